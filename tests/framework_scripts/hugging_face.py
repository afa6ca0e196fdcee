"""A tiny GPT-2 and its data for the scripts of transformers and accelerate."""

from __future__ import annotations

from typing import Any

import torch
from by_hand import LENGTH, VOCABULARY, tokens
from torch import Tensor, nn
from transformers import GPT2Config

config = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=LENGTH,
    n_embd=16,
    n_layer=2,
    n_head=2,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
    bos_token_id=None,
    eos_token_id=None,
)
# The first label predicts nothing, but Trainer.evaluate would count it when it divides the loss.
data = [{**one, "labels": one["labels"].where(torch.arange(LENGTH) > 0, -100)} for one in tokens(128)]


def loss_of(model: nn.Module, **batch: Any) -> Tensor:
    return model(**batch).loss
