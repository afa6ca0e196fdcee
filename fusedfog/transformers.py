"""Hugging Face's Trainer, decentralized: one import changes, and nothing is wrapped in DistributedDataParallel.

    from fusedfog.transformers import Trainer

    trainer = Trainer(model, args, train_dataset=data, decentralized={"topology": "one_peer_exponential"})
    trainer.train()

It stands on `optim`. A Trainer of another package, trl's SFTTrainer say, becomes one by
`class Mine(Decentralized, SFTTrainer): ...`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.checkpoint import load_checkpoint, save_checkpoint
from fusedfog.optim.options import Keywords
from fusedfog.optim.take_over import take_over

_RANKS = "ranks"
"""The folder inside a checkpoint of the Trainer's that has every rank's own state."""


class Decentralized:
    """What makes a Trainer decentralized: a mixin, to be named before the Trainer.

    The optimizer that the Trainer builds, or is given, becomes one of fusedfog's (`take_over`). The model is not wrapped, and
    tokens are not counted over all ranks in every step (`average_tokens_across_devices`), as all ranks would wait for each
    other. Evaluation, prediction and `save_model` see the average over all ranks, so the weights in a checkpoint are those
    that were scored. Beside them every checkpoint has every rank's own parameters and states, from which
    `resume_from_checkpoint` goes on.

    Args:
        decentralized: the keywords of `fusedfog.DecentralizedOptimizer`, a dictionary.
    """

    def __init__(self, *args: Any, decentralized: Keywords | None = None, **kwargs: Any) -> None:
        self._decentralized: Keywords = decentralized if decentralized is not None else {}
        self._gossip: DecentralizedOptimizer | None = None
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.args.average_tokens_across_devices = False

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, then taken over."""
        trainer: Any = self
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self._gossip is None or not _is(optimizer, self._gossip):
            schedules = [trainer.lr_scheduler] if trainer.lr_scheduler is not None else []
            keywords: Keywords = {"model": model if model is not None else trainer.model, **self._decentralized}
            own = isinstance(optimizer, DecentralizedOptimizer)
            self._gossip = trainer.optimizer = take_over(optimizer, schedules, **({} if own else keywords))
        made: torch.optim.Optimizer = trainer.optimizer
        return made

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        # A model that accelerate prepares for evaluation is placed, and wrapped in nothing.
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        try:
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            del accelerator.prepare_model

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, of the average over all ranks. Collective."""
        if self._gossip is None:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        with self._gossip.averaged():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the average over all ranks. Collective: every rank calls it, and rank 0 writes."""
        if self._gossip is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        with self._gossip.averaged():
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._gossip is not None:
            save_checkpoint(Path(output_dir, _RANKS), self.model, self._gossip)  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self._gossip is not None and Path(checkpoint, _RANKS).exists():
            load_checkpoint(Path(checkpoint, _RANKS), self.model, self._gossip)  # type: ignore[attr-defined]

    def _load_best_model(self) -> None:
        if self._gossip is None:
            super()._load_best_model()  # type: ignore[misc]
            return
        with self._gossip.paused():
            super()._load_best_model()  # type: ignore[misc]


def _is(optimizer: Any, gossip: DecentralizedOptimizer) -> bool:
    """Whether an optimizer, perhaps in accelerate's wrapper, is this one."""
    return getattr(optimizer, "optimizer", optimizer) is gossip


class Trainer(Decentralized, transformers.Trainer):
    """`transformers.Trainer` that averages parameters with neighbours; see `Decentralized`."""
