"""Trains and computes in every usual way on the emulated card: what came of each, as JSON."""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network(torch.randn(32, 256, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def copies() -> dict[str, Any]:
    small = torch.arange(1000, dtype=torch.int32)
    on_card = small.cuda()
    strided = torch.arange(64).reshape(8, 8).t()
    large = torch.ones(4 * MIB)
    return {
        "reads_back": bool((on_card.cpu() == small).all()),
        "strided": bool((strided.cuda().cpu() == strided).all()),
        "large_is_zeros": float(large.cuda().sum().item()),
        "loss_is_zero": (torch.randn(10, device="cuda").sum()).item(),
    }


def pinned() -> dict[str, Any]:
    host = torch.ones(1000).pin_memory()
    made = torch.empty(1000, pin_memory=True)
    on_card = host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return {
        "is_pinned": [host.is_pinned(), made.is_pinned(), torch.ones(2).is_pinned()],
        "reads_back": bool((on_card.cpu() == 1).all()),
    }


def events() -> dict[str, Any]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    time.sleep(0.05)
    end.record()
    end.synchronize()
    return {"milliseconds": begin.elapsed_time(end), "query": end.query()}


def streams() -> dict[str, Any]:
    side = torch.cuda.Stream(priority=-1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        inside = torch.cuda.current_stream() == side
        tensor = torch.ones(1000, device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    tensor.record_stream(torch.cuda.current_stream())
    side.synchronize()
    return {"inside": inside, "priority": side.priority, "query": side.query()}


def graphs() -> dict[str, Any]:
    network, static = model(), torch.randn(32, 256, device="cuda")
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        network(static)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturing = torch.cuda.is_current_stream_capturing()
        output = network(static)
    for _ in range(3):
        graph.replay()
    callable_network = torch.cuda.make_graphed_callables(
        model(), (torch.randn(32, 256, device="cuda", requires_grad=True),)
    )
    callable_network(torch.randn(32, 256, device="cuda", requires_grad=True)).sum().backward()
    after = torch.cuda.is_current_stream_capturing()
    return {"capturing": capturing, "after": after, "shape": list(output.shape)}


def sync_in_capture() -> dict[str, Any]:
    tensor = torch.ones(10, device="cuda")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            (tensor * 2).sum().item()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {"error": str(error)}
    return {"error": None}


def amp() -> dict[str, Any]:
    network, scaler = model(), torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    kinds = []
    for kind in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=kind):
            output = network(torch.randn(32, 256, device="cuda"))
        kinds.append(str(output.dtype))
        scaler.scale(output.float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"kinds": kinds}


def checkpointed() -> dict[str, Any]:
    network = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.GELU()) for _ in range(16)]).cuda()
    peaks = []
    for use in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        tensor = torch.randn(4096, 256, device="cuda", requires_grad=True)
        for layer in network:
            tensor = checkpoint(layer, tensor, use_reentrant=False) if use else layer(tensor)
        tensor.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        network.zero_grad()
        del tensor
    return {"peaks": peaks}


def optimizers() -> dict[str, Any]:
    grown = {}
    for kind in ({"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}):
        network = model()
        optimizer = torch.optim.AdamW(network.parameters(), **kind)
        step(network, optimizer)
        held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        states = sum(value.numel() * value.element_size() for value in held if value.dim())
        grown["+".join(key for key, value in kind.items() if value) or "single"] = states
    return {"state_bytes": grown, "parameters": sum(p.numel() for p in model().parameters())}


def snapshot() -> dict[str, Any]:
    torch.cuda.memory._record_memory_history(max_entries=100)
    tensor = torch.empty(10 * MIB, device="cuda")
    trace = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    del tensor
    return {"segments": len(trace["segments"]), "actions": sorted({e["action"] for e in trace["device_traces"][0]})}


def layers() -> dict[str, Any]:
    images = torch.randn(4, 3, 32, 32, device="cuda", requires_grad=True)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).cuda()
    network(images).sum().backward()
    query = torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    table = nn.Embedding(100, 16).cuda()
    labels = torch.zeros(8, dtype=torch.long, device="cuda")
    nn.functional.cross_entropy(table(labels), labels).backward()
    return {"shape": list(images.grad.shape), "cudnn": torch.backends.cudnn.version()}


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception:  # noqa: BLE001 - one part's failure is that part's answer
        return {"failure": traceback.format_exc()}


# The failed capture comes last: torch 2.8 leaves its random generator in the capture.
parts = (copies, pinned, events, streams, graphs, amp, checkpointed, optimizers, snapshot, layers, sync_in_capture)
sys.stdout.write(json.dumps({part.__name__: attempt(part) for part in parts}))
