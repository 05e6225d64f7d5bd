"""The child process in which the command line's trials run.

Requests and answers are lines of JSON over two pipes; the standard streams belong to the training job. The child
dies with its parent, and says what it can before it dies of anything else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

from autobatch.errors import AutobatchError, NoGpuError, UsageError

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

    from autobatch.gpu.opening import OpenDevice
    from autobatch.options import ProbeOptions
    from autobatch.workload.job import TrainingJob

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SERVING = os.getpid()


def main() -> int:
    """Serve trials until the parent closes its end."""
    read_end, write_end, parent = (int(word) for word in sys.argv[1:4])
    _die_with(parent)
    faulthandler.enable()  # a timeout ends the child by SIGABRT: its stack then stands in the log
    with os.fdopen(read_end, "r", encoding="utf-8") as requests, os.fdopen(write_end, "w", encoding="utf-8") as answers:
        try:
            _serve(requests, answers)
        except AutobatchError as error:
            _answer(answers, error=_describe(error))
            return error.exit_code
        except BaseException as error:  # noqa: BLE001 - the process's boundary: what it says is all that the parent learns
            _answer(answers, error=_describe_any(error))
            return 4
    return 0


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _answer(answers: io.TextIOWrapper, **content: object) -> None:
    if os.getpid() != _SERVING:  # a copy that the job forked, and that came back from it
        os._exit(0)
    try:
        answers.write(json.dumps(content) + "\n")
        answers.flush()
    except OSError:
        # Nobody can be told but by the log, and closing the pipe again at the interpreter's end would fail once more.
        sys.stderr.write("the training job closed the pipe to autobatch, a file descriptor that it did not open\n")
        sys.stderr.flush()
        os._exit(4)


def _describe(error: AutobatchError) -> dict[str, str]:
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "traceback": getattr(error, "traceback_text", ""),
    }


def _describe_any(error: BaseException) -> dict[str, str]:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, SystemExit):
        text = f"the training job ended the program (sys.exit({error.code!r})): a job returns, and leaves ending to autobatch"
    elif not isinstance(error, Exception):
        text = f"the training job raised {text}"
    return {"kind": "WorkloadError", "message": text, "traceback": traceback.format_exc()}


def _serve(requests: io.TextIOWrapper, answers: io.TextIOWrapper) -> None:
    from autobatch.jsonform import from_json_form, to_json_form
    from autobatch.options import ProbeOptions
    from autobatch.workload.loader import WorkloadName, load_factory, make_job

    setup = json.loads(requests.readline())
    name = WorkloadName.parse(setup["workload"])
    sys.argv = [name.target]  # a module that reads its arguments while it is imported finds none
    options = from_json_form(ProbeOptions, setup["options"])
    factory = load_factory(name)

    from autobatch.gpu.opening import open_device

    asked: ProbeOptions | None = options
    while asked is not None:
        try:
            with open_device(asked) as device:
                _answer(answers, ready=to_json_form(device.facts))
                asked = _serve_trials(requests, answers, device, asked, lambda: make_job(name, _as_at_start(factory)))
        except (NoGpuError, UsageError) as error:  # of this device; another may do
            _answer(answers, error=_describe(error))
            asked = _next_question(requests.readline())


def _next_question(line: str) -> ProbeOptions | None:
    """The question on another device; None where the parent has closed its end."""
    from autobatch.jsonform import from_json_form
    from autobatch.options import ProbeOptions

    return from_json_form(ProbeOptions, json.loads(line)["open"]) if line else None


def _as_at_start(factory: Callable[..., object]) -> Callable[..., object]:
    """A factory as a fresh process would find torch: what was compiled for one size is not made dynamic by the next."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    return factory


def _serve_trials(
    requests: io.TextIOWrapper,
    answers: io.TextIOWrapper,
    device: OpenDevice,
    options: ProbeOptions,
    make_job: Callable[[], TrainingJob],
) -> ProbeOptions | None:
    """Run what is asked for on a device; gives the question on another one, None where there is no more to come."""
    from autobatch.cache.sources import loaded_files
    from autobatch.jsonform import to_json_form
    from autobatch.throughput import windows_per_trial
    from autobatch.workload.inspection import inspect_job
    from autobatch.workload.running import TrialRunner

    emulated = device.facts.basis == "emulated"
    runner = TrialRunner(make_job, device.memory, min_windows=windows_per_trial(options), timed=not emulated)
    for line in requests:
        request = json.loads(line)
        if "open" in request:
            return _next_question(line)
        if "inspect" in request:
            _answer(answers, inspection=to_json_form(inspect_job(make_job, device.memory, request["inspect"])))
            continue
        if "itemize" in request:
            breakdown = runner.itemize(request["itemize"])
            _answer(answers, breakdown=None if breakdown is None else to_json_form(breakdown))
            continue
        if "files" in request:
            _answer(answers, files=loaded_files())
            continue
        trial = runner(tuple(request["window"]), confirmation=request["confirmation"])
        _answer(answers, trial=to_json_form(trial))
    return None


if __name__ == "__main__":
    sys.exit(main())
