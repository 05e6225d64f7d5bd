"""Processes that a test started, by a mark in their environment: whoever started them in between, and whatever became of it."""

from __future__ import annotations

import time

import psutil

__all__ = ["MARK", "marked", "wait_until_gone"]

MARK = "AUTOBATCH_TEST_MARK"
"""The variable that holds the mark."""


def marked(mark: str) -> list[psutil.Process]:
    """Processes with a mark that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(mark: str, seconds: float) -> list[psutil.Process]:
    """Those that still run after so long; none, if all goes well."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
