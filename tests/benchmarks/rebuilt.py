"""Published measurements of real cards, rebuilt: each function trains what its source trained and gives the figure that it gave.

    python rebuilt.py NAME '["ARGUMENT", …]'

prints `{case: figure}` as JSON; run it under `autobatch emulate`, or on a card. Values of weights do not matter, and are not
drawn: only the host would be busy with them. Sources, settings and doubts stand beside the figures, in the files of
`tests/data/real/published/`.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

# What timm 0.6 had; read while it is imported.
os.environ.setdefault("TIMM_FUSED_ATTN", "0")

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

Figures = dict[str, float | str | None]
OOM = "OOM"


def leave_values() -> None:
    """Leave weights as they come."""
    for name in ("uniform_", "normal_", "erfinv_"):
        setattr(torch.Tensor, name, lambda self, *_, **__: self)


def attention_training(model_name: str, attention: str) -> Figures:
    """Training steps without an optimizer, as the pull requests measured them: batch × sequence, in MB of 10^6 bytes."""
    import transformers as hf

    short, long = (128, 256, 512, 1024), (128, 256, 512, 1024, 2048)
    if model_name == "gpt2-large":
        config, kind = hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20), hf.GPT2LMHeadModel
        sizes = [(batch, length) for batch in (1, 2, 4) for length in short]
    elif model_name == "pythia-410m":
        config = hf.GPTNeoXConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            vocab_size=50304,
            rotary_pct=0.25,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        kind, sizes = hf.GPTNeoXForCausalLM, [(batch, length) for batch in (1, 2, 4) for length in long]
    elif model_name == "opt-350m":
        config = hf.OPTConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            ffn_dim=4096,
            vocab_size=50272,
            word_embed_proj_dim=512,
            do_layer_norm_before=False,
            max_position_embeddings=2048,
        )
        kind, sizes = hf.OPTForCausalLM, [(batch, length) for batch in (1, 2, 4, 8) for length in long]
    else:
        config, kind, sizes = hf.BertConfig(), hf.BertLMHeadModel, [(b, s) for b in (4, 8, 16) for s in (256, 512)]
    config._attn_implementation = attention
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    model.train()

    figures: Figures = {}
    for batch, length in sizes:
        tokens = torch.randint(config.vocab_size - 1, (batch, length), device="cuda")
        try:
            figures[f"{batch}x{length}"] = _peak_of_steps(model, tokens) / 1e6
        except torch.OutOfMemoryError:
            figures[f"{batch}x{length}"] = OOM
        gc.collect()
    return figures


def _peak_of_steps(model: nn.Module, tokens: torch.Tensor) -> int:
    """Most allocated in four steps after three: as in the source, a step's outputs live until the next one's are there."""
    outputs = loss = None
    for step in range(7):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        model.zero_grad()
        outputs = model(input_ids=tokens)
        loss = outputs.logits.sum()
        loss.backward()
    del outputs, loss
    return torch.cuda.max_memory_allocated()


def vit_large() -> Figures:
    """Each script of the source in a process of its own, in GB of 10^9 bytes."""
    cases = {
        "fp32, batch 64": (64, "", 0),
        "Fabric 32-true, batch 64": (64, "32-true", 0),
        "Fabric 16-mixed, batch 64": (64, "16-mixed", 0),
        "Fabric bf16-true, batch 64": (64, "bf16-true", 0),
        "Fabric bf16-true, batch 16": (16, "bf16-true", 0),
        "Fabric bf16-true, batch 4, accumulating 4": (4, "bf16-true", 4),
        "loaded in fp32, then fp16": (0, "", 0),
        "loaded in fp16": (0, "16-true", 0),
    }
    return {name: _forked(lambda case=case: _vit_large(*case)) for name, case in cases.items()}


def _vit_large(batch: int, precision: str, accumulate: int) -> float:
    import torchmetrics
    from torchvision.models import vit_l_16

    leave_values()
    fabric: Any = None
    if precision:
        from lightning import Fabric

        fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
        fabric.launch()
    if not batch:
        if fabric:
            with fabric.init_module():
                vit_l_16()
        else:
            vit_l_16().to("cuda").to(torch.float16)
        return torch.cuda.max_memory_reserved() / 1e9

    class Images(torch.utils.data.Dataset[Any]):
        def __init__(self, batches: int) -> None:
            self.length = batches * batch

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> Any:
            return torch.empty(3, 224, 224), 1

    training, validation = (
        torch.utils.data.DataLoader(Images(batches), batch_size=batch, drop_last=True) for batches in (12, 4)
    )
    if fabric:
        torch.set_float32_matmul_precision("high")
        training, validation = fabric.setup_dataloaders(training, validation)
    model = vit_l_16()
    model.heads.head = nn.Linear(1024, 10)
    if not fabric:
        model.to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
    if fabric:
        model, optimizer = fabric.setup(model, optimizer)
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10).to("cuda")
    for index, (images, labels) in enumerate(training):
        model.train()
        logits = model(images.to("cuda"))
        labels_there = labels.to("cuda")
        loss = nn.functional.cross_entropy(logits, labels_there)
        if accumulate:
            loss = loss / accumulate
        else:
            optimizer.zero_grad()
        fabric.backward(loss) if fabric else loss.backward()
        if not accumulate or index % accumulate == 0:
            optimizer.step()
            if accumulate:
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            accuracy.update(torch.argmax(logits, 1), labels_there)
    model.eval()
    with torch.no_grad():
        for images, labels in validation:
            accuracy.update(torch.argmax(model(images.to("cuda")), 1), labels.to("cuda"))
    return torch.cuda.max_memory_reserved() / 1e9


def bert_large() -> Figures:
    """Each row of the guide in a process of its own: NVML's figure less that after the first tensor, in MiB."""
    cases = {
        "batch 4": {"batch": 4},
        "batch 1, accumulating 4": {"accumulate": 4},
        "batch 1, accumulating 4, checkpointing": {"accumulate": 4, "checkpointing": True},
        "batch 4, fp16 autocast": {"batch": 4, "fp16": True},
        "batch 1, accumulating 4, checkpointing, fp16 autocast": {"accumulate": 4, "checkpointing": True, "fp16": True},
        "batch 4, Adafactor": {"batch": 4, "adafactor": True},
        "batch 1, accumulating 4, checkpointing, fp16 autocast, Adafactor": {
            "accumulate": 4,
            "checkpointing": True,
            "fp16": True,
            "adafactor": True,
        },
        "weights alone": {"steps": 0},
    }
    return {name: _forked(lambda case=case: _bert_large(**case)) for name, case in cases.items()}


class _OldAdamW(torch.optim.Optimizer):
    """The arithmetic of the AdamW that transformers 4 had: one temporary, tensor by tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            state = self.state[parameter]
            if not state:
                state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["first"].mul_(0.9).add_(parameter.grad, alpha=0.1)
            state["second"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            root = state["second"].sqrt().add_(1e-8)
            parameter.addcdiv_(state["first"], root, value=-1e-5)


def _bert_large(
    *,
    batch: int = 1,
    accumulate: int = 1,
    checkpointing: bool = False,
    fp16: bool = False,
    adafactor: bool = False,
    steps: int = 6,
) -> float:
    import pynvml
    from transformers import BertConfig, BertForSequenceClassification

    leave_values()
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    torch.ones((1, 1)).to("cuda")
    before = used()
    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    config._attn_implementation = "eager"
    model = BertForSequenceClassification(config).to("cuda")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    if adafactor:
        from transformers.optimization import Adafactor

        optimizer: Any = Adafactor(model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False)
    else:
        optimizer = _OldAdamW(model.parameters(), {})
    scaler = torch.amp.GradScaler("cuda", enabled=fp16)
    model.train()
    total = torch.tensor(0.0, device="cuda")
    for _ in range(steps):
        for _ in range(accumulate):
            tokens = torch.zeros(batch, 512, dtype=torch.long).to("cuda")
            labels = torch.zeros(batch, dtype=torch.long).to("cuda")
            with torch.autocast("cuda", dtype=torch.float16, enabled=fp16):
                loss = model(input_ids=tokens, labels=labels).loss
            loss = loss / accumulate
            scaler.scale(loss).backward()
            total += loss.detach()
            del loss
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=False)  # as torch did before 2.0
    return (used() - before) / (1 << 20)


def small_scripts() -> Figures:
    """Scripts of issues and tutorials, each in a process of its own, in MiB."""
    names = list(json.loads(_published("small-scripts"))["figures"])
    found = (
        _forked(_linear),
        _forked(lambda: _vit_step(in_backward=False)),
        _forked(lambda: _vit_step(in_backward=True)),
    )
    return dict(zip(names, found, strict=True))


def transposed_convolution() -> Figures:
    """One forward, in MiB: the same emulated card stands for both."""
    found = _forked(_transposed_convolution)
    return {"RTX 2080 Ti": found, "V100": found}


def convolutions_3d() -> Figures:
    """One forward each, in MiB."""
    names = list(json.loads(_published("convolutions-3d"))["figures"])
    found = [
        _forked(_autocast_convolution),
        _forked(lambda: _convolution_3d(256, 64, (4, 1090, 1922), deterministic=True)),
        _forked(lambda: _convolution_3d(3, 128, (24, 740, 1316), padding=1, dtype=torch.bfloat16)),
        _forked(lambda: _convolution_3d(3, 128, (24, 864, 1536), padding=1, dtype=torch.bfloat16)),
    ]
    return dict(zip(names, found, strict=True))


def conv3d_of_an_issue(dtype: str) -> Figures:
    """Forwards in a loop, as in its script: the last result lives while the next one is made. In GB of 2^30 bytes."""
    kind = getattr(torch, dtype)
    images = torch.randn(1, 96, 6, 626, 626, device="cuda").type(kind)
    weight = torch.randn(96, 96, 3, 3, 3, device="cuda").type(kind)
    bias = torch.randn(96, device="cuda").type(kind)
    result = None
    for _ in range(3):
        result = nn.functional.conv3d(images, weight, bias)
    del result
    return {dtype: torch.cuda.max_memory_allocated() / (1 << 30)}


def _autocast_convolution() -> float:
    images = torch.zeros(1, 128, 248, 248, 248).to("cuda").half()
    convolution = nn.Conv3d(128, 128, 3, padding=1).to("cuda")
    with torch.no_grad(), torch.autocast("cuda"):
        kept = convolution(images)
    free, total = torch.cuda.mem_get_info()
    del kept
    return (total - free) / (1 << 20)


def _convolution_3d(
    channels: int,
    filters: int,
    sides: tuple[int, int, int],
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
) -> float:
    torch.backends.cudnn.deterministic = deterministic
    with torch.set_grad_enabled(deterministic):
        convolution = nn.Conv3d(channels, filters, 3, padding=padding).to("cuda", dtype=dtype)
        convolution(torch.empty(1, channels, *sides, dtype=dtype, device="cuda"))
    return torch.cuda.max_memory_allocated() / (1 << 20)


def _published(name: str) -> str:
    from pathlib import Path

    return (Path(__file__).parents[1] / "data/real/published" / f"{name}.json").read_text()


def _linear() -> float:
    model = nn.Linear(1024, 1024, bias=False).cuda()
    model(torch.rand(1, 512, 1024).cuda())
    return torch.cuda.max_memory_allocated() / (1 << 20)


def _transposed_convolution() -> float:
    images = torch.ones((32, 2048, 8, 8), device="cuda")
    nn.ConvTranspose2d(2048, 512, kernel_size=4, stride=2, padding=1).cuda()(images)
    return torch.cuda.max_memory_allocated() / (1 << 20)


def _vit_step(*, in_backward: bool) -> float:
    from torchvision.models import vit_l_16

    leave_values()
    model = vit_l_16().cuda()
    optimizer = None if in_backward else torch.optim.Adam(model.parameters())
    if in_backward:
        each = {one: torch.optim.Adam([one], foreach=False) for one in model.parameters()}

        def step(parameter: torch.Tensor) -> None:
            each[parameter].step()
            each[parameter].zero_grad()

        for one in model.parameters():
            one.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(torch.rand(1, 3, 224, 224).cuda()).sum().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() / (1 << 20)


def nanogpt() -> Figures:
    """The first steps of its training script, in MiB."""
    return {"already allocated": _nanogpt()}


def _nanogpt() -> float | None:
    """What was allocated when it ran out of memory; None where it did not."""
    width, heads, length, vocabulary, batch = 768, 12, 1024, 50304, 32

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (width,), self.weight, None, 1e-5)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Norm(), Norm()
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            samples, positions, _ = x.shape
            shape = (samples, positions, heads, width // heads)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.first(x)).split(width, dim=2))
            scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(width // heads))
            scores = scores.masked_fill(self.mask[:, :, :positions, :positions] == 0, float("-inf"))
            mixed = nn.functional.softmax(scores, dim=-1) @ v
            x = x + self.out(mixed.transpose(1, 2).contiguous().view(samples, positions, width))
            y = self.up(self.second(x))
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * torch.pow(y, 3))))
            return x + self.down(y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(12)), Norm()
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.tokens.weight = self.head.weight

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device="cuda"))
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm(x))
            return logits, nn.functional.cross_entropy(logits.view(-1, vocabulary), targets.view(-1))

    def batch_of_zeros() -> torch.Tensor:
        return torch.zeros(batch, length, dtype=torch.long).cuda()

    model = Model().cuda()
    try:
        for training in (False, False, True):
            model.train(training)
            with torch.set_grad_enabled(training), torch.autocast("cuda", dtype=torch.float16):
                logits, loss = model(batch_of_zeros(), batch_of_zeros())
            loss.item()
        loss.backward()
    except torch.OutOfMemoryError as error:
        # "Of the allocated memory 10.06 GiB is allocated by PyTorch": the figure that was "already allocated" then.
        words = str(error).split("Of the allocated memory ")[1].split(" is allocated")[0].split()
        return float(words[0]) * {"MiB": 1, "GiB": 1024}[words[1]]
    del logits
    return None


def timm_training() -> Figures:
    """The batch that the decay rule of timm's benchmark finds for each model."""
    import timm

    leave_values()
    torch.backends.cudnn.benchmark = True
    figures: Figures = {}
    for name in json.loads(_published("timm-train-rtx3090"))["figures"]:
        model, _, image = name.rpartition(" at ")
        figures[name] = _decayed_batch(timm, model, int(image))
    return figures


def _decayed_batch(timm: Any, name: str, image: int) -> int | None:
    batch = 512
    while batch:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            _train_timm(timm, name, image, batch)
        except torch.OutOfMemoryError:
            batch = _decay(batch)
        except RuntimeError as error:  # what the emulation does not have is named, and is no measurement
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        else:
            return batch
    return 0


def _train_timm(timm: Any, name: str, image: int, batch: int) -> None:
    from timm.optim import create_optimizer_v2

    try:
        model = timm.create_model(name, img_size=image)
    except TypeError:
        model = timm.create_model(name)
    model.cuda().train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4, foreach=False)
    criterion = nn.CrossEntropyLoss().cuda()
    images = torch.randn((batch, 3, image, image), device="cuda")
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.float16):
            output = model(images)
            output = output[0] if isinstance(output, tuple) else output
            target = torch.empty((output.shape[0],), device="cuda", dtype=torch.long).random_(1000)
            criterion(output, target).backward()
        optimizer.step()


def _decay(batch: int) -> int:
    """The next of 512, 384, 256, 192, 128, … 3, 2, 1."""
    if batch <= 1:
        return 0
    base = 2 ** math.floor(math.log2(batch - 1))
    step = max(base // 2, 1)
    return base + (batch - base - 1) // step * step


def _forked(measure: Callable[[], float | None]) -> float | str | None:
    """Measure in a fork, from a card that nothing was done with; an out-of-memory error is a result too."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found: float | str | None = measure()
        except torch.OutOfMemoryError:
            found = OOM
        with os.fdopen(write_end, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    value: float | str | None = json.loads(text) if text else None
    return value


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    leave_values()
    print(json.dumps(globals()[name](*arguments)))


if __name__ == "__main__":
    main()
