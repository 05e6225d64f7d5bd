"""The catalogue: every figure is sourced and plausible, every name means what it says."""

from __future__ import annotations

import dataclasses

import pytest

from autobatch.errors import UsageError
from autobatch.gpu.catalogue import Card, find_card, load_catalogue, working_aliases

MIB = 1 << 20
CARDS = load_catalogue()
BY_NAME = {card.name: card for card in CARDS}

ASKED_FOR = {
    "T4": ("Tesla T4", 15360, (7, 5), 40),
    "V100-SXM2-16GB": ("Tesla V100-SXM2-16GB", 16384, (7, 0), 80),
    "V100-SXM2-32GB": ("Tesla V100-SXM2-32GB", 32768, (7, 0), 80),
    "RTX-3060-12GB": ("NVIDIA GeForce RTX 3060", 12288, (8, 6), 28),
    "RTX-3090": ("NVIDIA GeForce RTX 3090", 24576, (8, 6), 82),
    "RTX-4090": ("NVIDIA GeForce RTX 4090", 24564, (8, 9), 128),
    "RTX-5090": ("NVIDIA GeForce RTX 5090", 32607, (12, 0), 170),
    "A10": ("NVIDIA A10", 23028, (8, 6), 72),
    "A10G": ("NVIDIA A10G", 23028, (8, 6), 80),
    "A40": ("NVIDIA A40", 46068, (8, 6), 84),
    "RTX-A6000": ("NVIDIA RTX A6000", 49140, (8, 6), 84),
    "L4": ("NVIDIA L4", 23034, (8, 9), 58),
    "L40S": ("NVIDIA L40S", 46068, (8, 9), 142),
    "A100-SXM4-40GB": ("NVIDIA A100-SXM4-40GB", 40960, (8, 0), 108),
    "A100-PCIE-40GB": ("NVIDIA A100-PCIE-40GB", 40960, (8, 0), 108),
    "A100-SXM4-80GB": ("NVIDIA A100-SXM4-80GB", 81920, (8, 0), 108),
    "A100-PCIE-80GB": ("NVIDIA A100 80GB PCIe", 81920, (8, 0), 108),
    "H100-SXM5-80GB": ("NVIDIA H100 80GB HBM3", 81559, (9, 0), 132),
    "H100-PCIE-80GB": ("NVIDIA H100 PCIe", 81559, (9, 0), 114),
    "H200": ("NVIDIA H200", 143771, (9, 0), 132),
    "B200": ("NVIDIA B200", 183359, (10, 0), 148),
}

AMBIGUOUS = {
    "A100": {"A100-SXM4-40GB", "A100-PCIE-40GB", "A100-SXM4-80GB", "A100-PCIE-80GB"},
    "A100-SXM": {"A100-SXM4-40GB", "A100-SXM4-80GB"},
    "A100-SXM4": {"A100-SXM4-40GB", "A100-SXM4-80GB"},
    "A100-PCIE": {"A100-PCIE-40GB", "A100-PCIE-80GB"},
    "V100": {"V100-SXM2-16GB", "V100-SXM2-32GB"},
    "V100-SXM2": {"V100-SXM2-16GB", "V100-SXM2-32GB"},
    "V100-PCIE": {"V100-SXM2-16GB", "V100-SXM2-32GB"},
}


def test_the_catalogue_holds_the_cards_asked_for() -> None:
    """Every card is there once, with the name, total, capability and multiprocessors that it is known by."""
    found = {
        card.name: (card.nvml_name, card.nvml_total_bytes // MIB, card.compute_capability, card.sm_count)
        for card in CARDS
    }
    assert found == ASKED_FOR
    assert len(CARDS) == len(ASKED_FOR)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_figure_has_a_source(card: Card) -> None:
    """Each field but the names of our own says where it comes from, and nothing else does."""
    ours = {"name", "aliases", "sources"}
    assert set(card.sources) == {one.name for one in dataclasses.fields(card)} - ours
    assert all(len(source) > 8 for source in card.sources.values())


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_totals_are_what_a_driver_could_report(card: Card) -> None:
    """CUDA's total lies below NVML's by what a driver keeps: 100 MiB to 1 GiB, or 3 % with ECC in DRAM."""
    assert 100 * MIB <= card.reserved_bytes <= max(1024 * MIB, card.nvml_total_bytes * 3 // 100)
    assert card.nvml_total_bytes % MIB == 0


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_context_and_limits_are_plausible(card: Card) -> None:
    """The context is hundreds of MiB with a range around it; a block opts into no more than its multiprocessor has."""
    assert 100 * MIB <= card.context_low_bytes <= card.context_bytes <= card.context_high_bytes <= 900 * MIB
    assert card.context_low_bytes < card.context_high_bytes
    assert 48 << 10 < card.shared_per_block_optin_bytes <= card.shared_per_sm_bytes
    assert card.max_threads_per_sm in {1024, 1536, 2048}
    assert card.max_blocks_per_sm in {16, 24, 32}
    assert MIB < card.l2_bytes < 256 * MIB
    assert card.memory_bus_bits % 64 == 0


def test_exact_cuda_totals_are_those_published() -> None:
    """Three totals that many public outputs agree on, to the byte."""
    assert BY_NAME["A100-SXM4-40GB"].cuda_total_bytes == 42_298_834_944
    assert BY_NAME["T4"].cuda_total_bytes == 15_835_660_288
    assert BY_NAME["V100-SXM2-32GB"].cuda_total_bytes == 34_072_559_616


def test_every_name_is_of_one_card_or_ambiguous_on_purpose() -> None:
    """All names of all cards resolve to their card; those that do not are the list above and no others."""
    owners: dict[str, set[str]] = {}
    for card in CARDS:
        for name in (card.name, card.nvml_name, *card.aliases):
            owners.setdefault(name, set()).add(card.name)
    assert {name: cards for name, cards in owners.items() if len(cards) > 1} == AMBIGUOUS
    for name, cards in owners.items():
        if name not in AMBIGUOUS:
            assert {find_card(name).name} == cards


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("A100-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA-A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA-A100-SXM4-40GB-SHARED", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIE-80GB"),
        ("NVIDIA-A100-80GB-PCIe", "A100-PCIE-80GB"),
        ("H100-80GB", "H100-SXM5-80GB"),
        ("h100", "H100-SXM5-80GB"),
        ("NVIDIA-H100-80GB-HBM3", "H100-SXM5-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIE-80GB"),
        ("T4", "T4"),
        ("Tesla-T4", "T4"),
        ("nvidia tesla t4", "T4"),
        ("L4", "L4"),
        ("l40s", "L40S"),
        ("A10G", "A10G"),
        ("a10", "A10"),
        ("RTX 4090", "RTX-4090"),
        ("rtx_4090", "RTX-4090"),
        ("GeForce RTX 3060", "RTX-3060-12GB"),
        ("GeForceRTX3090", "RTX-3090"),
        ("V100-PCIE-32GB", "V100-SXM2-32GB"),
        ("a6000", "RTX-A6000"),
        ("NVIDIA-B200", "B200"),
    ],
)
def test_usual_names_resolve(name: str, card: str) -> None:
    """Names as people, nvidia-smi, clouds and Kubernetes write them, in any case."""
    assert find_card(name).name == card


@pytest.mark.parametrize("name", [*AMBIGUOUS, "nvidia a100", "Tesla V100"])
def test_an_ambiguous_name_lists_its_choices(name: str) -> None:
    """It is an error that names every card that was meant, and no other."""
    with pytest.raises(UsageError, match="ambiguous") as caught:
        find_card(name)
    choices = AMBIGUOUS[name.upper().replace("NVIDIA ", "").replace("TESLA ", "")]
    assert set(str(caught.value).split("write one of ")[1].split(", ")) == choices


@pytest.mark.parametrize(
    ("name", "nearest"), [("A100-SMX4-40GB", "A100-SXM4-40GB"), ("RTX 4091", "RTX-4090"), ("H201", "H200")]
)
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    """A slip of the pen is answered with the card that was meant and with where all are listed."""
    with pytest.raises(UsageError, match="autobatch gpus") as caught:
        find_card(name)
    assert repr(name) in str(caught.value)
    assert nearest in str(caught.value)


@pytest.mark.parametrize("name", ["", "NVIDIA", "€", "Radeon RX 7900 XTX"])
def test_a_name_unlike_any_is_a_usage_error(name: str) -> None:
    """Nothing near is still one clear line."""
    with pytest.raises(UsageError, match="cannot be emulated"):
        find_card(name)


def test_working_aliases_are_those_that_find_their_card() -> None:
    """All but the ambiguous ones, which `find_card` refuses."""
    for card in CARDS:
        assert {find_card(alias) for alias in working_aliases(card)} <= {card}
        assert set(card.aliases) - set(working_aliases(card)) == {
            name for name in AMBIGUOUS if card.name in AMBIGUOUS[name]
        }


def test_impossible_figures_are_refused() -> None:
    """A card whose CUDA total is not below NVML's, or whose context leaves its range, cannot be made."""
    card = BY_NAME["T4"]
    with pytest.raises(ValueError, match="not below"):
        dataclasses.replace(card, cuda_total_bytes=card.nvml_total_bytes)
    with pytest.raises(ValueError, match="not within"):
        dataclasses.replace(card, context_bytes=card.context_high_bytes + 1)


def test_the_catalogue_is_read_once() -> None:
    """Every call gives the same cards, which are values and can be keys."""
    assert load_catalogue() is CARDS
    assert len({*CARDS, *CARDS}) == len(CARDS)
