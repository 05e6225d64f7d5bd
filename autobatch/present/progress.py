"""A probe's progress on standard error: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from autobatch.facts import DeviceFacts
from autobatch.present.tables import OUTCOME_WORDS, window_text
from autobatch.probing import Noted, TrialEnded, TrialStarted
from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.text import Text

    from autobatch.probing import ProbeEvent
    from autobatch.ranking import CardRanked
    from autobatch.search import Bracket
    from autobatch.trial import Trial

__all__ = ["ProgressLines", "RankingLines"]


class _Live:
    """A console with a line that moves where it is a terminal. A context manager; says on the way in what is being started."""

    def __init__(self, console: Console, starting: str, *, live: bool) -> None:
        self._console, self._starting = console, starting
        self._status = console.status(starting) if console.is_terminal and live else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        else:
            self._console.print(self._starting, highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()


class RankingLines(_Live):
    """Shows each candidate of a ranking as it is done. A context manager; called with each `CardRanked`."""

    def __init__(self, console: Console, *, live: bool = True) -> None:
        """Prepare to write.

        Args:
            console: where to.
            live: whether a terminal shows how many are done, in a line that moves.
        """
        super().__init__(console, "starting torch, and emulating each card …", live=live)

    def __call__(self, event: CardRanked) -> None:
        """Show one candidate."""
        from rich.text import Text

        from autobatch.present.placements import cards_text, plan_words

        one = event.placement
        cached = one.report.cached if one.report is not None else None
        number = len(one.report.trials) - (cached.num_trials if cached else 0) if one.report is not None else 0
        words = f"{number} trial{'s' if number > 1 else ''}" if number else "remembered"
        trials = f"   {words}" if one.report is not None else ""
        line = Text(f"{event.done:>4} of {event.of}  {cards_text(one):<22}{plan_words(one)}{trials}")
        self._console.print(line, highlight=False, no_wrap=True, overflow="ellipsis")
        if self._status is not None:
            self._status.update(f"{event.done} of {event.of} done")


class ProgressLines(_Live):
    """Shows each event of a probe: which size is tried, what it took, and the bracket around the answer.

    A context manager; called with each `ProbeEvent`.
    """

    def __init__(self, console: Console, *, live: bool = True, starting: str = "starting torch …") -> None:
        """Prepare to write.

        Args:
            console: where to.
            live: whether a terminal shows what is under way, in a line that moves; not where others write to it too.
            starting: what is said until the device is known.
        """
        super().__init__(console, starting, live=live)
        self._budget_bytes = 1

    def __call__(self, event: ProbeEvent) -> None:
        """Show one event."""
        from rich.text import Text

        if isinstance(event, DeviceFacts):
            self._budget_bytes = event.memory.budget_bytes
            budget = format_bytes(event.memory.budget_bytes)
            self._line(Text(f"{event.device.name} ({event.basis}), torch {event.torch_version}, budget {budget}"))
        elif isinstance(event, Noted):
            self._line(Text(event.text))
        elif isinstance(event, TrialStarted):
            self._show_start(event)
        else:
            self._show_end(event)

    def _show_start(self, event: TrialStarted) -> None:
        if self._status is not None:
            what = "confirming" if event.confirmation else "trying"
            bracket = _bracket_text(event.bracket) or f"at most {event.ceiling}"
            self._status.update(f"{what} {window_text(event.window)}   {bracket}")

    def _show_end(self, event: TrialEnded) -> None:
        from rich.text import Text

        trial = event.trial
        words, colour = OUTCOME_WORDS[trial.outcome]
        # A confirmation that fits leaves the bracket as it was.
        result = "confirmed" if trial.confirmation and trial.fits else _bracket_text(event.bracket)
        line = Text(f"{window_text(trial.window):>10}  ")
        line.append(f"{words:<13}", colour)
        line.append(f" {self._memory(trial):<24}{_seconds(event.seconds)}   {result}")
        self._line(line)

    def _memory(self, trial: Trial) -> str:
        if trial.outcome is Outcome.OUT_OF_MEMORY:
            asked = trial.oom_request_bytes
            return f"asked for {format_bytes(asked)} more" if asked else ""
        return f"{format_bytes(trial.footprint_bytes)} ({trial.footprint_bytes / self._budget_bytes:.1%})"

    def _line(self, text: Text) -> None:
        self._console.print(text, highlight=False, no_wrap=True, overflow="ellipsis")


def _bracket_text(bracket: Bracket) -> str:
    if bracket.fits is None:
        return "" if bracket.fails is None else f"below {bracket.fails}"
    if bracket.fails is None:
        return f"at least {bracket.fits}"
    return f"between {bracket.fits} and {bracket.fails}"


def _seconds(seconds: float) -> str:
    """What a trial took; nothing of one that had run before it was asked for."""
    return f"{seconds:6.1f} s" if seconds >= 0.05 else " " * 8
