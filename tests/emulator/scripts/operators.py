"""Runs many operators on the first of two emulated cards and on the CPU: the shape or the error of each, as JSON.

What the process writes to its standard error meanwhile is kept apart and comes with the answer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.simplefilter("ignore")  # sparse layouts are announced as a beta


def matrix(device: str, size: int = 8) -> torch.Tensor:
    """A positive definite matrix: every decomposition takes it."""
    return (torch.eye(size) * size + 1).to(device)


def image(device: str) -> torch.Tensor:
    return torch.ones(2, 4, 8, 8, device=device, requires_grad=True)


def whole(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=device)


def trained(module: nn.Module, device: str, *shape: int) -> Any:
    """The output of a layer whose backward has run as well."""
    output = module.to(device)(torch.ones(*shape, device=device, requires_grad=True))
    output = output[0] if isinstance(output, tuple) else output
    output.sum().backward()
    return output


def backward(output: torch.Tensor) -> torch.Tensor:
    output.sum().backward()
    return output


def entries(device: str) -> torch.Tensor:
    """A sparse matrix whose number of entries is known on the host."""
    return torch.sparse_csr_tensor(
        whole(device, 0, 1, 2, 3), whole(device, 0, 1, 2), torch.ones(3, device=device), size=(3, 3)
    )


def coordinates(device: str, *, coalesced: bool) -> torch.Tensor:
    at = torch.tensor([[0, 1, 2], [0, 1, 2]], device=device)
    return torch.sparse_coo_tensor(at, torch.ones(3, device=device), size=(3, 3), is_coalesced=coalesced)


def ctc(device: str) -> torch.Tensor:
    scores = torch.zeros(12, 2, 5, device=device, requires_grad=True)
    lengths = torch.full((2,), 12), torch.full((2,), 3)
    return backward(functional.ctc_loss(scores.log_softmax(2), torch.ones(2, 3, dtype=torch.long).to(device), *lengths))


def ctc_of_cudnn(device: str) -> torch.Tensor:
    scores = torch.zeros(12, 2, 5, device=device).log_softmax(2)
    targets = torch.ones(6, dtype=torch.int32)
    lengths = torch.full((2,), 12, dtype=torch.int32), torch.full((2,), 3, dtype=torch.int32)
    return functional.ctc_loss(scores, targets, *lengths)


def grid(device: str, *, align_corners: bool) -> torch.Tensor:
    points = torch.zeros(2, 5, 5, 2, device=device)
    return backward(functional.grid_sample(image(device), points, align_corners=align_corners))


def scaled(device: str) -> torch.Tensor:
    eight = torch.ones(16, 16).to(torch.float8_e4m3fn).to(device)
    one = torch.ones((), device=device)
    return torch._scaled_mm(eight, eight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def graph(device: str) -> torch.Tensor:
    x = torch.ones(8, device=device)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = x * 2
    captured.replay()
    return y


def snapshot(device: str) -> torch.Tensor:
    torch.cuda.memory._record_memory_history()
    x = torch.ones(3, device=device)
    found = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    assert found["segments"]
    return x


def streamed(device: str) -> torch.Tensor:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        x = torch.ones(3, device=device)
        event.record()
    torch.cuda.current_stream().wait_event(event)
    event.synchronize()
    return x


def to_the_second(device: str) -> torch.Tensor:
    assert torch.cuda.can_device_access_peer(0, 1)
    return torch.ones(3, device=device).to("cuda:1") + 1


def reduced_by_nccl(device: str) -> torch.Tensor:
    parts = [torch.ones(3, device=device), torch.ones(3, device="cuda:1")]
    torch.cuda.nccl.all_reduce(parts)
    return parts[0]


def shared(device: str) -> torch.Tensor:
    x = torch.ones(3, device=device)
    x.untyped_storage()._share_cuda_()
    return x


# On both, and the shape is to be the same.
OPERATORS: dict[str, Callable[[str], Any]] = {
    "fft": lambda d: torch.fft.fft(matrix(d)),
    "rfft2": lambda d: torch.fft.rfft2(matrix(d)),
    "stft": lambda d: torch.stft(torch.ones(64, device=d), 16, return_complex=True),
    "inv": lambda d: torch.linalg.inv(matrix(d)),
    "solve": lambda d: torch.linalg.solve(matrix(d), matrix(d)),
    "cholesky": lambda d: torch.linalg.cholesky(matrix(d)),
    "qr": lambda d: torch.linalg.qr(matrix(d))[0],
    "svd": lambda d: torch.linalg.svd(matrix(d))[0],
    "eigh": lambda d: torch.linalg.eigh(matrix(d))[0],
    "eig": lambda d: torch.linalg.eig(matrix(d))[0],
    "det": lambda d: torch.linalg.det(matrix(d)),
    "lstsq": lambda d: torch.linalg.lstsq(matrix(d), matrix(d))[0],
    "solve_triangular": lambda d: torch.linalg.solve_triangular(matrix(d), matrix(d), upper=True),
    "matrix_exp": lambda d: torch.linalg.matrix_exp(matrix(d)),
    "csr_matmul": lambda d: entries(d) @ matrix(d, 3),
    "csr_matmul_vector": lambda d: entries(d) @ torch.ones(3, device=d),
    "csr_matmul_csr": lambda d: (entries(d) @ entries(d)).to_dense(),
    "coo_matmul": lambda d: coordinates(d, coalesced=True) @ matrix(d, 3),
    "coo_matmul_uncoalesced": lambda d: torch.sparse.mm(coordinates(d, coalesced=False), matrix(d, 3)),
    "coo_to_dense": lambda d: coordinates(d, coalesced=False).to_dense(),
    "rnn": lambda d: trained(nn.RNN(8, 8), d, 3, 2, 8),
    "lstm": lambda d: trained(nn.LSTM(8, 8), d, 3, 2, 8),
    "gru": lambda d: trained(nn.GRU(8, 8), d, 3, 2, 8),
    "lstm_cell": lambda d: trained(nn.LSTMCell(8, 8), d, 2, 8),
    "conv1d": lambda d: trained(nn.Conv1d(4, 4, 3), d, 2, 4, 16),
    "conv2d": lambda d: trained(nn.Conv2d(4, 4, 3), d, 2, 4, 8, 8),
    "conv2d_grouped": lambda d: trained(nn.Conv2d(4, 4, 3, groups=4), d, 2, 4, 8, 8),
    "conv3d": lambda d: trained(nn.Conv3d(4, 4, 3), d, 2, 4, 8, 8, 8),
    "conv_transpose1d": lambda d: trained(nn.ConvTranspose1d(4, 4, 3), d, 2, 4, 16),
    "conv_transpose2d": lambda d: trained(nn.ConvTranspose2d(4, 4, 3), d, 2, 4, 8, 8),
    "conv_transpose3d": lambda d: trained(nn.ConvTranspose3d(4, 4, 3), d, 2, 4, 8, 8, 8),
    "batch_norm": lambda d: trained(nn.BatchNorm2d(4), d, 2, 4, 8, 8),
    "group_norm": lambda d: trained(nn.GroupNorm(2, 4), d, 2, 4, 8, 8),
    "max_pool2d": lambda d: trained(nn.MaxPool2d(2), d, 2, 4, 8, 8),
    "attention": lambda d: trained(nn.TransformerEncoderLayer(16, 2, dropout=0.1), d, 3, 2, 16),
    "ctc_loss": ctc,
    "ctc_loss_of_cudnn": ctc_of_cudnn,
    "grid_sample": lambda d: grid(d, align_corners=False),
    "grid_sample_of_cudnn": lambda d: grid(d, align_corners=True),
    "unique": lambda d: torch.unique(whole(d, 1, 2, 3, 2)),
    "nonzero": lambda d: torch.nonzero(matrix(d)),
    "masked_select": lambda d: matrix(d)[matrix(d) > 0],
    "to_sparse_csr": lambda d: matrix(d).to_sparse_csr().values(),
    "csr_matmul_of_found_entries": lambda d: matrix(d).to_sparse_csr() @ matrix(d),
    "sort": lambda d: torch.sort(torch.ones(5000, device=d))[0],
    "sort_rows": lambda d: torch.sort(torch.ones(300, 50, device=d))[0],
    "topk": lambda d: torch.topk(torch.ones(3, 5000, device=d), 7)[0],
    "kthvalue": lambda d: torch.kthvalue(torch.ones(50, device=d), 3)[0],
    "median": lambda d: torch.median(torch.ones(50, device=d)),
    "cumsum": lambda d: torch.cumsum(torch.ones(5000, device=d), 0),
    "histc": lambda d: torch.histc(torch.ones(50, device=d), 10, 0, 1),
    "multinomial": lambda d: torch.multinomial(torch.ones(3, 50, device=d), 7),
    "randperm": lambda d: torch.randperm(5000, device=d),
    "dropout": lambda d: trained(nn.Dropout(), d, 8, 8),
    "embedding": lambda d: backward(nn.Embedding(9, 4).to(d)(whole(d, 1, 2, 3))),
    "embedding_bag": lambda d: backward(nn.EmbeddingBag(9, 4).to(d)(whole(d, 1, 2, 3), whole(d, 0, 2))),
    "scatter": lambda d: torch.zeros(9, device=d).scatter(0, whole(d, 1, 2), 1.0),
    "scatter_add": lambda d: torch.zeros(9, device=d).scatter_add(0, whole(d, 1, 2), torch.ones(2, device=d)),
    "gather": lambda d: torch.zeros(9, device=d).gather(0, whole(d, 1, 2)),
    "index_put": lambda d: torch.zeros(9, device=d).index_put(
        (whole(d, 1, 2),), torch.ones(2, device=d), accumulate=True
    ),
    "interpolate": lambda d: backward(functional.interpolate(image(d), scale_factor=2, mode="bicubic")),
    "bmm": lambda d: torch.bmm(torch.ones(3, 4, 5, device=d), torch.ones(3, 5, 6, device=d)),
    "complex_matmul": lambda d: matrix(d).to(torch.complex64) @ matrix(d).to(torch.complex64),
    "int8_matmul": lambda d: torch._int_mm(matrix(d, 32).to(torch.int8), matrix(d, 32).to(torch.int8)),
    "gcd": lambda d: torch.gcd(whole(d, 4, 6), whole(d, 6, 9)),
    "cdist": lambda d: torch.cdist(matrix(d), matrix(d)),
    "cross_entropy": lambda d: functional.cross_entropy(matrix(d), whole(d, *range(8))),
    "linear": lambda d: trained(nn.Linear(8, 8), d, 2, 8),
    "pinned": lambda d: torch.ones(3).pin_memory().to(d, non_blocking=True) if d != "cpu" else torch.ones(3),
}
# What only a card has.
OF_CARDS: dict[str, Callable[[str], Any]] = {
    "scaled_mm": scaled,
    "cuda_graph": graph,
    "streams_and_events": streamed,
    "snapshot": snapshot,
    "peer": to_the_second,
    "nccl": reduced_by_nccl,
    "semi_structured": lambda d: torch._cslt_compress(matrix(d, 64).half()),
    "ipc": shared,
}


def outcome(call: Callable[[str], Any], device: str) -> dict[str, Any]:
    try:
        shape = list(call(device).shape)
        torch.cuda.synchronize()
    except (RuntimeError, NotImplementedError) as error:
        return {"error": str(error)}
    return {"shape": shape}


with tempfile.TemporaryFile() as said:
    kept = os.dup(2)
    os.dup2(said.fileno(), 2)
    answer = {name: outcome(call, "cuda") for name, call in (OPERATORS | OF_CARDS).items()}
    os.dup2(kept, 2)
    said.seek(0)
    lines = said.read().decode().splitlines()
cpu = {name: outcome(call, "cpu") for name, call in OPERATORS.items()}
after = str((matrix("cuda") @ matrix("cuda")).shape)
sys.stdout.write(json.dumps({"cards": answer, "cpu": cpu, "lines": lines, "still_works": after}))
