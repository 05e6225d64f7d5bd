"""Reads NVML through its own bindings, as a monitor does: what it answers, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import pynvml


def attempt(function: str, *arguments: Any) -> str:
    try:
        getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError as error:
        return type(error).__name__
    return "answered"


def card(index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    first, second = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    again = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "uuid": uuid,
        "index_by_uuid": pynvml.nvmlDeviceGetIndex(again),
        "capability": pynvml.nvmlDeviceGetCudaComputeCapability(handle),
        "bus": pynvml.nvmlDeviceGetPciInfo(handle).busId,
        "v1": [first.total, first.free, first.used],
        "v2": [second.total, second.reserved, second.free, second.used],
        "processes": {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)},
        "graphics": len(pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)),
        "utilisation": attempt("nvmlDeviceGetUtilizationRates", handle),
        "temperature": attempt("nvmlDeviceGetTemperature", handle, 0),
        "power": attempt("nvmlDeviceGetPowerUsage", handle),
        "fan": attempt("nvmlDeviceGetFanSpeed", handle),
        "clock": attempt("nvmlDeviceGetClockInfo", handle, 0),
        "display": attempt("nvmlDeviceGetDisplayActive", handle),
        "state": attempt("nvmlDeviceGetPerformanceState", handle),
        "ecc": attempt("nvmlDeviceGetTotalEccErrors", handle, 0, 0),
        "missing": attempt("nvmlDeviceGetBoardId", handle),
    }


def main() -> None:
    uninitialised = attempt("nvmlDeviceGetCount")
    pynvml.nvmlInit()
    answer = {
        "uninitialised": uninitialised,
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": pynvml.nvmlSystemGetCudaDriverVersion(),
        "cards": [card(index) for index in range(pynvml.nvmlDeviceGetCount())],
        "beyond": attempt("nvmlDeviceGetHandleByIndex", 99),
        "unknown_uuid": attempt("nvmlDeviceGetHandleByUUID", "GPU-00000000-0000-0000-0000-000000000000"),
    }
    pynvml.nvmlShutdown()
    answer["after_shutdown"] = attempt("nvmlDeviceGetCount")
    sys.stdout.write(json.dumps(answer))


main()
