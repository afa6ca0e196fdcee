"""Every page of the tutorial runs, and its notebook is the page, executed."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

import fusedfog
from fusedfog.algorithms import TABLE
from fusedfog.kernels.reference import RULES

FOLDER = Path(fusedfog.__file__).parent / "examples" / "tutorial"
PAGES = sorted(FOLDER.glob("[0-9]_*.py"))
STARTS_RANKS = {page for page in PAGES if "torch.distributed.run" in page.read_text()}


def cells(page: Path) -> list[str]:
    """The code cells of a page in the percent format."""
    parts = re.split(r"^# %%(.*)\n", page.read_text(), flags=re.MULTILINE)
    return [code.strip() for kind, code in zip(parts[1::2], parts[2::2], strict=True) if "[markdown]" not in kind]


LONG = ("5_", "6_", "7_")
"""These start ranks several times, or train for long."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name.startswith(LONG) else ()) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    # The last page adds a rule and a row, which no other test may see.
    monkeypatch.setitem(TABLE, "SGD", dict(TABLE["SGD"]))
    rules = dict(RULES)
    try:
        runpy.run_path(str(page))
    finally:
        RULES.clear()
        RULES.update(rules)
        plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_notebook_has_the_same_code_with_outputs(page: Path) -> None:
    notebook = json.loads(page.with_suffix(".ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in code] == cells(page), "make tutorials"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert page.with_suffix(".ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_names_no_machine(page: Path) -> None:
    assert not re.search(r"/tmp/|/home/|/root/|/work/", page.with_suffix(".ipynb").read_text())


def test_every_page_has_a_formula_a_picture_and_an_exercise() -> None:
    assert len(PAGES) >= 6
    for page in PAGES:
        text = page.read_text()
        assert "plt.show()" in text, page
        assert "**Exercise.**" in text, page
