/* libcuda.so.1: the driver of the emulated machine. Allocations are kept in the ledger of state.c and
 * fail where a card would be full; kernels return at once. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

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
    static _Thread_local char text[160];
    if (error == CUDA_ERROR_NOT_SUPPORTED) {
        snprintf(text, sizeof text, "operation not supported: the emulated GPU does not implement %s",
                 abg_last_unsupported() ? abg_last_unsupported() : "this call");
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

static void *context_of(int ordinal) { return (void *)(uintptr_t)(0x1000 + ordinal); }
static int ordinal_of(const void *context) { return context ? (int)((uintptr_t)context - 0x1000) : 0; }

CUresult abg_set_current(int ordinal) {
    if (!abg_device_at(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    current_ordinal = ordinal;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) {
    *context = context_of(device);
    return abg_result(abg_ensure_context(device));
}

ABG_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return abg_device_at(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }

ABG_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    abg_machine *machine = abg_get_machine();
    int index = abg_visible_device(device);
    if (index < 0) return CUDA_ERROR_INVALID_DEVICE;
    if (flags) *flags = 0;
    *active = 0;
    for (int i = 0; i < ABG_MAX_PROCESSES; i++)
        if (machine->processes[i].pid == (uint32_t)getpid()) *active = (machine->processes[i].has_context >> index) & 1;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuCtxGetCurrent(void **context) {
    *context = context_of(current_ordinal);
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
    if (context) *context = context_of(current_ordinal);
    current_ordinal = context_stack[--context_depth];
    return CUDA_SUCCESS;
}

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

/* ---- memory ------------------------------------------------------------------------------- */

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    return abg_result(abg_alloc(current_ordinal, bytes, pointer));
}

CUresult cuMemFree_v2(CUdeviceptr pointer) { return pointer ? abg_result(abg_free(pointer)) : CUDA_SUCCESS; }

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    uint64_t unused = 0, total = 0;
    CUresult result = abg_result(abg_memory_info(current_ordinal, &unused, &total));
    *free_bytes = unused;
    *total_bytes = total;
    return result;
}

typedef struct pinned {
    struct pinned *next;
    char *start;
    size_t bytes;
    int owned;
} pinned;

static pinned *pinned_list;
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

static CUresult pin(void *start, size_t bytes, int owned) {
    CUresult result = CUDA_SUCCESS;
    pinned *made = malloc(sizeof *made);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    *made = (pinned){NULL, start, bytes, owned};
    pthread_mutex_lock(&pinned_lock);
    for (pinned *entry = pinned_list; entry; entry = entry->next)
        if (entry->start < made->start + bytes && made->start < entry->start + entry->bytes) result = CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (result == CUDA_SUCCESS) {
        made->next = pinned_list;
        pinned_list = made;
    }
    pthread_mutex_unlock(&pinned_lock);
    if (result != CUDA_SUCCESS) free(made);
    return result;
}

/* What was allocated here is freed, what was registered is left to its owner: the one call is no substitute for the other. */
static CUresult unpin(void *start, int owned) {
    pthread_mutex_lock(&pinned_lock);
    pinned **link = &pinned_list;
    while (*link && ((*link)->start != start || (*link)->owned != owned)) link = &(*link)->next;
    pinned *entry = *link;
    if (entry) *link = entry->next;
    pthread_mutex_unlock(&pinned_lock);
    if (!entry) return owned ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    if (owned) free(entry->start);
    free(entry);
    return CUDA_SUCCESS;
}

int abg_is_host_pinned(const void *pointer) {
    int found = 0;
    pthread_mutex_lock(&pinned_lock);
    for (pinned *entry = pinned_list; entry && !found; entry = entry->next)
        found = (const char *)pointer >= entry->start && (const char *)pointer < entry->start + entry->bytes;
    pthread_mutex_unlock(&pinned_lock);
    return found;
}

CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    (void)flags;
    void *start = NULL;
    if (posix_memalign(&start, 4096, bytes ? bytes : 1) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult result = pin(start, bytes, 1);
    if (result == CUDA_SUCCESS) *pointer = start;
    else free(start);
    return result;
}

CUresult cuMemFreeHost(void *pointer) { return pointer ? unpin(pointer, 1) : CUDA_SUCCESS; }

ABG_EXPORT CUresult cuMemHostRegister_v2(void *pointer, size_t bytes, unsigned flags) {
    (void)flags;
    return pointer && bytes ? pin(pointer, bytes, 0) : CUDA_ERROR_INVALID_VALUE;
}

ABG_EXPORT CUresult cuMemHostUnregister(void *pointer) { return pointer ? unpin(pointer, 0) : CUDA_ERROR_INVALID_VALUE; }

ABG_EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    abg_write_device(to, from, bytes);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    abg_read_device(from, to, bytes);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    abg_copy_device(to, from, bytes);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    return cuMemcpyHtoD_v2(to, from, bytes);
}

ABG_EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *stream) {
    (void)stream;
    return cuMemcpyDtoH_v2(to, from, bytes);
}

ABG_EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void *stream) {
    (void)stream;
    return cuMemcpyDtoD_v2(to, from, bytes);
}

static CUresult set_memory(CUdeviceptr to, size_t bytes) {
    abg_forget_device(to, bytes);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) { return (void)value, set_memory(to, count); }
ABG_EXPORT CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) { return (void)value, set_memory(to, 4 * count); }
ABG_EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, void *stream) { return (void)value, (void)stream, set_memory(to, count); }
ABG_EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void *stream) { return (void)value, (void)stream, set_memory(to, 4 * count); }

ABG_EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr pointer) {
    uint64_t start = 0, length = 0;
    if (abg_address_device(pointer, &start, &length) < 0) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = start;
    if (bytes) *bytes = length;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer) {
    int ordinal = abg_address_device(pointer, NULL, NULL);
    int is_pinned = ordinal < 0 && abg_is_host_pinned((void *)(uintptr_t)pointer);
    if (ordinal < 0 && !is_pinned) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case 1: *(void **)data = context_of(ordinal < 0 ? 0 : ordinal); break;
    case 2: *(unsigned *)data = ordinal < 0 ? 1 : 2; break; /* memory type: host, device */
    case 3: case 4: *(CUdeviceptr *)data = pointer; break;
    case 8: *(unsigned *)data = 0; break; /* managed */
    case 9: *(int *)data = ordinal < 0 ? 0 : ordinal; break;
    default: return abg_not_supported("cuPointerGetAttribute with this attribute");
    }
    return CUDA_SUCCESS;
}

/* ---- virtual memory: what `expandable_segments` uses ---------------------------------------- */

typedef struct physical {
    struct physical *next;
    uint64_t bytes;
    int ordinal;
    int handles;  /* times that cuMemRelease is still owed */
    int mappings;
} physical;

typedef struct mapping {
    struct mapping *next;
    uint64_t address;
    uint64_t bytes;
    physical *memory;
} mapping;

static physical *physicals;
static mapping *mappings;
static pthread_mutex_t mapping_lock = PTHREAD_MUTEX_INITIALIZER;

/* The memory that a handle names, where it is one that has not been released. */
static physical *memory_of(uint64_t handle) {
    physical *memory = physicals;
    while (memory && (uint64_t)(uintptr_t)memory != handle) memory = memory->next;
    return memory && memory->handles ? memory : NULL;
}

static void drop_if_unused(physical *memory) {
    if (memory->handles || memory->mappings) return;
    physical **link = &physicals;
    while (*link != memory) link = &(*link)->next;
    *link = memory->next;
    abg_discharge(memory->ordinal, memory->bytes);
    free(memory);
}

#define GRANULARITY (2ull << 20)

ABG_EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) {
    (void)properties, (void)option;
    *bytes = GRANULARITY;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t bytes, size_t alignment, CUdeviceptr wanted, uint64_t flags) {
    (void)wanted, (void)flags;
    return abg_result(abg_reserve_addresses(bytes, alignment, pointer));
}

ABG_EXPORT CUresult cuMemAddressFree(CUdeviceptr pointer, size_t bytes) { return (void)bytes, abg_result(abg_release_addresses(pointer)); }

/* CUmemAllocationProp: type, requested handle types, location type (1: a device), location id. */
ABG_EXPORT CUresult cuMemCreate(uint64_t *handle, size_t bytes, const int *properties, uint64_t flags) {
    (void)flags;
    if (!bytes || bytes % GRANULARITY) return CUDA_ERROR_INVALID_VALUE;
    if (properties[2] != 1) return abg_not_supported("cuMemCreate in host memory");
    physical *memory = malloc(sizeof *memory);
    if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
    int status = abg_charge(properties[3], bytes);
    if (status != ABG_OK) {
        free(memory);
        return abg_result(status);
    }
    pthread_mutex_lock(&mapping_lock);
    *memory = (physical){physicals, bytes, properties[3], 1, 0};
    physicals = memory;
    pthread_mutex_unlock(&mapping_lock);
    *handle = (uint64_t)(uintptr_t)memory;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemRelease(uint64_t handle) {
    pthread_mutex_lock(&mapping_lock);
    physical *memory = memory_of(handle);
    if (memory) {
        memory->handles--;
        drop_if_unused(memory);
    }
    pthread_mutex_unlock(&mapping_lock);
    return memory ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static int is_mapped(uint64_t address, uint64_t bytes) {
    for (mapping *entry = mappings; entry; entry = entry->next)
        if (entry->address < address + bytes && address < entry->address + entry->bytes) return 1;
    return 0;
}

static CUresult map_locked(CUdeviceptr pointer, size_t bytes, uint64_t handle) {
    uint64_t start = 0, room = 0;
    physical *memory = memory_of(handle);
    if (!memory || !bytes || bytes > memory->bytes || abg_address_device(pointer, &start, &room) < 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > room || pointer - start > room - bytes || is_mapped(pointer, bytes)) return CUDA_ERROR_INVALID_VALUE;
    mapping *entry = malloc(sizeof *entry);
    if (!entry) return CUDA_ERROR_OUT_OF_MEMORY;
    *entry = (mapping){mappings, pointer, bytes, memory};
    mappings = entry;
    memory->mappings++;
    abg_assign_addresses(pointer, memory->ordinal);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemMap(CUdeviceptr pointer, size_t bytes, size_t offset, uint64_t handle, uint64_t flags) {
    (void)offset, (void)flags;
    pthread_mutex_lock(&mapping_lock);
    CUresult result = map_locked(pointer, bytes, handle);
    pthread_mutex_unlock(&mapping_lock);
    return result;
}

ABG_EXPORT CUresult cuMemUnmap(CUdeviceptr pointer, size_t bytes) {
    int found = 0;
    pthread_mutex_lock(&mapping_lock);
    for (mapping **link = &mappings; *link;) {
        mapping *entry = *link;
        if (entry->address < pointer || entry->address - pointer >= bytes || bytes - (entry->address - pointer) < entry->bytes) {
            link = &entry->next;
            continue;
        }
        *link = entry->next;
        abg_forget_device(entry->address, entry->bytes);
        entry->memory->mappings--;
        drop_if_unused(entry->memory);
        free(entry);
        found = 1;
    }
    pthread_mutex_unlock(&mapping_lock);
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

ABG_EXPORT CUresult cuMemSetAccess(CUdeviceptr pointer, size_t bytes, const void *access, size_t count) {
    (void)pointer, (void)bytes, (void)access, (void)count;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemRetainAllocationHandle(uint64_t *handle, void *pointer) {
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mapping_lock);
    for (mapping *entry = mappings; entry; entry = entry->next) {
        uint64_t address = (uint64_t)(uintptr_t)pointer;
        if (address < entry->address || address >= entry->address + entry->bytes) continue;
        entry->memory->handles++;
        *handle = (uint64_t)(uintptr_t)entry->memory;
        result = CUDA_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&mapping_lock);
    return result;
}

/* ---- streams, events, capture --------------------------------------------------------------- */
/* Streams and events are the same objects for driver and runtime, and the stream handles 0, 1 and 2 are the default streams.
 * The room of an object that was destroyed is kept for the next one, so that a stale handle can be told for what it is. */

#define STREAM_MARK 0x4D525453u
#define EVENT_MARK 0x544E5645u

typedef struct object {
    uint32_t mark; /* 0: destroyed */
    struct object *next_free;
    int ordinal; /* of a stream */
    int priority;
    int is_origin; /* the capture began on this stream */
    int has_time;  /* of an event: it may be timed */
    int is_recorded;
    double seconds;
    uint64_t capture_id; /* of a stream: 0 where it does not capture; of an event: where it was recorded */
} object;

static object *free_objects;
static pthread_mutex_t object_lock = PTHREAD_MUTEX_INITIALIZER; /* also of the captures */

#define MOST_CAPTURES 64
static struct { uint64_t id; int is_invalid; } captures[MOST_CAPTURES]; /* those under way */
static uint64_t next_capture = 1;

static object *make_object(uint32_t mark) {
    pthread_mutex_lock(&object_lock);
    object *made = free_objects;
    if (made) free_objects = made->next_free;
    pthread_mutex_unlock(&object_lock);
    if (!made) made = malloc(sizeof *made);
    if (made) *made = (object){.mark = mark};
    return made;
}

static int is_default_stream(const void *stream) { return (uintptr_t)stream <= 2; }
static object *stream_of(const void *handle) {
    object *stream = (object *)(uintptr_t)handle;
    return !is_default_stream(handle) && stream->mark == STREAM_MARK ? stream : NULL;
}
static object *event_of(void *handle) {
    object *event = handle;
    return event && event->mark == EVENT_MARK ? event : NULL;
}

static int capture_slot(uint64_t id) {
    for (int i = 0; i < MOST_CAPTURES; i++)
        if (id && captures[i].id == id) return i;
    return -1;
}

static int end_capture_locked(object *stream) {
    int i = capture_slot(stream->capture_id), is_invalid = i >= 0 && captures[i].is_invalid;
    if (i >= 0) captures[i].id = 0;
    stream->capture_id = 0;
    stream->is_origin = 0;
    return is_invalid;
}

static CUresult destroy_object(object *gone) {
    if (!gone) return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&object_lock);
    if (gone->is_origin) end_capture_locked(gone);
    gone->mark = 0;
    gone->next_free = free_objects;
    free_objects = gone;
    pthread_mutex_unlock(&object_lock);
    return CUDA_SUCCESS;
}

uint64_t abg_capture_of(const void *handle) {
    const object *stream = stream_of(handle);
    if (!stream) return 0;
    pthread_mutex_lock(&object_lock);
    uint64_t id = capture_slot(stream->capture_id) < 0 ? 0 : stream->capture_id;
    pthread_mutex_unlock(&object_lock);
    return id;
}

int abg_capture_status(const void *handle) {
    uint64_t id = abg_capture_of(handle);
    pthread_mutex_lock(&object_lock);
    int i = capture_slot(id), status = i < 0 ? CAPTURE_NONE : captures[i].is_invalid ? CAPTURE_INVALIDATED : CAPTURE_ACTIVE;
    pthread_mutex_unlock(&object_lock);
    return status;
}

/* What is not allowed in a capture spoils it. */
static CUresult refuse_in_capture(uint64_t id, CUresult error) {
    pthread_mutex_lock(&object_lock);
    int i = capture_slot(id);
    if (i >= 0) captures[i].is_invalid = 1;
    pthread_mutex_unlock(&object_lock);
    return i < 0 ? CUDA_SUCCESS : error;
}

CUresult abg_begin_capture(void *handle) {
    object *stream = stream_of(handle);
    if (!stream) return is_default_stream(handle) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_ERROR_INVALID_HANDLE;
    CUresult result = CUDA_ERROR_ILLEGAL_STATE;
    pthread_mutex_lock(&object_lock);
    for (int i = 0; i < MOST_CAPTURES && capture_slot(stream->capture_id) < 0; i++) {
        if (captures[i].id) continue;
        captures[i].id = stream->capture_id = next_capture++;
        captures[i].is_invalid = 0;
        stream->is_origin = 1;
        result = CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&object_lock);
    return result;
}

CUresult abg_end_capture(void *handle) {
    object *stream = stream_of(handle);
    if (!abg_capture_of(handle)) return CUDA_ERROR_ILLEGAL_STATE;
    if (!stream->is_origin) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    pthread_mutex_lock(&object_lock);
    int is_invalid = end_capture_locked(stream);
    pthread_mutex_unlock(&object_lock);
    return is_invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    (void)flags;
    CUresult result = abg_result(abg_ensure_context(current_ordinal));
    if (result != CUDA_SUCCESS) return result;
    object *made = make_object(STREAM_MARK);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    made->ordinal = current_ordinal;
    made->priority = priority;
    *stream = made;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuStreamCreate(void **stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

CUresult cuStreamDestroy_v2(void *stream) { return destroy_object(stream_of(stream)); }

CUresult abg_wait_for_stream(void *stream) {
    if (!is_default_stream(stream) && !stream_of(stream)) return CUDA_ERROR_INVALID_HANDLE;
    return refuse_in_capture(abg_capture_of(stream), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

CUresult abg_wait_for_event(void *handle) {
    const object *event = event_of(handle);
    return event ? refuse_in_capture(event->capture_id, CUDA_ERROR_CAPTURED_EVENT) : CUDA_ERROR_INVALID_HANDLE;
}

/* Not while any stream captures. */
CUresult abg_wait_for_device(void) {
    CUresult result = CUDA_SUCCESS;
    for (int i = 0; i < MOST_CAPTURES; i++)
        if (captures[i].id) result = refuse_in_capture(captures[i].id, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return result;
}

CUresult abg_stream_priority(const void *handle, int *priority) {
    const object *stream = stream_of(handle);
    if (!stream && !is_default_stream(handle)) return CUDA_ERROR_INVALID_HANDLE;
    *priority = stream ? stream->priority : 0;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuStreamSynchronize(void *stream) { return abg_wait_for_stream(stream); }
ABG_EXPORT CUresult cuStreamQuery(void *stream) { return abg_wait_for_stream(stream); }

ABG_EXPORT CUresult cuStreamIsCapturing(void *stream, int *status) {
    *status = abg_capture_status(stream);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuStreamGetCtx(void *stream, void **context) {
    const object *self = stream_of(stream);
    *context = context_of(self ? self->ordinal : current_ordinal);
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
    (void)flags;
    object *stream = stream_of(handle);
    const object *event = event_of(event_handle);
    if (!event || (!stream && !is_default_stream(handle))) return CUDA_ERROR_INVALID_HANDLE;
    /* Work that waits for captured work is captured with it. */
    pthread_mutex_lock(&object_lock);
    if (stream && !stream->is_origin && capture_slot(event->capture_id) >= 0) stream->capture_id = event->capture_id;
    pthread_mutex_unlock(&object_lock);
    return CUDA_SUCCESS;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

CUresult cuEventCreate(void **event, unsigned flags) {
    CUresult result = abg_result(abg_ensure_context(current_ordinal));
    if (result != CUDA_SUCCESS) return result;
    object *made = make_object(EVENT_MARK);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    made->has_time = !(flags & 2); /* CU_EVENT_DISABLE_TIMING */
    *event = made;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(void *event) { return destroy_object(event_of(event)); }

CUresult cuEventRecord(void *handle, void *stream) {
    object *event = event_of(handle);
    if (!event || (!is_default_stream(stream) && !stream_of(stream))) return CUDA_ERROR_INVALID_HANDLE;
    event->seconds = now();
    event->is_recorded = 1;
    event->capture_id = abg_capture_of(stream);
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuEventQuery(void *event) { return abg_wait_for_event(event); }
ABG_EXPORT CUresult cuEventSynchronize(void *event) { return abg_wait_for_event(event); }

/* The time that the host took between the two: plausible, and no measure of a card. */
CUresult cuEventElapsedTime_v2(float *milliseconds, void *begin, void *end) {
    const object *first = event_of(begin), *last = event_of(end);
    if (!first || !last || !first->is_recorded || !last->is_recorded || !first->has_time || !last->has_time) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = (float)(1e3 * (last->seconds - first->seconds));
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuEventElapsedTime(float *milliseconds, void *begin, void *end) { return cuEventElapsedTime_v2(milliseconds, begin, end); }

/* ---- modules and kernels: names without code ------------------------------------------------ */

static CUresult make_handle(void **handle) {
    *handle = calloc(1, 16);
    return *handle ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

ABG_EXPORT CUresult cuModuleLoad(void **module, const char *path) { return (void)path, make_handle(module); }
ABG_EXPORT CUresult cuModuleLoadData(void **module, const void *image) { return (void)image, make_handle(module); }
ABG_EXPORT CUresult cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values) {
    (void)image, (void)count, (void)options, (void)values;
    return make_handle(module);
}
ABG_EXPORT CUresult cuModuleUnload(void *module) { return free(module), CUDA_SUCCESS; }
ABG_EXPORT CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module, (void)name;
    return make_handle(function); /* lives as long as the process: a function has no call that ends it */
}
ABG_EXPORT CUresult cuFuncGetModule(void **module, void *function) { return *module = function, CUDA_SUCCESS; }
ABG_EXPORT CUresult cuLibraryLoadData(void **library, const void *code, int *jit, void **jit_values, unsigned jit_count, int *options,
                                      void **values, unsigned count) {
    (void)code, (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    return make_handle(library);
}
ABG_EXPORT CUresult cuLibraryUnload(void *library) { return free(library), CUDA_SUCCESS; }
ABG_EXPORT CUresult cuLibraryGetKernel(void **kernel, void *library, const char *name) { return (void)library, (void)name, make_handle(kernel); }
ABG_EXPORT CUresult cuLibraryGetModule(void **module, void *library) { return *module = library, CUDA_SUCCESS; }
ABG_EXPORT CUresult cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, CUDA_SUCCESS; }
ABG_EXPORT CUresult cuLinkCreate_v2(unsigned count, int *options, void **values, void **state) {
    (void)count, (void)options, (void)values;
    return make_handle(state);
}
ABG_EXPORT CUresult cuLinkAddData_v2(void *state, int type, void *data, size_t bytes, const char *name, unsigned count, int *options, void **values) {
    (void)state, (void)type, (void)data, (void)bytes, (void)name, (void)count, (void)options, (void)values;
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuLinkComplete(void *state, void **cubin, size_t *bytes) {
    *cubin = state;
    *bytes = 16;
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuLinkDestroy(void *state) { return free(state), CUDA_SUCCESS; }

ABG_EXPORT CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
    (void)function;
    const abg_device *card = abg_device_at(current_ordinal);
    if (!card) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
    case 0: *value = 1024; break; /* threads per block */
    case 4: *value = 32; break;   /* registers */
    case 5: case 6: *value = 10 * card->major + card->minor; break;
    case 8: *value = card->shared_per_block_optin; break;
    default: *value = 0; break;
    }
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuKernelGetAttribute(int *value, int attribute, void *kernel, CUdevice device) { return (void)device, cuFuncGetAttribute(value, attribute, kernel); }
ABG_EXPORT CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return (void)function, (void)attribute, (void)value, CUDA_SUCCESS; }
ABG_EXPORT CUresult cuFuncSetCacheConfig(void *function, int config) { return (void)function, (void)config, CUDA_SUCCESS; }

ABG_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, void *function, int threads, size_t shared, unsigned flags) {
    (void)function, (void)flags;
    const abg_device *card = abg_device_at(current_ordinal);
    if (!card || threads < 1) return CUDA_ERROR_INVALID_VALUE;
    int by_threads = card->max_threads_per_sm / ((threads + 31) / 32 * 32);
    int by_shared = shared ? (int)((size_t)card->shared_per_sm / shared) : card->max_blocks_per_sm;
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    if (*blocks > card->max_blocks_per_sm) *blocks = card->max_blocks_per_sm;
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
ABG_EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) {
    (void)function, (void)config;
    const abg_device *card = abg_device_at(current_ordinal);
    *clusters = card ? card->sm_count / 2 : 0;
    return CUDA_SUCCESS;
}

static CUresult launch(void) {
    abg_kernel_ran();
    return abg_result(abg_ensure_context(current_ordinal));
}
ABG_EXPORT CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                   void *stream, void **parameters, void **extra) {
    (void)function, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)parameters, (void)extra;
    return launch();
}
ABG_EXPORT CUresult cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
    (void)config, (void)function, (void)parameters, (void)extra;
    return launch();
}
ABG_EXPORT CUresult cuLaunchCooperativeKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                              unsigned shared, void *stream, void **parameters) {
    (void)function, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)parameters;
    return launch();
}
ABG_EXPORT CUresult cuTensorMapEncodeTiled(void *map) { return memset(map, 0, 128), CUDA_SUCCESS; }
ABG_EXPORT CUresult cuTensorMapEncodeIm2col(void *map) { return memset(map, 0, 128), CUDA_SUCCESS; }

/* ---- by name -------------------------------------------------------------------------------- */

/* This library itself: looking in the global scope instead could find the real driver's calls. */
static void *own_library(void) {
    static void *library;
    Dl_info here;
    if (!library && dladdr((void *)&cuInit, &here)) library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return library;
}

/* The newest version of a call that this library has: `name_v3`, else `name_v2`, else `name`. */
static void *find_call(const char *name) {
    char versioned[128];
    void *function = NULL;
    for (int version = 3; version >= 1 && !function; version--) {
        snprintf(versioned, sizeof versioned, version > 1 ? "%s_v%d" : "%s", name, version);
        function = dlsym(own_library(), versioned);
    }
    return function;
}

/* A program that asks for a call by name gets one also where this library has none: it fails and says its name.
 * (torch looks up every call that any of its features may use, and gives up at the first that is missing.) */
#define MOST_ABSENT 256
static char absent_names[MOST_ABSENT][64];
static int absent_count;
static pthread_mutex_t absent_lock = PTHREAD_MUTEX_INITIALIZER;

#define ABSENT(n) \
    static CUresult absent_##n(void) { return abg_not_supported(absent_names[0x##n]); }
#define ABSENT_ROW(f, r) f(r##0) f(r##1) f(r##2) f(r##3) f(r##4) f(r##5) f(r##6) f(r##7) f(r##8) f(r##9) f(r##A) f(r##B) f(r##C) f(r##D) f(r##E) f(r##F)
#define ABSENT_ALL(f)                                                                                                                   \
    ABSENT_ROW(f, 0) ABSENT_ROW(f, 1) ABSENT_ROW(f, 2) ABSENT_ROW(f, 3) ABSENT_ROW(f, 4) ABSENT_ROW(f, 5) ABSENT_ROW(f, 6) ABSENT_ROW(f, 7) \
    ABSENT_ROW(f, 8) ABSENT_ROW(f, 9) ABSENT_ROW(f, A) ABSENT_ROW(f, B) ABSENT_ROW(f, C) ABSENT_ROW(f, D) ABSENT_ROW(f, E) ABSENT_ROW(f, F)
ABSENT_ALL(ABSENT)
#define ABSENT_ENTRY(n) absent_##n,
static CUresult (*const absent_calls[MOST_ABSENT])(void) = {ABSENT_ALL(ABSENT_ENTRY)};

static void *absent_call(const char *name) {
    if (strncmp(name, "cu", 2) != 0) return NULL;
    pthread_mutex_lock(&absent_lock);
    int i = 0;
    while (i < absent_count && strncmp(absent_names[i], name, sizeof absent_names[0] - 1) != 0) i++;
    if (i == absent_count && i < MOST_ABSENT) snprintf(absent_names[absent_count++], sizeof absent_names[0], "%s", name);
    pthread_mutex_unlock(&absent_lock);
    return i < MOST_ABSENT ? (void *)absent_calls[i] : NULL;
}

ABG_EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags);

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    (void)flags;
    int is_old = strcmp(name, "cuGetProcAddress") == 0 && version < 12000; /* four arguments before CUDA 12 */
    *function = is_old ? (void *)cuGetProcAddress : find_call(name);
    if (!*function) *function = absent_call(name);
    if (status) *status = *function ? 0 : 1; /* found, or symbol not found */
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

ABG_EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

/* ---- around a fork --------------------------------------------------------------------------- */

static pthread_mutex_t *const locks[] = {&mapping_lock, &pinned_lock, &object_lock, &absent_lock};

void abg_lock_driver(void) {
    for (size_t i = 0; i < sizeof locks / sizeof *locks; i++) pthread_mutex_lock(locks[i]);
}
void abg_unlock_driver(void) {
    for (size_t i = sizeof locks / sizeof *locks; i-- > 0;) pthread_mutex_unlock(locks[i]);
}

/* A runtime linked statically into an extension asks for tables that are not public. */
ABG_EXPORT CUresult cuGetExportTable(const void **table, const void *id) {
    (void)id;
    *table = NULL;
    return abg_not_supported("cuGetExportTable (a statically linked CUDA runtime)");
}
