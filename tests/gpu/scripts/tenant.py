"""A probe beside another process on the same card, as JSON: `tenant.py stays` or `tenant.py grows`.

The other process is this file too (`tenant.py hold`): it takes what standard input tells it to, in bytes, and says when it has.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import autobatch

GIB = 1 << 30
ROWS, WIDTH = 8192, 1024


def hold() -> None:
    """Hold as many bytes as the last line said."""
    torch.cuda.init()
    held = None
    for line in sys.stdin:
        held = None
        torch.cuda.empty_cache()
        if int(line):
            held = torch.empty(int(line), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        print("held" if held is not None else "free", flush=True)


class Tenant:
    """The other process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def take(self, size: int) -> None:
        """Have it hold so many bytes."""
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the tenant ended")

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def probe(micro_step, model, optimizer, progress=None) -> autobatch.Report:
    """Probe for 2 GiB of what the tenant leaves."""
    return autobatch.probe(
        micro_step,
        optimizer=optimizer,
        target=4096,
        restore=[model],
        memory_limit="2GiB",
        headroom=0,
        progress=progress,
    )


def main(how: str) -> dict[str, object]:
    """Probe beside a tenant."""
    tenant = Tenant()
    try:
        tenant.take(3 * GIB if how == "stays" else 64 << 20)
        model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH)
        ).cuda()
        optimizer = torch.optim.AdamW(model.parameters())

        def micro_step(n: int) -> None:
            model(torch.empty(n, ROWS // 8, WIDTH, device="cuda")).square().mean().backward()

        if how == "stays":
            report = autobatch.probe(
                micro_step, optimizer=optimizer, target=64, restore=[model], headroom=0, max_micro_batch=8
            )
            usable = report.device.total_bytes
            return {
                "tenants": report.memory.other_tenants_bytes,
                "budget": report.memory.budget_bytes,
                "usable": usable,
                "certified": report.certified,
            }
        alone = probe(micro_step, model, optimizer)
        seen = {"trials": 0, "is_on": False, "steps": 0}

        def watch(event: object) -> None:
            if isinstance(event, autobatch.TrialStarted):  # one that fits when nobody is in its way, and not the first
                seen["trials"] += 1
                seen["is_on"] |= seen["trials"] > 1 and max(event.window) <= alone.max_micro_batch_size

        def disturbed(n: int) -> None:
            seen["steps"] += seen["is_on"]
            if seen["is_on"] and seen["steps"] == 1:
                tenant.take(torch.cuda.mem_get_info()[0] - (96 << 20))  # next to nothing is left for this trial
            elif seen["steps"] == 2:
                tenant.take(64 << 20)
            micro_step(n)

        report = probe(disturbed, model, optimizer, watch)
        return {
            "tried_again": seen["steps"] > 1,
            "certified": report.certified,
            "largest": report.max_micro_batch_size,
            "largest_alone": alone.max_micro_batch_size,
        }
    finally:
        tenant.close()


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold()
    else:
        print(json.dumps(main(sys.argv[1])))
