"""How the answer to a question, and the space of a measurement, change with how many measurements are stored.

    python tests/benchmarks/store_scale.py [--postgresql] [--most N] [--quick] [--write]

A database is filled in steps to a hundred, ten
thousand and a million measurements: workloads × cards × targets. At each step questions are put to the library call that the
service answers by, from the database each time and on jobs drawn at random, and probes go through the queue. The bar: a question
takes at most 1.5 times as long among a million as among a hundred, so that its time does not grow with them.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "server"), str(ROOT / "tests")]

from results import Result, add_flags, finish, machine, markdown_table
from service_fakes import make_report
from sqlalchemy import insert, text

from autobatch import ProbeOptions, load_catalogue
from autobatch.store import MeasurementStore, NewMeasurement, measurement, new_id
from autobatch_server.answers import answer_question
from autobatch_server.database import open_database
from autobatch_server.queue import Limits, Order, ProbeQueue, Slot

if TYPE_CHECKING:
    from autobatch.store import Database

STEPS = (100, 10_000, 1_000_000)
TARGETS = 10
BAR = 1.5
CARDS = [card.name for card in load_catalogue()]


def job(number: int) -> tuple[str, str]:
    """Workload and card of a measurement: ten of each pair, one for each target."""
    pair = number // TARGETS
    return f"job-{pair // len(CARDS)}", CARDS[pair % len(CARDS)]


def fill(database: Database, numbers: range) -> None:
    """Add measurements, many in a statement."""
    forms = {gpu: make_report(gpu=gpu, largest=37) for gpu in CARDS}
    texts = {gpu: report.to_json() for gpu, report in forms.items()}
    for some in (numbers[start : start + 10_000] for start in range(0, len(numbers), 10_000)):
        rows = []
        for number in some:
            workload, gpu = job(number)
            rows.append(
                {
                    "id": new_id("mea"), "created_at": time.time(), "workload": workload, "gpu": gpu, "basis": "emulated",
                    "fingerprint": forms[gpu].fingerprint, "source": "probe", "report_json": texts[gpu],
                }
            )  # fmt: skip
        with database.write() as connection:
            connection.execute(insert(measurement), rows)


def ask(database: Database, stored: int, number: int) -> list[float]:
    """Seconds of each of so many questions, on jobs drawn at random."""
    store, dice, seconds = MeasurementStore(database), random.Random(stored), []
    for _ in range(number):
        workload, gpu = job(dice.randrange(stored))
        options = ProbeOptions(target=dice.randrange(64, 4096))
        began = time.perf_counter()
        answer = answer_question(store, workload=workload, gpu=gpu, options=options)
        seconds.append(time.perf_counter() - began)
        if answer.verdict == "unknown" and answer.measurement is None:
            raise RuntimeError(f"{workload} on {gpu} is not known among {stored}")
    return seconds


def probe_rate(database: Database, number: int) -> float:
    """Probes a second that the queue takes in, gives out and ends."""
    queue = ProbeQueue(database, lease_seconds=60, max_attempts=3)
    slot = Slot(name="bench", basis="emulated", gpu=None)
    report = make_report(gpu="L4", largest=16)
    order = Order(workload="gpt2", gpu="L4", basis="emulated", options={"target": 64})
    began = time.perf_counter()
    for index in range(number):
        request = str(index).encode()
        queue.submit(
            order, principal="bench", token_id=None, limits=Limits(queued=10, per_token=10), key=None, request=request
        )
        claim = queue.claim(slot, "bench")
        if claim is None:
            raise RuntimeError("the queue gives nothing out")
        found = NewMeasurement.of(report, workload="gpt2", gpu="L4", source="probe")
        queue.finish(claim, "succeeded", measurement=found)
    return number / (time.perf_counter() - began)


def bytes_stored(database: Database, path: Path | None) -> int:
    """What the database takes on disk."""
    if path is not None:
        return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
    with database.read() as connection:
        return int(connection.execute(text("select pg_database_size(current_database())")).scalar_one())


def measure(url: str, path: Path | None, most: int) -> list[dict[str, Any]]:
    rows, stored = [], 0
    with open_database(url) as database:
        for step in (step for step in STEPS if step <= most):
            fill(database, range(stored, step))
            stored = step
            ask(database, stored, 50)  # warm
            seconds = ask(database, stored, 400)
            rows.append(
                {
                    "measurements": stored,
                    "question_us": 1e6 * statistics.median(seconds),
                    "question_p99_us": 1e6 * sorted(seconds)[int(len(seconds) * 0.99)],
                    "probes_per_second": probe_rate(database, 50),
                    "bytes_per_measurement": bytes_stored(database, path) / stored,
                }
            )
            sys.stderr.write(f"{stored} measurements done\n")
    return rows


def result(rows: list[dict[str, Any]], *, quick: bool, postgresql: bool) -> Result:
    """Put the steps together."""
    for row in rows:
        row["ratio"] = row["question_us"] / rows[0]["question_us"]
    shown = [{name: round(value, 2) for name, value in row.items()} for row in rows]
    head = ("measurements", "a question (µs)", "against the first", "99 % within (µs)", "probes a second", "bytes each")
    table = markdown_table(
        head,
        [
            (
                f"{row['measurements']:,}",
                f"{row['question_us']:.0f}",
                f"{row['ratio']:.2f}",
                f"{row['question_p99_us']:.0f}",
                f"{row['probes_per_second']:.0f}",
                f"{row['bytes_per_measurement']:,.0f}",
            )
            for row in rows
        ],
    )
    database = "PostgreSQL" if postgresql else "SQLite"
    worst = max(row["ratio"] for row in rows)
    text = f"# The store as it grows, on {database}\n\n{machine()}. The bar for the ratio is {BAR:g}.\n\n{table}"
    misses = () if worst <= BAR or quick else (f"a question takes {worst:.2f} times as long, the bar is {BAR:g}",)
    name = "store_scale_postgresql" if postgresql else "store_scale"
    return Result(name=name, data={"machine": machine(), "steps": shown}, text=text, misses=misses)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument("--postgresql", action="store_true", help="on a PostgreSQL of its own rather than on SQLite")
    parser.add_argument("--most", type=int, default=10_000, help=f"measurements to stop at, up to {STEPS[-1]:,}")
    asked = parser.parse_args()
    most = STEPS[0] if asked.quick else asked.most
    with contextlib.ExitStack() as stack:
        if asked.postgresql:
            from service_databases import PostgresServer

            url, path = stack.enter_context(stack.enter_context(PostgresServer()).new_database()), None
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store.sqlite3"
            url = f"sqlite:///{path}"
        rows = measure(url, path, most)
    return finish(result(rows, quick=asked.quick, postgresql=asked.postgresql), asked)


if __name__ == "__main__":
    sys.exit(main())
