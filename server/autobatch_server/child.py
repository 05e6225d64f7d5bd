"""The process that runs one probe for the service: told what by a line of JSON, telling what happens by others."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import IO, TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

    from autobatch import ProbeEvent

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _Stopped(BaseException):
    """SIGTERM, raised where it stands, so that the trials' own children are ended on the way out."""


def main() -> int:
    """Run the probe that standard input describes."""
    parent = int(sys.argv[1])
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # What a job starts and lets go of becomes this process's child, and so is found when the run is ended.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before the call above
        return 1
    signal.signal(signal.SIGTERM, _stop)
    order = json.loads(sys.stdin.readline())
    # What anything here prints must not stand among the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        return _run(order, answers)


def _run(order: dict[str, object], answers: IO[str]) -> int:
    from autobatch import AutobatchError, ProbeOptions, from_json_form, probe_workload

    def tell(**content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    def progress(event: ProbeEvent) -> None:
        tell(event=_event_form(event))

    try:
        options = from_json_form(ProbeOptions, order["options"])
        report = probe_workload(str(order["workload"]), progress=progress, **vars(options))
    except AutobatchError as error:
        tell(problem={"code": error.code, "message": str(error), "trace": getattr(error, "traceback_text", "")})
    except _Stopped:
        return 128 + signal.SIGTERM
    else:
        tell(report=report.to_dict())
    return 0


def _event_form(event: ProbeEvent) -> dict[str, object]:
    from autobatch import Noted, TrialEnded, TrialStarted, to_json_form

    if isinstance(event, TrialStarted):
        kind, form = "trial_started", {"window": list(event.window), "confirmation": event.confirmation}
        form |= {"ceiling": event.ceiling}
    elif isinstance(event, TrialEnded):
        kind, form = "trial_ended", {"trial": to_json_form(event.trial), "seconds": round(event.seconds, 3)}
    elif isinstance(event, Noted):
        kind, form = "noted", {"text": event.text}
    else:
        kind, form = "device", {"device": to_json_form(event.device), "memory": to_json_form(event.memory)}
    if isinstance(event, TrialStarted | TrialEnded):
        form |= {"largest_fitting": event.bracket.fits, "smallest_failing": event.bracket.fails}
    return {"kind": kind, **form}


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the way out must not be cut short
    raise _Stopped


if __name__ == "__main__":
    sys.exit(main())
