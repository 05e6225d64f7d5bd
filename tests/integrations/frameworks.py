"""What tests run on an emulated card inside of the frameworks: each line of the output is the JSON of one answer.

`tune`: the trainer is left as it was but for its sizes. `evaluate`: evaluation apart from training. `maximum FRAMEWORK` and
`train FRAMEWORK N K`: the size that tuning finds, and a training with K micro-batches of N by the framework alone.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import autobatch

EXAMPLES = Path(__file__).parents[1] / "examples" / "integrations"
LARGE = 1 << 20


def example(name: str) -> dict[str, Any]:
    """What an example defines."""
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def tune() -> dict[str, Any]:
    """Tune a trainer with an optimizer of its own making, and one with a scaler."""
    from transformers import TrainerCallback

    from autobatch.integrations.transformers import tune as tune_trainer

    class Called(TrainerCallback):
        calls = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            Called.calls += 1

    trainer = example("hf_trainer.py")["make_trainer"](fp16=True, max_steps=1)
    trainer.add_callback(Called())
    before, attributes = autobatch.state_hash([trainer.model]), dict(vars(trainer))
    report = tune_trainer(trainer, target=128, looks=500, max_micro_batch=16, progress=lambda _: None)
    unchanged = autobatch.state_hash([trainer.model]) == before
    others = [name for name, value in vars(trainer).items() if attributes.get(name) is not value]
    calls = Called.calls
    casts = []
    trainer.model.transformer.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cuda")))
    trainer.train()
    return {
        "unchanged": unchanged,
        "attributes": others,
        "trains_under_autocast": casts == [True] * 8,
        "callbacks": calls,
        "sizes": [
            trainer.args.per_device_train_batch_size,
            trainer.args.gradient_accumulation_steps,
            trainer.get_train_dataloader().batch_sampler.batch_size,
        ],
        "plan": [report.plan.micro_batch_size, report.plan.accumulation_steps] if report.plan else None,
        "workload": report.workload,
        "warning": report.warnings[-1],
    }


def prepared() -> dict[str, Any]:
    """What `train` does to the model before its loop is measured, and what a step keeps for itself is forgotten."""
    from transformers import Trainer

    from autobatch.integrations.transformers import tune as tune_trainer

    make_trainer = example("hf_trainer.py")["make_trainer"]
    answer: dict[str, Any] = {}
    kept: list[Any] = []

    class Keeping(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **others: Any) -> Any:
            loss = super().compute_loss(model, inputs, *more, **others)
            self.seen.append(self.state.max_steps + self.lr_scheduler.last_epoch)
            self.log({"mine": 1.0})
            kept.append(inputs.pop("labels"))
            return loss

    for checkpointing in (False, True):
        trainer = make_trainer(bf16=True, gradient_checkpointing=checkpointing)
        report = tune_trainer(trainer, target=LARGE, looks=500, max_micro_batch=512, dataset_size=None)
        answer[f"peak_{checkpointing}"] = max(trial.footprint_bytes for trial in report.trials)
    trainer.__class__ = Keeping
    trainer.seen = [7]
    tune_trainer(trainer, target=128, looks=500, max_micro_batch=4)
    answer["seen"], answer["logged"], answer["ran"] = trainer.seen, len(trainer.state.log_history), len(kept) > 0
    return answer


def evaluate() -> dict[str, Any]:
    """Predictions of the whole set do not fit on the card; moved to the host after each batch they do."""
    from autobatch.integrations.transformers import tune_evaluation

    module = example("hf_trainer.py")
    trainer = module["make_trainer"](per_device_train_batch_size=32, gradient_accumulation_steps=2)
    trainer.eval_dataset = module["Texts"](40_000)
    trainer.compute_metrics = lambda _: {}
    answer: dict[str, Any] = {}
    try:
        tune_evaluation(trainer, looks=500, progress=lambda _: None)
    except autobatch.NothingFitsError as error:
        answer["all_on_the_card"] = str(error)
    trainer.args.eval_accumulation_steps = 1
    report = tune_evaluation(trainer, looks=500, max_micro_batch=4096, progress=lambda _: None)
    answer["sizes"] = [
        trainer.args.per_device_eval_batch_size,
        trainer.args.per_device_train_batch_size,
        trainer.args.gradient_accumulation_steps,
    ]
    answer["found"] = report.max_micro_batch_size
    return answer


def refused() -> list[str]:
    """What cannot be tuned, each in its words."""
    from autobatch.integrations.transformers import tune as tune_trainer
    from autobatch.integrations.transformers import tune_evaluation

    make_trainer = example("hf_trainer.py")["make_trainer"]
    said = []

    def attempt(call: Any) -> None:
        try:
            call()
        except autobatch.UsageError as error:
            said.append(str(error))

    trainer = make_trainer()
    attempt(lambda: tune_trainer(trainer, target=8, split="balanced"))
    attempt(lambda: tune_trainer(trainer, target=8, cache="trust"))
    attempt(lambda: tune_trainer(make_trainer(auto_find_batch_size=True), target=8))
    attempt(lambda: tune_trainer(trainer, target=30_000))
    trainer.train_dataset = None
    attempt(lambda: tune_trainer(trainer, target=8))
    trainer = make_trainer()
    trainer.eval_dataset = None
    attempt(lambda: tune_evaluation(trainer))
    return said


def lightning_refused() -> list[str]:
    """What the callback refuses."""
    import lightning

    from autobatch.integrations.lightning import BatchSizeTuner

    module = example("lightning_fit.py")
    said = []

    def attempt(model: Any, data: Any = None, **loaders: Any) -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            devices=1,
            callbacks=[BatchSizeTuner(target=8)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        try:
            trainer.fit(model, datamodule=data, **loaders)
        except autobatch.UsageError as error:
            said.append(str(error))

    by_hand = module["Model"]()
    by_hand.automatic_optimization = False
    attempt(by_hand, module["Data"]())
    attempt(module["Model"](), train_dataloaders=torch.utils.data.DataLoader(module["Points"]()))
    sizeless = module["Data"]()
    loader = torch.utils.data.DataLoader(module["Points"]())
    del sizeless.batch_size
    sizeless.train_dataloader = lambda: loader
    attempt(module["Model"](), sizeless)
    kept = module["Data"]()
    kept.train_dataloader = lambda: loader
    attempt(module["Model"](), kept)
    return said


def odd_module() -> dict[str, Any]:  # noqa: C901 - a module and its data in one piece
    """A module that makes its state in hooks, takes from its batch, keeps what it saw, and has its data module's hooks."""
    import lightning
    from lightning.pytorch.loggers import Logger

    from autobatch.integrations.lightning import BatchSizeTuner

    seen: dict[str, Any] = {"transferred": 0, "steps": 0, "logged": 0}

    class Counting(Logger):
        name, version = "counting", 0

        def log_metrics(self, *_: Any, **__: Any) -> None:
            seen["logged"] += 1

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """None are kept."""

    class Odd(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = torch.nn.Linear(64, 64), []

        def on_fit_start(self) -> None:
            self.scale = 1.0

        def on_train_start(self) -> None:
            self.begun = True

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            seen["steps"] += 1
            loss = self.net(batch.pop("x")).square().mean() * self.scale * self.begun
            self.losses.append(loss.detach())
            self.logger.log_metrics({"loss": 0.0})
            return loss

        def on_train_epoch_end(self) -> None:
            seen["kept"] = len(self.losses)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(lightning.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> Any:
            samples = [{"x": torch.zeros(64), "name": torch.zeros(1)} for _ in range(64)]
            return torch.utils.data.DataLoader(samples, batch_size=self.batch_size)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            del dataloader_idx
            batch.pop("name")
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            del dataloader_idx
            seen["transferred"] += 1
            return batch

    trainer = lightning.Trainer(
        max_epochs=1, devices=1, precision="bf16-true", logger=Counting(), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[BatchSizeTuner(target=16, max_micro_batch=8, progress=lambda _: None)],
    )  # fmt: skip
    trainer.fit(Odd(), datamodule=Data())
    return {**seen, "updates": trainer.global_step}


def maximum(framework: str) -> dict[str, Any]:
    """The largest size, with no memory left over, when sizes accumulate."""
    asked = {"target": LARGE, "headroom": 0, "dataset_size": None}
    if framework == "transformers":
        from autobatch.integrations.transformers import tune as tune_trainer

        trainer = example("hf_trainer.py")["make_trainer"](bf16=True)
        report = tune_trainer(trainer, looks=500, **asked)
    else:
        module = example("lightning_fit.py")
        from autobatch.integrations.lightning import BatchSizeTuner

        tuner = BatchSizeTuner(looks=1, **asked)
        module["fit"](tuner, precision="bf16-mixed", max_steps=1, limit_train_batches=1)
        report = tuner.report
    return {"size": report.max_micro_batch_size, "steps": report.micro_batches_per_step, "certified": report.certified}


class Flushes:
    """Counts how often the allocator had to give back what it kept, by optimizer step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def note(self, *_: Any) -> None:
        self.counts.append(int(torch.cuda.memory_stats()["num_alloc_retries"]))

    @property
    def answer(self) -> str:
        return "fits" if self.counts[-1] == self.counts[1] else "flushes"


def train(framework: str, size: str, steps: str) -> str:
    """Train four optimizer steps by the framework alone."""
    flushes = Flushes()
    handle = register_optimizer_step_post_hook(flushes.note)
    try:
        if framework == "transformers":
            module = example("hf_trainer.py")
            trainer = module["make_trainer"](
                bf16=True,
                per_device_train_batch_size=int(size),
                gradient_accumulation_steps=int(steps),
                max_steps=4,
            )
            longest = list(map(trainer.train_dataset.__getitem__, range(500)))
            longest = [sample for sample in longest if len(sample["input_ids"]) == 128]
            trainer.train_dataset = longest * (4 * int(size) * int(steps) // len(longest) + 1)
            trainer.train()
        else:
            import lightning

            module = example("lightning_fit.py")
            data = module["Data"]()
            data.batch_size = int(size)
            module["Points"].__len__ = lambda _: 4 * int(size) * int(steps)
            lightning.Trainer(
                max_steps=4, devices=1, precision="bf16-mixed", accumulate_grad_batches=int(steps),
                gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            ).fit(module["Model"](), datamodule=data)  # fmt: skip
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        handle.remove()
    return flushes.answer


ACTIONS = {
    "tune": tune,
    "prepared": prepared,
    "evaluate": evaluate,
    "refused": refused,
    "lightning-refused": lightning_refused,
    "odd-module": odd_module,
    "maximum": maximum,
    "train": train,
}
words: list[str] = []
for word in [*sys.argv[1:], ","]:
    if word != ",":
        words.append(word)
        continue
    answer = ACTIONS[words[0]](*words[1:])
    sys.stdout.write("ANSWER " + json.dumps(answer) + "\n")
    sys.stdout.flush()
    words = []
os._exit(0)
