"""What the recipes train: a small residual network, and scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.data import TensorDataset

TEST_IMAGES = 360


class Block(nn.Module):
    """Two convolutions with BatchNorm, and their input added to what they make of it (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = (
            nn.Identity()
            if (inputs, stride) == (outputs, 1)
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride]."""
        return relu(self.body(x) + self.skip(x))


def network(width: int = 16) -> nn.Module:
    """Images [N, 1, 8, 8] -> logits [N, 10]: blocks of `width`, 2 `width` and 4 `width` channels, 78 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """1,437 images to train on, with labels, and 360 images [N, 1, 8, 8] in 0..1 and labels [N] to test with."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(targets)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return TensorDataset(images[train], labels[train]), images[test], labels[test]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The part of the images that the model names correctly, with BatchNorm's running statistics."""
    model.eval()
    right = (model(images).argmax(1) == labels).double().mean()
    model.train()
    return float(right)
