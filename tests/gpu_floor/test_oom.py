"""The out-of-memory classifier, with the table of known messages as its test."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest

from autobatch.gpu.oom import FailureKind, Verdict, classify, requested_bytes

torch = pytest.importorskip("torch")

MEMORY, NOT_MEMORY, NOT_VRAM = FailureKind.MEMORY, FailureKind.NOT_MEMORY, FailureKind.NOT_VRAM


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: an error, and its answer by what the trial knows."""

    error: BaseException
    empty_and_new: FailureKind
    """The answer on a device that is not nearly full, where no smaller size ran."""
    nearly_full: FailureKind
    smaller_ran: FailureKind
    limit: str = ""
    context_lost: bool = False


def certain(error: BaseException, kind: FailureKind, *, limit: str = "", context_lost: bool = False) -> Row:
    return Row(
        error=error,
        empty_and_new=kind,
        nearly_full=kind,
        smaller_ran=kind,
        limit=limit,
        context_lost=context_lost,
    )


def ambiguous(message: str, *, smaller_ran: FailureKind = MEMORY) -> Row:
    return Row(error=RuntimeError(message), empty_and_new=NOT_MEMORY, nearly_full=MEMORY, smaller_ran=smaller_ran)


class OutOfResources(Exception):  # noqa: N818 - Triton's own name
    """What stands in for Triton's error where Triton is not installed."""


def triton_error() -> BaseException:
    """Triton's own error where Triton is installed, else one that looks like it."""
    try:
        errors = importlib.import_module("triton.runtime.errors")
    except ImportError:
        return OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 101376")
    made: BaseException = errors.OutOfResources(262144, 101376, "shared memory")
    return made


TORCH_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.39 GiB of which 1.45 GiB is free."
)
CONVOLUTION = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
ILLEGAL = "CUDA error: an illegal memory access was encountered"

ROWS = {
    "torch-oom": certain(torch.OutOfMemoryError(TORCH_MESSAGE), MEMORY),
    "torch-cuda-oom": certain(torch.cuda.OutOfMemoryError(TORCH_MESSAGE), MEMORY),
    "old-torch-oom": certain(RuntimeError(TORCH_MESSAGE), MEMORY),
    "oom-by-type-alone": certain(torch.OutOfMemoryError("no words that are known"), MEMORY),
    "hip": certain(RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"), MEMORY),
    "hip-type": certain(torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB"), MEMORY),
    "xpu": certain(RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"), MEMORY),
    "mps": certain(RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1 MB"), MEMORY),
    "npu": certain(RuntimeError("NPU out of memory. Tried to allocate 52.00 MiB (NPU 0; 60.96 GiB"), MEMORY),
    "cuda-error": certain(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), MEMORY),
    "cuda-error-accelerator": certain(torch.AcceleratorError("CUDA error: out of memory"), MEMORY),
    "cuda-error-lower-case": certain(RuntimeError("cuda error: OUT OF MEMORY"), MEMORY),
    "cuda-driver-error": certain(RuntimeError("CUDA driver error: out of memory"), MEMORY),
    "cublas-alloc": certain(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MEMORY
    ),
    "cublas-not-initialized": ambiguous(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", smaller_ran=NOT_MEMORY
    ),
    "cudnn-alloc": certain(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), MEMORY),
    "cudnn-internal-alloc": certain(
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), MEMORY
    ),
    "cudnn-internal-host-alloc": certain(
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), NOT_VRAM, limit="host memory"
    ),
    "cudnn-not-supported": ambiguous(CONVOLUTION),
    "cudnn-internal": ambiguous("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "cudnn-no-engine": ambiguous("FIND was unable to find an engine to execute this computation"),
    "cudnn-no-engine-get": ambiguous("GET was unable to find an engine to execute this computation"),
    "cudnn-no-plan": ambiguous("[cudnn_frontend] Error: No execution plans support the graph."),
    "cufft-alloc": certain(RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), MEMORY),
    "cufft-internal": ambiguous("cuFFT error: CUFFT_INTERNAL_ERROR"),
    "cusolver-alloc": certain(
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), MEMORY
    ),
    "cusolver-internal": ambiguous(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"
    ),
    "cusparse": certain(
        RuntimeError(
            "CUDA error: insufficient resources when calling `cusparseCreate(handle)`: CUSPARSE insufficient resources"
        ),
        MEMORY,
    ),
    "nccl-unhandled": certain(
        torch.distributed.DistBackendError(
            "NCCL error in: NCCLUtils.hpp:301, ncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
        MEMORY,
    ),
    "nccl-warning": certain(RuntimeError("NCCL WARN Cuda failure 'out of memory'"), MEMORY),
    "data-parallel": certain(
        torch.OutOfMemoryError(
            f"Caught OutOfMemoryError in replica 0 on device 0.\nOriginal Traceback …\n{TORCH_MESSAGE}"
        ),
        MEMORY,
    ),
    "two-args": certain(torch.OutOfMemoryError(TORCH_MESSAGE, {"rank": 1}), MEMORY),
    "two-args-retold": certain(RuntimeError("worker 1 died", TORCH_MESSAGE), MEMORY),
    "xla": certain(
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes."), MEMORY
    ),
    "host-cannot": certain(
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        NOT_VRAM,
        limit="host memory",
    ),
    "host-not-enough": certain(
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
        NOT_VRAM,
        limit="host memory",
    ),
    "host-type": certain(MemoryError(), NOT_VRAM, limit="host memory"),
    "host-worker": certain(
        RuntimeError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"),
        NOT_VRAM,
        limit="host memory",
    ),
    "data-loader-bus-error": certain(
        RuntimeError(
            "DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit."
        ),
        NOT_VRAM,
        limit="shared memory",
    ),
    "triton": certain(triton_error(), NOT_MEMORY),
    "triton-retold": certain(RuntimeError("out of resource: shared memory, Required: 262144"), NOT_MEMORY),
    "illegal-access": certain(RuntimeError(ILLEGAL), NOT_MEMORY, context_lost=True),
    "illegal-access-accelerator": certain(torch.AcceleratorError(ILLEGAL), NOT_MEMORY, context_lost=True),
    "device-assert": certain(RuntimeError(ASSERT), NOT_MEMORY, context_lost=True),
    "device-assert-accelerator": certain(torch.AcceleratorError(ASSERT), NOT_MEMORY, context_lost=True),
    "launch-limit": certain(
        RuntimeError("CUDA error: invalid configuration argument"), NOT_VRAM, limit="CUDA launch limit"
    ),
    "launch-limit-accelerator": certain(
        torch.AcceleratorError("CUDA error: invalid configuration argument"), NOT_VRAM, limit="CUDA launch limit"
    ),
    "index-math": certain(
        RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false"),
        NOT_VRAM,
        limit="32-bit index limit",
    ),
    "index-range": certain(RuntimeError("integer out of range"), NOT_VRAM, limit="32-bit index limit"),
    "index-max": certain(
        RuntimeError("Expected x.numel() <= INT_MAX to be true"), NOT_VRAM, limit="32-bit index limit"
    ),
    "unrelated": certain(ValueError("expected 3 channels, got 4"), NOT_MEMORY),
    "unrelated-memory-word": certain(RuntimeError("could not pin memory twice"), NOT_MEMORY),
    "emulator": certain(
        RuntimeError("CUDA error: out of memory: the emulated GPU does not implement cudaMallocManaged"), NOT_MEMORY
    ),
    "emulator-by-type": certain(torch.OutOfMemoryError("the emulated GPU does not implement cuMemMap"), NOT_MEMORY),
}


def judge(error: BaseException, *, nearly_full: bool = False, smaller_ran: bool = False) -> Verdict:
    return classify(error, device_nearly_full=nearly_full, smaller_size_ran=smaller_ran)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_the_table(row: Row) -> None:
    """Each known message gets its answer on an empty device, on a full one, and after a smaller size ran."""
    verdicts = {
        "empty": judge(row.error),
        "full": judge(row.error, nearly_full=True),
        "ran": judge(row.error, smaller_ran=True),
    }
    kinds = {fact: verdict.kind for fact, verdict in verdicts.items()}
    assert kinds == {"empty": row.empty_and_new, "full": row.nearly_full, "ran": row.smaller_ran}
    assert {verdict.limit for verdict in verdicts.values()} == {row.limit}
    assert {verdict.context_lost for verdict in verdicts.values()} == {row.context_lost}
    assert all(verdict.reason for verdict in verdicts.values())


def test_an_ambiguous_message_names_the_fact_that_decided() -> None:
    """The report can say that the message alone did not settle it, and what did."""
    error = RuntimeError(CONVOLUTION)
    assert "the device was nearly full" in judge(error, nearly_full=True, smaller_ran=True).reason
    assert "a smaller size ran" in judge(error, smaller_ran=True).reason
    assert "not nearly full and no smaller size ran" in judge(error).reason
    assert "ambiguous" in judge(error).reason
    assert "ambiguous" not in judge(RuntimeError(TORCH_MESSAGE)).reason


def test_peers_defect_8_an_accelerator_error_is_out_of_memory() -> None:
    """`torch.AcceleratorError`, which is no `OutOfMemoryError`, counts when it says so; four finders miss it."""
    error = torch.AcceleratorError("CUDA error: out of memory")
    assert not isinstance(error, torch.OutOfMemoryError)
    assert judge(error).kind is MEMORY


def test_peers_defect_8_a_wrapped_error_with_two_args_is_out_of_memory() -> None:
    """The number of args does not matter; a guard on one arg drops errors that were wrapped."""
    assert judge(torch.OutOfMemoryError("CUDA out of memory.", "rank 3")).kind is MEMORY
    assert judge(RuntimeError("in stage 2", torch.OutOfMemoryError(TORCH_MESSAGE))).kind is MEMORY
    assert judge(RuntimeError(("in stage 2", ["cause", TORCH_MESSAGE]))).kind is MEMORY


@pytest.mark.parametrize("message", [ASSERT, ILLEGAL])
def test_peers_defect_8_a_poisoned_context_is_not_out_of_memory(message: str) -> None:
    """Illegal accesses and device asserts are the job's own failure; a finder counts them as memory."""
    verdict = judge(RuntimeError(message), nearly_full=True, smaller_ran=True)
    assert verdict.kind is NOT_MEMORY
    assert verdict.context_lost


def raised(outer: BaseException, inner: BaseException, *, how: str) -> BaseException:
    """Link two errors as `raise outer` does in the except clause of `inner`: bare, `from inner` or `from None`."""
    outer.__context__ = inner
    if how == "cause":
        outer.__cause__ = inner
    outer.__suppress_context__ = how in {"cause", "hidden"}
    return outer


def test_an_explicit_cause_counts_whatever_the_outer_error_is() -> None:
    """`raise … from oom` says that memory is the reason, also for a type that is otherwise a mistake."""
    for outer in (RuntimeError("step failed"), TypeError("step failed"), KeyError("step")):
        assert judge(raised(outer, torch.OutOfMemoryError(TORCH_MESSAGE), how="cause")).kind is MEMORY


def test_an_error_retold_while_out_of_memory_was_handled_is_out_of_memory() -> None:
    """A plain `raise RuntimeError("step failed")` in an except clause retells what it handled."""

    class StepFailedError(Exception):
        pass

    for outer in (RuntimeError("step failed"), StepFailedError(), SystemExit(1)):
        assert judge(raised(outer, torch.OutOfMemoryError(TORCH_MESSAGE), how="context")).kind is MEMORY


@pytest.mark.parametrize(
    "outer", [TypeError("x"), AttributeError("x"), KeyError("x"), NameError("x"), ZeroDivisionError()]
)
def test_a_mistake_in_a_handler_is_not_out_of_memory(outer: BaseException) -> None:
    """A defect in the code that handled an out-of-memory error is a defect: no smaller size would mend it."""
    assert judge(raised(outer, torch.OutOfMemoryError(TORCH_MESSAGE), how="context")).kind is NOT_MEMORY


def test_what_the_error_itself_says_comes_before_what_was_handled() -> None:
    """The context is asked only where the error itself has no clear answer."""
    error = raised(
        RuntimeError("CUDA error: invalid configuration argument"), torch.OutOfMemoryError(TORCH_MESSAGE), how="context"
    )
    assert judge(error).kind is NOT_VRAM
    ambiguous_outer = raised(RuntimeError(CONVOLUTION), torch.OutOfMemoryError(TORCH_MESSAGE), how="context")
    assert judge(ambiguous_outer).kind is MEMORY
    assert "ambiguous" not in judge(ambiguous_outer).reason


def test_a_hidden_context_does_not_count() -> None:
    """`raise … from None` says that what was handled has nothing to do with it."""
    assert judge(raised(RuntimeError("other"), torch.OutOfMemoryError(TORCH_MESSAGE), how="hidden")).kind is NOT_MEMORY


@pytest.mark.parametrize("how", ["cause", "context"])
def test_a_lost_context_wins_over_everything(how: str) -> None:
    """Whatever else the chain says, a process whose CUDA context is lost can run no other trial."""
    for outer in (torch.OutOfMemoryError(TORCH_MESSAGE), TypeError("x"), MemoryError()):
        verdict = judge(raised(outer, torch.AcceleratorError(ILLEGAL), how=how))
        assert (verdict.kind, verdict.context_lost) == (NOT_MEMORY, True)


def test_a_decisive_cause_outweighs_an_ambiguous_error() -> None:
    """An ambiguous message is decided by a clear one further down before any fact of the trial is asked."""
    error = raised(RuntimeError(CONVOLUTION), torch.OutOfMemoryError(TORCH_MESSAGE), how="cause")
    verdict = judge(error)
    assert verdict.kind is MEMORY
    assert "ambiguous" not in verdict.reason


def test_members_of_an_exception_group_count() -> None:
    """One member out of memory makes the group so, however deep it lies."""
    group = ExceptionGroup("ranks", [ValueError("x"), ExceptionGroup("node", [torch.OutOfMemoryError(TORCH_MESSAGE)])])
    assert judge(group).kind is MEMORY
    assert judge(ExceptionGroup("ranks", [ValueError("x"), TypeError("y")])).kind is NOT_MEMORY


def test_an_error_among_the_args_counts_by_its_type() -> None:
    """What is wrapped as an argument is judged as an error, not only by the words that its rendering shows."""
    wordless = torch.OutOfMemoryError("rank 3")
    assert judge(RuntimeError("in stage 2", wordless)).kind is MEMORY
    assert judge(RuntimeError("in stage 2", [("rank", wordless)])).kind is MEMORY
    assert judge(ExceptionGroup("ranks", (wordless,))).kind is MEMORY


def test_args_that_an_error_does_not_render_count() -> None:
    """Some types show a text of their own and keep what happened in their args."""

    class TerseError(Exception):
        def __str__(self) -> str:
            return "failed"

    error = TerseError("stage 2", TORCH_MESSAGE)
    assert judge(error).kind is MEMORY
    assert requested_bytes(error) == 2 << 30


def test_a_circular_chain_ends() -> None:
    """Chains can be made circular by hand; the walk visits each error once."""
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert judge(first).kind is NOT_MEMORY
    assert requested_bytes(first) == 0


def test_a_device_error_that_is_a_memory_error_too_is_about_the_device() -> None:
    """Errors of cupy and RMM derive from `MemoryError`; the device is what they speak of."""
    cupy_like = type("OutOfMemoryError", (MemoryError,), {})
    assert judge(cupy_like("Out of memory allocating 1,024 bytes")).kind is MEMORY
    assert judge(MemoryError("std::bad_alloc: out_of_memory: CUDA error: cudaErrorMemoryAllocation")).kind is MEMORY


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (TORCH_MESSAGE, 2 << 30),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("CUDA out of memory. Tried to allocate 1.50 KiB.", 1536),
        ("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 11.17 GiB total capacity", 20 << 20),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes.", 12 << 30),
        ("CUDA error: out of memory", 0),
        ("", 0),
    ],
)
def test_the_bytes_asked_for_are_read_off_the_message(message: str, size: int) -> None:
    """Where an allocator prints its request, in its own units, it is read; elsewhere it is 0."""
    assert requested_bytes(RuntimeError(message)) == size


def test_the_bytes_asked_for_are_found_where_the_verdict_was() -> None:
    """Causes, args, groups and retold contexts are searched; the context of a handler's mistake is not."""
    oom = torch.OutOfMemoryError(TORCH_MESSAGE)
    assert requested_bytes(raised(KeyError("x"), oom, how="cause")) == 2 << 30
    assert requested_bytes(RuntimeError("x", oom)) == 2 << 30
    assert requested_bytes(ExceptionGroup("x", [oom])) == 2 << 30
    assert requested_bytes(raised(RuntimeError("x"), oom, how="context")) == 2 << 30
    assert requested_bytes(raised(TypeError("x"), oom, how="context")) == 0
