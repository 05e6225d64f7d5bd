"""`autobatch rank --from`: a service's answer in every form that a scheduler reads, and no probe."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from http_answers import answering
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch.cli import main
from autobatch.errors import UsageError
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.options import ProbeOptions
from autobatch.placement import Placement, PlacementTable
from autobatch.present.formats import placement_as_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service_fakes import RunningService

A100 = "A100-SXM4-40GB"
PAIR = ("--gpu", "a100-40gb:2", "--gpu", "L4")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A service that knows gpt2 on two cards: up to 37 samples on one, up to 17 on the other."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:
        for gpu, largest in ((A100, 37), ("L4", 17)):
            report = make_report(gpu=gpu, largest=largest)
            sent = running.client.post("/v1/measurements", json={"report": report.to_dict(), "workload": "gpt2"})
            assert sent.status_code == 201, sent.text
        yield running


def ask(service: RunningService, *words: str) -> int:
    return main(["rank", "gpt2", "--target", "256", "--from", service.url, *words])


def test_the_services_ranking_is_shown_as_our_own_is(
    service: RunningService, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fewest cards first, prices over all cards, and what the figures are."""
    assert ask(service, *PAIR) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpt2, target 256, by gpus, emulated"
    assert lines[3].split()[:5] == ["1", "L4", "16", "16", "–"]
    assert lines[4].split()[:6] == ["2", "2", "×", A100, "32", "4"]
    assert ask(service, *PAIR, "--price", "L4=9", "--price", "a100-40gb=1", "--format", "json") == 0
    table = from_json_form(PlacementTable, json.loads(capsys.readouterr().out))
    assert [(one.gpu, one.price_per_hour) for one in table.placements] == [(A100, 2.0), ("L4", 9.0)]
    assert all(one.measurement for one in table.placements)


def test_the_first_is_written_for_a_shell_and_for_slurm(
    service: RunningService, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plan as variables and flags; its cards by the type of their gres, by a feature, and by a site's own name."""
    printed = {}
    for form in ("env", "args:hf", "slurm", "slurm:constraint"):
        assert ask(service, "--gpu", f"{A100}:2", "--format", form) == 0
        printed[form] = capsys.readouterr().out.strip()
    assert printed["slurm"] == "--gres=gpu:nvidia_a100-sxm4-40gb:2"
    assert printed["slurm:constraint"] == "--gres=gpu:2 --constraint=nvidia_a100-sxm4-40gb"
    assert printed["args:hf"] == "--per_device_train_batch_size 32 --gradient_accumulation_steps 4"
    script = f'{printed["env"]}\necho "$AUTOBATCH_MICRO_BATCH_SIZE $AUTOBATCH_WORLD_SIZE $AUTOBATCH_MEASUREMENT"'
    told = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True).stdout.split()
    assert told[:2] == ["32", "2"]
    assert told[2].startswith("mea_")
    assert ask(service, *PAIR, "--format", "slurm", "--type", "L4=l4") == 0
    assert capsys.readouterr().out.strip() == "--gres=gpu:l4:1"


def test_what_is_unknown_or_does_not_fit_is_an_error_for_scripts(
    service: RunningService, capsys: pytest.CaptureFixture[str]
) -> None:
    """69 where nothing answers, 3 where nothing fits, 5 where the target cannot be split; nothing is printed to be taken up."""
    assert ask(service, "--gpu", "T4", "--format", "env") == 69
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (
        f"no measurement that answers for gpt2: probe it there, or with `autobatch probe … --report-to {service.url}`"
        in (printed.err)
    )
    report = make_report(gpu="T4", largest=None)
    service.client.post("/v1/measurements", json={"report": report.to_dict(), "workload": "gpt2"})
    assert ask(service, "--gpu", "T4", "--format", "slurm") == 3
    assert ask(service, "--gpu", "L4:3", "--format", "env") == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--headroom", "5%"), "--headroom is for a probe"),
        (("--no-cache",), "--cache is for a probe"),
        (("--plot", "cards.svg"), "--plot draws what a probe measures"),
        (("--", "python", "train.py"), "name the training job as it is known there"),
        (("--type", "L4"), "write L4=l4"),
        (("--type", "T4=t4", "--gpu", "L4"), "add --gpu T4"),
    ],
)
def test_what_only_a_probe_takes_is_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], service: RunningService
) -> None:
    """One line, exit 2, before anything is asked."""
    assert ask(service, *words) == 2
    assert said in capsys.readouterr().err


def test_times_are_a_services(capsys: pytest.CaptureFixture[str]) -> None:
    """An emulated ranking has none to rank by."""
    assert main(["rank", "gpt2", "--target", "8", "--gpu", "T4", "--rank-by", "throughput"]) == 2
    assert "give --from URL" in capsys.readouterr().err


def test_an_unknown_workload_and_a_token_are_told(
    service: RunningService, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the service's own words; reading needs the scope plan:read alone."""
    assert main(["rank", "gtp2", "--target", "8", "--from", service.url, "--gpu", "L4"]) == 69
    assert "unknown-workload" in capsys.readouterr().err
    text = service.services.tokens.create("slurm", ["plan:read"], seconds=None)[1]
    assert ask(service, *PAIR) == 69
    assert "a token with the scope plan:read goes into AUTOBATCH_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("AUTOBATCH_TOKEN", text)
    assert ask(service, *PAIR) == 0


def test_a_type_that_a_shell_would_read_is_refused() -> None:
    """What is printed goes unquoted into a command line."""
    placed = Placement(
        rank=1,
        gpu="L4",
        count=1,
        verdict="fits",
        reason="",
        plan=None,
        basis=None,
        price_per_hour=None,
        headroom_bytes=None,
        missing_bytes=None,
    )
    with pytest.raises(UsageError, match="is not a name of letters"):
        placement_as_arguments(placed, "slurm", type_name="l4 --wrap=id")


def saying(text: str) -> Any:
    """A service that always says this."""
    return answering((200, {}, text.encode()))


def one(**values: Any) -> dict[str, Any]:
    """A placement as a service might send it."""
    plan = to_json_form(ProbeOptions(target=256).make_plan(16))
    placed = {"rank": 1, "gpu": "L4", "count": 1, "verdict": "fits", "reason": "r", "plan": plan, "basis": "measured"}
    numbers = {"price_per_hour": None, "headroom_bytes": 1, "missing_bytes": None, "measurement": "mea_1"}
    return {**placed, **numbers, **values}


def table_of(*placements: dict[str, Any]) -> str:
    return json.dumps({"workload": "gpt2", "target": 256, "rank_by": "gpus", "placements": placements})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is not autobatch's service"),
        ("{}", "placementtable.workload is missing"),
        ("[" * 100_000, "cannot be used"),
        (table_of(), "not those of the 1 asked for"),
        (table_of(one(), one()), "not those of the 1 asked for"),
        (table_of(one(gpu="H200")), "not those of the 1 asked for"),
        (table_of(one(count=-5)), "not those of the 1 asked for"),
        (
            table_of(one(plan=to_json_form(ProbeOptions(target=32).make_plan(16)))),
            "of target 32 over 1 ranks, asked was 256",
        ),
        (table_of(one(measurement="a\nexport LD_PRELOAD=/x")), "is no id"),
    ],
)
@pytest.mark.parametrize("form", ["env", "slurm", "slurm:prolog", "table"])
def test_an_answer_to_another_question_is_not_taken(
    text: str, said: str, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed goes into command lines and environments; the error is one line."""
    monkeypatch.setattr("autobatch.client._PAUSES_SECONDS", ())
    with saying(text) as (url, _):
        assert main(["rank", "gpt2", "--target", "256", "--gpu", "L4", "--from", url, "--format", form]) == 69
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_the_first_that_fits_is_taken_and_signs_that_act_on_a_terminal_are_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it stands in the list."""
    unknown = one(gpu="T4", verdict="unknown", plan=None, reason="\x1b[2J\ud800")
    words = ["rank", "gpt2", "--target", "256", "--gpu", "T4", "--gpu", "L4", "--format"]
    with saying(table_of(unknown, one(rank=2))) as (url, _):
        assert main([*words, "slurm", "--from", url]) == 0
        assert capsys.readouterr().out == "--gres=gpu:nvidia_l4:1\n"
        assert main([*words, "slurm:prolog", "--from", url]) == 0
        assert "export AUTOBATCH_MEASUREMENT=mea_1\n" in capsys.readouterr().out
        assert main([*words, "table", "--from", url]) == 0
        assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:abc", "http://a b/", "http://[::1", "http://:80", "http://host:99999"]
)
def test_an_address_that_cannot_be_asked_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit 2."""
    assert main(["rank", "gpt2", "--target", "8", "--gpu", "L4", "--from", url]) == 2
    assert "is no address of a service" in capsys.readouterr().err
