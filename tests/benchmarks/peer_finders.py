"""The finders of others, each with its own defaults, driving one training job of ours.

A finder takes a `Halves`, the job with its forward and its backward apart, and answers with a batch size. All of it runs in a
process that has a GPU, measured or emulated; what each does is its own code.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch import TrainingJob

TARGET = 256
"""Samples per optimizer step: what finders that begin with the batch asked for begin with."""
LARGEST = 8192
"""Lightning's own `max_val`, and the most that any loader here has."""


class Halves:
    """A training job as trainers want it: a loss to call `backward` on, parameters and an optimizer. It counts what is run."""

    def __init__(self, job: TrainingJob) -> None:
        (self.optimizer,) = job.optimizers()
        self.parameters = torch.nn.ParameterList(
            value for group in self.optimizer.param_groups for value in group["params"]
        )
        self.sizes: list[int] = []
        """Each size that was tried, in order."""
        self.num_steps = 0
        """Optimizer steps that ran to their end."""
        self._micro_step = job.micro_step
        self.optimizer.register_step_post_hook(self._count_step)

    @property
    def model(self) -> torch.nn.Module:
        """The module that has all of the parameters, as the garbage collector knows it: a job does not name it."""
        wanted = {id(one) for one in self.parameters}
        modules = [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module)]
        return next(
            one
            for one in modules
            if not isinstance(one, torch.nn.ParameterList) and wanted <= {id(each) for each in one.parameters()}
        )

    @property
    def num_ooms(self) -> int:
        """Out-of-memory errors of the allocator, also those that somebody caught."""
        return int(torch.cuda.memory_stats().get("num_ooms", 0))

    def loss(self, size: int) -> torch.Tensor:
        """The forward of `size` samples: what the job's micro-step does up to its `backward()`."""
        self.sizes.append(int(size))
        kept: list[torch.Tensor] = []
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda loss, *_, **__: kept.append(loss)  # type: ignore[method-assign, assignment]
        try:
            self._micro_step(int(size))
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
        return kept.pop()

    def step(self, size: int) -> int:
        """A training step on `size` samples; gives the size."""
        self.sizes.append(int(size))
        self._micro_step(int(size))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return int(size)

    def _count_step(self, *_: object) -> None:
        self.num_steps += 1


class Rows(Dataset[torch.Tensor]):
    """As many rows as a finder may ask for; a job makes its own samples."""

    def __len__(self) -> int:
        return 4 * LARGEST

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


def ours(headroom: str, workload: str, limit_bytes: int | None = None) -> dict[str, Any]:
    """The probe of the command line, whose trials run in a process of their own, as the training afterwards does.

    Args:
        headroom: what it leaves free.
        workload: the training job's name.
        limit_bytes: the size of a smaller card that stands in for this one; None for the card itself.

    Returns:
        Its answer, the sizes that it tried, steps, and how often it ran out of memory.
    """
    import autobatch

    limit = None if limit_bytes is None else f"{limit_bytes}B"
    report = autobatch.probe_workload(workload, target=TARGET, headroom=headroom, memory_limit=limit)
    return {
        "answer": report.max_micro_batch_size,
        "sizes": [trial.micro_batch_size for trial in report.trials],
        "steps": sum(trial.steps for trial in report.trials),
        "ooms": report.num_ooms,
    }


def accelerate(job: Halves) -> int:
    """`find_executable_batch_size`: from 128, times 0.9."""
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size
    def train(batch_size: int) -> int:
        return job.step(batch_size)

    return int(train())


def toma(job: Halves) -> int:
    """`toma.simple.batch`: halved, from 1024 as in its own example."""
    from toma import simple

    return int(simple.batch(job.step, 1024))


def batch_probe(job: Halves) -> int:
    """`batch_probe.probe`: bisection between 1 and 4096, less its headroom of 20 %."""
    from batch_probe import probe

    return int(probe(job.step, low=1, high=4096, headroom=0.2, verbose=False))


def timm(job: Halves) -> int:
    """A loop over `decay_batch_step` from 1024, as timm's benchmark has it."""
    from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step

    size = 1024
    while size:
        torch.cuda.empty_cache()
        try:
            return job.step(size)
        except RuntimeError as error:
            if not check_batch_size_retry(str(error)):
                raise
        size = decay_batch_step(size)
    return 0


def lightning(mode: str, job: Halves) -> int:
    """`Tuner.scale_batch_size` in one of its modes, on the GPU."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner import Tuner

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.weights = job.parameters

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return job.loss(len(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer

        def train_dataloader(self) -> DataLoader[torch.Tensor]:
            return DataLoader(Rows(), batch_size=self.batch_size)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        found = Tuner(trainer).scale_batch_size(Module(), mode=mode, max_val=LARGEST)
        return int(found or 0)


def ludwig(job: Halves) -> int:
    """`BatchSizeEvaluator.select_best_batch_size`: doubled from 1, by throughput, which is real time here."""
    from ludwig.utils.batch_size_tuner import BatchSizeEvaluator

    class Evaluator(BatchSizeEvaluator):
        def reset(self) -> None:
            job.optimizer.zero_grad()

        def step(self, batch_size: int, global_max_sequence_length: int | None = None) -> None:
            job.step(batch_size)

    return int(Evaluator().select_best_batch_size(dataset_len=len(Rows()), max_batch_size=LARGEST))


def transformers(job: Halves) -> int:
    """`Trainer(auto_find_batch_size=True)` from the batch that was asked for; three steps of training are its trial."""
    from transformers import Trainer, TrainingArguments

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = job.parameters

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": job.loss(len(rows))}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            auto_find_batch_size=True,
            per_device_train_batch_size=TARGET,
            max_steps=3,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=Module(),
            args=arguments,
            train_dataset=Rows(),
            data_collator=lambda rows: {"rows": torch.stack(rows)},
            optimizers=(job.optimizer, None),
        )
        trainer.train()
        return int(trainer._train_batch_size)


def composer(job: Halves) -> int:
    """`device_train_microbatch_size="auto"`: accumulates to the batch asked for, in halves of it; three batches."""
    from composer import ComposerModel, Trainer

    class Module(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weights = job.parameters

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return job.loss(len(batch))

        def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            return outputs

    trainer = Trainer(
        model=Module(),
        optimizers=job.optimizer,
        train_dataloader=DataLoader(Rows(), batch_size=TARGET),
        device_train_microbatch_size="auto",
        max_duration="3ba",
        device="gpu",
        precision="fp32",  # the job has its own autocast
        progress_bar=False,
    )
    trainer.fit()
    return int(trainer.state.device_train_microbatch_size)


def ultralytics(job: Halves) -> int:
    """`autobatch`: a line through the peaks of 1 to 64, and the size at 60 % of the card."""
    from ultralytics.utils.autobatch import autobatch

    class Module(torch.nn.Module):
        yaml = {"channels": 3}  # noqa: RUF012
        names: dict[int, str] = {}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.weights = job.parameters
            self.stride = torch.tensor([32.0])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return job.loss(len(images))

    return int(autobatch(Module(), imgsz=1))


FINDERS: dict[str, tuple[str, Callable[[Halves], int]]] = {
    "accelerate find_executable_batch_size": ("accelerate", accelerate),
    "transformers auto_find_batch_size": ("transformers", transformers),
    "Lightning power": ("lightning", functools.partial(lightning, "power")),
    "Lightning binsearch": ("lightning", functools.partial(lightning, "binsearch")),
    "Composer auto": ("mosaicml", composer),
    "timm decay_batch_step": ("timm", timm),
    "toma simple.batch": ("toma", toma),
    "batch-probe": ("batch-probe", batch_probe),
    "Ludwig": ("ludwig", ludwig),
    "Ultralytics autobatch": ("ultralytics", ultralytics),
}
"""By the name in the table: the distribution that has it, and how it is called."""

OURS = {"autobatch": "2%", "autobatch --headroom 0": "0"}
"""By the name in the table: the headroom. The first is as it is by itself."""


def deepspeed(workload: str, folder: Path) -> dict[str, Any]:
    """DeepSpeed's autotuner, which starts a job of its own for each size; `--autotuning tune` in its fast mode.

    Args:
        workload: the training job's name.
        folder: an empty one, for its results.

    Returns:
        Its answer, the sizes that it tried, and how many of them ran out of memory.
    """
    # After each size it has pdsh end programs by name, on all its hosts: one that does nothing stands in for that.
    (folder / "bin").mkdir()
    (folder / "bin" / "pdsh").symlink_to("/bin/true")
    config = folder / "config.json"
    tuning = {"enabled": True, "fast": True}
    settings = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 0}, "autotuning": tuning}
    config.write_text(json.dumps(settings))
    beside = Path(sys.executable).parent
    command = [str(beside / "deepspeed"), "--autotuning", "tune", "--num_nodes", "1", "--num_gpus", "1"]
    command += [str(Path(__file__).with_name("peer_deepspeed.py")), workload, "--deepspeed_config", str(config)]
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{beside}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cuda",
        "DS_BUILD_OPS": "0",
    }
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=log, stderr=log, timeout=900)
    return deepspeed_results(folder / "autotuning_results")


def deepspeed_results(folder: Path) -> dict[str, Any]:
    """Read what the autotuner left: a folder for each size, named by it."""
    found = json.loads((folder / "ds_config_optimal.json").read_text())
    tried = {int(one.name.rpartition("_tmbspg")[2]): one for one in folder.glob("z*_tmbspg*")}
    ran_out = [one for one in tried.values() if "CUDA out of memory" in (one / "stderr.log").read_text()]
    return {"answer": int(found["train_micro_batch_size_per_gpu"]), "sizes": sorted(tried), "ooms": len(ran_out)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let finders talk to nobody."""
    import logging
    import warnings

    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
