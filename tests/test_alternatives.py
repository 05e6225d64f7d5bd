"""What can be changed by --what-if, and what is refused before anything is started."""

from __future__ import annotations

import pytest

from autobatch.alternatives import check_changes, parse_change
from autobatch.errors import UsageError
from autobatch.options import ProbeOptions

OPTIONS = ProbeOptions(target=256, headroom="3%")


def test_a_setting_of_the_allocator_joins_those_that_are_there() -> None:
    """Torch reads one variable before 2.9, and the other from there on."""
    change = parse_change("expandable_segments")
    for given in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        before = {given: "max_split_size_mb:64,expandable_segments:False", "HOME": "/"}
        after = change.environment(before)
        wanted = "max_split_size_mb:64,expandable_segments:True"
        assert after == {"PYTORCH_ALLOC_CONF": wanted, "PYTORCH_CUDA_ALLOC_CONF": wanted, "HOME": "/"}
    assert parse_change("headroom=0").environment({"HOME": "/"}) == {"HOME": "/"}


@pytest.mark.parametrize(
    ("text", "name", "changed"),
    [
        ("seq_len=512", "gpt2", "gpt2?seq_len=512"),
        ("seq_len=512", "gpt2?seq_len=64&layers=2", "gpt2?layers=2&seq_len=512"),
        ("checkpointing=true", "hf:c.json?task=causal-lm", "hf:c.json?task=causal-lm&checkpointing=true"),
        ("headroom=0", "gpt2", "gpt2"),
    ],
)
def test_a_parameter_takes_the_place_of_its_earlier_value(text: str, name: str, changed: str) -> None:
    assert parse_change(text).workload(name) == changed


def test_options_are_read_as_a_probe_reads_them() -> None:
    assert parse_change("multiple-of=8").options == {"multiple_of": 8}
    assert parse_change("headroom=512MiB").options == {"headroom": "512MiB"}


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("emulate=L4", "autobatch rank"),
        ("target=512", "--target"),
        ("device=cuda:1", "--device"),
        ("deadline=5", "what can be changed is headroom"),
        ("expandable", "write expandable_segments"),
        ("=5", "write expandable_segments"),
        ("headroom=", "write expandable_segments"),
        ("multiple_of=x", "not a whole number"),
    ],
)
def test_what_is_no_change_is_refused_with_the_way_out(text: str, way_out: str) -> None:
    with pytest.raises(UsageError, match=way_out):
        parse_change(text)


@pytest.mark.parametrize(
    ("job", "text", "said"),
    [
        ("gpt2", "depth=3", "--what-if depth=3: workload gpt2"),
        ("gpt2", "headroom=many", "--what-if headroom=many"),
        ("gpt2", "multiple_of=999", "--what-if multiple_of=999"),
        (("python", "t.py", "{micro_batch_size}", "{accumulation_steps}"), "layers=3", "a command has no parameters"),
    ],
)
def test_a_change_that_cannot_be_probed_is_refused_beforehand(job: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_changes(job, [parse_change(text)], OPTIONS)


def test_what_can_be_probed_passes() -> None:
    check_changes("gpt2", [parse_change("expandable_segments"), parse_change("seq_len=64")], OPTIONS)
