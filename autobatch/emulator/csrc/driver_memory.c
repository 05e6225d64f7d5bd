/* The driver's memory: device, pinned and virtual. The ledger itself is state.c's. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory ------------------------------------------------------------------------------- */

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    return abg_result(abg_alloc(abg_current_ordinal(), bytes, pointer));
}

CUresult cuMemFree_v2(CUdeviceptr pointer) { return pointer ? abg_result(abg_free(pointer)) : CUDA_SUCCESS; }

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    uint64_t unused = 0, total = 0;
    CUresult result = abg_result(abg_memory_info(abg_current_ordinal(), &unused, &total));
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
pthread_mutex_t abg_pinned_lock = PTHREAD_MUTEX_INITIALIZER;

static CUresult pin(void *start, size_t bytes, int owned) {
    CUresult result = CUDA_SUCCESS;
    pinned *made = malloc(sizeof *made);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    *made = (pinned){NULL, start, bytes, owned};
    pthread_mutex_lock(&abg_pinned_lock);
    for (pinned *entry = pinned_list; entry; entry = entry->next)
        if (entry->start < made->start + bytes && made->start < entry->start + entry->bytes) result = CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (result == CUDA_SUCCESS) {
        made->next = pinned_list;
        pinned_list = made;
    }
    pthread_mutex_unlock(&abg_pinned_lock);
    if (result != CUDA_SUCCESS) free(made);
    return result;
}

/* What was allocated here is freed, what was registered is left to its owner: the one call is no substitute for the other. */
static CUresult unpin(void *start, int owned) {
    pthread_mutex_lock(&abg_pinned_lock);
    pinned **link = &pinned_list;
    while (*link && ((*link)->start != start || (*link)->owned != owned)) link = &(*link)->next;
    pinned *entry = *link;
    if (entry) *link = entry->next;
    pthread_mutex_unlock(&abg_pinned_lock);
    if (!entry) return owned ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    if (owned) free(entry->start);
    free(entry);
    return CUDA_SUCCESS;
}

int abg_is_host_pinned(const void *pointer) {
    int found = 0;
    pthread_mutex_lock(&abg_pinned_lock);
    for (pinned *entry = pinned_list; entry && !found; entry = entry->next)
        found = (const char *)pointer >= entry->start && (const char *)pointer < entry->start + entry->bytes;
    pthread_mutex_unlock(&abg_pinned_lock);
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
    case 1: *(void **)data = abg_context_of(ordinal < 0 ? 0 : ordinal); break;
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
pthread_mutex_t abg_mapping_lock = PTHREAD_MUTEX_INITIALIZER;

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
    pthread_mutex_lock(&abg_mapping_lock);
    *memory = (physical){physicals, bytes, properties[3], 1, 0};
    physicals = memory;
    pthread_mutex_unlock(&abg_mapping_lock);
    *handle = (uint64_t)(uintptr_t)memory;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemRelease(uint64_t handle) {
    pthread_mutex_lock(&abg_mapping_lock);
    physical *memory = memory_of(handle);
    if (memory) {
        memory->handles--;
        drop_if_unused(memory);
    }
    pthread_mutex_unlock(&abg_mapping_lock);
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
    pthread_mutex_lock(&abg_mapping_lock);
    CUresult result = map_locked(pointer, bytes, handle);
    pthread_mutex_unlock(&abg_mapping_lock);
    return result;
}

ABG_EXPORT CUresult cuMemUnmap(CUdeviceptr pointer, size_t bytes) {
    int found = 0;
    pthread_mutex_lock(&abg_mapping_lock);
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
    pthread_mutex_unlock(&abg_mapping_lock);
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

ABG_EXPORT CUresult cuMemSetAccess(CUdeviceptr pointer, size_t bytes, const void *access, size_t count) {
    (void)pointer, (void)bytes, (void)access, (void)count;
    return CUDA_SUCCESS;
}

ABG_EXPORT CUresult cuMemRetainAllocationHandle(uint64_t *handle, void *pointer) {
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&abg_mapping_lock);
    for (mapping *entry = mappings; entry; entry = entry->next) {
        uint64_t address = (uint64_t)(uintptr_t)pointer;
        if (address < entry->address || address >= entry->address + entry->bytes) continue;
        entry->memory->handles++;
        *handle = (uint64_t)(uintptr_t)entry->memory;
        result = CUDA_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&abg_mapping_lock);
    return result;
}
