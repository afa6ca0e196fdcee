"""PyTorch Lightning; between the marks is what the README shows. Argument: "train" or "resume"."""

import os
import sys

import torch
from by_hand import Network, Record, tokens

data = tokens(64)


class Share(torch.utils.data.IterableDataset):
    """This rank's half of the data, in order: Lightning's own sampler shuffles differently after a resume."""

    def __iter__(self):
        return iter(data[int(os.environ["RANK"]) :: 2])


train_loader = torch.utils.data.DataLoader(Share(), batch_size=4)
valid_loader = torch.utils.data.DataLoader(data, batch_size=64)
resume = "run/step=4.ckpt" if sys.argv[1] == "resume" else None

# README: begin
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from fusedfog.lightning import Decentralized


class Module(L.LightningModule):  # as for one GPU
    def __init__(self):
        super().__init__()
        self.network = Network()

    def training_step(self, batch):
        return self.network(**batch)

    def validation_step(self, batch):
        self.log("loss", self.network(**batch), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


trainer = L.Trainer(
    devices=2,
    strategy=Decentralized(topology="one_peer_exponential"),
    max_steps=8,
    gradient_clip_val=0.5,
    accumulate_grad_batches=2,
    callbacks=[ModelCheckpoint("run", "{step}", save_top_k=-1)],
)
# README: end
model = Module()


class Recorded(L.Callback):
    def on_train_start(self, trainer, model):
        self.record = Record(model.network, trainer.optimizers[0])

    def on_train_end(self, trainer, model):
        # Here and not after fit(), which ends by taking the model from its device.
        self.record.save(data, trainer.callback_metrics["loss"].item())


trainer.callbacks.append(Recorded())
trainer.fit(model, train_loader, valid_loader, ckpt_path=resume)
