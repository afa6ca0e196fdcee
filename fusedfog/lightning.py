"""PyTorch Lightning, decentralized: a strategy. The module and its `configure_optimizers` stay as they are.

    from fusedfog.lightning import Decentralized

    trainer = lightning.Trainer(devices=4, strategy=Decentralized(topology="one_peer_exponential"))

It stands on `optim`.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy

from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.checkpoint import load_checkpoint, save_checkpoint
from fusedfog.optim.take_over import take_over

_DDP = frozenset(inspect.signature(DDPStrategy.__init__).parameters) - {"self", "kwargs"}


class Decentralized(DDPStrategy):
    """A strategy that averages parameters with neighbours instead of gradients over all ranks.

    Processes are started as by `DDPStrategy`, and nothing is wrapped in DistributedDataParallel. Torch optimizers that the module
    configures become fusedfog's (`take_over`), with their schedules; fusedfog's own stay. Validation, test and prediction within
    `fit` see the average over all ranks, and so does a checkpoint's "state_dict". Beside each file FILE.ckpt the folder
    FILE.ckpt.ranks has every rank's own parameters and states, from which `fit(ckpt_path=...)` goes on.

    Args:
        save: "average" saves the average as the model, "rank0" what rank 0 has.
        keywords: those of `fusedfog.DecentralizedOptimizer`, but `model`, which is known, and those of `DDPStrategy` that
            start processes (timeout, process_group_backend, start_method...).

    Raises:
        ValueError: `save` is something else.
        TypeError: an unknown keyword, when the optimizers are built.
    """

    def __init__(self, *, save: Literal["average", "rank0"] = "average", **keywords: Any) -> None:
        if save not in ("average", "rank0"):
            raise ValueError(f"save is 'average' or 'rank0', and is {save!r}")
        self._decentralized: Any = {name: keywords.pop(name) for name in list(keywords) if name not in _DDP}
        super().__init__(**keywords)
        self._save = save
        self._averages: contextlib.ExitStack | None = None
        self._resumed: Path | None = None

    def configure_ddp(self) -> None:
        """The module is wrapped in nothing."""

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """As `configure_optimizers` says, then taken over."""
        super().setup_optimizers(trainer)
        schedules = [config.scheduler for config in self.lr_scheduler_configs]
        configured: list[Any] = self.optimizers
        taken = []
        for optimizer in configured:
            own = isinstance(optimizer, DecentralizedOptimizer)
            keywords: Any = {} if own else {"model": self.lightning_module, **self._decentralized}
            taken.append(take_over(optimizer, schedules, **keywords))
        self.optimizers: Any = taken

    @property
    def _gossip(self) -> list[DecentralizedOptimizer]:
        found = [one._optimizer if isinstance(one, LightningOptimizer) else one for one in self.optimizers]
        return [one for one in found if isinstance(one, DecentralizedOptimizer)]

    # -- the average where models are scored -------------------------------------------------------------------------

    def _average(self) -> None:
        self._averages = contextlib.ExitStack()
        for optimizer in self._gossip:
            self._averages.enter_context(optimizer.averaged(self.lightning_module))

    def _end_average(self) -> bool:
        """Whether there was one."""
        averages, self._averages = self._averages, None
        if averages is not None:
            averages.close()
        return averages is not None

    def on_validation_start(self) -> None:
        """From here on the parameters are the average. Collective."""
        self._average()

    def on_validation_end(self) -> None:
        """They are this rank's own again."""
        self._end_average()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds as the model: copies, as the parameters go on. Collective with save="average"."""
        assert self.lightning_module is not None
        if self._averages is not None or self._save == "rank0" or not self._gossip:
            return _copies(self.lightning_module)
        self._average()
        found = _copies(self.lightning_module)
        self._end_average()
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Lightning's file by rank 0, and every rank's own state beside it. Collective."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        # Lightning saves while validation, and with it the average, has not quite ended.
        averaging = self._end_average()
        for number, optimizer in enumerate(self._gossip):
            save_checkpoint(_ranks(filepath, number), self.lightning_module, optimizer)
        if averaging:
            self._average()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Lightning's file, and the folders beside it."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            for folder in Path(filepath).parent.glob(f"{Path(filepath).name}.ranks*"):
                self.checkpoint_io.remove_checkpoint(folder)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Lightning's file; where it was, for the ranks' own states."""
        self._resumed = Path(checkpoint_path)
        found: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        return found

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Every rank's own parameters and states, or rank 0's where a checkpoint has no others. Collective."""
        if self._resumed is None or not _ranks(self._resumed, 0).exists():
            super().load_optimizer_state_dict(checkpoint)
            return
        for number, optimizer in enumerate(self._gossip):
            load_checkpoint(_ranks(self._resumed, number), self.lightning_module, optimizer)


def _ranks(filepath: Any, number: int) -> Path:
    return Path(f"{filepath}.ranks{number or ''}")


def _copies(module: pl.LightningModule) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
