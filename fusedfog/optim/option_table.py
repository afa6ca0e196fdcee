"""The option table of the docs, made from the table of what does not go with what (`compatibility`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fusedfog.algorithms import TABLE
from fusedfog.optim.compatibility import ROWS, Refusal, first_refusal
from fusedfog.optim.features import FEATURES, OPTIMIZERS, ROWS_OF_ALGORITHMS, Setup

_COLUMNS: dict[str, Mapping[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "`communicate_every` > 1": {"communicate_every": 2},
    "`global_average_every`": {"global_average_every": 2},
    "`mesh`": {"mesh": "machines"},
    "`mix_strength`": {"mix_strength": 0.5},
    "`wire_dtype`": {"wire_dtype": "bf16"},
    "`low_precision`": {"low_precision": "kahan"},
    "`state_dtype` bf16": {"state_dtype": torch.bfloat16},
    "`capturable`": {"capturable": True},
    "`asynchronous`": {"asynchronous": True},
    "`adapt`": {"adapt": 50},
}
_ALGORITHMS = {name for name, _, _ in ROWS_OF_ALGORITHMS}
_GRAPHS = {"doubly_stochastic": "doubly stochastic", "symmetric": "static symmetric", "any": "any directed"}


def markdown() -> str:
    """The option table for readers: each algorithm with the commonest options, then all other rows."""
    head, more = ["optimizer", "algorithm", "graph", *_COLUMNS], ["this", "does not go with", "because", "instead"]
    generic = {"algorithm": "it", "lacking": "bf16 takes sm_80, fp8 sm_89", "replacement": "fp32, fp16 or int8"}
    rows = [
        [*(FEATURES[name].words for name in (row.what, row.other)), *(text.format_map(generic) for text in row.texts)]
        for row in ROWS
        if not _in_cells(row)
    ]
    return f"{_table(head, _cells())}\n\nMoreover:\n\n{_table(more, rows)}"


def _in_cells(row: Refusal) -> bool:
    """Whether an algorithm's line says it."""
    return row.what in _ALGORITHMS and any(row.other in option for option in _COLUMNS.values())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def _cells() -> Iterator[list[str]]:
    for family, rows in TABLE.items():
        for row in rows.values():
            graph = _GRAPHS[row.graph] if row.exchanges == "parameters" else "none"
            cells = [OPTIMIZERS[family], f"`{row.name}`", graph]
            for option in _COLUMNS.values():
                unknown = "momentum" in option and family != "SGD"
                refused = first_refusal(Setup(family, row, option, ranks=2)) is not None
                cells.append("" if unknown else "no" if refused else "yes")
            yield cells
