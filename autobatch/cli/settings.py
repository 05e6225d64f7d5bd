"""What `[tool.autobatch]` of a pyproject.toml says, under the flags of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.cache.uses import CACHE_USES
from autobatch.errors import UsageError
from autobatch.present.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autobatch.cache.uses import CacheUse

__all__ = ["Settings", "read_settings"]

_WHERE = "[tool.autobatch] of"
_SIZES = ("headroom", "memory_limit", "tenant")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The table, checked for what the command line itself reads of it; None where it does not say."""

    workload: str | None = None
    form: str | None = None
    """How the result is printed, one of `FORMATS`."""
    verbose: bool | None = None
    cache: CacheUse | None = None
    """What the cache is for."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Fields of `ProbeOptions`, which checks their values."""


def read_settings(path: Path) -> Settings:
    """Read the table; empty where there is no file or it has none.

    Raises:
        UsageError: the file cannot be read, or the table has a key or a value that means nothing.
    """
    import dataclasses

    from autobatch.options import ProbeOptions

    table = _read_table(path)
    fields = {one.name for one in dataclasses.fields(ProbeOptions)}
    known = {"workload", "format", "verbose", "cache", *fields}
    if unknown := sorted(set(table) - known):
        raise UsageError(f"{_WHERE} {path} has {', '.join(unknown)}: it takes {', '.join(sorted(known))}")
    workload, form, verbose, cache = (table.get(name) for name in ("workload", "format", "verbose", "cache"))
    if workload is not None and not isinstance(workload, str):
        raise UsageError(f"{_WHERE} {path}: workload is {workload!r}: write a name, such as 'gpt2'")
    if form is not None and (not isinstance(form, str) or form not in FORMATS):
        raise UsageError(f"{_WHERE} {path}: format is {form!r}: write one of {', '.join(FORMATS)}")
    if verbose is not None and not isinstance(verbose, bool):
        raise UsageError(f"{_WHERE} {path}: verbose is {verbose!r}: write true or false")
    if cache is not None and cache not in CACHE_USES:
        raise UsageError(f"{_WHERE} {path}: cache is {cache!r}: write one of {', '.join(CACHE_USES)}")
    options = {name: _as_written(name, table[name]) for name in fields & set(table)}
    return Settings(workload=workload, form=form, verbose=verbose, cache=cache, options=options)


def _as_written(name: str, value: object) -> object:
    """Give the value; a size in bytes as text, so that a bare `headroom = 3` is refused like `--headroom 3`."""
    return str(value) if name in _SIZES and isinstance(value, int) and not isinstance(value, bool) else value


def _read_table(path: Path) -> Mapping[str, object]:
    import tomllib

    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current folder is gone: change to one that is there") from None
    if not path.is_file():
        return {}
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    table = tools.get("autobatch", {}) if isinstance(tools, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(
            f"{path}: tool.autobatch is {table!r}: write a table, [tool.autobatch], with target = 256 in it"
        )
    return {str(key).replace("-", "_"): value for key, value in table.items()}
