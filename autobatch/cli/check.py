"""`autobatch check`: does accumulation equal the full batch for this model and loss?"""

from __future__ import annotations

import argparse
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.output import write_json, write_view
from autobatch.cli.settings import read_settings
from autobatch.errors import AutobatchError, NoGpuError, UsageError, WorkloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from autobatch.training.equivalence import EquivalenceReport

__all__ = ["DIFFERENT", "add_commands"]

DIFFERENT = 6
"""The exit status where accumulation is not the full batch."""
_SAMPLES = 8
_PARTS = ("model", "batch", "loss_fn")

_DESCRIPTION = """\
Run a model on a small batch, whole and in micro-batches, and compare the gradients, in float64 where the model can. What
breaks equality is named with the way out. Exits 0 where they are equal, 6 where they are not.

WORKLOAD is module:factory or path/to/file.py:factory, with parameters as train.py:parts?width=64; without one, the workload in
[tool.autobatch] of ./pyproject.toml. Here the factory returns what is checked, either as the tuple (model, batch, loss_fn) or as
an object with these attributes, and with count and loss_reduction where they are needed:

  model           the torch.nn.Module, in the mode in which it trains
  batch           a batch of at least 2 samples, or a function of n that makes one
  loss_fn         loss_fn(model, batch), or loss_fn(batch) that calls this very model
  count           what a mean counts in a micro-batch, such as labels that are not ignored
  loss_reduction  mean (default) or sum

A training job made for `probe` builds its batches itself and cannot be checked: give it a second factory."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a factory gave to be checked."""

    model: Any
    batch: Any
    loss_fn: Any
    count: Any = None
    loss_reduction: Any = "mean"


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="does accumulation equal the full batch here?",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workload", nargs="?", metavar="WORKLOAD", help="the factory of what is checked")
    parser.add_argument(
        "--samples",
        type=_number(2),
        metavar="N",
        help=f"samples of the whole batch (default all of the batch, or {_SAMPLES} where a function makes it)",
    )
    parser.add_argument(
        "--micro-batch",
        type=_number(1),
        metavar="N",
        help="largest micro-batch of the split run (default a third of the samples)",
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="how it is printed (default table)"
    )
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of the model's own failures")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Check, print what came of it, and give the exit status."""
    from autobatch.workload.loader import WorkloadName

    if parsed.command is not None:
        raise UsageError("autobatch check takes no command after --")
    workload = parsed.workload or read_settings(Path("pyproject.toml")).workload
    if workload is None:
        raise UsageError("no workload: name a factory of (model, batch, loss_fn), such as train.py:parts")
    name = WorkloadName.parse(workload)
    if not name.is_own:
        raise UsageError(
            f"{name} builds its batches itself, for a GPU: name a factory of (model, batch, loss_fn), such "
            "as train.py:parts"
        )
    report = _check(_parts(name, parsed.samples), parsed.micro_batch)
    if parsed.format == "json":
        write_json(report.to_dict())
    else:
        write_view(_view(report))
    return 0 if report.equal else DIFFERENT


def _check(parts: _Parts, micro_batch: int | None) -> EquivalenceReport:
    from autobatch.training.equivalence import check_equivalence

    return check_equivalence(
        parts.model,
        parts.batch,
        parts.loss_fn,
        micro_batch_size=micro_batch,
        count=parts.count,
        loss_reduction=parts.loss_reduction,
    )


def _parts(name: Any, samples: int | None) -> _Parts:
    """Call the factory, and bring the batch to its size."""
    import inspect

    from autobatch.workload.loader import load_factory

    factory = load_factory(name)
    try:
        inspect.signature(factory).bind(**name.parameters)
    except TypeError as error:
        raise UsageError(f"workload {name}: {error}") from None
    result = _called(lambda: factory(**name.parameters), f"workload {name}")
    parts = _read(result, str(name))
    batch = parts.batch
    if callable(batch):
        batch = _called(lambda: parts.batch(samples or _SAMPLES), f"the batch function of {name}")
    elif samples is not None:
        batch = _first(batch, samples)
    return _Parts(
        model=parts.model,
        batch=batch,
        loss_fn=parts.loss_fn,
        count=parts.count,
        loss_reduction=parts.loss_reduction,
    )


def _called(call: Callable[[], object], what: str) -> Any:
    try:
        return call()
    except AutobatchError:
        raise
    except Exception as error:
        line = str(error).partition("\n")[0]
        if "NVIDIA" in line or "not compiled with CUDA" in line:
            raise NoGpuError(
                f"{what} wants a GPU ({line}): make the model on the CPU, or check on a machine with one"
            ) from error
        raise WorkloadError(
            f"{what} failed: {type(error).__name__}: {line}".removesuffix(": "),
            traceback_text="".join(traceback.format_exception(error)),
        ) from error


def _read(result: object, origin: str) -> _Parts:
    from torch import nn

    if isinstance(result, tuple) and not hasattr(result, "_fields") and len(result) == len(_PARTS):
        model, batch, loss_fn = result
        parts = _Parts(model=model, batch=batch, loss_fn=loss_fn)
    elif all(hasattr(result, one) for one in _PARTS):
        given: Any = result
        parts = _Parts(
            model=given.model,
            batch=given.batch,
            loss_fn=given.loss_fn,
            count=getattr(given, "count", None) if not isinstance(given, tuple) else None,
            loss_reduction=getattr(given, "loss_reduction", "mean"),
        )
    else:
        raise WorkloadError(
            f"{origin} returned {type(result).__name__}: to be checked, a factory returns (model, batch, loss_fn) or an "
            "object with these attributes; a job of micro_step and optimizer builds its batches itself"
        )
    if not isinstance(parts.model, nn.Module) or not callable(parts.loss_fn):
        raise WorkloadError(
            f"{origin} returned {type(parts.model).__name__} as model and {type(parts.loss_fn).__name__} as loss_fn: a "
            "torch.nn.Module and a function are wanted, in the order (model, batch, loss_fn)"
        )
    return parts


def _first(batch: Any, samples: int) -> Any:
    from autobatch.training.batches import batch_size, split_batch

    has = batch_size(batch)
    if samples > has:
        raise UsageError(f"--samples {samples} of a batch that has {has}: take --samples {has} or less")
    return batch if samples == has else split_batch(batch, (samples, has - samples))[0]


def _number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is below {least}; give at least {least}")
        return number

    return read


def _view(report: EquivalenceReport) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sizes = " + ".join(map(str, report.micro_batch_sizes))
    samples = sum(report.micro_batch_sizes)
    verdict = "equal" if report.equal else "NOT equal"
    lines = [
        Text(f"Accumulation over {sizes} is {verdict} to the batch of {samples}.", style="bold"),
        Text(
            f"largest relative difference {report.relative_difference:.2e} in {report.worst_parameter} (up to "
            f"{report.tolerance:.0e} is rounding), in {report.dtype}"
        ),
        *(Text(f"note: {note}") for note in report.notes),
    ]
    if not report.causes:
        return Group(*lines)
    table = Table("cause", "seen", "way out", show_lines=True)
    for cause in report.causes:
        table.add_row(Text(cause.name), Text(cause.why), Text(cause.way_out))
    return Group(*lines, table)
