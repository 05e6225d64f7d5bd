"""The largest batches of a data set: which samples they are made of, and what is said where not all were looked at."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from autobatch import UsageError
from autobatch.integrations.largest import LargestSamples, largest_named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def loader(samples: Any, **more: Any) -> Any:
    return SimpleNamespace(dataset=samples, collate_fn=list, **more)


def lengths_of(batch: Sequence[Any]) -> list[int]:
    return [len(sample["input_ids"]) for sample in batch]


def texts(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [1] * length} for length in lengths]


def test_a_batch_has_the_longest_samples() -> None:
    """The longest first; where there are too few, they are taken again."""
    samples = LargestSamples.of_loader(loader(texts(5, 80, 7, 100, 90)))
    assert lengths_of(samples.batch(3)) == [100, 90, 80]
    assert lengths_of(samples.batch(7)) == [100, 90, 80, 7, 5, 100, 90]
    assert (samples.elements, samples.num_looked_at, samples.num_samples, samples.warning) == (100, 5, 5, None)


def test_a_batch_is_as_long_as_its_longest_sample_in_each_field() -> None:
    """A text with a long answer and one with a long question are padded to both lengths where they meet."""
    data = [{"question": [1] * q, "answer": [1] * a} for q, a in ((50, 50), (90, 1), (1, 80), (40, 40))]
    batch = LargestSamples.of_loader(loader(data)).batch(3)
    assert max(len(one["question"]) for one in batch) == 90
    assert max(len(one["answer"]) for one in batch) == 80
    assert LargestSamples.of_loader(loader(data)).batch(1) == [data[0]]


@pytest.mark.parametrize(
    ("sample", "elements"),
    [
        ([1, 2, 3], 3),
        ("words", 5),
        (([1, 2], 7), 3),
        ({"pixels": SimpleNamespace(size=(20, 10)), "label": 3}, 201),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3, 4]]}, 8),
        (SimpleNamespace(numel=lambda: 12), 12),
        (SimpleNamespace(size=6), 6),
        (3.5, 1),
    ],
)
def test_what_a_sample_is_counted_as(sample: Any, elements: int) -> None:
    """Numbers, characters, pixels; nested as they come."""
    assert LargestSamples.of_loader(loader([sample])).elements == elements


def test_of_a_large_data_set_some_are_looked_at_and_that_is_said() -> None:
    """The same ones in every process."""
    data = texts(*range(1, 1001))
    found = [LargestSamples.of_loader(loader(data), looks=100) for _ in range(2)]
    assert found[0].order == found[1].order
    assert len(set(found[0].order)) == found[0].num_looked_at == 100
    assert found[0].elements < 1000
    assert (found[0].warning or "").startswith(
        f"looked at 100 of 1000 samples, the largest has {found[0].elements} elements: a larger one could run out of memory"
    )
    assert LargestSamples.of_loader(loader(data), largest=[data[-1]]).batch(2) == [data[-1]] * 2


def test_a_stream_is_looked_at_from_its_beginning() -> None:
    """It does not tell its length."""

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(texts(3, 9, 4))

    samples = LargestSamples.of_loader(loader(Stream()), looks=2)
    assert lengths_of(samples.batch(2)) == [9, 3]
    assert "a data set that does not tell its length" in (samples.warning or "")


def test_reading_samples_leaves_the_random_generators_alone() -> None:
    """A data set that draws moves them on; what training draws later must not depend on the probe."""

    class Drawn:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> list[int]:
            if index >= 5:
                raise IndexError
            return [1] * random.randint(1, 100)

    random.seed(1)
    before = random.getstate()
    LargestSamples.of_loader(loader(Drawn())).batch(3)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LargestSamples.of_loader(loader([])), "the data set has no sample"),
        (lambda: LargestSamples.of_loader(loader(texts(3)), looks=0), "looks 0 is below 1"),
        (lambda: LargestSamples.of_loader(loader([1], batch_size=None, batch_sampler=None)), "batch_size=None"),
        (lambda: largest_named({"input_ids": [1]}), "largest is one dict: pass a list of samples"),
        (lambda: largest_named([]), "largest is an empty list"),
    ],
)
def test_what_has_no_largest_batch_is_refused(call: Any, message: str) -> None:
    """In one line with the way out."""
    with pytest.raises(UsageError, match=message):
        call()
