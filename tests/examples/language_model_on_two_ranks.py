"""A small causal language model on sequences of different lengths, on two ranks over gloo.

Each rank takes two of four sequences, one at a time. Weighted by its tokens, the gradient is that of all four at once; with every
micro-batch counted alike, as `loss / steps` under DDP does, it is another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autobatch

VOCABULARY, IGNORED, LENGTHS = 17, -100, (3, 12, 7, 5)
RANKS = 2
ROOT = Path(__file__).parents[2]


class CausalModel(nn.Module):
    """An embedding, one causal attention layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=later, need_weights=False)[0]
        output: torch.Tensor = self.head(x)
        return output


def fresh_model() -> CausalModel:
    torch.manual_seed(0)
    return CausalModel().double()


def data() -> dict[str, torch.Tensor]:
    """Sequences padded to the longest; the labels of the padding are ignored."""
    tokens = torch.randint(VOCABULARY, (len(LENGTHS), max(LENGTHS) + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    for row, length in zip(labels, LENGTHS, strict=True):
        row[length:] = IGNORED
    return {"tokens": tokens[:, :-1], "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over the labels that are not ignored."""
    return nn.functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"] != IGNORED).sum())


def gradient_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def on_rank(rank: int, model: nn.Module, *, weighted: bool) -> torch.Tensor:
    """The gradient at the optimizer's step."""
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradient_of(model)))
    accumulator = autobatch.Accumulator(
        autobatch.make_plan(target=len(LENGTHS), max_micro_batch_size=1, world_size=RANKS),
        model=model,
        optimizer=optimizer,
        count=count_tokens if weighted else None,
    )
    mine = {name: values[rank * 2 : rank * 2 + 2] for name, values in data().items()}
    accumulator.step(mine, lambda batch: loss_of(model, batch))
    return seen[0]


def run_rank(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    whole = fresh_model()
    loss_of(whole, data()).backward()
    wanted = gradient_of(whole)
    model = DistributedDataParallel(fresh_model())
    figures = {
        name: ((on_rank(rank, model, weighted=weighted) - wanted).norm() / wanted.norm()).item()
        for name, weighted in (("token-weighted", True), ("unweighted", False))
    }
    dist.destroy_process_group()
    print(json.dumps(figures))


def main() -> list[dict[str, float]]:
    """The relative differences from the full batch on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), f"{folder}/store"],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_rank(int(sys.argv[1]), sys.argv[2])
    else:
        print(main())
