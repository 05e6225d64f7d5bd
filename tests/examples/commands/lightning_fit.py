"""Lightning's `Trainer`, with a validation before training."""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, required=True)
parser.add_argument("--accumulate", type=int, required=True)
options = parser.parse_args()


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.layers(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def loader() -> torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]:
    data = torch.utils.data.TensorDataset(torch.zeros(1, 1, 1).expand(1 << 16, 64, 1024))
    return torch.utils.data.DataLoader(data, batch_size=options.batch_size)


lightning.Trainer(
    max_steps=50,
    accumulate_grad_batches=options.accumulate,
    accelerator="gpu",
    devices=1,
    logger=False,
    enable_progress_bar=False,
).fit(Net(), loader(), loader())
