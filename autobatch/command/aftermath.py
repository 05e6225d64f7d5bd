"""Inside a training that was started with a plan: tell whether it ended for want of the device's memory, and no more."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from autobatch.gpu.oom import FailureKind, classify

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["watch_end"]


def watch_end(send: Callable[..., None]) -> None:
    """Look, at this process's end, at the error that ended it.

    Args:
        send: tells the program that started the training.
    """
    atexit.register(_tell, send, os.getpid())


def _tell(send: Callable[..., None], watched: int) -> None:
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None or os.getpid() != watched:
        return
    if classify(error, device_nearly_full=False, smaller_size_ran=True).kind is FailureKind.MEMORY:
        send(kind="out_of_memory")
