"""Random draws that belong to samples: a sample's dropout is the same in a whole batch and in any part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch

__all__ = ["NoiseLedger"]

_IN_PLACE = {"aten::bernoulli_", "aten::uniform_", "aten::normal_", "aten::exponential_", "aten::log_normal_"}
_FACTORIES = {"aten::rand", "aten::randn"}
_LIKE = {"aten::rand_like", "aten::randn_like"}


class NoiseLedger:
    """What random operators drew in a run of the whole batch, so that runs of its parts draw the same for each sample.

    Each operator first draws one number from torch's CPU generator, by which its own values are seeded. Runs that begin with
    the same seed draw the same numbers in the same order, however large their batch, and a checkpointed part that is computed
    again draws its own again, since checkpointing puts that generator back. Values are always drawn in the whole run's shape.
    A tensor belongs to samples where one dimension grew with the batch; one of the same shape in every run (noise on
    weights) is the same in every run.

    `unheld` names the operators whose draws could not be held.
    """

    def __init__(self, samples: int) -> None:
        """Start with nothing drawn; `samples` is the size of the whole batch."""
        self.samples = samples
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.unheld: set[str] = set()
        self.rows: Sequence[int] | None = None

    def holding(self, rows: Sequence[int] | None) -> AbstractContextManager[object]:
        """The context of a run of these samples of the whole batch, or of all of it in its own order, which must come first.

        `rows` may be set anew inside, at each micro-batch.
        """
        self.rows = rows
        return _mode(self)


def _mode(ledger: NoiseLedger) -> AbstractContextManager[object]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Held(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
                return func(*args, **kwargs)
            return _draw(ledger, func, args, kwargs)

    mode: Any = Held
    return mode()  # type: ignore[no-any-return]  # torch leaves its modes without types


def _draw(ledger: NoiseLedger, func: Any, args: Any, kwargs: Any) -> Any:
    import torch

    name = func._schema.name  # noqa: SLF001 - the one place where an operator says its name
    shape = _drawn_shape(name, args)
    if shape is None or not all(isinstance(size, int) for size in shape):
        ledger.unheld.add(name)
        return func(*args, **kwargs)
    seed = int(torch.randint(2**62, (), device="cpu"))
    if ledger.rows is None:
        ledger.shapes[seed] = shape
    whole = ledger.shapes.get(seed)
    picked = None if whole is None else _rows_of(shape, whole, ledger.rows, ledger.samples)
    if whole is None or picked is None:
        ledger.unheld.add(name)
        return func(*args, **kwargs)
    return _values(name, func, args, kwargs, whole, picked, seed)


def _drawn_shape(name: str, args: Any) -> tuple[int, ...] | None:
    import torch

    if name in _IN_PLACE and any(isinstance(value, torch.Tensor) for value in args[1:]):
        return None
    if name in _FACTORIES:
        return tuple(args[0])
    if name in _IN_PLACE | _LIKE or name == "aten::native_dropout" or (name == "aten::bernoulli" and len(args) == 1):
        return tuple(args[0].shape)
    return None


@dataclass(frozen=True, kw_only=True)
class _Picked:
    """Which part of the whole draw belongs to a run: rows of a dimension, or all of it."""

    dimension: int = 0
    rows: tuple[int, ...] | None = None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The part."""
        import torch

        if self.rows is None:
            return values
        return values.index_select(self.dimension, torch.tensor(self.rows, device=values.device))


def _rows_of(
    shape: tuple[int, ...], whole: tuple[int, ...], rows: Sequence[int] | None, samples: int
) -> _Picked | None:
    """Find the dimension that grew with the batch; None where there is no such one, or several."""
    if shape == whole:
        return _Picked()
    if rows is None or len(shape) != len(whole):
        return None
    grown = [position for position, size in enumerate(shape) if size != whole[position]]
    if len(grown) != 1:
        return None
    (dimension,) = grown
    each, over = divmod(whole[dimension], samples)
    if over or shape[dimension] != each * len(rows):
        return None
    return _Picked(dimension=dimension, rows=tuple(row * each + offset for row in rows for offset in range(each)))


def _values(name: str, func: Any, args: Any, kwargs: Any, whole: tuple[int, ...], picked: _Picked, seed: int) -> Any:
    """Draw for the whole batch from the operator's own seed, and take the rows."""
    import torch

    target = args[0] if isinstance(args[0], torch.Tensor) else None
    device = torch.device(kwargs.get("device") or "cpu") if target is None else target.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        (torch.cuda if device.type == "cuda" else torch.default_generator).manual_seed(seed)
        if target is None:
            return picked.of(func(list(whole), *args[1:], **kwargs))
        if name in _IN_PLACE:
            return target.copy_(picked.of(func(target.new_empty(whole), *args[1:], **kwargs)))
        if name in _LIKE:
            return picked.of(func(target.new_empty(whole), *args[1:], **kwargs))
        uniform = picked.of(torch.rand(whole, device=device, dtype=torch.float64))
    if name == "aten::bernoulli":
        return (uniform < target).to(target.dtype)
    probability, train = args[1], args[2]
    if train is False:
        return target.clone(), torch.ones_like(target, dtype=torch.bool)
    kept = uniform >= probability
    scale = 0.0 if math.isclose(probability, 1.0) else 1.0 / (1.0 - probability)
    return target * kept * scale, kept
