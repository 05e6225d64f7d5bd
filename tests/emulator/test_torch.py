"""The stock CUDA build of torch on emulated cards: what training does works, and memory is kept to the byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autobatch.gpu.catalogue import find_card

if TYPE_CHECKING:
    from conftest import ScriptRunner
    from emulator.conftest import OlderTorch

SCRIPTS = Path(__file__).parent / "scripts"
MIB = 1 << 20
T4 = find_card("T4")


@pytest.fixture(scope="module")
def memory(scripts: ScriptRunner) -> Any:
    """A card filled through the allocator."""
    return scripts.run(SCRIPTS / "memory.py", ["T4"]).answer


@pytest.fixture(scope="module")
def training(scripts: ScriptRunner) -> Any:
    """Everything that training does, done once."""
    run = scripts.run(SCRIPTS / "training.py", ["A100-SXM4-40GB"])
    assert run.unsupported_calls == ()
    for name, part in run.answer.items():
        assert "failure" not in part, f"{name}: {part['failure']}"
    return run.answer


def test_out_of_memory_exactly_at_capacity(memory: Any) -> None:
    """All that is left can be taken, to the last granule of 2 MiB, and no granule more."""
    assert memory["all_but_2_mib"]
    assert memory["free_when_full"] < 2 * MIB
    assert (memory["exactly_all"], memory["one_granule_more"]) == (True, False)
    assert memory["free_again"]
    assert memory["after"]


def test_the_error_is_torchs_own(memory: Any) -> None:
    """The text names the card's capacity as the real one does."""
    assert "CUDA out of memory. Tried to allocate" in memory["error"]
    assert "GPU 0 has a total capacity of 14.75 GiB" in memory["error"]


def test_context_counts(memory: Any) -> None:
    """A process's context is taken from what it can allocate; the total is CUDA's."""
    assert (memory["total"], memory["context"]) == (T4.cuda_total_bytes, T4.context_bytes)


def test_memory_fraction(memory: Any) -> None:
    """A cap set on the allocator holds."""
    assert memory["fraction"] == [True, False]


def test_expandable_segments(scripts: ScriptRunner) -> None:
    """Segments that grow take what they hold, run out where the card does, and give all of it back."""
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    answer = scripts.run(SCRIPTS / "expandable.py", ["T4"], variables=variables).answer
    assert answer["expandable"]
    assert answer["taken"] == 20 * 100 * MIB
    assert answer["overfull"]
    assert answer["left"] == 0
    assert answer["again"] > T4.cuda_total_bytes - T4.context_bytes - 64 * MIB


def test_copies(training: Any) -> None:
    """Small copies to the card read back; what a kernel would have made reads zero."""
    assert training["copies"] == {"reads_back": True, "strided": True, "large_is_zeros": 0.0, "loss_is_zero": 0.0}


def test_pinned_memory(training: Any) -> None:
    """Pinned memory is told from the rest, and can be copied from."""
    assert training["pinned"] == {"is_pinned": [True, True, False], "reads_back": True}


def test_events_measure_the_host(training: Any) -> None:
    """The time between two events is that which passed on the host."""
    assert 45 < training["events"]["milliseconds"] < 2000
    assert training["events"]["query"]


def test_streams(training: Any) -> None:
    """Streams are made, entered and waited for."""
    assert training["streams"] == {"inside": True, "priority": -1, "query": True}


def test_cuda_graphs(training: Any) -> None:
    """Graphs capture and replay, and a capture ends."""
    assert training["graphs"] == {"capturing": True, "after": False, "shape": [32, 256]}


def test_synchronizing_in_a_capture_fails(training: Any) -> None:
    """Reading a value while capturing fails as on a card, rather than giving a graph that no card would."""
    assert "capture" in training["sync_in_capture"]["error"]


def test_mixed_precision(training: Any) -> None:
    """Autocast and a gradient scaler run."""
    assert training["amp"]["kinds"] == ["torch.float16", "torch.bfloat16"]


def test_checkpointing_saves_memory(training: Any) -> None:
    """Checkpointing lowers the peak, as it does on a card."""
    without, checkpointed = training["checkpointed"]["peaks"]
    assert checkpointed < without / 2


def test_optimizers_hold_their_state(training: Any) -> None:
    """AdamW holds two values of 4 bytes for each parameter, in all three of its forms."""
    expected = 2 * 4 * training["optimizers"]["parameters"]
    assert training["optimizers"]["state_bytes"] == {"fused": expected, "foreach": expected, "single": expected}


def test_memory_snapshot(training: Any) -> None:
    """The allocator's history is recorded."""
    assert training["snapshot"]["segments"] > 0
    assert "segment_alloc" in training["snapshot"]["actions"]


def test_layers(training: Any) -> None:
    """Convolution, batch normalisation, attention and embedding run both ways, with the version of the real cuDNN."""
    assert training["layers"]["shape"] == [4, 3, 32, 32]
    assert training["layers"]["cudnn"] > 90000


def check_properties(answer: Any) -> None:
    expected = [find_card("T4"), find_card("A100-SXM4-40GB")]
    for card, found in zip(expected, answer["cards"], strict=True):
        assert found["name"] == card.nvml_name
        assert (found["major"], found["minor"]) == card.compute_capability
        assert found["total_memory"] == found["mem_get_info_total"] == card.cuda_total_bytes
        assert found["multi_processor_count"] == card.sm_count
        assert found["L2_cache_size"] == card.l2_bytes
        assert found["max_threads_per_multi_processor"] == card.max_threads_per_sm
        assert found.get("shared_memory_per_block", 49152) == 49152
        assert found.get("shared_memory_per_block_optin") in {None, card.shared_per_block_optin_bytes}
        assert found.get("shared_memory_per_multiprocessor") in {None, card.shared_per_sm_bytes}
        assert found.get("regs_per_multiprocessor", 65536) == 65536
        assert found.get("warp_size", 32) == 32
        assert len(found["uuid"]) == 36
    assert [card.get("pci_bus_id", ordinal + 1) for ordinal, card in enumerate(answer["cards"])] == [1, 2]


def test_properties(scripts: ScriptRunner) -> None:
    """What torch reads of a card is what the catalogue says."""
    check_properties(scripts.run(SCRIPTS / "properties.py", ["T4", "A100-SXM4-40GB"]).answer)


@pytest.mark.slow
def test_older_torch(older_torch: OlderTorch) -> None:
    """So it is under CUDA 12's layout, and training runs there."""
    answer = older_torch.run(SCRIPTS / "properties.py", ["T4", "A100-SXM4-40GB"]).answer
    assert answer["cuda"].startswith("12.")
    check_properties(answer)
    parts = older_torch.run(SCRIPTS / "training.py", ["A100-SXM4-40GB"]).answer
    assert {name: part["failure"] for name, part in parts.items() if "failure" in part} == {}


@pytest.mark.slow
def test_compile(scripts: ScriptRunner, tmp_path: Path) -> None:
    """A compiled model's training step runs: kernels are compiled by Triton and loaded, though none computes."""
    if not shutil.which("gcc"):
        pytest.skip("Triton needs gcc")
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    answer = scripts.run(SCRIPTS / "compiled.py", ["A100-SXM4-40GB"], variables=variables).answer
    assert answer["graphs"] == 1
    assert answer["allocated"] > 0
