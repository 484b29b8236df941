"""The demo's data, network and training loop: plain PyTorch without LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

TEST_SHARE = 0.25
BATCH = 64


@dataclass(frozen=True)
class Digits:
    """Images (n, 8, 8) with values in [0, 1] and labels (n,), for training and for testing."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def rotated(self) -> Digits:
        """The same digits, rotated by 90 degrees counter-clockwise.

        >>> one = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        >>> Digits(one, torch.tensor([1]), one, torch.tensor([1])).rotated().test.tolist()
        [[[1.0, 0.0], [0.0, 0.0]]]
        """
        train, test = (torch.rot90(images, 1, (1, 2)) for images in (self.train, self.test))
        return Digits(train, self.train_labels, test, self.test_labels)


def load(seed: int) -> Digits:
    """scikit-learn's 1,797 handwritten digits, shuffled by `seed`. A quarter is for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images / 16.0, dtype=torch.float32)
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([round(TEST_SHARE * len(order)), len(order) - round(TEST_SHARE * len(order))])
    return Digits(images[train], labels[train], images[test], labels[test])


class Network(nn.Module):
    """logits = W3 relu(W2 relu(W1 x + b1) + b2) + b3, with x the 64 pixels: 85,002 parameters."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)  # (n, 8, 8) -> (n, 64)
        x = functional.relu(self.fc1(x))  # (n, hidden)
        x = functional.relu(self.fc2(x))  # (n, hidden)
        return cast(Tensor, self.out(x))  # (n, 10)


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes: (0, 1) without torch.distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output (n, 10), in evaluation mode and without gradients."""
    model.eval()
    return cast(Tensor, model(images))


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of correctly classified test digits, in [0, 1]."""
    right = logits(model, digits.test).argmax(dim=1) == digits.test_labels
    return right.double().mean().item()


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    learning_rate: float,
    seed: int,
    after_epoch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train the parameters with `requires_grad`. Return the test accuracy before training and after each epoch.

    Adam, mini-batches of 64, a learning rate that falls linearly to zero. This loop trains the base network, the
    adapters and the fully fine-tuned copy: LoRA changes only which parameters are trained. With several processes
    (torchrun) each has a part of every mini-batch, and the gradients are averaged.
    """
    rank, world = rank_and_world_size()
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    shuffle = torch.Generator().manual_seed(seed)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=learning_rate)
    steps = epochs * -(-len(digits.train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    curve = [accuracy(model, digits)]
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(digits.train), generator=shuffle).split(BATCH):
            optimiser.zero_grad()
            share = batch[rank::world]
            functional.cross_entropy(replica(digits.train[share]), digits.train_labels[share]).backward()
            optimiser.step()
            schedule.step()
        curve.append(accuracy(model, digits))
        after_epoch()
    return curve
