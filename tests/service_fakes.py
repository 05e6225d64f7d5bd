"""A service under test: reports made in code, runs that take milliseconds, a server on a loopback port."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx
import uvicorn

from autobatch import Outcome, ProbeOptions, Report, Trial, find_card, to_json_form
from autobatch.report import Device, Memory, Versions, fingerprint, utc_timestamp
from autobatch_server.app import create_app
from autobatch_server.database import open_database
from autobatch_server.services import Services, open_services
from autobatch_server.serving import IDLE_SECONDS
from autobatch_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from fastapi import FastAPI

    from autobatch.store import Database
    from autobatch_server.execution import Executor, ProbeTask

GIB = 1024**3


def make_trial(
    size: int, *, fits: bool, steps: int = 2, bytes_per_sample: int = GIB, confirmation: bool = False
) -> Trial:
    """A trial of a job whose memory is 2 GiB and `bytes_per_sample` for each sample."""
    used = 2 * GIB + size * bytes_per_sample
    return Trial(
        micro_batch_size=size,
        outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
        micro_batches_per_step=steps,
        steps=3 if fits else 0,
        peak_allocated_bytes=used,
        peak_reserved_bytes=used,
        footprint_bytes=used + GIB // 2,
        alloc_retries=0,
        seconds_per_step=None,
        confirmation=confirmation,
        held_bytes=2 * GIB,
        gradient_bytes=GIB // 2,
        largest_segment_bytes=GIB // 4,
        oom_request_bytes=0 if fits else GIB,
    )


def make_report(
    *,
    target: int = 256,
    largest: int | None = 37,
    gpu: str = "A100-SXM4-40GB",
    workload: str = "gpt2",
    world_size: int = 1,
    basis: str = "emulated",
    torch: str = "2.15.0",
    extra_trials: Sequence[Trial] = (),
) -> Report:
    """The report of a probe whose largest size is `largest` (None: nothing fits) on a card."""
    card = find_card(gpu)
    options = ProbeOptions(target=target, world_size=world_size, emulate=gpu if basis == "emulated" else None)
    plan = None if largest is None else options.make_plan(largest)
    ceiling_reached = largest == options.ceiling
    trials = list(extra_trials)
    if largest is None:
        trials.append(make_trial(1, fits=False, bytes_per_sample=100 * GIB))
    else:
        trials.append(make_trial(largest, fits=True, steps=options.micro_batches_per_step(largest)))
        if not ceiling_reached:
            trials.append(make_trial(largest + 1, fits=False))
    return Report(
        basis=basis,  # type: ignore[arg-type]
        workload=workload,
        fingerprint=fingerprint(workload=workload, gpu=gpu, basis=basis, torch=torch),
        plan=plan,
        objective="max",
        measured_at=utc_timestamp(),
        micro_batches_per_step=trials[-1].micro_batches_per_step,
        max_micro_batch_size=largest,
        smallest_failing=None if ceiling_reached else (largest or 0) + 1,
        ceiling_reached=ceiling_reached,
        monotone=True,
        device=Device(
            name=card.nvml_name,
            uuid="GPU-00000000-0000-0000-0000-000000000000",
            total_bytes=card.nvml_total_bytes,
            compute_capability="{}.{}".format(*card.compute_capability),
            driver="0.0",
        ),
        memory=Memory(budget_bytes=40 * GIB, headroom_bytes=GIB, other_tenants_bytes=0, context_bytes=GIB // 2),
        trials=tuple(trials),
        versions=Versions(autobatch="0", torch=torch, cuda="13.2"),
        options=options,
        certified=True,
        not_modelled=("NCCL buffers",) if basis == "emulated" else (),
        expected_error="about 0.4 %" if basis == "emulated" else "",
    )


@dataclass
class FakeExecution:
    """A run that says what a script has it say, with a pause before each message."""

    messages: list[Mapping[str, Any]]
    pause: float
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self.ended.set()

    def next_message(self, seconds: float) -> Mapping[str, Any] | None:
        """The next message, after its pause."""
        if not self.messages or self.pause > seconds:
            time.sleep(min(seconds, self.pause or 0.01))
            self.pause = max(0.0, self.pause - seconds)
            return None
        time.sleep(self.pause)
        return self.messages.pop(0)


@dataclass
class FakeExecutor:
    """Runs that take milliseconds; `script` makes the messages of one run."""

    script: Callable[[ProbeTask], list[Mapping[str, Any]]]
    pause: float = 0.001
    started: list[FakeExecution] = field(default_factory=list)
    tasks: list[ProbeTask] = field(default_factory=list)

    def start(self, task: ProbeTask) -> FakeExecution:
        """Begin a run."""
        execution = FakeExecution(messages=self.script(task), pause=self.pause)
        self.started.append(execution)
        self.tasks.append(task)
        return execution


def succeeding(task: ProbeTask) -> list[Mapping[str, Any]]:
    """A run of one trial that ends with a report for what was asked."""
    options = task.options
    report = make_report(
        target=options["target"], world_size=options["world_size"], gpu=task.claim.record.order.gpu, workload="gpt2"
    )
    return [
        {"event": {"kind": "trial_started", "window": [37, 37], "confirmation": False}},
        {"event": {"kind": "trial_ended", "trial": to_json_form(report.trials[0]), "seconds": 0.1}},
        {"report": report.to_dict()},
    ]


def failing(task: ProbeTask) -> list[Mapping[str, Any]]:
    """A run whose job raises something."""
    return [{"problem": {"code": "workload-failed", "message": "ValueError: /secret/path", "trace": "Traceback …"}}]


def hanging(task: ProbeTask) -> list[Mapping[str, Any]]:
    """A run that never says anything."""
    return []


def make_settings(folder: Path, **values: Any) -> Settings:
    """Settings with a database of their own and short leases."""
    return Settings(
        **{
            "database_url": f"sqlite:///{folder / 'server.sqlite3'}",
            "lease": 2.0,
            "real_gpus": False,
            "port": 0,
            **values,
        }
    )


@dataclass
class RunningService:
    """A service that answers on a loopback port."""

    url: str
    app: FastAPI
    services: Services
    client: httpx.Client

    def wait_for(self, probe_id: str, *states: str, seconds: float = 20.0) -> dict[str, Any]:
        """Poll a probe until it is in one of those states."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            probe: dict[str, Any] = self.client.get(f"/v1/probes/{probe_id}").json()
            if probe["state"] in states:
                return probe
            time.sleep(0.02)
        raise TimeoutError(f"probe {probe_id} is {probe['state']}, not {states}, after {seconds} s")


@contextlib.contextmanager
def running_service(
    settings: Settings, *, executor: Executor | None = None, database: Database | None = None
) -> Iterator[RunningService]:
    """Serve on a free loopback port, in a thread, for as long as the context lasts."""
    with contextlib.ExitStack() as stack:
        database = database or stack.enter_context(open_database(settings.database_url))
        services = stack.enter_context(open_services(settings, database))
        runner = stack.enter_context(services.running(executor)) if settings.run_probes else None
        app = create_app(services, runner=runner)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host="127.0.0.1",
                port=0,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
                timeout_keep_alive=IDLE_SECONDS,
            )
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until = time.monotonic() + 20
            while not server.started:
                if not thread.is_alive() or time.monotonic() > until:
                    raise RuntimeError("the server did not start")
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                yield RunningService(url=url, app=app, services=services, client=client)
        finally:
            app.state.closing.set()
            server.should_exit = True
            thread.join(30)
