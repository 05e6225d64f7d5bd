"""The settings of torch's caching allocator, as the environment holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALLOCATOR_VARIABLES", "allocator_settings"]

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where the settings stand. Torch 2.8 reads the second alone; torch 2.15 the first, and the second where that is unset."""


def allocator_settings(environment: Mapping[str, str]) -> str:
    """The caching allocator's settings; empty for the default."""
    return next((environment[name] for name in ALLOCATOR_VARIABLES if environment.get(name)), "")
