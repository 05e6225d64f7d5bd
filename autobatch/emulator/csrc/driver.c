/* libcuda.so.1: the driver of the emulated machine. Allocations are kept in the ledger of state.c and
 * fail where a card would be full; kernels return at once. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local int current_ordinal;

int abg_current_ordinal(void) { return current_ordinal; }

CUresult abg_result(int status) {
    switch (status) {
    case ABG_OK: return CUDA_SUCCESS;
    case ABG_NO_MACHINE: return CUDA_ERROR_NO_DEVICE;
    case ABG_BAD_DEVICE: return CUDA_ERROR_INVALID_DEVICE;
    case ABG_NO_MEMORY: return CUDA_ERROR_OUT_OF_MEMORY;
    case ABG_TOO_MANY: return CUDA_ERROR_DEVICE_UNAVAILABLE;
    case ABG_FORKED: return CUDA_ERROR_NOT_INITIALIZED;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

/* ---- errors ------------------------------------------------------------------------------- */

CUresult abg_not_supported(const char *call) {
    abg_note_unsupported(call);
    return CUDA_ERROR_NOT_SUPPORTED;
}

static const struct { int error; const char *name, *text; } errors[] = {
    {CUDA_SUCCESS, "cudaSuccess", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "cudaErrorInitializationError", "initialization error"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {CUDA_ERROR_INVALID_CONFIGURATION, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {CUDA_ERROR_DEVICE_UNAVAILABLE, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {CUDA_ERROR_NO_DEVICE, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "cudaErrorDeviceUninitialized", "invalid device context"},
    {CUDA_ERROR_INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {CUDA_ERROR_ILLEGAL_STATE, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {CUDA_ERROR_NOT_FOUND, "cudaErrorSymbolNotFound", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "cudaErrorNotReady", "device not ready"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "cudaErrorHostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_NOT_SUPPORTED, "cudaErrorNotSupported", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "cudaErrorStreamCaptureUnmatched", "capture was not initiated in this stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"},
};
#define ERRORS (sizeof errors / sizeof *errors)

const char *abg_error_string(int error) {
    static _Thread_local char text[200];
    if (error == CUDA_ERROR_NOT_SUPPORTED && abg_unsupported_text()) {
        snprintf(text, sizeof text, "operation not supported: %s", abg_unsupported_text());
        return text;
    }
    for (size_t i = 0; i < ERRORS; i++)
        if (errors[i].error == error) return errors[i].text;
    return "unrecognized error code";
}

const char *abg_error_name(int error) {
    for (size_t i = 0; i < ERRORS; i++)
        if (errors[i].error == error) return errors[i].name;
    return "unrecognized error code";
}

ABG_EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = abg_error_string(error);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = abg_error_name(error);
    return CUDA_SUCCESS;
}

/* Nothing is ever logged here, so the callback is never called. */
ABG_EXPORT CUresult cuLogsRegisterCallback(void *callback, void *data, void **handle) {
    (void)callback, (void)data;
    if (handle) *handle = NULL;
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuLogsUnregisterCallback(void *handle) { return (void)handle, CUDA_SUCCESS; }

/* ---- devices ------------------------------------------------------------------------------ */

CUresult cuInit(unsigned flags) {
    (void)flags;
    return abg_visible_count() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

CUresult cuDriverGetVersion(int *version) {
    abg_machine *machine = abg_get_machine();
    *version = machine ? (int)machine->cuda_version : 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = abg_visible_count();
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return abg_device_at(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

ABG_EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    const abg_device *card = abg_device_at(device);
    if (!card) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, (size_t)length, "%s", card->name);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    const abg_device *card = abg_device_at(device);
    if (!card) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = card->cuda_total_bytes;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDeviceGetUuid_v2(void *uuid, CUdevice device) {
    const abg_device *card = abg_device_at(device);
    if (!card) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid, card->uuid, sizeof card->uuid);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDeviceGetUuid(void *uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
    int index = abg_visible_device(device);
    if (index < 0) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(text, (size_t)length, "0000:%02X:00.0", index + 1);
    return CUDA_SUCCESS;
}

/* Attribute numbers are shared by CUdevice_attribute and cudaDeviceAttr. */
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    const abg_device *card = abg_device_at(device);
    if (!card) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break; /* threads per block, block x and y */
    case 4: *value = 64; break;                   /* block z */
    case 5: *value = 2147483647; break;           /* grid x */
    case 6: case 7: *value = 65535; break;        /* grid y and z */
    case 8: *value = 49152; break;                /* shared memory per block */
    case 9: *value = 65536; break;                /* constant memory */
    case 10: *value = 32; break;                  /* warp */
    case 11: *value = 2147483647; break;          /* pitch */
    case 12: case 82: *value = 65536; break;      /* registers per block, per SM */
    case 13: *value = 1410000; break;             /* clock, kHz: no time passes on this card */
    case 14: case 23: *value = 512; break;        /* texture alignment */
    case 16: *value = card->sm_count; break;
    case 33: *value = abg_visible_device(device) + 1; break; /* PCI bus */
    case 36: *value = 1215000; break;             /* memory clock, kHz */
    case 37: *value = card->memory_bus_bits; break;
    case 38: *value = (int)card->l2_bytes; break;
    case 39: *value = card->max_threads_per_sm; break;
    case 40: *value = 3; break;                   /* copy engines */
    case 75: *value = card->major; break;
    case 76: *value = card->minor; break;
    case 81: *value = card->shared_per_sm; break;
    case 97: *value = card->shared_per_block_optin; break;
    case 106: *value = card->max_blocks_per_sm; break;
    case 111: *value = card->major >= 8 ? 1024 : 0; break; /* shared memory reserved per block */
    case 120: *value = card->major >= 9; break;   /* clusters */
    case 15: case 19: case 31: case 41: case 78: case 79: case 80: case 83: case 90: case 95: case 98: case 99: case 102: case 103:
        *value = 1; break; /* overlap, host mapping, concurrent kernels, unified addresses, priorities, L1 caches, managed memory,
                              preemption, cooperative launch, flushes, host registration, virtual memory, file handles */
    default: *value = 0; break; /* everything else is absent on this card */
    }
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    cuDeviceGetAttribute(major, 75, device);
    return cuDeviceGetAttribute(minor, 76, device);
}

ABG_EXPORT CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    *can = device != peer && abg_device_at(device) && abg_device_at(peer);
    return CUDA_SUCCESS;
}

/* ---- contexts: one for each device, named by its ordinal ----------------------------------- */

void *abg_context_of(int ordinal) { return (void *)(uintptr_t)(0x1000 + ordinal); }
static int ordinal_of(const void *context) { return context ? (int)((uintptr_t)context - 0x1000) : 0; }

CUresult abg_set_current(int ordinal) {
    if (!abg_device_at(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    current_ordinal = ordinal;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) {
    *context = abg_context_of(device);
    return abg_result(abg_ensure_context(device));
}

ABG_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return abg_device_at(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }

ABG_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (abg_visible_device(device) < 0) return CUDA_ERROR_INVALID_DEVICE;
    if (flags) *flags = 0;
    *active = abg_has_context(device); /* asked whenever torch changes the device: no system call, no lock */
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxGetCurrent(void **context) {
    *context = abg_context_of(current_ordinal);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxSetCurrent(void *context) { return abg_set_current(ordinal_of(context)); }

static _Thread_local int context_stack[32];
static _Thread_local int context_depth;

ABG_EXPORT CUresult cuCtxPushCurrent_v2(void *context) {
    int before = current_ordinal;
    if (context_depth == 32 || abg_set_current(ordinal_of(context)) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
    context_stack[context_depth++] = before;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxPopCurrent_v2(void **context) {
    if (!context_depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = abg_context_of(current_ordinal);
    current_ordinal = context_stack[--context_depth];
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuCtxPushCurrent(void *context) { return cuCtxPushCurrent_v2(context); }
ABG_EXPORT CUresult cuCtxPopCurrent(void **context) { return cuCtxPopCurrent_v2(context); }

ABG_EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_ordinal;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxSynchronize(void) { return abg_wait_for_device(); }

ABG_EXPORT CUresult cuCtxGetLimit(size_t *value, int limit) {
    (void)limit;
    *value = 1024;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxSetLimit(int limit, size_t value) {
    (void)limit, (void)value;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

/* ---- around a fork --------------------------------------------------------------------------- */

static pthread_mutex_t *const locks[] = {&abg_mapping_lock, &abg_pinned_lock, &abg_object_lock, &abg_absent_lock};

void abg_lock_driver(void) {
    for (size_t i = 0; i < sizeof locks / sizeof *locks; i++) pthread_mutex_lock(locks[i]);
}
void abg_unlock_driver(void) {
    for (size_t i = sizeof locks / sizeof *locks; i-- > 0;) pthread_mutex_unlock(locks[i]);
}
