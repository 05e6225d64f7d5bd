"""Operators on an emulated card: each runs, fails by the name of a call, or sees a card that holds zeros."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import ScriptRun, ScriptRunner

SCRIPT = Path(__file__).parent / "scripts" / "operators.py"

FAILS = {
    "fft": "cufftCreate",
    "rfft2": "cufftCreate",
    "stft": "cufftCreate",
    "inv": "cusolverDnCreate",
    "solve": "cusolverDnCreate",
    "det": "cusolverDnCreate",
    "cholesky": "cusolverDnCreate",
    "qr": "cusolverDnCreate",  # and below: ...Params or ...Info in newer versions of torch
    "lstsq": "cusolverDnCreate",
    "svd": "cusolverDnCreate",
    "eigh": "cusolverDnCreate",
    "csr_matmul": "cusparseCreateCsr",
    "csr_matmul_vector": "cusparseCreateCsr",
    "csr_matmul_csr": "cusparseCreateCsr",
    "coo_matmul": "cusparseCreate",
    "semi_structured": "cusparseLt",
    "rnn": "cudnnCreateDropoutDescriptor",
    "lstm": "cudnnCreateDropoutDescriptor",
    "gru": "cudnnCreateDropoutDescriptor",
    "ctc_loss_of_cudnn": "cudnnCreateCTCLossDescriptor",
    "grid_sample_of_cudnn": "cudnnCreateSpatialTransformerDescriptor",
    "ipc": "cudaIpcGetMemHandle",
}
"""Operators that need a call which is not there, and the call at which they end."""

# Their shapes come from what the card holds, which is zeros: the inspection of a job lists them as data-dependent.
FINDS_NOTHING = {"unique": [0], "nonzero": [0, 2], "masked_select": [0], "to_sparse_csr": [0]}

# torch looks for a finite value first, and reads that there is none: the error is torch's own, and names no call.
MISLED = {"eig": "should not contain infs or NaNs"}

RUNS = [
    *(
        "solve_triangular",
        "matrix_exp",
        "lstm_cell",
        "conv1d",
        "conv2d",
        "conv2d_grouped",
        "conv3d",
        "conv_transpose1d",
    ),
    *(
        "conv_transpose2d",
        "conv_transpose3d",
        "batch_norm",
        "group_norm",
        "max_pool2d",
        "attention",
        "ctc_loss",
        "linear",
    ),
    *("grid_sample", "sort", "sort_rows", "topk", "kthvalue", "median", "cumsum", "histc", "multinomial", "randperm"),
    *("dropout", "embedding", "embedding_bag", "scatter", "scatter_add", "gather", "index_put", "interpolate", "bmm"),
    *("complex_matmul", "int8_matmul", "gcd", "cdist", "cross_entropy", "pinned", "coo_to_dense"),
    # Without a call of cuSPARSE, as for any matrix without entries: the card is asked how many there are, and says none.
    *("csr_matmul_of_found_entries", "coo_matmul_uncoalesced"),
]
"""Operators that run, with the shape that they have on the CPU."""

RUNS_ON_CARDS_ALONE = {
    "scaled_mm": [16, 16],
    "cuda_graph": [8],
    "streams_and_events": [3],
    "snapshot": [3],
    "peer": [3],
    "nccl": [3],
}


@pytest.fixture(scope="module", params=["installed", pytest.param("older", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, scripts: ScriptRunner) -> ScriptRun:
    """All of them, run once on a card of the newest kind, with the installed torch and with one for CUDA 12."""
    runner = scripts if request.param == "installed" else request.getfixturevalue("older_torch")
    result: ScriptRun = runner.run(SCRIPT, ["H100-80GB", "H100-80GB"])
    return result


def test_every_operator_is_classified(run: ScriptRun) -> None:
    """None of the script's operators is left without a claim."""
    assert {*FAILS, *FINDS_NOTHING, *MISLED, *RUNS, *RUNS_ON_CARDS_ALONE} == set(run.answer["cards"])


@pytest.mark.parametrize(("operator", "call"), FAILS.items())
def test_fails_by_name(run: ScriptRun, operator: str, call: str) -> None:
    """It raises for want of a call, which the error names, or standard error where the error has no room for it."""
    error = run.answer["cards"][operator].get("error")
    assert error is not None, f"{operator} ran"
    named = [name for name in run.unsupported_calls if name.startswith(call)]
    assert named, run.unsupported_calls
    assert "NOT_SUPPORTED" in error or any(name in error for name in named)
    assert all(f"autobatch: {missing(name)}" in run.answer["lines"] for name in named)


def missing(call: str) -> str:
    return f"the emulated GPU does not implement {call}"


@pytest.mark.parametrize("operator", ["csr_matmul", "coo_matmul", "lstm", "gru", "ctc_loss_of_cudnn", "ipc"])
def test_error_says_what_lacks_the_call(run: ScriptRun, operator: str) -> None:
    """Where a library gives its errors a text, the text has the name, and that it is the emulated card that lacks it."""
    assert missing(FAILS[operator]) in run.answer["cards"][operator]["error"]


def test_each_missing_call_is_said_once(run: ScriptRun) -> None:
    """One line for each on standard error, however often it is made, in the order of the first time; no other line."""
    assert run.answer["lines"] == [f"autobatch: {missing(call)}" for call in run.unsupported_calls]


@pytest.mark.parametrize("operator", RUNS)
def test_runs(run: ScriptRun, operator: str) -> None:
    """It runs, and its output has the shape that it has on the CPU."""
    assert run.answer["cards"][operator] == run.answer["cpu"][operator]


@pytest.mark.parametrize(("operator", "shape"), RUNS_ON_CARDS_ALONE.items())
def test_runs_on_cards_alone(run: ScriptRun, operator: str, shape: list[int]) -> None:
    """It runs, and has this shape."""
    assert run.answer["cards"][operator] == {"shape": shape}


@pytest.mark.parametrize(("operator", "shape"), FINDS_NOTHING.items())
def test_finds_nothing(run: ScriptRun, operator: str, shape: list[int]) -> None:
    """What picks by value picks nothing, since the card holds zeros."""
    assert run.answer["cards"][operator] == {"shape": shape} != run.answer["cpu"][operator]


@pytest.mark.parametrize(("operator", "words"), MISLED.items())
def test_misled_by_a_zero(run: ScriptRun, operator: str, words: str) -> None:
    """A check of values that torch makes itself fails, aloud."""
    assert words in run.answer["cards"][operator]["error"]


def test_process_goes_on(run: Any) -> None:
    """A refused call does no harm to the next."""
    assert run.answer["still_works"] == "torch.Size([8, 8])"
