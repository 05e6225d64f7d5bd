"""A training script for DeepSpeed's autotuner: the job named by its first argument, through DeepSpeed's engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import deepspeed
import torch
from peer_finders import Halves

from autobatch.workload.loader import WorkloadName, load_factory, make_job

# Its profile is of the steps 3 to 5.
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--local_rank", type=int, default=0)
    deepspeed.add_config_arguments(parser)
    asked = parser.parse_args()
    name = WorkloadName.parse(asked.workload)
    job = Halves(make_job(name, load_factory(name)))

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # The layers themselves: while it profiles, each layer's weights are gathered as the layer runs.
            self.model = job.model

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return job.loss(len(rows))

    engine, *_ = deepspeed.initialize(args=asked, model=Module(), optimizer=job.optimizer)
    rows = torch.zeros(engine.train_micro_batch_size_per_gpu(), 1, device="cuda")
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        engine.backward(engine(rows))
        engine.step()


if __name__ == "__main__":
    main()
