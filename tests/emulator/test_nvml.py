"""NVML as its real bindings read it: the same memory as CUDA's, per card and per process, from any process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autobatch.emulator.machine import DRIVER_VERSION
from autobatch.gpu.catalogue import find_card

if TYPE_CHECKING:
    from conftest import ScriptRunner

SCRIPTS = Path(__file__).parent / "scripts"
MIB = 1 << 20
CARDS = ("T4", "A100-SXM4-40GB")
HELD = (1000 * MIB, 20000 * MIB)
TENANT = 512 * MIB


@pytest.fixture(scope="module")
def reading(scripts: ScriptRunner) -> Any:
    """What a monitor reads while another process holds memory on both cards; that process's id with it."""
    with scripts.open(*CARDS, tenant_bytes=TENANT) as machine:
        with scripts.start(machine, SCRIPTS / "driver.py", "hold", *map(str, HELD)) as holder:
            assert holder.stdout is not None
            assert json.loads(holder.stdout.readline()) == [0] * 4
            output, errors = scripts.start(machine, SCRIPTS / "readings.py").communicate(timeout=60)
            holder.kill()
        assert not errors
        return {**json.loads(output), "holder": holder.pid, "owner": os.getpid()}


@pytest.mark.parametrize("index", [0, 1])
def test_identity(reading: Any, index: int) -> None:
    """Name, capability, UUID and bus are the card's own."""
    card, found = find_card(CARDS[index]), reading["cards"][index]
    assert found["name"] == card.nvml_name
    assert tuple(found["capability"]) == card.compute_capability
    assert found["uuid"].startswith("GPU-")
    assert found["index_by_uuid"] == index
    assert found["bus"] == f"00000000:0{index + 1}:00.0"


def test_cards_differ(reading: Any) -> None:
    """No two cards share a UUID."""
    assert len({card["uuid"] for card in reading["cards"]}) == len(CARDS)


@pytest.mark.parametrize("index", [0, 1])
def test_memory(reading: Any, index: int) -> None:
    """NVML's total is more than CUDA's by what the driver keeps; version 1 counts that as used, version 2 apart."""
    card, found = find_card(CARDS[index]), reading["cards"][index]
    used = TENANT + card.context_bytes + HELD[index]
    free = card.cuda_total_bytes - used
    assert found["v2"] == [card.nvml_total_bytes, card.reserved_bytes, free, used]
    assert found["v1"] == [card.nvml_total_bytes, free, used + card.reserved_bytes]


@pytest.mark.parametrize("index", [0, 1])
def test_processes(reading: Any, index: int) -> None:
    """Each process is listed with its bytes, context included, and the tenant under the machine's owner."""
    card = find_card(CARDS[index])
    expected = {str(reading["owner"]): TENANT, str(reading["holder"]): card.context_bytes + HELD[index]}
    assert reading["cards"][index]["processes"] == expected
    assert reading["cards"][index]["graphics"] == 0


def test_driver(reading: Any) -> None:
    """The driver's version says what it is."""
    assert reading["driver"] == DRIVER_VERSION == "0.1.emulated"
    assert reading["cuda"] >= 12000


@pytest.mark.parametrize("what", ["utilisation", "temperature", "power", "fan", "clock", "display", "state", "ecc"])
def test_what_no_card_is_there_for(reading: Any, what: str) -> None:
    """Figures that only a running card has are "not supported", never zero."""
    assert reading["cards"][0][what] == "NVMLError_NotSupported"


def test_errors(reading: Any) -> None:
    """Wrong calls fail as NVML's do."""
    assert reading["cards"][0]["missing"] == "NVMLError_FunctionNotFound"
    assert reading["beyond"] == "NVMLError_InvalidArgument"
    assert reading["unknown_uuid"] == "NVMLError_NotFound"
    assert (reading["uninitialised"], reading["after_shutdown"]) == ("NVMLError_Uninitialized",) * 2
