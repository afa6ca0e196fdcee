"""The layout is pure data: these tests hold it to its promises for any list of parameters."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedfog.kernels.region import ALIGNMENT, BLOCK
from fusedfog.params.layout import ParamSpec, backward_order, block_table, build_layout

DTYPES = (torch.float32, torch.bfloat16)


@st.composite
def specs(draw: st.DrawFn) -> list[ParamSpec]:
    shapes = draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=12))
    return [
        ParamSpec(
            name=str(i),
            shape=shape,
            stride=torch.empty(shape).stride(),
            dtype=draw(st.sampled_from(DTYPES)),
            group=draw(st.integers(0, 2)),
            mix=draw(st.booleans()),
            depth=i / len(shapes),
        )
        for i, shape in enumerate(shapes)
    ]


@given(specs(), st.integers(1, 100_000))
def test_every_parameter_has_one_aligned_slot_of_its_own(params: list[ParamSpec], bucket_bytes: int) -> None:
    segments = build_layout(params, bucket_bytes, graded=False)
    assert sorted(slot.index for segment in segments for slot in segment.slots) == list(range(len(params)))
    for segment in segments:
        assert segment.numel % ALIGNMENT == 0
        end = 0
        for slot in segment.slots:
            assert slot.start % ALIGNMENT == 0
            assert slot.start >= end
            assert slot.spec is params[slot.index]
            assert (slot.spec.group, slot.spec.dtype, slot.spec.mix) == (segment.group, segment.dtype, segment.mix)
            end = slot.stop
        assert end <= segment.numel


@given(specs(), st.integers(1, 100_000), st.booleans())
def test_buckets_tile_their_segment(params: list[ParamSpec], bucket_bytes: int, graded: bool) -> None:
    for segment in build_layout(params, bucket_bytes, graded=graded):
        assert segment.buckets[0].start == segment.buckets[0].first == 0
        assert segment.buckets[-1].stop == segment.numel
        assert segment.buckets[-1].last == len(segment.slots)
        for left, right in zip(segment.buckets, segment.buckets[1:], strict=False):
            assert (left.stop, left.last) == (right.start, right.first)


@given(specs(), st.one_of(st.integers(1, 100_000), st.integers(100_000, 3_000_000)), st.booleans())
def test_from_the_end_a_bucket_is_closed_as_soon_as_it_holds_its_limit(
    params: list[ParamSpec], bucket_bytes: int, graded: bool
) -> None:
    for segment in build_layout(params, bucket_bytes, graded=graded):
        size = segment.dtype.itemsize
        total = segment.numel * size
        for bucket in segment.buckets[1:]:
            done, limit = total - bucket.stop * size, bucket_bytes
            if graded:
                limit = min(bucket_bytes, max(524288, min(done, total / 16, (total - done) / 2)))
            without_first = segment.slots[bucket.first + 1].start if bucket.last - bucket.first > 1 else bucket.stop
            assert (bucket.stop - bucket.start) * size >= limit > (bucket.stop - without_first) * size


def sizes(count: int, numel: int, bucket_bytes: int) -> list[int]:
    """Kilobytes of graded buckets of equal fp32 parameters, in the order of gradients."""
    params = [ParamSpec(str(i), (numel,), (1,), torch.float32, 0, True, i / count) for i in range(count)]
    (segment,) = build_layout(params, bucket_bytes, graded=True)
    return [4 * (bucket.stop - bucket.start) // 1024 for bucket in reversed(segment.buckets)]


def test_graded_buckets_grow_by_doubling_and_shrink_by_halving() -> None:
    k = 1024
    assert sizes(1024, 16 * k, 25 * k * k) == [512, 512, k, 2 * k, *[4 * k] * 14, 2 * k, k, 512, 512]
    assert sizes(1024, 16 * k, 2 * k * k) == [512, 512, k, *[2 * k] * 30, k, 512, 512]
    assert sizes(12, 443 * 443, 25 * k * k) == [766] * 12
    assert sizes(4, 16 * k, 25 * k * k) == [256]
    assert sizes(4, 16 * k, 1) == [64] * 4


@given(specs(), st.integers(1, 100_000))
def test_blocks_cover_each_element_once_and_never_cross_a_parameter(params: list[ParamSpec], bucket_bytes: int) -> None:
    for segment in build_layout(params, bucket_bytes, graded=False):
        covered = torch.zeros(segment.numel, dtype=torch.int32)
        for bucket in segment.buckets:
            for p, offset, length, start in block_table(segment, bucket).tolist():
                assert 0 < length <= BLOCK
                assert bucket.first <= p < bucket.last
                assert start == segment.slots[p].start + offset
                assert offset + length <= segment.slots[p].spec.numel
                covered[start : start + length] += 1
        expected = torch.zeros_like(covered)
        for slot in segment.slots:
            expected[slot.start : slot.stop] = 1
        assert torch.equal(covered, expected)


@given(specs(), st.integers(1, 100_000))
def test_backward_order_lists_every_bucket_deepest_first(params: list[ParamSpec], bucket_bytes: int) -> None:
    segments = build_layout(params, bucket_bytes, graded=False)
    order = backward_order(segments)
    assert sorted(order) == [(s, b) for s, segment in enumerate(segments) for b in range(len(segment.buckets))]
    depths = [segments[s].buckets[b].depth for s, b in order]
    assert depths == sorted(depths, reverse=True)


def test_interleaved_groups_are_ordered_by_depth_and_not_by_group() -> None:
    # decay / no-decay groups both span the whole model: neither may wait for the other's shallow end.
    params = [ParamSpec(f"{g}{i}", (64,), (1,), torch.float32, g, True, i / 3) for g in (0, 1) for i in range(3)]
    segments = build_layout(params, 1, graded=False)
    assert [segments[s].slots[b].spec.name for s, b in backward_order(segments)] == ["02", "12", "01", "11", "00", "10"]
