"""Where the command line's data goes: standard output, in tables that fit it or as text."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any

from autobatch.errors import AutobatchError
from autobatch.present.formats import plan_as_arguments, plan_as_environment, sizes_note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType

    from autobatch.plan import Plan
    from autobatch.report import Basis

__all__ = ["error_console", "say", "silence_output", "write_json", "write_plan", "write_text", "write_view"]

# A pipe has no width: a table is then as wide as it needs to be.
_WIDTH_OF_A_PIPE = 160


def say(message: str) -> None:
    """Write one line about the program itself to standard error."""
    if sys.stderr is not None:  # None: the program was started with it closed
        sys.stderr.write(f"autobatch: {message}\n")


def write_text(text: str) -> None:
    """Write text and a line's end to standard output.

    Raises:
        BrokenPipeError: its reader is gone.
        AutobatchError: it cannot be written.
    """
    if sys.stdout is None:  # the program was started with it closed
        raise AutobatchError("standard output is closed: nothing can be printed")
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_output()
        raise AutobatchError(f"cannot write to standard output: {error.strerror}") from error


def silence_output() -> None:
    """Send what standard output still holds nowhere, so that the interpreter's own flush at the end stays quiet."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def write_json(content: object) -> None:
    """Write a JSON form, indented; raises as `write_text` does."""
    import json

    write_text(json.dumps(content, indent=2))


def write_plan(
    plan: Plan,
    form: str,
    *,
    basis: Basis | None = None,
    measurement: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write a plan in the form `env` or one of `ARGUMENT_FORMS`, and on standard error what that form has no place for.

    Args:
        plan: the plan.
        form: the form's name.
        basis: where its maximum comes from; None where nobody measured it.
        measurement: the id under which the service keeps it; None where it came from none.
        notes: what the reader should know, one line each.

    Raises:
        PlanError: the plan cannot be written in this form.
        BrokenPipeError, AutobatchError: as `write_text`.
    """
    if form == "env":
        write_text(plan_as_environment(plan, basis=basis, measurement=measurement))
    else:
        write_text(plan_as_arguments(plan, form))
    sizes = sizes_note(plan) if form == "env" else ""
    for note in (*([sizes] if sizes else []), *notes):
        say(f"note: {note}")


def write_view(view: RenderableType) -> None:
    """Write what rich renders: as wide as the terminal, or plain and without blanks at the lines' ends."""
    from rich.console import Console

    if sys.stdout is not None and sys.stdout.isatty():
        Console().print(view)
        return
    page = io.StringIO()
    Console(file=page, width=_WIDTH_OF_A_PIPE, color_system=None).print(view)
    write_text("\n".join(line.rstrip() for line in page.getvalue().splitlines()))


def error_console() -> Console:
    """The console of standard error, for progress."""
    from rich.console import Console

    stream: Any = sys.stderr if sys.stderr is not None else io.StringIO()
    return Console(file=stream, width=None if stream.isatty() else _WIDTH_OF_A_PIPE)
