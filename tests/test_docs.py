"""What the docs show runs as written, alone and on ranks; what they point to is there."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.processes import run_all
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.algorithms import TABLE
from fusedfog.optim.option_table import markdown
from fusedfog.topology.guide import guide_table

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(path for room in ("fusedfog", "kernels", "bench", "tests") for path in (ROOT / room).rglob("README.md")),
]
DOCS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FRAMEWORKS = ("transformers", "accelerate", "lightning", "peft")
ROOMS_TO_COME = ("optim/", "engine/", "gossip/", "params/", "comm/", "cli/")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, which must be closed."""
    lines, begin = page.read_text().splitlines(), None
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if begin is None:
                begin = number
            else:
                yield Block(page, begin + 1, lines[begin][3:], "\n".join(lines[begin + 1 : number]) + "\n")
                begin = None
    assert begin is None, f"{page}:{begin} is never closed"


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in DOCS for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
NOT_RUN = [block for block in PYTHON if block.code.startswith("# Not run")]
CUT = [block for block in PYTHON if block.code.startswith("# From tests/")]
RUN = [block for block in PYTHON if block not in NOT_RUN and block not in CUT]


def run_block(name: str, code: str, folder: str) -> None:
    """Run a block as a script of its own, in `folder`."""
    torch.set_num_threads(1)
    os.chdir(folder)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", RUN, ids=[block.name for block in RUN])
def test_a_block_runs_alone(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # also undoes run_block's own chdir
    run_block(block.name, block.code, str(tmp_path))


@pytest.mark.parametrize("block", RUN, ids=[block.name for block in RUN])
def test_a_block_runs_on_two_ranks(ranks: Pool, block: Block, tmp_path: Path) -> None:
    ranks.run(2, run_block, block.name, block.code, str(tmp_path), init=False)
    saved = {path.name for path in tmp_path.iterdir()}
    for name in ("model.pt", "checkpoint", "checkpoint-{rank}.pt", "trace-{rank}.json"):
        if f'"{name}"' in block.code:
            assert saved >= {name.format(rank=rank) for rank in range(2)}


def test_the_script_of_the_first_page_runs_as_its_command_says(tmp_path: Path) -> None:
    script = next(block for block in RUN if block.page == ROOT / "README.md")
    command = "torchrun --standalone --nproc-per-node 4 train.py"
    assert any(command in block.code for block in BLOCKS if block.page == script.page)
    (tmp_path / "train.py").write_text(script.code)
    arguments = command.replace("4", "2").split()[1:]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = run_all([sys.executable, "-m", "torch.distributed.run", *arguments], 300, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "consensus distance" in done.stdout
    assert (tmp_path / "model.pt").exists()


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    assert [block.page.parent.name for block in NOT_RUN] == ["cli", "optim", "kernels"]
    for block in NOT_RUN:
        assert re.match(r"# Not run[\w ]*: \w+", block.code), block.name
        ast.parse(block.code)
    assert len(CUT) == 4
    assert len(RUN) >= 15
    languages = {block.language for block in BLOCKS}
    assert languages <= {"python", "bash", "diff", ""}, "other names for Python would not be run"


@pytest.mark.parametrize("block", CUT, ids=[block.name for block in CUT])
def test_snippets_for_frameworks_are_lines_of_a_script_that_is_tested(block: Block) -> None:
    head, *lines = block.code.splitlines()
    found = re.match(r"# From (tests/framework_scripts/\w+\.py),", head)
    assert found is not None, head
    tested = {line.strip() for line in (ROOT / found[1]).read_text().splitlines()}
    tested |= {line.removesuffix(",") for line in tested}
    for line in lines:
        assert line.strip() in tested or line.startswith("..."), line


def anchors_of(page: Path) -> set[str]:
    """What headings of a page are called in links, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose_of(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        repeats = sum(one == name or (one.startswith(f"{name}-") and one[len(name) + 1 :].isdigit()) for one in found)
        found.add(f"{name}-{repeats}" if repeats else name)
    return found


@pytest.mark.parametrize("page", DOCS, ids=[str(page.relative_to(ROOT)) for page in DOCS])
def test_every_link_leads_somewhere(page: Path) -> None:
    for text, target in re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), f"[{text}]({target})"
        if anchor:
            assert anchor in anchors_of(there), f"[{text}]({target}): there are {sorted(anchors_of(there))}"


@pytest.mark.parametrize("page", DOCS, ids=[str(page.relative_to(ROOT)) for page in DOCS])
def test_every_file_that_is_named_exists(page: Path) -> None:
    moved = (ROOT / "fusedfog" / "engine" / "scheduler.py").exists()
    for name in re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|md|txt|toml|json|png))`", prose_of(page)):
        if not moved and name.removeprefix("fusedfog/").startswith(ROOMS_TO_COME):
            continue  # The docs describe the packages that modules are moving to.
        places = (page.parent, ROOT, ROOT / "fusedfog")
        assert any((place / name).exists() for place in places), name


def imported(module: str) -> bool:
    """Whether a module can be imported; not one that needs a framework which is not installed, and is there all the same."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in FRAMEWORKS:
            raise
        return False
    return True


@pytest.mark.parametrize("page", DOCS, ids=[str(page.relative_to(ROOT)) for page in DOCS])
def test_every_name_of_fusedfog_that_is_mentioned_exists(page: Path) -> None:
    for dotted in set(re.findall(r"(?<![\w/.])fusedfog((?:\.\w+)+)(?![\w/])", page.read_text())):
        thing: object = fusedfog
        for name in dotted[1:].split("."):
            if not hasattr(thing, name) and not imported(f"{thing.__name__}.{name}"):  # type: ignore[attr-defined]
                break
            thing = getattr(thing, name)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_pictures_are_small() -> None:
    pictures = [(page, path) for page in DOCS for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", prose_of(page))]
    assert pictures
    for page, path in pictures:
        assert 0 < (page.parent / path).stat().st_size < 250_000


def option_table() -> list[dict[str, str]]:
    """The option table's rows, by column."""
    text = (ROOT / "fusedfog" / "README.md").read_text()
    table = text.split("<!-- option table -->")[1].split("<!-- /option table -->")[0].strip().split("\n\n")[0]
    head, _, *rows = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_option_table_is_the_one_in_the_code() -> None:
    page = ROOT / "fusedfog" / "README.md"
    before, remainder = page.read_text().split("<!-- option table -->")
    _, after = remainder.split("<!-- /option table -->")
    meant = f"{before}<!-- option table -->\n\n{markdown()}\n\n<!-- /option table -->{after}"
    how = f"put what `fusedfog.{markdown.__module__.partition('.')[2]}.markdown()` returns between its option table's marks"
    assert page.read_text() == meant, f"{page.relative_to(ROOT)} is out of date: {how}"


def build_every_cell() -> list[str]:
    """Cells of the option table that are not what an optimizer with that option does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
    keywords: dict[str, dict[str, Any]] = {
        "momentum": {"momentum": 0.9},
        "communicate_every` > 1": {"communicate_every": 2},
        "global_average_every": {"global_average_every": 2},
        "mesh": {"mesh": mesh},
        "wire_dtype": {"wire_dtype": "bf16"},
        "low_precision": {"low_precision": "kahan"},
        "state_dtype` bf16": {"state_dtype": torch.bfloat16},
        "capturable": {"capturable": True},
        "asynchronous": {"asynchronous": True},
    }
    wrong = []
    for row in option_table():
        for kind, option in itertools.product(row["optimizer"].split(", "), keywords):
            said, why = row[option], ""
            dtype = torch.bfloat16 if option == "low_precision" else torch.float32
            p = torch.nn.Parameter(torch.zeros(8, dtype=dtype))
            try:
                opt = getattr(fusedfog, kind)([p], lr=0.1, algorithm=row["algorithm"], **keywords[option])
                for _ in range(2):
                    p.grad = torch.ones_like(p)
                    opt.step()
                opt.drain()
                found = "yes"
            except (ValueError, TypeError) as error:
                found, why = "no" if isinstance(error, ValueError) else "", str(error)
            if said != found:
                wrong.append(f"{kind} {row['algorithm']} {option}: {said!r}, but {found!r} {why}")
    return wrong


def test_every_cell_of_the_option_table_is_what_optimizers_do(ranks: Pool) -> None:
    assert ranks.run(2, build_every_cell) == [[], []]
    rows = {(row["optimizer"].split(",")[0], row["algorithm"]) for row in option_table()}
    assert rows == {(family.replace("AccumAdam", "AccumAdamW"), name) for family in TABLE for name in TABLE[family]}


def test_the_package_index_is_shown_no_relative_links() -> None:
    shown = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]["text"]
    assert "fusedfog.AdamW(" in shown
    assert not re.findall(r"\]\((?!https?:|#)", shown)


@pytest.mark.slow
def test_the_table_of_topologies_is_what_the_command_prints() -> None:
    assert guide_table() in (ROOT / "fusedfog" / "topology" / "README.md").read_text()
