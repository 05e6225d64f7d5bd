"""What convolutions take beside inputs and outputs: cuDNN's own word on a card that is only described to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autobatch.gpu.catalogue import load_catalogue

if TYPE_CHECKING:
    from conftest import ScriptRunner
    from emulator.conftest import OlderTorch

TESTS = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"
SCRIPT = SCRIPTS / "workspaces.py"
IMAGES_BYTES = 32 * 64 * 56 * 56 * 4
WEIGHT_BYTES = 64 * 64 * 3 * 3 * 4
OFF = {"AUTOBATCH_EMULATED_WORKSPACES": "0"}


@pytest.fixture(scope="module")
def answer(scripts: ScriptRunner) -> Any:
    run = scripts.run(SCRIPT, ["A100-SXM4-40GB", "T4"])
    assert run.unsupported_calls == ()  # what cuDNN tries of the driver by itself is none of the program's calls
    return run.answer


def check_forward(found: dict[str, int]) -> None:
    """Tensor cores want channels last: without it in fp32 inputs and weights are copied into it, with bf16 and it nothing."""
    assert found["fp32 first"] >= IMAGES_BYTES + WEIGHT_BYTES
    assert found["bf16 first"] >= (IMAGES_BYTES + WEIGHT_BYTES) // 2
    assert found["bf16 last"] < 1 << 20


def test_a_layout_that_has_to_be_changed_is_paid_for(answer: Any) -> None:
    assert answer["known"]
    check_forward(answer["forward"])


def test_the_backward_has_workspaces_of_its_own(answer: Any) -> None:
    """To the input, gradient and result are copied; to the weights, both operands."""
    assert answer["backward"]["input"] >= 2 * IMAGES_BYTES
    assert answer["backward"]["weight"] >= 2 * IMAGES_BYTES


def test_the_same_question_has_the_same_answer(answer: Any) -> None:
    """From the plan that torch keeps, and from many threads at once, each with its card's own answer."""
    assert answer["again"] == answer["forward"]["fp32 first"] == answer["threads"]["0"]
    assert answer["benchmark"] >= answer["forward"]["bf16 first"]
    assert 0 < answer["threads"]["1"] != answer["threads"]["0"]


def test_asking_touches_no_card(answer: Any) -> None:
    """CuDNN looks for a card by itself: the process is on the one that it uses, and on no other."""
    assert answer["contexts_before"] == [False, False]
    assert answer["contexts_after"] == [True, False]


def test_asking_leaves_the_program_its_calls(answer: Any) -> None:
    """The library looks up hundreds of the driver's calls, of which torch would find none that it looks for later."""
    assert answer["looked_up"] == 200


def test_where_there_is_no_room_another_algorithm_is_taken(answer: Any) -> None:
    """As on a card: torch asks for the next in cuDNN's list."""
    assert 0 < answer["nearly_full"]["taken"] < 8 << 20


def test_every_kind_of_convolution_runs(answer: Any) -> None:
    assert all(answer["kinds"].values())


def test_they_can_be_left_out(scripts: ScriptRunner) -> None:
    """As where cuDNN does not answer: 0 bytes, and it says so."""
    answer = scripts.run(SCRIPT, ["A100-SXM4-40GB"], variables=OFF).answer
    assert not answer["known"]
    assert set(answer["forward"].values()) == set(answer["backward"].values()) == {0}
    assert all(answer["kinds"].values())


def test_cudnn_understands_every_card(scripts: ScriptRunner) -> None:
    """Each of the catalogue is described so that it answers."""
    names = [card.name for card in load_catalogue()]
    for some in (names[:16], names[16:]):
        known = scripts.run(SCRIPTS / "cards_known.py", some).answer
        assert dict(zip(some, known, strict=True)) == dict.fromkeys(some, True)


@pytest.mark.slow
def test_a_card_that_ends_an_older_cudnn_is_not_asked_about(older_torch: OlderTorch) -> None:
    """9.10 dies of compute capability 10.0; that card's convolutions run, and what they take is not known."""
    known = older_torch.run(SCRIPTS / "cards_known.py", ["B200", "A100-SXM4-40GB", "RTX-5090"]).answer
    assert known == [False, True, True]


@pytest.mark.slow
def test_with_the_same_cudnn_a_card_is_met_to_the_digit(older_torch: OlderTorch, tmp_path: Path) -> None:
    """What was published of torch 2.8.0 with its cuDNN, for a convolution that has taken other algorithms since."""
    published = json.loads((TESTS / "data/real/published/conv3d-issue-h100.json").read_text())["figures"]
    script = tmp_path / "script.py"
    rebuilt = "import sys, json; sys.path.insert(0, {!r}); import rebuilt\n"
    script.write_text(
        rebuilt.format(str(TESTS / "benchmarks")) + "print(json.dumps(rebuilt.conv3d_of_an_issue('float32')))\n"
    )
    found = older_torch.run(script, ["H100-80GB"]).answer
    assert {name: round(figure, 4) for name, figure in found.items()} == published


@pytest.mark.slow
def test_an_older_cudnn_answers_too(older_torch: OlderTorch) -> None:
    answer = older_torch.run(SCRIPT, ["A100-SXM4-40GB", "T4"]).answer
    assert answer["known"]
    check_forward(answer["forward"])
