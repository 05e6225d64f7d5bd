"""transformers' `Trainer` whose sizes `tune` sets: a model made from a configuration, on texts of many lengths.

The first argument is the target; `--evaluate` sets the evaluation's batch size too.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autobatch.integrations.transformers import tune, tune_evaluation


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Token ids of 16 to 128 tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(16 + index * 37 % 113) % 1000
        return {"input_ids": tokens, "labels": tokens}


def pad(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad to the longest."""
    join = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": join([one["input_ids"] for one in samples], batch_first=True),
        "labels": join([one["labels"] for one in samples], batch_first=True, padding_value=-100),
    }


def make_trainer(**arguments: object) -> Trainer:
    """The trainer as a user would write it."""
    shape = {"vocab_size": 1000, "n_positions": 128, "n_embd": 256, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))
    settings = TrainingArguments(
        tempfile.gettempdir(), report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, **arguments
    )
    return Trainer(
        model=model, args=settings, train_dataset=Texts(20_000), eval_dataset=Texts(2_000), data_collator=pad
    )


if __name__ == "__main__":
    trainer = make_trainer(num_train_epochs=1, warmup_steps=1, eval_strategy="steps", eval_steps=0.5)
    report = tune(trainer, target=int(sys.argv[1]))
    if "--evaluate" in sys.argv:
        tune_evaluation(trainer)
    trainer.train()
    print(report.plan.micro_batch_size, report.plan.accumulation_steps, "steps:", trainer.state.global_step)
