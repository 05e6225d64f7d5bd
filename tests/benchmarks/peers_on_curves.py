"""What others' finders answer on the recorded memory curves, and whether training with the answer fits.

    python tests/benchmarks/peers_on_curves.py [--quick] [--write]

Each finder is the real one, with its defaults, and drives a step that raises a real `torch.OutOfMemoryError` where the curve of
the job says so. Finders step without accumulating, so theirs is that curve; the training afterwards accumulates to 256 samples,
so the answer is held against the curve under accumulation. Ours searches the latter, as a probe does. Sizes, not seconds: memory
is recorded, on emulated cards. `--write` keeps the table under `results/`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import statistics
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from curves import Curve, recorded_curves, search_curve
from results import Result, markdown_table, run_benchmark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TARGET = 256
CEILING = 1024


@dataclass(kw_only=True)
class Step:
    """A training step on one curve."""

    curve: Curve
    sizes: list[int] = field(default_factory=list)
    num_ooms: int = 0

    def __call__(self, size: int) -> None:
        """Run a step, or run out of memory."""
        self.sizes.append(size)
        if not self.curve.trial_at(size).fits:
            self.num_ooms += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.00 MiB.")


def accelerate(step: Step) -> int:
    """`find_executable_batch_size`, which starts at 128."""
    from accelerate.utils import find_executable_batch_size

    def train(batch_size: int) -> int:
        step(batch_size)
        return batch_size

    found: int = find_executable_batch_size(train)()
    return found


def timm(step: Step) -> int:
    """A loop over `decay_batch_step`, from the ceiling on, as timm's benchmark has it."""
    from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step

    size = CEILING
    while size:
        try:
            step(size)
        except torch.OutOfMemoryError as error:
            if not check_batch_size_retry(str(error)):
                raise
            size = decay_batch_step(size)
        else:
            return size
    return 0


def lightning(mode: str) -> Callable[[Step], int]:
    """`Tuner.scale_batch_size` in one of its modes."""

    def find(step: Step) -> int:
        from lightning.pytorch import LightningModule, Trainer
        from lightning.pytorch.tuner import Tuner
        from torch.utils.data import DataLoader, TensorDataset

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.batch_size = 2
                self.layer = torch.nn.Linear(1, 1)

            def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
                step(len(batch[0]))
                return self.layer(batch[0]).mean()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.0)

            def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
                return DataLoader(TensorDataset(torch.zeros(4 * CEILING, 1)), batch_size=self.batch_size)

        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
        )
        found = Tuner(trainer).scale_batch_size(Module(), mode=mode, max_val=CEILING)
        return int(found or 0)

    return find


def ours(step: Step) -> int:
    """The search of a probe."""
    search = search_curve(step.curve, range(1, CEILING + 1))
    for trial in search.trials:
        with contextlib.suppress(torch.OutOfMemoryError):
            step(trial.micro_batch_size)
    return search.bracket.fits or 0


@dataclass(frozen=True, kw_only=True)
class Finder:
    """One that is compared."""

    name: str
    find: Callable[[Step], int]
    accumulates: bool = False


def finders() -> list[Finder]:
    """Ours and others'."""
    return [
        Finder(name="autobatch", find=ours, accumulates=True),
        Finder(name=f"accelerate {_version('accelerate')} find_executable_batch_size", find=accelerate),
        Finder(name=f"Lightning {_version('lightning')} power", find=lightning("power")),
        Finder(name=f"Lightning {_version('lightning')} binsearch", find=lightning("binsearch")),
        Finder(name=f"timm {_version('timm')} decay_batch_step", find=timm),
    ]


def _version(package: str) -> str:
    return importlib.metadata.version(package)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one finder did on all curves."""

    finder: str
    curves: int
    exact: int
    """Answers that are the largest size that trains under accumulation."""
    does_not_train: int
    """Answers at which the training runs out of memory, or none was given."""
    median_share: float
    """Of the true maximum, over answers that train."""
    worst_share: float
    median_sizes: float
    median_ooms: float


def compare(finder: Finder, pairs: list[tuple[Curve, Curve]]) -> Row:
    """Run a finder on every pair of curves, without accumulation and with it."""
    shares, sizes, ooms, exact, failing = [], [], [], 0, 0
    for plain, accumulating in pairs:
        step = Step(curve=accumulating if finder.accumulates else plain)
        with quiet():
            found = finder.find(step)
        fits = found > 0 and accumulating.trial_at(found).fits
        failing += not fits
        exact += found in accumulating.right_answers(CEILING)
        if fits:
            shares.append(found / (accumulating.true_maximum(CEILING) or 1))
        sizes.append(len(set(step.sizes)))
        ooms.append(step.num_ooms)
    return Row(
        finder=finder.name,
        curves=len(pairs),
        exact=exact,
        does_not_train=failing,
        median_share=statistics.median(shares or [0.0]),
        worst_share=min(shares, default=0.0),
        median_sizes=statistics.median(sizes),
        median_ooms=statistics.median(ooms),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Finders talk; the table is what counts."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def pairs_of(curves: list[Curve]) -> list[tuple[Curve, Curve]]:
    """Curves of the same job and card, without accumulation and with it."""
    by_name = {curve.name: curve for curve in curves}
    jobs = sorted({name[:-2] for name in by_name})
    return [(by_name[f"{job}-1"], by_name[f"{job}-2"]) for job in jobs if {f"{job}-1", f"{job}-2"} <= set(by_name)]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    head = (
        "finder",
        f"exact, of {rows[0].curves}",
        "training runs out of memory",
        "share of the maximum",
        "sizes",
        "OOMs",
    )
    rows_of_text = []
    for row in rows:
        share = f"{row.median_share:.0%}, worst {row.worst_share:.0%}"
        cells = (row.finder, row.exact, row.does_not_train, share, f"{row.median_sizes:g}", f"{row.median_ooms:g}")
        rows_of_text.append(cells)
    return markdown_table(head, rows_of_text)


def measure(*, quick: bool) -> Result:
    """Run every finder."""
    pairs = pairs_of(recorded_curves())
    rows = [compare(finder, pairs[:: 7 if quick else 1]) for finder in finders()]
    text = f"# Finders on recorded curves of emulated cards\n\n{table(rows)}"
    return Result(name="peers_on_curves", data=[dict(vars(row)) for row in rows], text=text)


if __name__ == "__main__":
    sys.exit(run_benchmark(measure, __doc__))
