"""Calls what the emulation does not have: the error of each, as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.simplefilter("ignore")  # sparse layouts are announced as a beta
matrix = torch.ones(8, 8, device="cuda")
CALLS: dict[str, Callable[[], object]] = {
    "fft": lambda: torch.fft.fft(matrix),
    "svd": lambda: torch.linalg.svd(matrix),
    "lstm": lambda: torch.nn.LSTM(8, 8).cuda()(torch.randn(3, 2, 8, device="cuda")),
    "gru": lambda: torch.nn.GRU(8, 8).cuda()(torch.randn(3, 2, 8, device="cuda")),
    "sparse": lambda: torch.sparse.mm(torch.eye(8).to_sparse_csr().cuda(), matrix),
}


def error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


answer = {name: error_of(call) for name, call in CALLS.items()}
answer["still_works"] = str((matrix @ matrix).shape)
sys.stdout.write(json.dumps(answer))
