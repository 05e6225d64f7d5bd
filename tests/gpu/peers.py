"""The finders of others, as far as they are installed here, and ours look for the same job's size on this machine's card.

    python tests/gpu/peers.py OUT.json [--seconds S] [--limit GIB] [--quick]

As `tests/benchmarks/peers_at_work.py`, with real seconds: every finder with its own defaults, in a process that has not touched
CUDA, and the card kept to so many GiB, so that it does not take an hour. Then each answer trains, and the largest size that
trains is found. It ends within `--seconds`; what was not reached is told.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recordings import GIB, ROOT, end_in_order, say, write_recording

sys.path.insert(0, str(ROOT / "tests/benchmarks"))

from peer_finders import OURS
from peer_trials import OUT_OF_TIME
from peers_at_work import DEEPSPEED, Answers, Card, installed_finders, look

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JOBS = ("resnet50?image=224", "gpt2?seq_len=512", "vit?image=224", "hf:gpt2?task=causal-lm&seq_len=512")
QUICK_JOB = "gpt2?seq_len=512&layers=2&width=256&heads=4&vocab=8192"
STEPS = 2
"""Optimizer steps of a training with an answer: each is a whole batch of 256 samples, and takes real time."""


class TimeUpError(Exception):
    """There is no time left to ask."""


class TimedCard(Card):
    """The card of this machine, for so long, and as large as a smaller one."""

    def __init__(self, log: Path, *, deadline: float, limit_bytes: int) -> None:
        self._deadline, self._limit_bytes = deadline, limit_bytes
        super().__init__("here", sys.executable, log, is_emulated=False)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have something run; raises `TimeUpError` where it could not end in time."""
        left = self._deadline - time.monotonic()
        if left < 5:
            raise TimeUpError
        answer = super().ask(limit_bytes=self._limit_bytes, within=left, **request)
        if answer["error"].startswith(OUT_OF_TIME):  # ours, and nothing that the finder or the size could help
            raise TimeUpError
        return answer


def compare(
    jobs: Sequence[str], card: Card, finders: Sequence[str], keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Job by job as far as time goes; each with what was found, and whether that is all. `keep` is given them after each."""
    pairs: list[dict[str, Any]] = []
    for job in jobs:
        answers = Answers(job=job, card="here", steps=STEPS)
        with contextlib.suppress(TimeUpError, RuntimeError):  # or the process that runs them is gone
            look(card, answers, finders)
        whole = answers.is_done(finders)
        pairs.append(
            {**dataclasses.asdict(answers), "true_maximum": answers.true_maximum if whole else None, "is_whole": whole}
        )
        keep(pairs)
        for finder, found in answers.found.items():
            say(f"  {job}: {finder}: {found['answer'] or found['error']} in {found['seconds']:.1f} s")
        say(f"  {job}: the largest that trains is {pairs[-1]['true_maximum'] or 'not found in time'}")
        if not whole:
            break


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--limit", type=float, default=16.0, metavar="GIB")
    parser.add_argument("--quick", action="store_true", help="one small job, 2 GiB")
    asked = parser.parse_args()
    end_in_order()
    began = time.monotonic()
    jobs, limit = ((QUICK_JOB,), 2.0) if asked.quick else (JOBS, asked.limit)
    versions = installed_finders(sys.executable)
    versions.pop(DEEPSPEED, None)  # it starts a job for each size, and fetches what it needs

    def keep(pairs: list[dict[str, Any]]) -> None:
        whole = {one["job"] for one in pairs if one["is_whole"]}
        content = {"limit_gib": limit, "steps": STEPS, "versions": versions, "pairs": pairs}
        write_recording(asked.out, {**content, "not_reached": [job for job in jobs if job not in whole]})

    with tempfile.TemporaryDirectory(prefix="autobatch-peers-") as folder:
        deadline, log = began + asked.seconds, Path(folder) / "log"
        card = TimedCard(log, deadline=deadline, limit_bytes=int(limit * GIB))
        try:
            compare(jobs, card, [next(iter(OURS)), *versions], keep)
        finally:
            card.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
