"""A command that trains with a plan: whether it ended for want of the device's memory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Self

from autobatch.command.launching import HOOK_FOLDER, PACKAGE_ROOT

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
        setup = {"training": True, "channel": str(self._path), "package_root": PACKAGE_ROOT}
        paths = [HOOK_FOLDER, *filter(None, [variables.get("PYTHONPATH")])]
        return {**variables, "AUTOBATCH_HOOK": json.dumps(setup), "PYTHONPATH": os.pathsep.join(paths)}

    def ran_out_of_memory(self) -> bool:
        """Whether a process of it has said so by now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                if json.loads(self._channel.recv(65536)).get("kind") == "out_of_memory":
                    return True
        return False
