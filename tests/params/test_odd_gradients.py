"""Gradients that are no plain tensors of their parameter's dtype are read for what they mean, as torch.optim does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedfog

ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": torch._neg_view,
    "imaginary part of a conjugate": lambda g: torch.complex(g, -g).conj().imag,
    "expanded": lambda g: g[:1].expand_as(g),
    "overlapping": lambda g: torch.arange(12.0).as_strided(g.shape, (2, 1)) if g.ndim == 2 else g,
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "transposed": lambda g: g.t().contiguous().t(),
    "misaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
    "a subclass": lambda g: g.as_subclass(type("Sub", (Tensor,), {})),
}


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_gradient_is_read_for_what_it_means(name: str, kind: str) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(1, 1))]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    opt, twin = getattr(fusedfog, kind)(ours, lr=0.1), getattr(torch.optim, kind)(theirs, lr=0.1)
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            value = torch.randn_like(one)
            one.grad = ODD[name](value) if step else value
            other.grad = (ODD[name](value) if step else value).clone().resolve_neg().contiguous()
        opt.step()
        twin.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_a_gradient_negated_in_its_place_is_noticed() -> None:
    param = nn.Parameter(torch.zeros(3))
    opt = fusedfog.SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    opt.step()
    param.grad = torch._neg_view(param.grad)
    opt.step()
    assert param.tolist() == [0.0] * 3


def edits() -> dict[str, tuple[Callable[[Any], None], str]]:
    def shape(param: Any) -> None:
        param.grad.data = torch.ones(5)

    def order(param: Any) -> None:
        param.grad.data = torch.ones(3, 4)

    def place(param: Any) -> None:
        param.grad.data = torch.ones(4, 3, device="meta")

    return {
        "shape": (shape, r"parameter weight has shape \(4, 3\) on cpu, but its gradient has shape \(5,\) on cpu"),
        "order": (order, r"parameter weight has shape \(4, 3\) on cpu, but its gradient has shape \(3, 4\) on cpu"),
        "device": (place, r"parameter weight has shape \(4, 3\) on cpu, but its gradient has shape \(4, 3\) on meta"),
    }


@pytest.mark.parametrize("what", ["shape", "device"])
def test_a_gradient_that_cannot_be_its_parameters_is_named(what: str) -> None:
    edit, message = edits()[what]
    model = nn.Linear(3, 4, bias=False)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    model.weight.grad = torch.zeros(4, 3)
    opt.step()
    before = model.weight.detach().clone()
    try:
        edit(model.weight)
    except RuntimeError:
        pytest.skip("torch refuses it already")
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(model.weight, before)


needs_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")


@needs_grad_dtype
@pytest.mark.parametrize("low_precision", [None, "master", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_gradients_of_16_bit_parameters_are_read_as_fp32(dtype: torch.dtype, low_precision: Any) -> None:
    start = torch.randn(8)
    fine = nn.Parameter(start.to(dtype))
    fine.grad_dtype = torch.float32  # type: ignore[attr-defined]
    opt = fusedfog.SGD([fine], lr=1.0, momentum=0.9, low_precision=low_precision)
    gradient = torch.full((8,), 1 + 2.0**-20)
    fine.grad = gradient
    opt.step()
    assert torch.equal(opt.state[fine]["momentum_buffer"], gradient)


@needs_grad_dtype
def test_gradients_of_several_dtypes_in_one_segment_lose_nothing() -> None:
    params = [nn.Parameter(torch.zeros(8, dtype=torch.bfloat16)) for _ in range(2)]
    params[0].grad_dtype = torch.float32  # type: ignore[attr-defined]
    opt = fusedfog.SGD(params, lr=1.0, momentum=0.9)
    params[0].grad, params[1].grad = torch.full((8,), 1 + 2.0**-20), torch.ones(8, dtype=torch.bfloat16)
    opt.step()
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], torch.full((8,), 1 + 2.0**-20))
    assert torch.equal(opt.state[params[1]]["momentum_buffer"], torch.ones(8))
