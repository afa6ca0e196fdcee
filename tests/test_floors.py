"""The house has floors: imports go down or along, never up and never in a circle, `TYPE_CHECKING` imports included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    ("topology", "kernels", "errors", "log", "environment"),
    ("algorithm",),
    ("algorithms",),
    ("comm",),
    ("params", "ops", "cost"),
    ("gossip",),
    ("engine",),
    ("optim",),
    ("simulate", "plan", "watch", "testing", "sampling", "transformers", "accelerate", "lightning"),
    ("cli",),
    ("examples",),
]
"""From the lowest up. Rooms of one floor may import each other, as long as there is no circle."""

HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name under `fusedfog`."""
    found = {}
    for folder, prefix in ((ROOT / "fusedfog", ""), (ROOT / "kernels", "kernels.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = prefix + ".".join(parts)
            found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The product's modules that a module imports, anywhere in it."""
    found = set()
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(["fusedfog", *above, *([base] if base else [])])
            wanted = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        known = [one.removeprefix("fusedfog.") for one in wanted if one.startswith("fusedfog.")]
        deepest = [one for one in known if one in MODULES]
        # `from package import module` needs the module; the package itself only if it is all that was named.
        found |= set(deepest[1:] or deepest)
    return found - {name}


GRAPH = {name: imports(name) for name in MODULES}
ROOMS = [name for name in MODULES if name.split(".")[0] in HEIGHT]


def test_every_module_has_a_floor() -> None:
    outside = {name for name in MODULES if name not in ROOMS}
    assert outside == {"", "__main__"}, "give it a room in FLOORS"


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_down(name: str) -> None:
    height = HEIGHT[name.split(".")[0]]
    upward = sorted(one for one in GRAPH[name] if one and HEIGHT[one.split(".")[0]] > height)
    assert not upward, f"{name} imports {upward} from above"


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_kernels_know_nothing_of_the_rest() -> None:
    assert {one for name in ROOMS if name.startswith("kernels") for one in GRAPH[name]} <= {
        name for name in MODULES if name.startswith("kernels")
    }
