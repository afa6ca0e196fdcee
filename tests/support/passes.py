"""Passes from fields by name, whatever their group: tests vary one field at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

from fusedfog.kernels import Compression, GradientInputs, Mixing, Pass, Precision

GROUPS: dict[str, type] = {
    "mixing": Mixing,
    "gradient": GradientInputs,
    "precision": Precision,
    "compression": Compression,
}
"""Field of `Pass` -> the group in it."""

_GROUP_OF = {field.name: name for name, group in GROUPS.items() for field in dataclasses.fields(group)}


def make_pass(rule: str, param: Any, states: Any, hyper: Any, region: Any, **fields: Any) -> Pass:
    """A pass with fields of `Pass` and of its groups, for instance `weights=(0.5,)`, which is `mixing.weights`."""
    return with_fields(Pass(rule, param, states, hyper, region), **fields)


def with_fields(work: Pass, **fields: Any) -> Pass:
    """The pass with other values of some fields of `Pass` and of its groups."""
    groups: dict[str, dict[str, Any]] = {}
    for name in [name for name in fields if name in _GROUP_OF]:
        groups.setdefault(_GROUP_OF[name], {})[name] = fields.pop(name)
    for name, values in groups.items():
        fields[name] = dataclasses.replace(getattr(work, name), **values)
    return dataclasses.replace(work, **fields)
