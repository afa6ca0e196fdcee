"""What gradients are multiplied by before a pass reads them, and their norm after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedfog.comm.finite import all_finite
from fusedfog.engine.passes import Engine
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment
from fusedfog.params.shards import Sharding


def multiplier(
    gradients: Sequence[Tensor], grad_scale: Tensor | None, limit: float | None, sharding: Sharding | None = None
) -> Tensor | None:
    """GradScaler's unscaling and clipping to a total norm of `limit`, as one 0-d tensor, without a host sync.

    Args:
        gradients: all that the norm is taken over; not looked at without a limit.
        grad_scale: GradScaler's scale, of one element.
        sharding: how the gradients are sharded; the norm is then taken over all shards of the replica.

    Returns:
        The factor (fp32), or None for 1.
    """
    unscale = None if grad_scale is None else grad_scale.reshape(()).float().reciprocal()
    if limit is None or not gradients:
        return unscale
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = (norm if sharding is None else sharding.norm(norm)).float()
    if unscale is not None:
        norm = norm * unscale
    # As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps a zero norm from dividing by zero.
    clip = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return clip if unscale is None else clip * unscale


def gradients_of(segments: Sequence[FlatSegment]) -> list[Tensor]:
    """All gradients that there are."""
    found = [grad for segment in segments for grad in segment.own_gradients(0, len(segment.params))]
    return [grad for grad in found if grad is not None]


def own_multipliers(engine: Engine, grad_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`multiplier` of this rank's own gradients, and of those of parameters that are not mixed; see `StepInputs`."""
    limit, segments = engine.schedule.max_grad_norm, engine.segments
    unmixed = [segment for segment in segments if not segment.layout.mix]
    if limit is None or engine.means is None or not unmixed:
        own = gradients_of(segments) if limit is not None else []
        factor = multiplier(own, grad_scale, limit, engine.sharding)
        return factor, factor
    mixed = [segment for segment in segments if segment.layout.mix]
    one, other = (multiplier(gradients_of(part), grad_scale, limit, engine.sharding) for part in (mixed, unmixed))
    return one, other


def flag_of(engine: Engine, found_inf: Tensor | None) -> Tensor | None:
    """A step's non-finite flag: GradScaler's, or if steps skip gradients that are not finite one of this rank's own gradients.

    The flag is fp32 of one element, and not zero if there are some; shards of one replica have the same. No host sync on GPUs.
    Where gradients are averaged, all ranks that average have the same flag, which also tells that one was left out of a mean,
    and that a mean overflowed although no GradScaler looks at this step.
    """
    means = engine.means
    unseen = means is not None and means.overflows_unseen and engine.schedule.nonfinite != "propagate"
    if found_inf is None and (engine.schedule.skips or unseen):
        found_inf = _flag_of_gradients(engine)
        if means is not None:
            found_inf = found_inf + means.somebody_left_out
    return found_inf if found_inf is None or means is None else means.agree(found_inf)


def _flag_of_gradients(engine: Engine) -> Tensor:
    gradients = [gradient for gradient in gradients_of(engine.segments) if gradient.numel()]
    flag = torch.zeros((), dtype=torch.float32, device=engine.place)
    if gradients and device.on_gpu(flag):
        largest = torch.stack([one.float() for one in torch._foreach_norm(gradients, float("inf"))])
        flag = 1.0 - largest.isfinite().all().float()
    elif not all(map(all_finite, gradients)):
        flag.fill_(1.0)
    return flag if engine.sharding is None else engine.sharding.norm(flag)


def measured_norms(segments: Sequence[FlatSegment], in_two_halves: bool) -> dict[str, float]:
    """Norms of the gradient as it was used, and of what the neighbours pulled, by the passes' sums; waits for the device.

    Args:
        in_two_halves: whether gradients are used in the pass before the exchange.
    """
    if not segments:
        return {"gradient_norm": 0.0, "disagreement": 0.0}
    mixing = [segment.norm_sums(False) for segment in segments]
    updating = [segment.norm_sums(in_two_halves) for segment in segments]
    sums = [
        torch.cat([norm_sums[:, 1] for norm_sums in updating]).sum(dtype=torch.float64),
        torch.cat([norm_sums[:, 0] for norm_sums in mixing]).sum(dtype=torch.float64),
    ]
    gradient_norm, disagreement = torch.stack(sums).sqrt().tolist()
    return {"gradient_norm": gradient_norm, "disagreement": disagreement}
