"""State of the whole process that training reads: random generators, cuDNN flags, modes."""

from __future__ import annotations

import operator
import random
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch.snapshot.digest import Digest

__all__ = ["Generator", "ProcessState", "other_generators", "torch_generators"]


class ProcessState:
    """Random generators and global switches, read on construction.

    numpy counts only where it was loaded before, and CUDA's generators only where CUDA was initialized:
    reading them otherwise would load the one and create contexts for the other.
    """

    def __init__(self) -> None:
        self._switches = list(_switches())
        self._values = [_read(read) for _, read, _ in self._switches]
        self._generators = [*other_generators(), *torch_generators()]
        self._states = [read() for _, read, _ in self._generators]

    def actions(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield a name and a call for each thing to put back; random generators come last."""
        import torch

        # The cache of autocast holds low-precision copies of weights as the job left them.
        yield "autocast cache", torch.clear_autocast_cache
        for (name, read, write), value in zip(self._switches, self._values, strict=True):
            if value is not _UNREADABLE:
                yield name, partial(_write_if_changed, read, write, value)
        for (name, _, write_state), state in zip(self._generators, self._states, strict=True):
            yield name, partial(write_state, state)

    def describe(self, digest: Digest) -> None:
        """Append everything to the hash."""
        for (name, _, _), value in zip(self._switches, self._values, strict=True):
            digest.add(name, "unreadable" if value is _UNREADABLE else repr(value))
        for (name, _, _), state in zip(self._generators, self._states, strict=True):
            digest.add(name)
            digest.add_value(state)


Generator = tuple[str, "Callable[[], Any]", "Callable[[Any], object]"]
"""Name of a random generator, how to read its state and how to write it."""


def torch_generators() -> Iterator[Generator]:
    """Yield torch's generators: the CPU's, and those of CUDA's devices where CUDA was initialized."""
    import torch

    yield "torch", torch.get_rng_state, torch.set_rng_state
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    if is_initialized():
        for index in range(torch.cuda.device_count()):
            read, write = partial(torch.cuda.get_rng_state, index), partial(torch.cuda.set_rng_state, device=index)
            yield f"torch.cuda:{index}", read, write


def other_generators() -> Iterator[Generator]:
    """Yield Python's generator, and numpy's where numpy was loaded."""
    yield "random", random.getstate, random.setstate
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        yield "numpy.random", numpy_random.get_state, numpy_random.set_state


_UNREADABLE = object()


def _read(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError:  # torch refuses to name one TF32 flag while two finer ones differ; those are kept too
        return _UNREADABLE


def _write_if_changed(read: Callable[[], object], write: Callable[[Any], object], value: object) -> None:
    if _read(read) != value:
        write(value)


def _switches() -> Iterator[tuple[str, Callable[[], object], Callable[[Any], object]]]:
    """Yield name, reader and writer; a coarse switch comes before the finer ones that it sets too."""
    import torch

    cudnn = torch.backends.cudnn
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        yield f"cudnn.{name}", partial(getattr, cudnn, name), partial(setattr, cudnn, name)
    yield "float32_matmul_precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    for path in ("cudnn.conv", "cudnn.rnn", "cuda.matmul"):
        try:
            flags = operator.attrgetter(path)(torch.backends)
            _ = flags.fp32_precision  # since torch 2.9
        except AttributeError:
            continue
        yield (
            f"{path}.fp32_precision",
            partial(getattr, flags, "fp32_precision"),
            partial(setattr, flags, "fp32_precision"),
        )
    yield "deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    yield "default dtype", torch.get_default_dtype, torch.set_default_dtype
    yield "grad mode", torch.is_grad_enabled, torch.set_grad_enabled
