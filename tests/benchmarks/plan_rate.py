"""How many plan queries a second one worker answers, against a bare FastAPI handler in the same run.

    python tests/benchmarks/plan_rate.py [--quick] [--write]

Both are served by uvicorn in a process of their own and asked over eight
connections, in turns, so that a slow moment of the machine meets both. Three kinds of question: the same one again and again, as
schedulers ask; the same with an ETag (304); and another one each time, which no memory of answers helps. The bars: the rate of
the same question 0.6 times the bare handler's at least, its 99th percentile 50 ms at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "server"), str(ROOT / "tests")]

from results import Result, machine, markdown_table, run_benchmark

CONNECTIONS = 8
ROUNDS = 5
RATIO_BAR = 0.6
PERCENTILE_BAR_MS = 50.0
QUERY = "/v1/plan?workload=gpt2&gpu=A100-SXM4-40GB&target={target}&world_size=1"


def serve(kind: str, port: int, folder: str) -> None:
    """Serve one of the two, in this process."""
    import uvicorn

    if kind == "bare":
        from fastapi import FastAPI

        app = FastAPI()

        @app.get("/v1/plan")
        async def bare() -> dict[str, str]:
            return {"verdict": "fits"}

        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
        return
    from service_fakes import make_report, make_settings

    from autobatch.store import NewMeasurement
    from autobatch_server.app import create_app
    from autobatch_server.database import open_database
    from autobatch_server.logs import configure_logging
    from autobatch_server.services import open_services

    configure_logging("INFO")  # with the line for each request that the service writes
    settings = make_settings(Path(folder), emulated_slots=1)
    with open_database(settings.database_url) as database, open_services(settings, database) as services:
        for _ in range(3):
            new = NewMeasurement.of(make_report(largest=37), workload="gpt2", gpu="A100-SXM4-40GB", source="reported")
            services.measurements.add(new, token_id=None)
        token, text = services.tokens.create("bench", ["plan:read"], seconds=None)
        del token
        (Path(folder) / "token").write_text(text)
        with services.running() as runner:
            uvicorn.run(
                create_app(services, runner=runner), host="127.0.0.1", port=port, log_config=None, access_log=False
            )


@contextlib.contextmanager
def server(kind: str, folder: Path) -> Iterator[int]:
    """One of the two in a process of its own; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    environment_path = f"{ROOT}:{ROOT / 'server'}:{ROOT / 'tests'}"
    command = [
        "env",
        f"PYTHONPATH={environment_path}",
        sys.executable,
        __file__,
        "--serve",
        kind,
        str(port),
        str(folder),
    ]
    with (folder / f"{kind}.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(port)
            yield port
        finally:
            process.terminate()


def wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("the server did not start")


async def ask(port: int, paths: Iterator[str], headers: str, seconds: float) -> list[float]:
    """Ask over one connection until the time is up; the latency of each answer in seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    latencies = []
    until = time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        writer.write(f"GET {next(paths)} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        if status not in {200, 304}:
            raise RuntimeError(f"status {status}")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if length:
            await reader.readexactly(int(length[0].partition(b":")[2]))
        latencies.append(time.perf_counter() - started)
    writer.close()
    return latencies


def load(port: int, make_paths: Callable[[int], Iterator[str]], headers: str, seconds: float) -> list[float]:
    async def all_connections() -> list[float]:
        found = await asyncio.gather(
            *(ask(port, make_paths(number), headers, seconds) for number in range(CONNECTIONS))
        )
        return [latency for one in found for latency in one]

    return asyncio.run(all_connections())


def same(number: int) -> Iterator[str]:
    del number
    while True:
        yield QUERY.format(target=256)


def distinct(number: int) -> Iterator[str]:
    target = 256 + number * 1_000_000
    while True:
        target += 8
        yield QUERY.format(target=target % 4096 * 8 + 64) + f"&tolerance={target % 997 / 1e6:.6f}"


def etag(port: int, headers: str) -> str:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"GET {QUERY.format(target=256)} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{headers}\r\n".encode()
        )
        head = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return next(line.partition(": ")[2] for line in head.split("\r\n") if line.lower().startswith("etag"))


def rates(seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """Median rates and 99th percentiles over the rounds."""
    with (
        tempfile.TemporaryDirectory() as name,
        server("bare", Path(name)) as bare,
        server("service", Path(name)) as service,
    ):
        authorised = f"Authorization: Bearer {(Path(name) / 'token').read_text()}\r\n"
        known = authorised + f"If-None-Match: {etag(service, authorised)}\r\n"
        kinds: dict[str, tuple[int, Callable[[int], Iterator[str]], str]] = {
            "bare": (bare, same, ""),
            "same": (service, same, authorised),
            "same_etag": (service, same, known),
            "distinct": (service, distinct, authorised),
        }
        for port, paths, headers in kinds.values():
            load(port, paths, headers, 0.5)  # warm
        found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, (port, paths, headers) in kinds.items():
                found[kind].append(load(port, paths, headers, seconds))
    return {
        kind: {
            "per_second": statistics.median(len(one) / seconds for one in times),
            "p50_ms": 1e3 * statistics.median(sorted(one)[len(one) // 2] for one in times),
            "p99_ms": 1e3 * statistics.median(sorted(one)[int(len(one) * 0.99)] for one in times),
        }
        for kind, times in found.items()
    }


def measure(*, quick: bool) -> Result:
    """Load both."""
    figures = rates(0.3 if quick else 2.0, 1 if quick else ROUNDS)
    bare = figures["bare"]["per_second"]
    for kind in figures:
        figures[kind]["ratio"] = figures[kind]["per_second"] / bare
    named = {
        "bare": "a bare FastAPI handler",
        "same": "the same question again",
        "same_etag": "the same with an ETag",
        "distinct": "another question each time",
    }
    rows = [
        (
            named[kind],
            f"{one['per_second']:,.0f}",
            f"{one['ratio']:.2f}",
            f"{one['p50_ms']:.2f}",
            f"{one['p99_ms']:.2f}",
        )
        for kind, one in figures.items()
    ]
    head = ("`GET /v1/plan`", "a second", "against bare", "median (ms)", "99 % within (ms)")
    text = (
        f"# The service's rate and latency\n\n{machine()}; one worker, {CONNECTIONS} connections, the client on the same cores. "
        f"The bars: {RATIO_BAR:g} of the bare handler for the same question, 99 % within {PERCENTILE_BAR_MS:g} ms.\n\n"
        f"{markdown_table(head, rows)}"
    )
    ratio, slowest = figures["same"]["ratio"], figures["same"]["p99_ms"]
    misses = []
    if not quick and ratio < RATIO_BAR:
        misses.append(f"{ratio:.2f} of a bare handler's rate, the bar is {RATIO_BAR:g}")
    if not quick and slowest > PERCENTILE_BAR_MS:
        misses.append(f"99 % within {slowest:.1f} ms, the bar is {PERCENTILE_BAR_MS:g}")
    shown = {kind: {name: round(value, 3) for name, value in one.items()} for kind, one in figures.items()}
    return Result(name="plan_rate", data={"machine": machine(), **shown}, text=text, misses=tuple(misses))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(run_benchmark(measure, __doc__))
