"""One table of names: whoever schedules spells a card in a way of their own and means the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from autobatch import find_card, load_catalogue
from autobatch_server.gpus import GpuProblem, canonical_gpu

if TYPE_CHECKING:
    from service_fakes import RunningService

# python/ray/util/accelerators/accelerators.py, Ray 2: the types of NVIDIA cards that the catalogue holds.
RAY = {
    "T4": "T4",
    "A10G": "A10G",
    "L4": "L4",
    "L40S": "L40S",
    "H100": "H100-SXM5-80GB",
    "H200": "H200",
    "B200": "B200",
    "A100-40G": "A100-SXM4-40GB",
    "A100-80G": "A100-SXM4-80GB",
}
# Labels and gres types as they stand in public manifests and job scripts.
SEEN = {
    "NVIDIA-A100-SXM4-40GB": "A100-SXM4-40GB",
    "A100-SXM4-40GB-SHARED": "A100-SXM4-40GB",
    "NVIDIA-A100-80GB-PCIe": "A100-PCIE-80GB",
    "NVIDIA-H100-80GB-HBM3": "H100-SXM5-80GB",
    "Tesla-T4": "T4",
    "Tesla-T4-SHARED": "T4",
    "NVIDIA-GeForce-RTX-3090": "RTX-3090",
    "nvidia_a100-sxm4-40gb": "A100-SXM4-40GB",
    "nvidia_a100-sxm4-80gb": "A100-SXM4-80GB",
    "nvidia_a100_80gb_pcie": "A100-PCIE-80GB",
    "nvidia_h100_80gb_hbm3": "H100-SXM5-80GB",
    "nvidia_geforce_rtx_4090": "RTX-4090",
    "tesla_t4": "T4",
    "tesla_v100-sxm2-32gb": "V100-SXM2-32GB",
}
SLICES = (
    "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb",
    "A100-SXM4-40GB-MIG-1g.5gb-SHARED",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "nvidia_a100_80gb_pcie_1g.10gb",
    "mig-1g.5gb",
)


def test_every_way_of_spelling_a_card_means_that_card() -> None:
    """NVML's name, Kubernetes' label, shared or not, Slurm's gres type and our own, for the whole catalogue."""
    for card in load_catalogue():
        product = card.kubernetes_product
        spellings = (card.name, card.nvml_name, product, f"{product}-SHARED", card.slurm_type)
        assert {canonical_gpu(name) for name in spellings} == {card.name}
        assert " " not in product + card.slurm_type


@pytest.mark.parametrize(("name", "card"), [*RAY.items(), *SEEN.items()])
def test_names_that_schedulers_use_are_understood(name: str, card: str) -> None:
    """Ray's accelerator types; labels and gres types as found in the open."""
    assert canonical_gpu(name) == card
    assert find_card(name).name == card


@pytest.mark.parametrize("name", ["A100", "V100", "nvidia a100", "NVIDIA-A100-SHARED", "Tesla_V100", "nvidia_a100"])
def test_an_ambiguous_name_gives_the_choices(name: str) -> None:
    """Cards of several sizes go by it; each of them is named, and is understood when it is sent."""
    with pytest.raises(GpuProblem) as caught:
        canonical_gpu(name)
    assert caught.value.code == "ambiguous-gpu"
    choices = caught.value.detail.split("write one of ")[1].split(", ")
    assert len(choices) > 1
    assert {canonical_gpu(choice) for choice in choices} == set(choices)


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_never_taken_for_its_card(name: str) -> None:
    """A MIG slice has a part of the memory: asked for it is refused, reported it keeps a name of its own."""
    with pytest.raises(GpuProblem, match="unknown-gpu") as caught:
        canonical_gpu(name)
    assert "MIG" in caught.value.detail
    assert canonical_gpu(name, strict=False) == name


@pytest.mark.parametrize("name", ["", " ", "nvidia", "H1000", "../etc/passwd", "A100'--", "x" * 500])
def test_what_is_no_card_is_refused(name: str) -> None:
    """Also where reports of unlisted cards are taken, what cannot be a card's name is not."""
    with pytest.raises(GpuProblem, match="unknown-gpu"):
        canonical_gpu(name)


def test_a_card_outside_the_catalogue_is_kept_as_the_driver_names_it() -> None:
    """Only where it was measured; and not where the name holds anything but a name."""
    assert canonical_gpu("NVIDIA GeForce GTX 1080 Ti", strict=False) == "NVIDIA GeForce GTX 1080 Ti"
    for name in ("../x", "a\nb", "", "x" * 129, "MIG\n1g.5gb"):
        with pytest.raises(GpuProblem):
            canonical_gpu(name, strict=False)


def test_the_list_holds_each_name_and_each_works(service: RunningService) -> None:
    """GET /v1/gpus: every name that it lists is taken by GET /v1/plan, or is refused as ambiguous."""
    cards = service.client.get("/v1/gpus").json()["gpus"]
    assert [card["name"] for card in cards] == [card.name for card in load_catalogue()]
    card = next(card for card in cards if card["name"] == "A100-SXM4-40GB")
    for name in (card["name"], card["nvml_name"], card["kubernetes"], card["slurm"], *card["aliases"]):
        answer = service.client.get("/v1/plan", params={"workload": "gpt2", "gpu": name, "target": 8})
        problem = answer.json().get("code")
        assert answer.json().get("gpu") == "A100-SXM4-40GB" or problem == "ambiguous-gpu"
