"""The names of cards: as NVML, Kubernetes labels, Ray and Slurm spell them, to the one that this service keeps."""

from __future__ import annotations

import re

from autobatch import Card, UsageError, find_card, load_catalogue

__all__ = ["GpuProblem", "canonical_gpu"]

# The label nvidia.com/gpu.product of a slice ends in -MIG-1g.5gb (github.com/NVIDIA/k8s-device-plugin, gpu-feature-discovery),
# NVML's own name in " MIG 1g.5gb", Slurm's in the profile alone.
_SLICE = re.compile(r"(?i)(?<![a-z])mig(?![a-z])|[0-9]+g[._][0-9]+gb")
_UNKNOWN_CARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()/-]{0,127}")


class GpuProblem(Exception):  # noqa: N818 - a finding about a request, turned into a problem document
    """A request names a card that there is not, or several go by its name."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


def canonical_gpu(name: str, *, strict: bool = True) -> str:
    """Find the one name of a card.

    Args:
        name: any usual name.
        strict: whether a card outside the catalogue is refused; what a driver reports is kept as it is.

    Raises:
        GpuProblem: no card, or several, go by the name.
    """
    if _SLICE.search(name):
        if not strict and _UNKNOWN_CARD.fullmatch(name):
            return name
        detail = "MIG slices are not known: only whole cards are, which GET /v1/gpus lists"
        raise GpuProblem("unknown-gpu", detail)
    try:
        return find_card(name).name
    except UsageError:
        pass
    same = [card.name for card in load_catalogue() if _is_family(name, card)]
    if same:
        raise GpuProblem("ambiguous-gpu", f"several cards go by that name: write one of {', '.join(same)}")
    if strict or not _UNKNOWN_CARD.fullmatch(name):
        raise GpuProblem("unknown-gpu", "no card goes by that name: GET /v1/gpus lists them with their aliases")
    return name


def _is_family(name: str, card: Card) -> bool:
    key = _family_key(name)
    return bool(key) and any(_family_key(alias) == key for alias in card.aliases)


def _family_key(name: str) -> str:
    """What is left of a name without the words that makers and labels put around it."""
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if word]
    while words and words[0] in {"nvidia", "tesla", "geforce"}:
        words.pop(0)
    return "".join(words[:-1] if words[-1:] == ["shared"] else words)
