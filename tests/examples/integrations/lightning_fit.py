"""Lightning's `Trainer` whose sizes `BatchSizeTuner` sets; the schedule is as long as the training.

The argument is the target.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch

from autobatch.integrations.lightning import BatchSizeTuner


class Points(torch.utils.data.Dataset[torch.Tensor]):
    """16,384 rows."""

    def __len__(self) -> int:
        return 16384

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((512,), index / 16384)


class Data(lightning.LightningDataModule):
    """Reads its batch size when the loader is made."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Points(), batch_size=self.batch_size)


class Model(lightning.LightningModule):
    """Two layers over 1,024 places."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
        self.planned_steps = 0

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        del batch_index
        loss = self.net(batch[:, None].expand(-1, 1024, -1)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        self.planned_steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=self.planned_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(tuner: lightning.Callback, **settings: Any) -> tuple[lightning.Trainer, Model, Data]:
    """Train an epoch."""
    model, data = Model(), Data()
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[tuner],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **{"devices": 1, **settings},
    )
    trainer.fit(model, datamodule=data)
    return trainer, model, data


if __name__ == "__main__":
    tuner = BatchSizeTuner(target=int(sys.argv[1]))
    trainer, model, data = fit(tuner)
    print(data.batch_size, trainer.accumulate_grad_batches, "steps:", trainer.global_step, "of", model.planned_steps)
