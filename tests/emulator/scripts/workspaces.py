"""What convolutions take besides their inputs and outputs, on each of the machine's cards, as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from typing import Any

import torch
from torch.nn import functional

from autobatch.emulator.inside import workspaces_are_known
from autobatch.gpu.nvml import NvmlSession

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def beside(run: Any, card: int = 0) -> int:
    """The most that a call takes beyond what it gives back, in bytes."""
    torch.cuda.synchronize(card)
    before = torch.cuda.memory_allocated(card)
    torch.cuda.reset_peak_memory_stats(card)
    made = run()
    peak = torch.cuda.max_memory_allocated(card) - before
    outputs = [one for one in (made if isinstance(made, tuple) else (made,)) if one is not None]
    return peak - sum(-(-one.nbytes // 512) * 512 for one in outputs)


def operands(dtype: str, layout: str, card: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.empty(32, 64, 56, 56, device=f"cuda:{card}", dtype=TYPES[dtype])
    weight = torch.empty(64, 64, 3, 3, device=f"cuda:{card}", dtype=TYPES[dtype])
    return images.to(memory_format=LAYOUTS[layout]), weight.to(memory_format=LAYOUTS[layout])


def forward(dtype: str, layout: str, card: int = 0) -> int:
    torch.cuda.set_device(card)
    images, weight = operands(dtype, layout, card)
    return beside(lambda: functional.conv2d(images, weight, padding=1), card)


def backward(dtype: str, layout: str, operation: str) -> int:
    images, weight = operands(dtype, layout)
    mask = [operation == "input", operation == "weight", False]
    shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    gradient = images.clone()  # as many channels go out as come in
    return beside(lambda: torch.ops.aten.convolution_backward(gradient, images, weight, None, *shape, mask))


def from_many_threads() -> dict[str, int]:
    found: dict[str, int] = {}
    count = torch.cuda.device_count()
    threads = [
        threading.Thread(target=lambda card=card: found.__setitem__(str(card), forward("fp32", "first", card)))
        for card in range(count)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def contexts() -> list[bool]:
    """On which cards this process holds memory."""
    with NvmlSession() as session:
        return [bool(session.device(card).process_bytes(os.getpid())) for card in range(torch.cuda.device_count())]


def nearly_full() -> dict[str, Any]:
    """A convolution for whose first workspace there is no room: torch takes the next algorithm rather than fail."""
    images, weight = operands("fp32", "first")
    torch.cuda.empty_cache()
    room = images.nbytes + (8 << 20)  # the output's, and a little
    kept = torch.empty(torch.cuda.mem_get_info(0)[0] - room - (4 << 20), dtype=torch.uint8, device="cuda")
    taken = beside(lambda: functional.conv2d(images, weight, padding=1))
    del kept
    return {"taken": taken}


def kinds() -> dict[str, bool]:
    """Other convolutions run, both ways."""
    ran = {}
    for name, module, shape in (
        ("1d", torch.nn.Conv1d(8, 16, 3), (4, 8, 64)),
        ("3d", torch.nn.Conv3d(4, 8, 3), (2, 4, 8, 8, 8)),
        ("depthwise", torch.nn.Conv2d(16, 16, 3, groups=16), (4, 16, 32, 32)),
        ("grouped", torch.nn.Conv2d(16, 32, 3, groups=4), (4, 16, 32, 32)),
        ("transposed", torch.nn.ConvTranspose2d(16, 8, 4, 2, 1), (4, 16, 16, 16)),
        ("dilated", torch.nn.Conv2d(16, 8, 3, dilation=2), (4, 16, 32, 32)),
    ):
        module.cuda()(torch.empty(shape, device="cuda", requires_grad=True)).sum().backward()
        ran[name] = all(one.grad is not None for one in module.parameters())
    return ran


def calls_that_can_be_looked_up() -> int:
    """How many of 200 calls that no driver has get a place, so that each can say its name when it is called."""
    driver = ctypes.CDLL("libcuda.so.1")
    found = ctypes.c_void_p()
    return sum(
        driver.cuGetProcAddress_v2(f"cuNothing{number}".encode(), ctypes.byref(found), 13000, 0, None) == 0
        for number in range(200)
    )


torch.cuda.init()
answer: dict[str, Any] = {"known": workspaces_are_known(), "cudnn": torch.backends.cudnn.version()}
answer["contexts_before"] = contexts()
answer["forward"] = {f"{dtype} {layout}": forward(dtype, layout) for dtype in TYPES for layout in LAYOUTS}
answer["backward"] = {name: backward("fp32", "first", name) for name in ("input", "weight")}
answer["contexts_after"] = contexts()
answer["again"] = forward("fp32", "first")
torch.backends.cudnn.benchmark = True
answer["benchmark"] = forward("bf16", "first")
torch.backends.cudnn.benchmark = False
answer["kinds"] = kinds()
torch.cuda.set_device(0)
answer["nearly_full"] = nearly_full()
answer["threads"] = from_many_threads()
answer["looked_up"] = calls_that_can_be_looked_up()
print(json.dumps(answer))
