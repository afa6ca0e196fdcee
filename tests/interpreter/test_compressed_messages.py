"""Compressed messages in the interpreter: codes, scales, replicas and neighbours' differences are the reference's to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from support.kernel_rules import ROWS
from support.passes import with_fields
from test_fused_pass import NUMELS
from test_lossy import FEW, FORMATS, WAYS, Lossy, same, written
from test_lossy import _casts_of_the_hardware as _casts_of_the_hardware  # pytest finds fixtures by their names

from fusedfog.kernels import torch_pass, wire

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

SENT = ("mix", "sgd-momentum", "adamw", "descend", "decentlam", "tracking")
# Of each rule and number of neighbours one format, of one neighbour all; the others are slow.
WIRED = [
    pytest.param(
        name,
        k,
        dtype,
        id=f"{name}-{k}-{str(dtype)[6:]}",
        marks=() if k == 1 or name == "descend" or (r + k + f) % 3 == 0 else pytest.mark.slow,
    )
    for r, name in enumerate(SENT)
    for k in (0, 1, 2)
    for f, dtype in enumerate(FORMATS)
    if k == 0 or name != "descend"
]


@pytest.mark.parametrize(("name", "neighbours", "dtype"), WIRED)
def test_compressed_messages_equal_the_reference(name, neighbours, dtype):
    case = Lossy(ROWS[name], neighbours=neighbours, wire=dtype, numels=FEW)
    ours = case.check()
    if name == "mix":
        theirs = case.after(torch_pass.run_pass)
        assert same(ours.param[case.valid], theirs.param[case.valid]), "sums and products in the same order"


@pytest.mark.parametrize(
    "dtype", [pytest.param(one, marks=() if one == torch.int8 else pytest.mark.slow) for one in FORMATS], ids=str
)
def test_compressed_messages_of_any_size_equal_the_reference(dtype):
    Lossy(ROWS["mix"], neighbours=1, wire=dtype, numels=NUMELS, first=1).check()


def test_eight_compressed_messages_and_any_row_sum_equal_the_reference():
    Lossy(ROWS["sgd-momentum"], neighbours=8, wire=torch.int8, numels=FEW, options={"row_sum": 0.75}).check()


@pytest.mark.parametrize("strength", [0.0, 0.375])
def test_any_strength_of_mixing_equals_the_reference_and_stays_out_of_the_sum(strength):
    case = Lossy(ROWS["mix"], neighbours=2, wire=torch.int8, numels=FEW, options={"strength": strength})
    weaker, full = case.check(), case.after(strength=1.0)
    delta = full.compression.taken[0].neighbor_delta
    assert same(weaker.compression.taken[0].neighbor_delta, delta)
    assert delta.abs().max() > 0.1
    assert same(weaker.param[case.valid], (case.work.param + strength * delta)[case.valid])


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        pytest.param(way, dtype, id=f"{way}-{str(dtype)[6:]}", marks=() if w == f else pytest.mark.slow)
        for w, way in enumerate(WAYS)
        for f, dtype in enumerate(FORMATS)
    ],
)
def test_16_bit_parameters_send_compressed_messages(dtype, way):
    settings = {"way": way, "state_dtype": torch.bfloat16, "absent": frozenset({0})}
    Lossy(ROWS["adamw"], torch.bfloat16, 1, wire=dtype, numels=FEW, **settings).check()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_messages_of_any_magnitude_are_encoded_as_the_spec_does(dtype):
    case = Lossy(ROWS["mix"], wire=dtype, numels=(4000,))
    x = case.work.param
    # One magnitude per group of sixteen, with zeros, subnormals and the largest in between.
    exponents = torch.randint(-149, 127, (63, 1, 4), generator=case.random).float().expand(63, 16, 4)
    x.copy_((torch.exp2(exponents.double()).flatten()[: case.size] * (1 + x.double().abs())).float() * x.sign())
    x[::5], x[128:192], x[200], x[300] = 0.0, 0.0, torch.finfo(torch.float32).max, 2.0**-149
    x[~case.valid] = math.nan
    case.work.compression.given[0].replica.zero_()
    case.work.compression.given[0].neighbor_delta.zero_()
    ours = case.after()
    assert same(ours.param[case.valid], x[case.valid])
    case.check_wires(ours)
    if ours.compression.given[0].scales is not None:
        assert ours.compression.given[0].scales.unique().numel() > 100


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_values_that_are_not_finite_are_not_spread(dtype):
    case = Lossy(ROWS["mix"], wire=dtype, numels=FEW)
    x, wild = case.work.param, {0: math.nan, 64: math.inf, 200: -math.inf, 1100: math.nan}
    x[list(wild)] = torch.tensor(list(wild.values()))
    ours, was = case.after(), case.work.compression.given[0]
    case.check_wires(ours)
    case.check_wires(case.after(torch_pass.run_pass))
    end = ours.compression.given[0]
    assert end.spoilt() and not was.spoilt() and end.replica.isfinite().all()
    assert (
        ours.compression.spoilt.any()
        and not Lossy(ROWS["mix"], wire=dtype, numels=FEW).check().compression.spoilt.any()
    )
    places = torch.arange(case.size)
    groups = places if end.scales is None else places // 64 * 4 + places % 4
    spoilt = torch.isin(groups, groups[list(wild)])
    assert same(end.replica[spoilt], was.replica[spoilt])
    assert (end.replica != was.replica)[case.valid & ~spoilt].float().mean() > 0.9
    if end.scales is not None:
        assert torch.equal((end.scales == 255)[groups], spoilt) and (end.codes.float()[spoilt] == 0).all()

    # Who gets them takes no difference for that group, and everything else.
    taking = Lossy(ROWS["mix"], neighbours=2, wire=dtype, numels=FEW)
    inbox, scales = (
        (codes, part[0][1])
        for codes, part in ((end.codes, taking.work.mixing.inbox), (end.scales, taking.work.compression.scales))
    )
    taking.work = with_fields(taking.work, inbox=(tuple(inbox),), scales=(tuple(scales),))
    taken = taking.check()
    assert taken.param[taking.valid].isfinite().all() and taken.compression.taken[0].neighbor_delta.isfinite().all()
    alone = taking.after(weights=(0.0, taking.work.mixing.weights[1]))
    own = wire.decode(taking.work.compression.taken[0].codes, taking.work.compression.taken[0].scales, torch.float32)
    heard = (
        taken.compression.taken[0].neighbor_delta - alone.compression.taken[0].neighbor_delta
    ) / taking.work.mixing.weights[0] + own
    assert heard[spoilt & taking.valid].abs().max() < 2**-20 < heard[~spoilt & taking.valid].abs().max()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_neighbour_of_weight_zero_is_not_heard(dtype):
    case = Lossy(ROWS["mix"], neighbours=2, wire=dtype, numels=FEW, options={"weights": (0.5, 0.0)})
    codes, scales = case.work.mixing.inbox[0][1], case.work.compression.scales[0][1]
    codes.view(torch.uint8).fill_(0x7F)  # NaN, or with this scale infinity.
    if scales is not None:
        scales.fill_(254)
    ours = case.check()
    alone = case.after(
        inbox=(case.work.mixing.inbox[0][:1],), scales=(case.work.compression.scales[0][:1],), weights=(0.5,)
    )
    for got, expected in zip(written(ours), written(alone), strict=True):
        assert same(got[case.valid], expected[case.valid])
    assert same(ours.compression.taken[0].neighbor_delta, alone.compression.taken[0].neighbor_delta)
