"""Start programs on emulated cards."""

from __future__ import annotations

import contextlib
import functools
import signal
import subprocess
from typing import TYPE_CHECKING

from autobatch.emulator.build import build_libraries
from autobatch.emulator.machine import EmulatedMachine
from autobatch.errors import UsageError
from autobatch.gpu.catalogue import find_card

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["open_machine", "run_command"]

_PASSED_ON = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGWINCH,
    }
)
_SI_KERNEL = 0x80  # asm-generic/siginfo.h: sent by the kernel, as the terminal's signals are


@contextlib.contextmanager
def open_machine(card_names: Sequence[str], *, tenant_bytes: int = 0) -> Iterator[EmulatedMachine]:
    """Make a machine with the cards named, for as long as the context lasts.

    Raises:
        UsageError: a name is unknown or ambiguous, or the tenant is larger than a card.
        EmulatorError: the emulation cannot be built.
    """
    cards = [find_card(name) for name in card_names]
    with EmulatedMachine(cards, build_libraries(), tenant_bytes=tenant_bytes) as machine:
        yield machine


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, passing signals on.

    Args:
        command: the program and its arguments.
        environment: its environment variables.

    Returns:
        Its exit status; 128 + N where signal N ended it, as a shell has it.

    Raises:
        OSError: there is no such program (`FileNotFoundError`), or it cannot be run.
        UsageError: an argument holds a NUL, which no program can be given.
    """
    # Blocked and taken one by one: none is lost before the child stands, and each says who sent it. A signal that we were
    # started to ignore (nohup) stays ignored, here and in the child.
    passed_on = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
    child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an ignored one would lose the child's status
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    try:
        process = _start(command, environment, mask)
        status = _wait(process, passed_on)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, child_handler)
    return 128 - status if status < 0 else status


def _start(
    command: Sequence[str], environment: Mapping[str, str], mask: Iterable[int | signal.Signals]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(command),
            env=dict(environment),
            preexec_fn=functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask),  # noqa: PLW1509 - one thread
        )
    except ValueError as error:
        raise UsageError(f"cannot run {command[0]!r}: {error}") from None


def _wait(process: subprocess.Popen[bytes], passed_on: Iterable[int]) -> int:
    """Wait for the child's end, passing signals on meanwhile."""
    awaited = {*passed_on, signal.SIGCHLD}
    while (status := process.poll()) is None:
        received = signal.sigwaitinfo(awaited)
        # What the terminal sends (Ctrl-C) goes to the whole foreground group: the child has had it already.
        if received.si_signo != signal.SIGCHLD and received.si_code != _SI_KERNEL:
            process.send_signal(received.si_signo)
    return status
