"""Ray Train: the plan is found in the driver and passed on in the loop's configuration. The argument is the target."""

from __future__ import annotations

import sys
from typing import Any

import torch

import autobatch

WORKERS = 1


def make_model() -> torch.nn.Module:
    """The model that is probed and trained."""
    return torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))


def job() -> autobatch.TrainingJob:
    """What a probe runs: the model's step on the largest batch."""
    model = make_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters())

    def micro_step(n: int) -> None:
        model(torch.randn(n, 512, 1024, device="cuda")).square().mean().backward()

    return autobatch.TrainingJob(micro_step=micro_step, optimizer=optimizer)


def train_loop(config: dict[str, Any]) -> None:
    """One worker's training, with the plan's sizes."""
    import ray.train
    import ray.train.torch

    device = ray.train.torch.get_device()
    model = ray.train.torch.prepare_model(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        for _ in range(config["accumulation_steps"]):
            batch = torch.randn(config["micro_batch_size"], 512, 1024, device=device)
            loss = model(batch).square().mean() / config["accumulation_steps"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ray.train.report({"step": step + 1, "samples": config["micro_batch_size"] * config["accumulation_steps"]})


def main(target: int) -> None:
    """Probe, then train on as many workers as the plan is for."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    report = autobatch.probe_workload(f"{__file__}:job", target=target, world_size=WORKERS)
    plan = report.plan
    if plan is None:
        raise SystemExit("nothing fits")
    ray.init(num_gpus=WORKERS, include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"micro_batch_size": plan.micro_batch_size, "accumulation_steps": plan.accumulation_steps},
        scaling_config=ScalingConfig(num_workers=WORKERS, use_gpu=True),
        run_config=RunConfig(storage_path=sys.argv[2] if len(sys.argv) > 2 else None),
    )
    trainer.fit()  # raises what a worker raised
    ray.shutdown()
    print(plan.micro_batch_size, plan.accumulation_steps)


if __name__ == "__main__":
    main(int(sys.argv[1]))
