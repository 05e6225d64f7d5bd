"""Fills a card to the last byte through torch's allocator, as JSON."""

from __future__ import annotations

import json
import sys
import warnings

import torch

MIB = 1 << 20
GRANULE = 2 * MIB


def fits(size: int) -> bool:
    try:
        torch.empty(size, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return False
    return True


def main() -> None:
    answer: dict[str, object] = {}
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    answer["total"], answer["context"] = total, total - free
    room = free // GRANULE * GRANULE
    kept = torch.empty(room - GRANULE, dtype=torch.uint8, device="cuda")
    answer["all_but_2_mib"] = torch.cuda.memory_reserved() == room - GRANULE
    # A small tensor takes the last 2 MiB; the next one that needs a segment finds none.
    first = torch.empty(MIB // 2, dtype=torch.uint8, device="cuda")
    answer["free_when_full"] = torch.cuda.mem_get_info()[0]
    try:
        torch.empty(GRANULE, dtype=torch.uint8, device="cuda")
        answer["error"] = None
    except torch.OutOfMemoryError as error:
        answer["error"] = str(error)
    del kept, first
    torch.cuda.empty_cache()
    answer["free_again"] = torch.cuda.mem_get_info()[0] == free
    answer["exactly_all"], answer["one_granule_more"] = fits(room), fits(room + GRANULE)
    torch.cuda.empty_cache()
    answer["fraction"] = fraction_holds()
    with warnings.catch_warnings(record=True) as caught:
        answer["after"] = fits(MIB)
    answer["warnings"] = [str(each.message) for each in caught]
    sys.stdout.write(json.dumps(answer))


def fraction_holds() -> list[bool]:
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(0.5)
    answer = [fits(total // 2 - 64 * MIB), fits(total // 2 + 64 * MIB)]
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    return answer


main()
