"""Which exceptions mean that device memory ran out: one classifier over the error and all that it carries.

The rules are tried in this order over the error and everything that it explicitly carries: its `__cause__`, the members
of an exception group, exceptions among its args, and theirs in turn.

1. Facts that settle the matter wherever they stand, implicit `__context__` included: the CUDA context is lost (illegal
   memory access, device-side assert and their like), or the emulated GPU was asked for what it does not implement.
2. Types and messages that say what ran out.
3. Messages that a full device and a defect have in common: what the trial knows decides, and the reason says so.

What Python set by itself as `__context__` is what was being handled when the error was raised. Rules 2 and 3 read it
after what is explicitly carried, and only where `raise … from …` does not hide it and the error is not of a type that a
mistake in the handling code raises (`TypeError`, `KeyError`, …): a `RuntimeError("step failed")` raised while an
out-of-memory error was handled is that error retold, a `TypeError` there is a defect of the handler, of no interest to
a search over sizes. (An error that a job swallows or garbles is still seen, in the allocator's own `num_ooms`.)
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["FailureKind", "Verdict", "classify", "requested_bytes"]


class FailureKind(enum.StrEnum):
    """What an exception says of device memory."""

    MEMORY = "memory"
    """Device memory ran out: a smaller micro-batch may fit."""
    NOT_MEMORY = "not_memory"
    """The job failed for a reason of its own."""
    NOT_VRAM = "not_vram"
    """A limit of another kind was hit, named in `Verdict.limit`."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an exception was found to be."""

    kind: FailureKind
    """Whether it is about device memory."""
    reason: str
    """The rule that matched and, where the message alone is ambiguous, the fact that decided."""
    limit: str = ""
    """For `NOT_VRAM`: `host memory`, `shared memory`, `CUDA launch limit` or `32-bit index limit`; otherwise empty."""
    context_lost: bool = False
    """True where the CUDA context is unusable from here on: the process must end."""


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A type, by its name anywhere in the MRO, or a message, and what it says."""

    name: str
    kind: FailureKind
    pattern: re.Pattern[str] | None = None
    type_name: str = ""
    limit: str = ""
    context_lost: bool = False

    def matches(self, error: BaseException) -> bool:
        if self.type_name and any(base.__name__ == self.type_name for base in type(error).__mro__):
            return True
        return self.pattern is not None and any(map(self.pattern.search, _texts(error)))

    def verdict(self, reason: str) -> Verdict:
        return Verdict(kind=self.kind, reason=reason, limit=self.limit, context_lost=self.context_lost)


def _message(name: str, pattern: str, kind: FailureKind, *, limit: str = "", context_lost: bool = False) -> _Rule:
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    return _Rule(name=name, kind=kind, pattern=compiled, limit=limit, context_lost=context_lost)


_MEMORY, _NOT_MEMORY, _NOT_VRAM = FailureKind.MEMORY, FailureKind.NOT_MEMORY, FailureKind.NOT_VRAM

# CUDA runtime API, "Error types": after each of these "the process must be terminated and relaunched".
_SETTLING = (
    *(
        _message(f"{text!r}, the CUDA context is lost", re.escape(text), _NOT_MEMORY, context_lost=True)
        for text in (
            "an illegal memory access was encountered",
            "device-side assert triggered",
            "an illegal instruction was encountered",
            "misaligned address",
            "unspecified launch failure",
            "uncorrectable ECC error encountered",
            "operation not supported on global/shared address space",
        )
    ),
    _message("the emulated GPU lacks the call", "the emulated GPU does not implement", _NOT_MEMORY),
)

# In order: the first that matches an error speaks for it. What names a device comes before what names the host, because
# cupy's and RMM's out-of-memory errors are `MemoryError`s too.
_DECISIVE = (
    # A kernel's own shared memory, the same at every micro-batch size.
    _Rule(
        name="a Triton kernel asks for too much shared memory",
        kind=_NOT_MEMORY,
        type_name="OutOfResources",
        pattern=re.compile(r"out of resources?: shared memory", re.IGNORECASE),
    ),
    _Rule(name="an OutOfMemoryError", kind=_MEMORY, type_name="OutOfMemoryError"),
    _message("host memory of cuDNN", r"CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOC", _NOT_VRAM, limit="host memory"),
    _message("the device's allocator", r"\b(?:CUDA|HIP|XPU|NPU|MPS)\b[^\n:]{0,20}(?:: )?out of memory", _MEMORY),
    _message("the CUDA driver", r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY", _MEMORY),
    _message("cuBLAS", r"CUBLAS_STATUS_ALLOC_FAILED", _MEMORY),
    _message("cuDNN", r"CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR\S*ALLOC", _MEMORY),
    _message("cuFFT", r"CUFFT_ALLOC_FAILED", _MEMORY),
    _message("cuSOLVER", r"CUSOLVER_STATUS_ALLOC_FAILED", _MEMORY),
    _message("cuSPARSE", r"CUSPARSE.*insufficient resources|CUSPARSE_STATUS_ALLOC_FAILED", _MEMORY),
    _message("NCCL", r"NCCL.*(?:CUDA error|CUDA failure).*out of memory", _MEMORY),
    _message("XLA", r"RESOURCE_EXHAUSTED: Out of memory", _MEMORY),
    _message(
        "the CPU's allocator",
        r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
        _NOT_VRAM,
        limit="host memory",
    ),
    _message(
        "a DataLoader worker",
        r"DataLoader worker.*is killed by signal: Bus error",
        _NOT_VRAM,
        limit="shared memory",
    ),
    _Rule(
        name="a MemoryError",
        kind=_NOT_VRAM,
        type_name="MemoryError",
        # The type's name in a traceback that another process sent as text.
        pattern=re.compile(r"\bMemoryError\b"),
        limit="host memory",
    ),
    _message("a grid beyond 65,535", r"invalid configuration argument", _NOT_VRAM, limit="CUDA launch limit"),
    _message(
        "a tensor beyond 2**31 elements",
        r"canUse32BitIndexMath|integer out of range|\bINT_MAX\b",
        _NOT_VRAM,
        limit="32-bit index limit",
    ),
)

# cuBLAS says this of a handle that was never made, which on an idle device is a defect at any size.
_AMBIGUOUS_BY_FULLNESS = _message("cuBLAS", r"CUBLAS_STATUS_NOT_INITIALIZED", _MEMORY)
# These fall back from one algorithm to the next, each with a smaller workspace, and fail as if none existed.
_AMBIGUOUS = (
    _message("cuDNN", r"CUDNN_STATUS_NOT_SUPPORTED", _MEMORY),
    _message("cuDNN", r"CUDNN_STATUS_INTERNAL_ERROR", _MEMORY),
    _message("cuDNN", r"unable to find an engine|No execution plans support the graph", _MEMORY),
    _message("cuFFT", r"CUFFT_INTERNAL_ERROR", _MEMORY),
    _message("cuSOLVER", r"CUSOLVER_STATUS_INTERNAL_ERROR", _MEMORY),
)

# Types that a mistake in Python code raises, and nothing that retells a failure of the device.
_MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
    KeyboardInterrupt,
)

_REQUEST = re.compile(r"(?:tried|trying) to allocate\s+([0-9]+(?:\.[0-9]+)?)\s*(bytes?|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def classify(error: BaseException, *, device_nearly_full: bool, smaller_size_ran: bool) -> Verdict:
    """Tell whether an exception of a training job means that device memory ran out.

    Types go by name, so that torch need not be loaded. See the module's docstring for the order of the rules and for
    what of an exception chain counts.

    Args:
        error: what the job raised.
        device_nearly_full: NVML showed next to no free memory when it was raised.
        smaller_size_ran: the same job ran at a smaller micro-batch size.

    Returns:
        The verdict; `NOT_MEMORY` where no rule matches.

    Example:
        >>> verdict = classify(RuntimeError("CUDA out of memory."), device_nearly_full=True, smaller_size_ran=False)
        >>> verdict.kind.value, verdict.reason
        ('memory', "the device's allocator: RuntimeError")
    """
    if found := _first(_chain(error, with_context=True), _SETTLING):
        rule, one = found
        return rule.verdict(_reason(rule, one))
    errors = list(_relevant(error))
    if found := _first(errors, _DECISIVE):
        rule, one = found
        return rule.verdict(_reason(rule, one))
    if found := _first(errors, (_AMBIGUOUS_BY_FULLNESS, *_AMBIGUOUS)):
        rule, one = found
        ran = None if rule is _AMBIGUOUS_BY_FULLNESS else smaller_size_ran
        return _decide(rule, one, nearly_full=device_nearly_full, ran=ran)
    return Verdict(kind=_NOT_MEMORY, reason=f"no sign of memory in {type(error).__name__}")


def requested_bytes(error: BaseException) -> int:
    """Read how many bytes the failed allocation asked for.

    Args:
        error: an out-of-memory error, or one that carries it.

    Returns:
        Bytes, good to the two decimals that torch prints ("2.00 GiB"); 0 where no message says it.

    Example:
        >>> requested_bytes(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total …"))
        2684354560
    """
    for one in _relevant(error):
        for text in _texts(one):
            if match := _REQUEST.search(text):
                return round(float(match[1]) * _UNITS.get(match[2].lower(), 1))
    return 0


def _first(errors: Iterable[BaseException], rules: Sequence[_Rule]) -> tuple[_Rule, BaseException] | None:
    """Find the first error that any rule matches, and the first rule that does."""
    return next(((rule, one) for one in errors for rule in rules if rule.matches(one)), None)


def _decide(rule: _Rule, error: BaseException, *, nearly_full: bool, ran: bool | None) -> Verdict:
    """Decide an ambiguous message by what the trial knows; `ran` is None where it has no say."""
    said = f"ambiguous message of {_reason(rule, error)}"
    if nearly_full:
        return rule.verdict(f"{said}; decided by: the device was nearly full")
    if ran:
        return rule.verdict(f"{said}; decided by: a smaller size ran")
    facts = "the device was not nearly full" + ("" if ran is None else " and no smaller size ran")
    return Verdict(kind=_NOT_MEMORY, reason=f"{said}; decided by: {facts}")


def _reason(rule: _Rule, error: BaseException) -> str:
    return f"{rule.name}: {type(error).__name__}"


def _relevant(error: BaseException) -> Iterator[BaseException]:
    """Yield what an error explicitly carries, then what was handled when it was raised, but for a handler's mistake."""
    seen: set[int] = set()
    for one in _chain(error, with_context=False):
        seen.add(id(one))
        yield one
    if not isinstance(error, _MISTAKES):
        yield from (one for one in _chain(error, with_context=True) if id(one) not in seen)


def _chain(error: BaseException, *, with_context: bool) -> Iterator[BaseException]:
    """Yield an error, then what it carries, nearest first and each once (chains can be circular)."""
    waiting = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
        # The members of an exception group are among its args.
        waiting.extend(arg for arg in _flat(one.args) if isinstance(arg, BaseException))
        if with_context and one.__context__ is not None and not one.__suppress_context__:
            waiting.append(one.__context__)


def _texts(error: BaseException) -> Iterator[str]:
    """Yield what an error says: its own rendering, and every string among its args (some types render but one)."""
    yield str(error)
    yield from (arg for arg in _flat(error.args) if isinstance(arg, str))


def _flat(args: Iterable[object]) -> Iterator[object]:
    """Yield args, those inside tuples and lists of args too."""
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _flat(arg)
        else:
            yield arg
