"""Record what cuDNN takes for convolutions besides their inputs and outputs: by operation, shape, type and layout.

    python tests/gpu/workspaces.py OUT.json.gz [--seconds S] [--resume FILE] [--quick]
    python tests/gpu/workspaces.py --collect      write convolutions.json anew; needs timm and transformers

`convolutions.json` has every convolution of ResNet-50, ConvNeXt, MobileNetV3, MnasNet, EfficientNet, a U-Net and Whisper, once.
Each runs forward, backward to its input and backward to its weights, twice: the first call chooses an algorithm, the second is
what training repeats; then the batch normalisation of its output, forward. Written down are the blocks that torch's allocator
gave: those that came back within the call, workspaces among them, and those that did not, its results. A layout that torch
changes before it calls cuDNN shows there too, and shows on an emulated card as well. What is asked first is what tells most;
what time does not allow is counted in `not_reached`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recordings import end_in_order, machine_facts, read_recording, say, write_recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

CONVOLUTIONS = Path(__file__).with_name("convolutions.json")
TIMM = ("resnet50", "convnext_tiny", "mobilenetv3_large_100", "mnasnet_100", "efficientnet_b0")
OPERATIONS = ("forward", "input", "weight", "norm")
"""`input` and `weight` are the backward to each."""
COLUMNS = ("convolution", "batch", "dtype", "layout", "benchmark", "operation", "first", "then", "kept")
"""The last three: bytes of the blocks that came back within the first call and within the second, and of its results; where the
operation failed, the error stands in both."""
# What to ask first: batch, type, layout, benchmark mode.
PASSES = (
    *((32, dtype, layout, False) for dtype, layout in (("bf16", "last"), ("fp32", "first"), ("fp32", "last"))),
    *((32, dtype, layout, True) for dtype, layout in (("bf16", "last"), ("fp32", "first"))),
    *((batch, dtype, layout, False) for batch in (8, 128) for dtype, layout in (("bf16", "last"), ("fp32", "first"))),
    *((32, dtype, layout, False) for dtype, layout in (("fp16", "last"), ("bf16", "first"), ("fp16", "first"))),
    *((batch, dtype, layout, True) for batch in (8, 128) for dtype, layout in (("bf16", "last"), ("fp32", "first"))),
    *((1, dtype, layout, False) for dtype, layout in (("bf16", "last"), ("fp32", "first"), ("fp16", "last"))),
)
_WRITTEN_EVERY = 15.0
"""Seconds: what is recorded by then is not lost, however this ends."""
LARGEST_BYTES = 8 << 30
"""Of one tensor; a convolution beyond that is left out at that batch."""


def collect() -> list[dict[str, Any]]:
    """Every convolution of the networks, once, with the names of those that have it."""
    import timm
    import torch
    from torch import nn

    found: dict[str, set[str]] = collections.defaultdict(set)

    def watch(network: str, model: nn.Module) -> nn.Module:
        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(module, nn.Conv1d | nn.Conv2d)
            shape = {
                "in": [module.in_channels, *inputs[0].shape[2:]],
                "weight": list(module.weight.shape),
                "stride": list(module.stride),
                "padding": list(module.padding) if not isinstance(module.padding, str) else module.padding,
                "dilation": list(module.dilation),
                "groups": module.groups,
                "bias": module.bias is not None,
            }
            found[json.dumps(shape)].add(network)

        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.register_forward_pre_hook(note)
        return model

    with torch.device("meta"):
        for name in TIMM:
            watch(name, timm.create_model(name))(torch.empty(1, 3, 224, 224))
        watch("unet", _unet())(torch.empty(1, 3, 256, 256))
        import transformers

        watch("whisper", transformers.WhisperModel(transformers.WhisperConfig()).encoder)(torch.empty(1, 80, 3000))
    return [{**json.loads(text), "networks": sorted(names)} for text, names in found.items()]


def _unet() -> torch.nn.Module:
    """The usual one, of five levels from 64 channels on; its up-convolutions are interpolation and a convolution."""
    import torch
    from torch import nn

    def double(channels: int, filters: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.Conv2d(filters, filters, 3, padding=1), nn.ReLU()
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (64, 128, 256, 512, 1024)
            self.down = nn.ModuleList(double(a, b) for a, b in itertools.pairwise((3, *widths)))
            self.up = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in itertools.pairwise(widths))
            self.merge = nn.ModuleList(double(2 * a, a) for a in widths[:-1])
            self.head = nn.Conv2d(64, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for level, block in enumerate(self.down):
                x = block(nn.functional.max_pool2d(x, 2) if level else x)
                kept.append(x)
            for level in reversed(range(len(self.up))):
                x = self.up[level](nn.functional.interpolate(x, scale_factor=2))
                x = self.merge[level](torch.cat((kept[level], x), dim=1))
            out: torch.Tensor = self.head(x)
            return out

    return UNet()


class Case:
    """One convolution at a batch, in a type and a layout."""

    def __init__(self, shape: Mapping[str, Any], batch: int, dtype: str, layout: str) -> None:
        import torch

        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        last = {4: torch.channels_last, 3: torch.contiguous_format}[len(shape["weight"])]
        form = last if layout == "last" else torch.contiguous_format
        filters = shape["weight"][0]
        self._arguments = (shape["stride"], shape["padding"], shape["dilation"], False, [0] * len(shape["stride"]))
        self._groups = shape["groups"]
        self.x = torch.empty(batch, *shape["in"], device="cuda", dtype=kind).to(memory_format=form)
        self.weight = torch.empty(shape["weight"], device="cuda", dtype=kind).to(memory_format=form)
        self.bias = torch.empty(filters, device="cuda", dtype=kind) if shape["bias"] else None
        sides = output_sides(shape)
        self.out = torch.empty(batch, filters, *sides, device="cuda", dtype=kind).to(memory_format=form)
        self.norm = [torch.ones(filters, device="cuda") for _ in range(4)]

    def run(self, operation: str) -> object:
        """Run one of them; gives what it made."""
        import torch

        if operation == "forward":
            return torch.ops.aten.convolution(self.x, self.weight, self.bias, *self._arguments, self._groups)
        if operation == "norm":
            with torch.autocast("cuda", enabled=False):
                return torch._batch_norm_impl_index(self.out, *self.norm, True, 0.1, 1e-5, torch.backends.cudnn.enabled)
        mask = [operation == "input", operation == "weight", False]
        back = torch.ops.aten.convolution_backward
        return back(self.out, self.x, self.weight, None, *self._arguments, self._groups, mask)


def output_sides(shape: Mapping[str, Any]) -> list[int]:
    """The output's sides."""
    return [
        (side + 2 * pad - dilation * (size - 1) - 1) // stride + 1
        for side, pad, dilation, size, stride in zip(
            shape["in"][1:], shape["padding"], shape["dilation"], shape["weight"][2:], shape["stride"], strict=True
        )
    ]


def largest_tensor(shape: Mapping[str, Any], batch: int, dtype: str) -> int:
    """Bytes of the larger one of input and output."""
    element = 4 if dtype == "fp32" else 2
    return batch * element * max(math.prod(shape["in"]), math.prod([shape["weight"][0], *output_sides(shape)]))


def blocks(call: Callable[[], object]) -> tuple[list[int], list[int]]:
    """Bytes of each block that the allocator gave during a call: those that it got back before the end, and the others."""
    import torch

    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", clear_history=True)
    made = call()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    del made
    standing: dict[int, int] = {}
    returned: list[int] = []
    for place, event in enumerate(events):
        if event["action"] == "alloc":
            standing[event["addr"]] = place
        elif event["action"] == "free_completed" and event["addr"] in standing:
            returned.append(standing.pop(event["addr"]))
    sizes = [[events[place]["size"] for place in sorted(places)] for places in (returned, standing.values())]
    return sizes[0], sizes[1]


def rows(
    shapes: Sequence[Mapping[str, Any]], keys: Sequence[tuple[int, int, str, str, bool]]
) -> Iterator[list[list[Any]]]:
    """Record case by case: a row for each operation."""
    import torch

    for number, batch, dtype, layout, benchmark in keys:
        torch.backends.cudnn.benchmark = benchmark
        found = []
        for operation in OPERATIONS:
            try:
                case = Case(shapes[number], batch, dtype, layout)
                (first, _), (then, kept) = (blocks(functools.partial(case.run, operation)) for _ in range(2))
                found.append([number, batch, dtype, layout, benchmark, operation, first, then, kept])
            except RuntimeError as error:  # no algorithm, or no memory: that is an answer too
                why = [f"{type(error).__name__}: {error}".splitlines()[0][:200]]
                found.append([number, batch, dtype, layout, benchmark, operation, why, why, []])
                torch.cuda.empty_cache()
        yield found


def main() -> int:
    """Record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done there, and go on from it")
    parser.add_argument("--like", type=Path, metavar="FILE", help="run the cases of this recording, and no others")
    parser.add_argument("--quick", action="store_true", help="the first twelve convolutions, two passes")
    parser.add_argument("--collect", action="store_true", help="write convolutions.json anew")
    asked = parser.parse_args()
    if asked.collect:
        lines = ",\n".join(f" {json.dumps(shape)}" for shape in collect())
        CONVOLUTIONS.write_text(f"[\n{lines}\n]\n")
        return 0
    if asked.out is None:
        parser.error("name the file to write")
    deadline = time.monotonic() + asked.seconds
    shapes = json.loads(CONVOLUTIONS.read_text())
    passes, places = (PASSES, range(len(shapes))) if not asked.quick else ((PASSES[0], PASSES[3]), range(12))
    keys = [(place, *each) for each in passes for place in places]
    keys = [key for key in keys if largest_tensor(shapes[key[0]], key[1], key[2]) <= LARGEST_BYTES]
    if asked.like:
        keys = list(dict.fromkeys(tuple(row[:5]) for row in read_recording(asked.like)["rows"]))
    kept = read_recording(asked.resume) if asked.resume else {"columns": COLUMNS, "rows": []}
    kept["machine"] = machine_facts()
    done = {tuple(row[:5]) for row in kept["rows"]}
    left = [key for key in keys if key not in done]
    kept["not_reached"] = len(left)
    written = time.monotonic()
    end_in_order()
    try:
        for found in rows(shapes, left):
            kept["rows"] += found
            kept["not_reached"] -= 1
            if time.monotonic() > written + _WRITTEN_EVERY:
                write_recording(asked.out, kept)
                written = time.monotonic()
            if time.monotonic() > deadline:
                break
    finally:
        write_recording(asked.out, kept)
    some = sum(bool(row[-2]) for row in kept["rows"])
    say(f"  {len(kept['rows'])} operations, {some} with blocks of their own, {kept['not_reached']} cases not reached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
