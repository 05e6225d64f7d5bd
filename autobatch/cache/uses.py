"""What the cache may be for, in a module that imports nothing: the command line's help names it too."""

from __future__ import annotations

from typing import Literal, get_args

from autobatch.errors import UsageError

__all__ = ["CACHE_USES", "CacheUse", "check_cache_use"]

CacheUse = Literal["confirm", "trust", "off"]
"""`confirm`: one trial shows whether what is remembered holds. `trust`: it is taken as it stands. `off`: it is left alone."""
CACHE_USES: tuple[CacheUse, ...] = get_args(CacheUse)


def check_cache_use(use: str) -> None:
    """Refuse what is no use of the cache; raises `UsageError`."""
    if use not in CACHE_USES:
        raise UsageError(f"cache {use!r} is unknown; choose {', '.join(CACHE_USES)}")
