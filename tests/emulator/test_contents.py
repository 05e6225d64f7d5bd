"""What an emulated card's memory holds: small copies from the host until any kernel runs, and zeros otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import ScriptRunner

SCRIPT = Path(__file__).parent / "scripts" / "contents.py"
NUMBERS = [3, -5, 1 << 40]
ZEROS = [0, 0, 0]


@pytest.fixture(scope="module", params=["installed", pytest.param("older", marks=pytest.mark.slow)])
def answer(request: pytest.FixtureRequest, scripts: ScriptRunner) -> Any:
    """What was written and read, with the installed torch and with one for CUDA 12."""
    runner = scripts if request.param == "installed" else request.getfixturevalue("older_torch")
    return runner.run(SCRIPT, ["T4"]).answer


def test_small_copies_read_back(answer: Any) -> None:
    """Until a kernel runs, what the host wrote comes back to the bit, whole or in part."""
    assert (answer["before"], answer["part"]) == (NUMBERS, NUMBERS[1:])
    assert answer["held"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_copies_up_to_64_kib(answer: Any) -> None:
    """One number, a few thousand bytes and 64 KiB are all kept."""
    assert answer["of_a_size"] == [True, True, True]


def test_gathered_copies_read_back(answer: Any) -> None:
    """Copied in, copied on the card and copied out, as frameworks compare the ranks' shapes at their start."""
    assert answer["gathered"] == [NUMBERS, NUMBERS]


def test_reused_block_is_zeros(answer: Any) -> None:
    """What a kernel makes in a block that held a copy is not that copy: zeros, of which none is nonzero."""
    assert answer["reused"]
    assert (answer["made"], answer["nonzero"]) == ([0.0, 0.0, 0.0], [0, 1])


def test_a_kernel_ends_every_copy(answer: Any) -> None:
    """Also those that it did not touch: no tensor then holds numbers while others hold zeros."""
    assert answer["written_earlier"] == ZEROS


def test_made_after_a_layer_is_zeros(answer: Any) -> None:
    """A layer's parameters, small enough to be kept, do not come back in the tensors made after it is gone."""
    assert answer["after_a_layer"] == [[[0.0, 0.0, 0.0], 0]] * 4


def test_written_after_a_kernel(answer: Any) -> None:
    """A copy written later is kept again, and cleared as it would be."""
    assert (answer["written_again"], answer["cleared"]) == (NUMBERS, ZEROS)
