"""Two ranks on NCCL: what collectives leave behind, and what a step of DDP and of FSDP2 holds beside one without."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("nccl")
rank, world = dist.get_rank(), dist.get_world_size()
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def host(*values: int) -> torch.Tensor:
    return torch.tensor(values).cuda()


def collectives() -> dict[str, object]:
    """Each is read at once: the next kernel makes all of it zeros."""
    answers: dict[str, object] = {}
    reduced = host(4)
    dist.all_reduce(reduced)
    answers["reduced"] = reduced.tolist()
    given = host(7)
    dist.broadcast(given, src=0)
    answers["given"] = given.tolist()
    listed = [host(0) for _ in range(world)]
    dist.all_gather(listed, host(5))
    answers["listed"] = [one.tolist() for one in listed]
    flat = host(*([0] * world))
    dist.all_gather_into_tensor(flat, host(6))
    answers["flat"] = flat.tolist()
    part = host(0)
    dist.reduce_scatter_tensor(part, host(*range(10, 10 + world)))
    answers["part"] = part.tolist()
    dist.barrier()
    group = dist.new_group([0, 1])
    in_group = host(3)
    dist.all_reduce(in_group, group=group)
    answers["in_group"] = in_group.tolist()
    return answers


def peak(wrap: str) -> int:
    """The most bytes that tensors held in three steps of a model of 64 MiB of weights."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = torch.nn.Sequential(torch.nn.Linear(2048, 4096, bias=False), torch.nn.Linear(4096, 2048, bias=False)).cuda()
    if wrap == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
    elif wrap == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.zeros(8, 2048, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - before


answer = {
    "name": torch.cuda.get_device_name(),
    **collectives(),
    "peak": {wrap: peak(wrap) for wrap in ("none", "ddp", "fsdp2")},
}
dist.destroy_process_group()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(answer))
sys.stdout.flush()
os._exit(0)
