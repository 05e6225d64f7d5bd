"""1,000 samples of which 100 fit: ten micro-batches make the one update of an epoch."""

from __future__ import annotations

import torch
from torch import nn

import autobatch


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 5, dtype=torch.float64, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True))


def fresh_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main(epochs: int = 5) -> dict[str, float]:
    x, y = data()
    whole, whole_optimizer = fresh_model()
    model, optimizer = fresh_model()
    plan = autobatch.make_plan(target=1000, max_micro_batch_size=100)
    accumulator = autobatch.Accumulator(plan, model=model, optimizer=optimizer)
    for _ in range(epochs):
        whole_optimizer.zero_grad()
        nn.functional.mse_loss(whole(x), y).backward()
        whole_optimizer.step()
        for micro_batch in zip(x.split(100), y.split(100), strict=True):
            accumulator.add(micro_batch, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
    difference = (flat(model) - flat(whole)).norm() / flat(whole).norm()
    return {
        "steps_per_update": plan.accumulation_steps,
        "updates": accumulator.optimizer_steps,
        "difference": difference.item(),
    }


if __name__ == "__main__":
    print(main())
