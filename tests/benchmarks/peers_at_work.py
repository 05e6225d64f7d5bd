"""The real finders of others beside ours: the same training step, the same emulated card, real out-of-memory errors.

    python tests/benchmarks/peers_at_work.py [--quick] [--write] [--only JOB …] [--cards A,B] [--no-deepspeed] [--resume FILE]

For each of 20 jobs on each of two cards every finder looks for its batch size, from its own defaults. Then the answers are put to
work: a training that accumulates micro-batches of that size to 256 samples runs 50 optimizer steps, in a process of its own. The
true maximum is the largest size that trains, found by bisection between what survived and what did not, and by trying every size
within 3 of it; sizes that nobody answered with run 5 steps, which is enough for whatever repeats from step to step.

Nothing is computed on an emulated card: memory is emulated, and seconds are what the host needs for the steps. The peers are
installed into a throw-away environment. It takes about an hour; `--resume FILE` keeps what is done there, and goes on from it.
`--quick` takes one small job on one card, the finders that are installed here, and 3 steps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from peer_environment import PeerEnvironment, peer_environment
from peer_finders import FINDERS, OURS, TARGET
from results import BAD, GOOD, MUTED, OTHER, Picture, Result, add_flags, finish, machine, markdown_table

from autobatch import ProbeOptions, __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    from matplotlib.axes import Axes

JOBS = (
    "gpt2?seq_len=1024",
    "gpt2?seq_len=512&layers=6&width=512&heads=8",
    "resnet50?image=512",
    "vit?image=384",
    "hf:gpt2?task=causal-lm&seq_len=512",
    "hf:opt?task=causal-lm&seq_len=512",
    "hf:bert?task=masked-lm&seq_len=512",
    "hf:roberta?task=token-classification&seq_len=512",
    "hf:distilbert?task=masked-lm&seq_len=512",
    "hf:whisper?task=speech-seq2seq",
    "timm:convnext_tiny?image=448",
    "timm:densenet121?image=448",
    "timm:efficientnet_b0?image=512",
    "timm:mixer_l16_224",
    "timm:mobilenetv3_large_100?image=640",
    "timm:regnety_032?image=448",
    "timm:resnet101?image=448",
    "timm:swin_base_patch4_window7_224",
    "timm:vit_base_patch16_224?image=448",
    "timm:vit_large_patch16_224?image=320",
)
CARDS = ("L4", "A100-SXM4-40GB")
QUICK_JOB = "gpt2?seq_len=256&layers=2&width=512&heads=8"
OPTIMIZER_STEPS = 50
"""Of a training with an answer."""
STEPS_BESIDE = 5
"""Of one with any other size."""
NEIGHBOURS = 3
_INTRODUCTION = (
    "{pairs} pairs of a job and a card, bf16 autocast, accumulating to {target}. Memory is emulated, no kernel computes: seconds "
    "are the host's, with two cards side by side. A training runs {steps} optimizer steps in a process of its own; *exact* is "
    "the largest size that survives that."
)
DEEPSPEED = "DeepSpeed autotuning"
DEEPSPEED_PAIRS = ((JOBS[0], CARDS[0]),)
"""It starts a process for each size, which takes ten minutes and more for each pair."""


class Card:
    """A process on a card that runs what is asked of it, one thing at a time."""

    def __init__(self, name: str, python: str, log: Path, *, is_emulated: bool = True) -> None:
        """Start it; where the card is not emulated, it is the one of this machine, whatever its name."""
        self.name, self.python = name, python
        script = str(Path(__file__).with_name("peer_trials.py"))
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "YOLO_CONFIG_DIR": str(log.parent)}
        environment |= {"AUTOBATCH_CACHE": str(log.parent / "cache.db"), "OMP_NUM_THREADS": "1"}
        self._log = log.open("w")
        emulation = [sys.executable, "-m", "autobatch", "emulate", name, "--"] if is_emulated else []
        self._process = subprocess.Popen(
            [*emulation, python, script],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.missing: Sequence[str] = self._read()["missing"]
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have something run."""
        if self._process.stdin is None:
            raise RuntimeError("the card's process has no standard input")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the process on {self.name} ended: {Path(self._log.name).read_text()[-2000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()


@dataclass
class Answers:
    """What was found for one job on one card."""

    job: str
    card: str
    steps: int
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By finder: what it answered, and what that took."""
    trainings: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By size: how a training with it went."""

    @property
    def sizes_answered(self) -> set[int]:
        """The sizes that finders answered with, up to the target: more than a whole batch is never run."""
        return {min(one["answer"], TARGET) for one in self.found.values() if one["answer"]}

    def untried_neighbours(self) -> list[int]:
        """Sizes near the true maximum, as far as it is known, that were not trained with."""
        truth = self.true_maximum or 1
        near = range(max(1, truth - NEIGHBOURS), min(TARGET, truth + NEIGHBOURS) + 1)
        return [size for size in near if size not in self.trainings]

    def planned(self, finder: str) -> int | None:
        """The micro-batch of the plan that our probe makes of its answer; None of others, who make none."""
        answer = self.found[finder]["answer"] if finder in OURS and finder in self.found else None
        return ProbeOptions(target=TARGET).make_plan(answer).micro_batch_size if answer else None

    @property
    def sizes_to_train(self) -> set[int]:
        """Every answer, and the sizes that are planned with ours."""
        return self.sizes_answered | {size for finder in OURS if (size := self.planned(finder))}

    def is_done(self, finders: Iterable[str]) -> bool:
        """Whether every finder has looked, and every answer was put to work for all of the steps."""
        trained = (self.trainings.get(size) for size in self.sizes_to_train)
        whole = all(one is not None and (not one["survives"] or one["steps"] >= self.steps) for one in trained)
        return set(finders) <= set(self.found) and whole and not self.untried_neighbours()

    @property
    def true_maximum(self) -> int | None:
        """The largest size of which all up to it, as far as was tried, survive."""
        return max((size for size, one in self.trainings.items() if one["survives"]), default=None)

    @property
    def steady_maximum(self) -> int | None:
        """The largest that survives without the allocator flushing its cache after the second step."""
        kept = [size for size, one in self.trainings.items() if one["survives"] and one["flushes"] == 0]
        return max(kept, default=None)


def look(card: Card, answers: Answers, finders: Sequence[str]) -> None:
    """Let every finder look that has not yet, put the answers to work, and find the truth."""
    job, steps = answers.job, answers.steps
    for finder in finders:
        if finder in answers.found:
            continue
        if finder == DEEPSPEED:
            answers.found[finder] = _deepspeed(card, job)
        else:
            answers.found[finder] = card.ask(job=job, find=finder)

    def survives(size: int, its_steps: int = min(steps, STEPS_BESIDE)) -> bool:
        known = answers.trainings.get(size)
        if known is None or (known["survives"] and known["steps"] < its_steps):
            answers.trainings[size] = {**card.ask(job=job, train=size, steps=its_steps), "steps": its_steps}
        return bool(answers.trainings[size]["survives"])

    for size in answers.sizes_to_train:
        survives(size, steps)
    low = max((size for size in answers.trainings if survives(size)), default=0)
    above = [size for size in answers.trainings if size > low and not survives(size)]
    high = min(above, default=TARGET + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if survives(middle) else (low, middle)
    while missing := answers.untried_neighbours():  # where one above survives, those near it come next
        for size in missing:
            survives(size)


def _deepspeed(card: Card, job: str) -> dict[str, Any]:
    """Run its autotuner on a card of its own: it starts processes, which no fork can."""
    import time

    began = time.perf_counter()
    code = (
        "import sys, tempfile, pathlib, json; sys.path.insert(0, sys.argv[1]); import peer_finders\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    print(json.dumps(peer_finders.deepspeed(sys.argv[2], pathlib.Path(folder))))"
    )
    command = [sys.executable, "-m", "autobatch", "emulate", card.name, "--", card.python, "-c", code]
    ended = subprocess.run(
        [*command, str(Path(__file__).parent), job],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    lines = ended.stderr.strip().splitlines()
    error = "" if ended.returncode == 0 else (lines[-1] if lines else f"ended with {ended.returncode}")
    found = {"answer": None, "sizes": [], "ooms": None} if error else json.loads(ended.stdout.splitlines()[-1])
    # The steps are those of its processes, which it does not count.
    return {**found, "steps": None, "seconds": seconds, "error": error}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one finder did over all jobs and cards."""

    finder: str
    answers: int
    exact: int
    """Answers that are the true maximum."""
    does_not_train: int
    """Answers with which the training ran out of memory."""
    no_answer: int
    """Runs that ended without one."""
    median_share: float
    """Of the true maximum, over answers that train."""
    worst_share: float
    median_sizes: float | None
    median_steps: float | None
    median_ooms: float | None
    median_seconds: float


def summarise(finder: str, pairs: Sequence[Answers]) -> Row:
    """Put together how one finder did."""
    ran = [(one, one.found[finder]) for one in pairs if finder in one.found]
    given = [(one, min(found["answer"], TARGET)) for one, found in ran if found["answer"]]
    trains = [(one, size) for one, size in given if one.trainings[size]["survives"]]
    shares = [size / (one.true_maximum or size) for one, size in trains]

    def median(what: str) -> float | None:
        figures = [len(set(found[what])) if what == "sizes" else found[what] for _, found in ran if found["answer"]]
        known = [figure for figure in figures if figure is not None]
        return statistics.median(known) if known and any(known) else None

    return Row(
        finder=finder,
        answers=len(given),
        exact=sum(size == one.true_maximum for one, size in trains),
        does_not_train=len(given) - len(trains),
        no_answer=len(ran) - len(given),
        median_share=statistics.median(shares or [0.0]),
        worst_share=min(shares, default=0.0),
        median_sizes=median("sizes"),
        median_steps=median("steps"),
        median_ooms=0.0 if median("sizes") and median("ooms") is None else median("ooms"),
        median_seconds=median("seconds") or 0.0,
    )


def finder_table(rows: Sequence[Row]) -> str:
    """The finders in Markdown."""
    head = (
        "finder",
        "answers",
        "exact",
        "training runs out of memory",
        "share of the maximum",
        "sizes",
        "steps",
        "OOMs",
        "s",
    )

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return markdown_table(
        head,
        [
            (
                row.finder,
                f"{row.answers}" + (f" ({row.no_answer} without)" if row.no_answer else ""),
                row.exact,
                row.does_not_train,
                f"{row.median_share:.0%}, worst {row.worst_share:.0%}",
                number(row.median_sizes),
                number(row.median_steps),
                number(row.median_ooms),
                number(row.median_seconds),
            )
            for row in rows
        ],
    )


def plans_text(pairs: Sequence[Answers]) -> str:
    """How training goes by the plans of our probe, which have no remainder."""
    trained = [one.trainings[size]["survives"] for one in pairs for finder in OURS if (size := one.planned(finder))]
    return (
        "Where an answer does not divide the target, the last micro-batch of each step is smaller: no finder tries that, and two "
        "sizes in turn can leave memory in pieces. Our probe's plans are of one size, which ran: by them "
        f"{sum(trained)} of {len(trained)} trainings survive."
    )


def job_table(pairs: Sequence[Answers], finders: Sequence[str]) -> str:
    """Every answer in Markdown; one with which the training ran out of memory is struck through."""

    def cell(one: Answers, finder: str) -> str:
        found = one.found.get(finder)
        if found is None:
            return ""
        if not found["answer"]:
            return "–"
        trains = one.trainings[min(found["answer"], TARGET)]["survives"]
        return f"{found['answer']}" if trains else f"~~{found['answer']}~~"

    rows = []
    for one in pairs:
        steady = one.steady_maximum
        truth = f"{one.true_maximum}" + ("" if steady == one.true_maximum else f" ({steady} without flushes)")
        rows.append((f"`{one.job}`", one.card, truth, *(cell(one, finder) for finder in finders)))
    return markdown_table(("job", "card", "true maximum", *finders), rows)


def picture(pairs: Sequence[Answers], finders: Sequence[str]) -> Callable[[Axes], None]:
    """Every answer as a share of the true maximum."""

    def paint(axes: Axes) -> None:
        for place, finder in enumerate(finders):
            for one in pairs:
                found = one.found.get(finder)
                if not found or not found["answer"]:
                    continue
                size = min(found["answer"], TARGET)
                trains = one.trainings[size]["survives"]
                colour = (GOOD if finder in OURS else OTHER) if trains else BAD
                axes.plot(
                    size / (one.true_maximum or size),
                    place,
                    marker="o" if trains else "X",
                    color=colour,
                    markersize=5 if trains else 7,
                    alpha=0.75 if trains else 1.0,
                    markeredgewidth=0,
                )
        axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.set_yticks(range(len(finders)), finders)
        axes.set_ylim(len(finders) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel("answer as a share of the largest size that trains; ✕: the training runs out of memory")

    return paint


@contextlib.contextmanager
def environment_for(*, quick: bool) -> Iterator[PeerEnvironment]:
    """Where the finders are: a throw-away environment, or here."""
    if quick:
        yield PeerEnvironment(python=sys.executable, missing={}, seconds=0.0)
        return
    with peer_environment() as made:
        yield made


def installed_finders(python: str) -> dict[str, str]:
    """The finders whose distribution that interpreter has, with its version."""
    wanted = {**{name: distribution for name, (distribution, _) in FINDERS.items()}, DEEPSPEED: "deepspeed"}
    if python == sys.executable:
        found = {}
        for name, distribution in wanted.items():
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(distribution)
        return found
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name, one in json.loads(sys.argv[1]).items():\n"
        "    try: found[name] = m.version(one)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    ended = subprocess.run([python, "-c", code, json.dumps(wanted)], capture_output=True, text=True, check=True)
    return dict(json.loads(ended.stdout))


def kept_answers(file: Path | None) -> list[Answers]:
    """What an earlier run had done when it ended."""
    if file is None or not file.exists():
        return []
    found = [Answers(**json.loads(line)) for line in file.read_text().splitlines()]
    for one in found:
        one.trainings = {int(size): training for size, training in one.trainings.items()}
    return found


def compare(
    jobs: Sequence[str],
    cards: Sequence[str],
    *,
    quick: bool,
    with_deepspeed: bool,
    progress: Callable[[str], None],
    resume: Path | None = None,
    only: Container[str] | None = None,
) -> tuple[list[Answers], dict[str, str]]:
    """Run everything: the cards side by side, each with its jobs in turn; gives the answers, and versions by finder."""
    done = {(one.job, one.card): one for one in kept_answers(resume)}
    with (
        environment_for(quick=quick) as made,
        tempfile.TemporaryDirectory(prefix="autobatch-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        for name, why in made.missing.items():
            progress(f"{name} cannot be installed and is left out: {why}")
        versions = installed_finders(made.python)
        finders = [*OURS, *(name for name in FINDERS if name in versions and (only is None or name in only))]
        opened = [
            stack.enter_context(contextlib.closing(Card(name, made.python, Path(folder) / f"{name}.log")))
            for name in cards
        ]
        for line in opened[0].missing:
            progress(f"cannot be imported: {line}")

        def on_one(card: Card) -> list[Answers]:
            found = []
            for job in jobs:
                asked = with_deepspeed and DEEPSPEED in versions and (job, card.name) in DEEPSPEED_PAIRS
                extra = [DEEPSPEED] if asked else []
                fresh = Answers(job=job, card=card.name, steps=3 if quick else OPTIMIZER_STEPS)
                answers = done.get((job, card.name), fresh)
                found.append(answers)
                if answers.is_done([*finders, *extra]):
                    continue
                look(card, answers, [*finders, *extra])
                shown = ", ".join(f"{name} {one['answer'] or one['error']}" for name, one in answers.found.items())
                progress(f"{job} on {card.name}: {answers.true_maximum}; {shown}")
                if resume is not None:
                    with resume.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(answers)) + "\n")
            return found

        with concurrent.futures.ThreadPoolExecutor(len(opened)) as pool:
            by_card = list(pool.map(on_one, opened))
    pairs = [one for several in zip(*by_card, strict=True) for one in several]
    return pairs, {"autobatch": __version__, **versions}


def result(pairs: Sequence[Answers], versions: dict[str, str]) -> Result:
    """Put everything together."""
    finders = [*OURS, *(name for name in (*FINDERS, DEEPSPEED) if any(name in one.found for one in pairs))]
    rows = [summarise(finder, pairs) for finder in finders]
    spelled = ", ".join(f"{name} {version}" for name, version in versions.items())
    errors = [
        f"- {finder} on `{one.job}`, {one.card}: {one.found[finder]['error']}"
        for one in pairs
        for finder in finders
        if finder in one.found and one.found[finder]["error"]
    ]
    text = "\n\n".join(
        (
            "# Finders at work, emulated",
            _INTRODUCTION.format(pairs=len(pairs), target=TARGET, steps=pairs[0].steps),
            f"{machine()}. {spelled}.",
            finder_table(rows),
            plans_text(pairs),
            "![Every answer as a share of the true maximum](peers_at_work.svg)",
            "Answers that are struck through run out of memory in that training; – is a run that ended without an answer.",
            job_table(pairs, finders),
            "\n".join(errors),
        )
    )
    data = {
        "machine": machine(),
        "versions": versions,
        "finders": [dataclasses.asdict(row) for row in rows],
        "pairs": [
            dataclasses.asdict(one) | {"true_maximum": one.true_maximum, "steady_maximum": one.steady_maximum}
            for one in pairs
        ],
    }
    drawn = Picture(paint=picture(pairs, finders), title="Finders at work, emulated", size=(8.5, 4.6))
    return Result(name="peers_at_work", data=data, text=text, pictures={"peers_at_work": drawn})


def main() -> int:
    """Compare, print, and keep it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument("--only", nargs="*", default=JOBS, metavar="JOB")
    parser.add_argument("--cards", default=",".join(CARDS))
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done there, and go on from it")
    parser.add_argument("--no-deepspeed", dest="deepspeed", action="store_false")
    asked = parser.parse_args()
    jobs, cards = ((QUICK_JOB,), ("T4",)) if asked.quick else (asked.only, asked.cards.split(","))
    pairs, versions = compare(
        jobs,
        cards,
        quick=asked.quick,
        with_deepspeed=asked.deepspeed,
        resume=asked.resume,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return finish(result(pairs, versions), asked)


if __name__ == "__main__":
    sys.exit(main())
