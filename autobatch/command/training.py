"""A command that trains with a plan: whether it ended for want of the device's memory."""

from __future__ import annotations

import builtins
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any, Self

from autobatch.command.launching import hooked_environment
from autobatch.gpu.oom import FailureKind, classify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

__all__ = ["WatchedTraining"]


class WatchedTraining:
    """Hears from a training's processes, by the hook, whether one ended by an out-of-memory error.

    A context manager. The training runs as it would without it: the hook looks at an error when its process ends, and where it
    cannot, says nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare to listen.

        Args:
            folder: for the socket; its path has less than 90 characters (unix(7)).
        """
        self._path = folder / "channel"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._channel = self._stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        self._channel.bind(str(self._path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The variables with which the hook is loaded, beside those given."""
        return hooked_environment(variables, {"training": True}, self._path)

    def ran_out_of_memory(self) -> bool:
        """Whether a process of it has ended so by now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                message = json.loads(self._channel.recv(1 << 20))
                if message.get("kind") == "ended_by" and _is_out_of_memory(_rebuilt(message["error"])):
                    return True
        return False


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says so by itself: nothing is known of the device any more."""
    if error is None:
        return False
    return classify(error, device_nearly_full=False, smaller_size_ran=False).kind is FailureKind.MEMORY


def _rebuilt(described: Mapping[str, Any] | None) -> BaseException | None:
    """An error that another process told of, with all that it carried, as one of types of the same names."""
    if described is None:
        return None
    kind: type[BaseException] = Exception
    for name in reversed(described["types"]):
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, ExceptionGroup):
            kind = known
        elif not isinstance(known, type):
            kind = type(name, (kind,), {"__str__": _text_of})
    error = kind.__new__(kind)
    error.args = (described["text"], *map(_rebuilt, described["members"]))
    error.__cause__ = _rebuilt(described["cause"])
    error.__context__ = _rebuilt(described["context"])
    error.__suppress_context__ = described["context"] is None
    return error


def _text_of(error: BaseException) -> str:
    return str(error.args[0])
