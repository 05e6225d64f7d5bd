"""Training jobs in plain torch that need nothing of the user: GPT-2, ResNet-50 and a vision transformer.

Weights and data are random: memory does not depend on their values.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from autobatch.errors import UsageError
from autobatch.workload.job import TrainingJob

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["BUILTIN_WORKLOADS", "Precision", "build_gpt2", "build_resnet50", "build_vit", "job_of", "positive"]

Precision = Literal["bf16", "fp16", "fp32"]


def build_gpt2(
    *,
    seq_len: int = 1024,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocab: int = 50257,
    precision: Precision = "bf16",
) -> TrainingJob:
    """GPT-2 on full sequences: causal attention, tied embeddings, AdamW; 124 M parameters as it stands."""
    import torch
    from torch import nn

    positive(seq_len=seq_len, layers=layers, width=width, heads=heads, vocab=vocab)
    if width % heads:
        raise UsageError(f"width {width} is not divisible by heads {heads}: choose a multiple, such as {heads * 64}")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_attention = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.norm_mlp = nn.LayerNorm(width)
            self.up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.out(_attention(self.qkv(self.norm_attention(x)), heads, causal=True))
            out: torch.Tensor = self.down(nn.functional.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))
            return x + out

    class Gpt2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(vocab, width)
            self.positions = nn.Embedding(seq_len, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            return nn.functional.linear(self.norm(x), self.tokens.weight)

    with torch.device("cuda"):
        model = Gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)

    def loss_of(n: int) -> torch.Tensor:
        tokens = torch.randint(0, vocab, (n, seq_len), device="cuda")
        targets = torch.randint(0, vocab, (n, seq_len), device="cuda")
        logits = model(tokens)
        return nn.functional.cross_entropy(logits.view(-1, vocab), targets.view(-1))

    return job_of(loss_of, optimizer, precision)


def build_resnet50(*, image: int = 224, classes: int = 1000, precision: Precision = "bf16") -> TrainingJob:
    """ResNet-50 (the variant that strides in its 3 × 3 convolutions), channels last, SGD with momentum."""
    import torch
    from torch import nn

    positive(image=image, classes=classes)

    def convolution(channels: int, filters: int, size: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, filters, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(filters)
        )

    class Bottleneck(nn.Module):
        def __init__(self, channels: int, filters: int, stride: int) -> None:
            super().__init__()
            self.reduce = convolution(channels, filters, 1)
            self.conv = convolution(filters, filters, 3, stride)
            self.expand = convolution(filters, 4 * filters, 1)
            self.shortcut = (
                convolution(channels, 4 * filters, 1, stride)
                if stride > 1 or channels != 4 * filters
                else nn.Identity()
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = nn.functional.relu(self.reduce(x), inplace=True)
            out = nn.functional.relu(self.conv(out), inplace=True)
            return nn.functional.relu(self.expand(out) + self.shortcut(x), inplace=True)

    def stage(channels: int, filters: int, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(channels, filters, stride)
        return nn.Sequential(first, *(Bottleneck(4 * filters, filters, 1) for _ in range(blocks - 1)))

    with torch.device("cuda"):
        model = nn.Sequential(
            convolution(3, 64, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
            stage(64, 64, 3, 1),
            stage(256, 128, 4, 2),
            stage(512, 256, 6, 2),
            stage(1024, 512, 3, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2048, classes),
        ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return job_of(_image_loss(model, image, classes), optimizer, precision)


def build_vit(
    *,
    image: int = 224,
    patch: int = 16,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    classes: int = 1000,
    precision: Precision = "bf16",
) -> TrainingJob:
    """Vision transformer, ViT-B/16 as it stands, with a class token and AdamW."""
    import torch
    from torch import nn

    positive(image=image, patch=patch, layers=layers, width=width, heads=heads, classes=classes)
    if image % patch or width % heads:
        raise UsageError(f"image {image} must be divisible by patch {patch}, and width {width} by heads {heads}")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_attention = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.norm_mlp = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.out(_attention(self.qkv(self.norm_attention(x)), heads, causal=False))
            out: torch.Tensor = self.mlp(self.norm_mlp(x))
            return x + out

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, patch, patch)
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.patches(images).flatten(2).transpose(1, 2)
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1) + self.positions
            logits: torch.Tensor = self.head(self.norm(self.blocks(x))[:, 0])
            return logits

    with torch.device("cuda"):
        model = Vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    return job_of(_image_loss(model, image, classes), optimizer, precision)


BUILTIN_WORKLOADS: dict[str, Callable[..., TrainingJob]] = {
    "gpt2": build_gpt2,
    "resnet50": build_resnet50,
    "vit": build_vit,
}
"""The built-in workloads by name; their keyword arguments are their parameters."""


def _attention(qkv: torch.Tensor, heads: int, *, causal: bool) -> torch.Tensor:
    """Scaled dot-product attention over (samples, positions, 3 × width), giving (samples, positions, width)."""
    import torch

    samples, positions, triple = qkv.shape
    q, k, v = qkv.view(samples, positions, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).reshape(samples, positions, triple // 3)


def _image_loss(model: torch.nn.Module, image: int, classes: int) -> Callable[[int], torch.Tensor]:
    import torch

    def loss_of(n: int) -> torch.Tensor:
        images = torch.randn(n, 3, image, image, device="cuda").contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, classes, (n,), device="cuda")
        return torch.nn.functional.cross_entropy(model(images), labels)

    return loss_of


def job_of(loss_of: Callable[[int], torch.Tensor], optimizer: torch.optim.Optimizer, precision: str) -> TrainingJob:
    """A job of a loss under autocast, with a scaler where that needs one; raises `UsageError` for another precision."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
    if precision not in dtypes:
        raise UsageError(f"precision {precision!r} is none of {', '.join(dtypes)}")
    dtype = dtypes[precision]
    scaler = torch.amp.GradScaler("cuda") if dtype is torch.float16 else None

    def micro_step(n: int) -> None:
        with torch.autocast("cuda", dtype=dtype) if dtype else contextlib.nullcontext():
            loss = loss_of(n)
        (scaler.scale(loss) if scaler else loss).backward()

    return TrainingJob(micro_step=micro_step, optimizer=optimizer, scaler=scaler)


def positive(**sizes: int) -> None:
    """Refuse sizes that are not whole numbers from 1 on."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r} must be a whole number from 1 on")
