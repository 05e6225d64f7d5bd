"""The cards that can be emulated, read from `gpus.toml`, and the names they go by."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re
import tomllib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Card", "find_card", "load_catalogue", "working_aliases"]

_MIB = 1 << 20
_SEPARATORS = re.compile(r"[\s_-]+")
# The vendor and its product lines; what is left still tells the cards apart.
_PREFIXES = ("nvidia", "tesla", "geforce")
# Kubernetes' GPU feature discovery appends it to the label of a card that is time-sliced.
_SUFFIX = "shared"
_SOURCED_BY_NAME = (
    "nvml_name",
    "compute_capability",
    "cuda_total_bytes",
    "sm_count",
    "l2_bytes",
    "memory_bus_bits",
)
_BY_CAPABILITY = (
    "max_threads_per_sm",
    "max_blocks_per_sm",
    "shared_per_sm_bytes",
    "shared_per_block_optin_bytes",
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as CUDA and NVML describe it, whole and without MIG.

    Each figure holds for one driver branch, named in `sources`; totals and context move by tens of MiB between them.
    """

    name: str
    """What this project calls it, as in `--emulate A100-SXM4-40GB`."""
    nvml_name: str
    """What `nvidia-smi` and `torch.cuda.get_device_name` print."""
    aliases: tuple[str, ...]
    """Other names it goes by; one that several cards share is ambiguous on purpose."""
    nvml_total_bytes: int
    """What NVML calls the total; includes what the driver keeps for itself."""
    cuda_total_bytes: int
    """What CUDA calls the total (`total_memory` in torch), and the most that can be allocated."""
    compute_capability: tuple[int, int]
    """Major and minor."""
    sm_count: int
    """Streaming multiprocessors."""
    context_bytes: int
    """What a training process typically holds outside torch's allocator: CUDA context, modules, library handles."""
    context_low_bytes: int
    """The least of it that is plausible on this card, over drivers and workloads."""
    context_high_bytes: int
    """The most of it that is plausible."""
    l2_bytes: int
    """L2 cache."""
    memory_bus_bits: int
    """Width of the memory interface."""
    max_threads_per_sm: int
    """Threads resident on one multiprocessor."""
    max_blocks_per_sm: int
    """Blocks resident on one multiprocessor."""
    shared_per_sm_bytes: int
    """Shared memory of one multiprocessor."""
    shared_per_block_optin_bytes: int
    """Most shared memory that one block may ask for (`sharedMemPerBlockOptin`)."""
    sources: Mapping[str, str] = field(compare=False, repr=False)
    """Where each figure comes from, by the name of its field; `derived: …` where it was not published."""

    def __post_init__(self) -> None:
        if not 0 < self.cuda_total_bytes < self.nvml_total_bytes:
            raise ValueError(
                f"{self.name}: CUDA total {self.cuda_total_bytes} is not below NVML's {self.nvml_total_bytes}"
            )
        if not 0 < self.context_low_bytes <= self.context_bytes <= self.context_high_bytes:
            bounds = f"{self.context_low_bytes} to {self.context_high_bytes}"
            raise ValueError(f"{self.name}: context {self.context_bytes} is not within {bounds}")

    @property
    def reserved_bytes(self) -> int:
        """What the driver keeps for itself: NVML's total less CUDA's (NVML's `reserved`, memory info v2)."""
        return self.nvml_total_bytes - self.cuda_total_bytes

    @property
    def kubernetes_product(self) -> str:
        """The label `nvidia.com/gpu.product` of NVIDIA's GPU feature discovery: NVML's name with '-' for blanks."""
        return self.nvml_name.replace(" ", "-")

    @property
    def slurm_type(self) -> str:
        """The type of gres that Slurm's `AutoDetect=nvml` gives it: NVML's name in lower case with '_' for blanks."""
        return self.nvml_name.replace(" ", "_").lower()


@functools.cache
def load_catalogue() -> tuple[Card, ...]:
    """Read every card of the catalogue, in the order in which people are shown them.

    Returns:
        The cards; the same object on every call.
    """
    text = importlib.resources.files("autobatch.gpu").joinpath("gpus.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return tuple(_card(entry, tables["compute_capability"]) for entry in tables["card"])


def find_card(name: str) -> Card:
    """Find a card by any usual name.

    Case, spaces, dashes and underscores do not count, nor does a leading NVIDIA, Tesla or GeForce; the labels of
    Kubernetes' GPU feature discovery (`NVIDIA-A100-SXM4-40GB`, `…-SHARED`) are read too. Where cards differ by form
    factor alone, a name that leaves it out means the SXM one: `A100-40GB` is `A100-SXM4-40GB`, `H100` is
    `H100-SXM5-80GB`.

    Args:
        name: for example `A100-40GB`, `NVIDIA A100-SXM4-40GB`, `t4` or `RTX 4090`.

    Returns:
        The card.

    Raises:
        UsageError: no card goes by this name (the nearest is named), or several do (all are named).

    Example:
        >>> find_card("rtx 4090").nvml_name
        'NVIDIA GeForce RTX 4090'
    """
    index = _index()
    key = _key(name)
    cards = index.get(key, ())
    if len(cards) == 1:
        return cards[0]
    if cards:
        choices = ", ".join(card.name for card in cards)
        raise UsageError(f"GPU {name!r} is ambiguous, {len(cards)} cards go by it: write one of {choices}")
    near = difflib.get_close_matches(key, index, n=1, cutoff=0.0)
    hint = " or ".join(card.name for card in index[near[0]])
    raise UsageError(
        f"GPU {name!r} cannot be emulated, the nearest known is {hint}: "
        f"`autobatch gpus` lists all {len(load_catalogue())}"
    )


def working_aliases(card: Card) -> tuple[str, ...]:
    """List the aliases by which `find_card` finds this card: not those that it refuses as ambiguous.

    Example:
        >>> working_aliases(find_card("A100-SXM4-40GB"))
        ('A100-40GB', 'A100-40G', 'A100-SXM-40GB')
    """
    index = _index()
    return tuple(alias for alias in card.aliases if index[_key(alias)] == (card,))


def _key(name: str) -> str:
    """Reduce a name to what tells cards apart."""
    key = _SEPARATORS.sub("", name.casefold())
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                key, stripped = key.removeprefix(prefix), True
    return key.removesuffix(_SUFFIX)


@functools.cache
def _index() -> Mapping[str, tuple[Card, ...]]:
    """Map every key to the cards that go by it."""
    index: dict[str, tuple[Card, ...]] = {}
    for card in load_catalogue():
        for key in sorted({_key(name) for name in (card.name, card.nvml_name, *card.aliases)}):
            index[key] = (*index.get(key, ()), card)
    return MappingProxyType(index)


def _card(entry: Mapping[str, Any], capabilities: Mapping[str, Mapping[str, Any]]) -> Card:
    """Build a card from its table and that of its compute capability."""
    capability = capabilities[entry["compute_capability"]]
    major, minor = entry["compute_capability"].split(".")
    low, typical, high = (mib * _MIB for mib in entry["context_mib"])
    given = entry["sources"]
    sources = {
        **{key: given[key] for key in _SOURCED_BY_NAME},
        "nvml_total_bytes": given["nvml_total_mib"],
        **dict.fromkeys(("context_bytes", "context_low_bytes", "context_high_bytes"), given["context_mib"]),
        **dict.fromkeys(_BY_CAPABILITY, capability["source"]),
    }
    return Card(
        name=entry["name"],
        nvml_name=entry["nvml_name"],
        aliases=tuple(entry["aliases"]),
        nvml_total_bytes=entry["nvml_total_mib"] * _MIB,
        cuda_total_bytes=entry["cuda_total_bytes"],
        compute_capability=(int(major), int(minor)),
        sm_count=entry["sm_count"],
        context_bytes=typical,
        context_low_bytes=low,
        context_high_bytes=high,
        l2_bytes=entry["l2_bytes"],
        memory_bus_bits=entry["memory_bus_bits"],
        **{key: capability[key] for key in _BY_CAPABILITY},
        sources=MappingProxyType(sources),
    )
