"""Make a rank fail at a step, to see what the others do: for tests of training loops, this package's own among them.

    with fail_at(rank=2, step=100, how="kill"):
        train()

It stands above the optimizers, and nothing of the package imports it.
"""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedfog.comm.group import rank as own_rank
from fusedfog.errors import did_you_mean
from fusedfog.optim.base import DecentralizedOptimizer

HOWS = ("kill", "stop", "raise", "nan", "slow")


class InjectedFailure(RuntimeError):
    """What `fail_at(..., how="raise")` raises out of `step()`."""


class fail_at:
    """A context: inside, rank `rank` fails when one of its optimizers begins its step number `step`, counted from 0, once.

    Every rank may enter it alike; it does something on one of them. Steps are those of an optimizer's own clock, which a
    checkpoint resumes.

    Args:
        rank: global rank, before there is a process group that of the launcher's variables; alone it is 0.
        step: the number of the step, from 0.
        how: "kill": SIGKILL to its own process, as the kernel's out-of-memory killer does. "stop": SIGSTOP, so that it neither
            answers nor ends until somebody sends SIGCONT. "raise": `InjectedFailure` out of `step()`. "nan": all gradients that
            the step would use become NaN; those that `fused_backward` has used already stay. "slow": it sleeps.
        seconds: how long it sleeps, for "slow".

    Raises:
        ValueError: no such `how`; negative `rank` or `step`; `seconds` that are not positive.
    """

    def __init__(self, rank: int, step: int, how: str = "kill", *, seconds: float = 5.0) -> None:
        if how not in HOWS:
            raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}{did_you_mean(how, HOWS)}")
        if rank < 0 or step < 0:
            raise ValueError(f"rank and step count from 0, got rank {rank} and step {step}")
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.rank, self.step, self.how, self.seconds = rank, step, how, seconds
        self._hook: Any = None

    def __enter__(self) -> fail_at:
        """Have it happen from now on."""
        if own_rank() == self.rank:
            self._hook = register_optimizer_step_pre_hook(self._before_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """If it has not happened, it will not."""
        self._forget()

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer, DecentralizedOptimizer) or optimizer._engine.clock.steps != self.step:
            return
        self._forget()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "slow":
            time.sleep(self.seconds)
        elif self.how == "raise":
            raise InjectedFailure(f"rank {self.rank}: injected at step {self.step} (fusedfog.testing.fail_at)")
        else:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.fill_(torch.nan)
