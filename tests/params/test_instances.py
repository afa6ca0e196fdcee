"""One look through memory finds all instances of a class, and is not made again while there can be no others."""

from __future__ import annotations

import gc
from unittest import mock

from fusedfog.params.instances import instances


class Base:
    """Instances of it are looked for."""


class Child(Base):
    """So are those of its subclasses."""


def test_instances_come_and_go_and_are_looked_for_only_when_they_may_have_come() -> None:
    one, other = Base(), Child()
    assert set(map(id, instances(Base))) == {id(one), id(other)}
    with mock.patch.object(gc, "get_objects", side_effect=AssertionError("looked again")):
        for _ in range(100):
            assert len(instances(Base)) == 2
    third = Child()
    assert set(map(id, instances(Base))) == {id(one), id(other), id(third)}
    del one
    fourth = Base()
    assert set(map(id, instances(Base))) == {id(other), id(third), id(fourth)}
    del other, third, fourth
    assert instances(Base) == []
