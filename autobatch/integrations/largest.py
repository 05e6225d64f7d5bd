"""The batches of a data set that take the most memory."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from autobatch.errors import UsageError
from autobatch.training.randomness import unchanged_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["MOST_LOOKS", "LargestSamples", "Loader", "largest_named"]

MOST_LOOKS = 10_000
"""Samples that are looked at where nobody says how many."""

_DEEPEST = 8  # a sample that is nested deeper than this, or in itself, is counted as one element there


class Loader(Protocol):
    """What a `DataLoader` of torch has, and one that a framework made of it."""

    @property
    def dataset(self) -> Any:
        """The samples."""

    @property
    def collate_fn(self) -> Any:
        """Makes a batch of a list of samples."""


@dataclass(kw_only=True)
class LargestSamples:
    """Samples of a data set, those first that make a batch large, and batches of them.

    A batch is padded to its longest sample, field by field: so a batch of any size begins with the sample that has the most
    elements, goes on with the one that has the most in each field, and then with the next in size. With fewer samples than the
    batch takes, they are taken again.
    """

    samples: Sequence[Any]
    """What `order` points into."""
    order: Sequence[int]
    """Indices of samples, the largest first."""
    collate: Callable[[list[Any]], Any]
    """Makes a batch of a list of samples."""
    elements: int
    """Elements (numbers, pixels, characters) of the largest sample."""
    num_looked_at: int
    num_samples: int | None
    """Samples in the data set; None where it does not say."""
    _last: tuple[int, Any] | None = field(default=None, repr=False)

    @classmethod
    def of_loader(
        cls, loader: Loader, *, largest: Sequence[Any] | None = None, looks: int | None = None
    ) -> LargestSamples:
        """Find them in a loader's data set; the random generators are left as they were.

        Args:
            loader: gives the data set, and makes batches.
            largest: the largest samples, where the caller knows them: none is looked for.
            looks: samples to look at, at least 1: all of a data set that is not larger, else as many at random, or the first
                of one that cannot be indexed. `MOST_LOOKS` where None.

        Raises:
            UsageError: there is no sample, the loader's data set gives batches, or `looks` is below 1.
        """
        looks = MOST_LOOKS if looks is None else looks
        if looks < 1:
            raise UsageError(f"looks {looks} is below 1: give how many samples to look at")
        if getattr(loader, "batch_size", 1) is None and getattr(loader, "batch_sampler", True) is None:
            raise UsageError(
                "the loader has batch_size=None, so its data set makes the batches and no batch size can be set: give the "
                "loader a batch size, or probe with autobatch.probe and a micro_step of your own"
            )
        dataset = loader.dataset
        samples, indices = _looked_at(dataset, looks) if largest is None else (list(largest), range(len(largest)))
        with unchanged_generators():
            # As a batch of its own: so a field that the collator drops does not count, and a text counts as its tokens.
            sizes = {index: _elements_by_field(loader.collate_fn([samples[index]])) for index in indices}
        if not sizes:
            raise UsageError("the data set has no sample, and the largest batch is made of its largest: give it some")
        order = _largest_first(sizes)
        return cls(
            samples=samples,
            order=order,
            collate=loader.collate_fn,
            elements=sum(sizes[order[0]].values()),
            num_looked_at=len(sizes),
            num_samples=_length(dataset),
        )

    def batch(self, size: int) -> Any:
        """Make the largest batch of `size` samples: new containers each time, of the same tensors where the size is the last."""
        if self._last is None or self._last[0] != size:
            with unchanged_generators():
                chosen = [self.samples[index] for index in itertools.islice(itertools.cycle(self.order), size)]
                self._last = (size, self.collate(chosen))
        return _with_new_containers(self._last[1])

    @property
    def warning(self) -> str | None:
        """What to know where not all samples were looked at; None where all were, or the caller named the largest."""
        if self.num_samples is not None and self.num_looked_at >= self.num_samples:
            return None
        of = "a data set that does not tell its length" if self.num_samples is None else f"{self.num_samples} samples"
        return (
            f"looked at {self.num_looked_at} of {of}, the largest has {self.elements} elements: a larger one could run out of "
            "memory; name it with largest=[...], or look at more with looks=N"
        )


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _looked_at(dataset: Any, looks: int) -> tuple[Sequence[Any], Sequence[int]]:
    """The samples to look at, and their indices in what is given."""
    length = _length(dataset)
    if length is None or not hasattr(dataset, "__getitem__"):
        with unchanged_generators():
            first = list(itertools.islice(iter(dataset), looks))
        return first, range(len(first))
    if length <= looks:
        return dataset, range(length)
    # The same ones in every process: ranks build alike batches.
    return dataset, sorted(random.Random(0).sample(range(length), looks))  # noqa: S311 - not for secrets


def _largest_first(sizes: Mapping[int, Mapping[str, int]]) -> list[int]:
    by_total = sorted(sizes, key=lambda index: -sum(sizes[index].values()))
    fields = sorted({name for size in sizes.values() for name in size})
    longest = [max(sizes, key=lambda index: sizes[index].get(name, 0)) for name in fields]
    return list(dict.fromkeys([by_total[0], *longest, *by_total]))


def _with_new_containers(value: Any) -> Any:
    """The same tensors in containers of their own: a step that takes a field out of its batch takes it out of this one alone."""
    if isinstance(value, Mapping):
        copied = copy.copy(value)
        if isinstance(copied, MutableMapping):
            for key in list(copied):
                copied[key] = _with_new_containers(copied[key])
        return copied
    if type(value) in {list, tuple}:
        return type(value)(map(_with_new_containers, value))
    return value


def _elements_by_field(sample: Any) -> dict[str, int]:
    """Elements of each field of a sample, by its path in it."""
    return dict(_fields(sample, "", _DEEPEST))


def _fields(value: Any, path: str, depth: int) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping) and depth:
        for key, each in value.items():
            yield from _fields(each, f"{path}.{key}", depth - 1)
    elif isinstance(value, list | tuple) and depth and not _is_plain(value):
        for position, each in enumerate(value):
            yield from _fields(each, f"{path}[{position}]", depth - 1)
    else:
        yield path, _num_elements(value)


def _is_plain(values: Sequence[Any]) -> bool:
    """Whether a list is one of numbers, such as token ids, rather than of fields."""
    return len(values) == 0 or isinstance(values[0], int | float | bool)


def _num_elements(value: Any) -> int:
    if callable(count := getattr(value, "numel", None)):  # a tensor
        return int(count())
    size = getattr(value, "size", None)
    if isinstance(size, int):  # an array
        return size
    if isinstance(size, tuple):  # a picture: width and height
        return math.prod(int(each) for each in size)
    if isinstance(value, str | bytes | list | tuple):
        return len(value)
    return 1


def largest_named(largest: Iterable[Any] | None) -> list[Any] | None:
    """Take what a caller named as the largest samples.

    Raises:
        UsageError: it is one sample, or none.
    """
    if largest is None:
        return None
    if isinstance(largest, Mapping | str | bytes):
        raise UsageError(f"largest is one {type(largest).__name__}: pass a list of samples, as in largest=[dataset[7]]")
    named = list(largest)
    if not named:
        raise UsageError("largest is an empty list: name at least one sample, or leave it out")
    return named
