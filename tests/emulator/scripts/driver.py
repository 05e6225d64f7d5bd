"""Calls the driver and the runtime without torch: what each answers, as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

cuda = ctypes.CDLL("libcuda.so.1")
runtime = ctypes.CDLL(None)  # the preloaded library
MIB = 1 << 20
size_t, pointer = ctypes.c_size_t, ctypes.c_void_p


def malloc(size: int) -> tuple[int, int | None]:
    address = pointer()
    return runtime.cudaMalloc(ctypes.byref(address), size_t(size)), address.value


def free(address: int | None) -> int:
    return runtime.cudaFree(pointer(address))


def free_bytes() -> int:
    unused, total = size_t(), size_t()
    assert runtime.cudaMemGetInfo(ctypes.byref(unused), ctypes.byref(total)) == 0
    return unused.value


def devices() -> list[str]:
    count = ctypes.c_int()
    cuda.cuInit(0)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for ordinal in range(count.value):
        uuid = ctypes.create_string_buffer(16)
        cuda.cuDeviceGetUuid(uuid, ordinal)
        text = uuid.raw.hex()
        found.append(f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}")
    return found


def allocations() -> dict[str, object]:
    answer: dict[str, object] = {
        "set_device_99": runtime.cudaSetDevice(99),
        "set_device_minus_1": runtime.cudaSetDevice(-1),
    }
    answer["huge"] = [malloc(size)[0] for size in (2**64 - 1, 2**64 - 4096, 2**63, 2**63 - 1, 2**62, 2**45)]
    before = free_bytes()
    answer["nothing"] = malloc(0)
    status, address = malloc(4 * MIB)
    answer["taken"] = [status, before - free_bytes()]
    answer["inside"] = free(address + 512 if address else None)
    answer["free"], answer["double_free"], answer["foreign"] = free(address), free(address), free(0x1234)
    small = [malloc(1000)[1] for _ in range(5000)]
    answer["small_taken"] = before - free_bytes()
    for each in small:
        free(each)
    answer["leak"] = before - free_bytes()
    return answer


def events() -> dict[str, int]:
    timed, untimed, elapsed = pointer(), pointer(), ctypes.c_float()
    runtime.cudaEventCreate(ctypes.byref(timed))
    runtime.cudaEventCreateWithFlags(ctypes.byref(untimed), 2)
    answer = {"unrecorded": runtime.cudaEventElapsedTime(ctypes.byref(elapsed), timed, timed)}
    runtime.cudaEventRecord(timed, None)
    runtime.cudaEventRecord(untimed, None)
    answer["recorded"] = runtime.cudaEventElapsedTime(ctypes.byref(elapsed), timed, timed)
    answer["untimed"] = runtime.cudaEventElapsedTime(ctypes.byref(elapsed), timed, untimed)
    answer["destroyed"], answer["destroyed_twice"] = runtime.cudaEventDestroy(timed), runtime.cudaEventDestroy(timed)
    answer["recorded_after"], answer["none"] = runtime.cudaEventRecord(timed, None), runtime.cudaEventDestroy(None)
    return answer


def captures() -> dict[str, int]:
    stream, graph = pointer(), pointer()
    runtime.cudaStreamCreate(ctypes.byref(stream))
    answer = {"end_of_none": runtime.cudaStreamEndCapture(stream, ctypes.byref(graph))}
    runtime.cudaStreamBeginCapture(stream, 0)
    answer["twice"] = runtime.cudaStreamBeginCapture(stream, 0)
    answer["wait"] = runtime.cudaStreamSynchronize(stream)
    answer["end_of_spoilt"] = runtime.cudaStreamEndCapture(stream, ctypes.byref(graph))
    return answer


def forked() -> int:
    runtime.cudaSetDevice(0)
    child = os.fork()
    if child == 0:
        os._exit(runtime.cudaSetDevice(0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill_slots(wanted: int) -> list[int]:
    """Context after context in children of their own, until there are no more: their status."""
    children, results = [], []
    for _ in range(wanted):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write_end, bytes([runtime.cudaSetDevice(0)]))
            signal.pause()
        children.append(child)
        results.append(os.read(read_end, 1)[0])
        os.close(read_end)
        os.close(write_end)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return results


def hold(sizes: list[int]) -> None:
    """Take so much of each device, say so, and wait for the end."""
    statuses = []
    for ordinal, size in enumerate(sizes):
        statuses.append(runtime.cudaSetDevice(ordinal))
        if size:
            statuses.append(malloc(size)[0])
    sys.stdout.write(json.dumps(statuses) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "hold":
        hold([int(size) for size in rest])
    elif what == "slots":
        sys.stdout.write(json.dumps(fill_slots(int(rest[0]))))
    elif what == "devices":
        sys.stdout.write(json.dumps(devices()))
    else:
        calls = (allocations, events, captures, forked)
        sys.stdout.write(json.dumps({call.__name__: call() for call in calls}))
