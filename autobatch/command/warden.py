"""A process between a probe and a training command, which ends all that the command started.

As a child subreaper (prctl(2)) it inherits whatever loses its parent below it, whatever session or group that moved to. It
ends everything when the command has ended, when it is told to (SIGTERM), and when the probe dies, however it dies.

Run as `python -I warden.py PARENT_PID STATUS_DESCRIPTOR FOLDER COMMAND…`; writes the command's exit status, negative for a
signal, to the descriptor, or `!` and the reason why it cannot be started. FOLDER holds the run's temporary files, and goes
with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_TRACKERS_SECONDS = 2.0
_AWAITED = {signal.SIGTERM, signal.SIGCHLD}


def main() -> int:
    """Run the command."""
    parent, descriptor, folder, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        return 1
    os.set_inheritable(descriptor, False)
    try:
        child = os.posix_spawnp(
            command[0], command, os.environ, setsigmask=[], setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
    except OSError as error:
        os.write(descriptor, f"!{error.strerror}".encode())
        return 0
    status = None
    while status is None and signal.sigwait(_AWAITED) != signal.SIGTERM:
        status = _reap(child)
    _end_all()
    shutil.rmtree(folder, ignore_errors=True)
    if status is not None:
        os.write(descriptor, str(status).encode())
    return 0


def _reap(child: int) -> int | None:
    """Take the status of every child that has ended; give that of one."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                found = os.waitstatus_to_exitcode(status)
    return found


def _end_all() -> None:
    """End everything below, until nothing is left: what is ended leaves children behind, which come to us."""
    own = psutil.Process()
    while True:
        below = own.children(recursive=True)
        trackers = [process for process in below if _is_tracker(process)]
        for process in below:
            if process not in trackers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        _reap(0)
        # Python's own: at the end of those that it serves it removes the shared memory that they left, and ends.
        psutil.wait_procs(trackers, timeout=_TRACKERS_SECONDS)
        for process in trackers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


if __name__ == "__main__":
    sys.exit(main())
