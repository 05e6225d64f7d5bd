/* libnvidia-ml.so.1: the emulated cards as NVML's readers see them. Structure layouts as in NVML 12's header;
 * calls that are missing here are reported by the bindings as "function not found". */
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
};

static _Atomic int sessions;

/* A handle is the machine's index + 1: NVML knows nothing of CUDA_VISIBLE_DEVICES. */
static const abg_device *card_of(const void *handle) {
    abg_machine *machine = abg_get_machine();
    uintptr_t index = (uintptr_t)handle - 1;
    return machine && index < machine->device_count ? &machine->devices[index] : NULL;
}
static int index_of(const void *handle) { return (int)((uintptr_t)handle - 1); }

#define NEEDS_CARD(handle)                                     \
    if (!sessions) return NVML_ERROR_UNINITIALIZED;            \
    const abg_device *card = card_of(handle);                  \
    if (!card) return NVML_ERROR_INVALID_ARGUMENT;

static nvmlReturn_t give_text(char *to, unsigned room, const char *text) {
    if (strlen(text) + 1 > room) return NVML_ERROR_INSUFFICIENT_SIZE;
    memcpy(to, text, strlen(text) + 1);
    return NVML_SUCCESS;
}

ABG_EXPORT nvmlReturn_t nvmlInit_v2(void) {
    if (!abg_get_machine()) return NVML_ERROR_DRIVER_NOT_LOADED;
    sessions++;
    return NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlInit(void) { return nvmlInit_v2(); }
ABG_EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags) { return (void)flags, nvmlInit_v2(); }
ABG_EXPORT nvmlReturn_t nvmlShutdown(void) {
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    sessions--;
    return NVML_SUCCESS;
}
ABG_EXPORT const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH: return "Argument Version Mismatch";
    default: return "Unknown Error";
    }
}

/* ---- the system ---------------------------------------------------------------------------- */

ABG_EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *text, unsigned room) {
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    return give_text(text, room, abg_get_machine()->driver_version);
}
ABG_EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *text, unsigned room) {
    char version[64];
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    snprintf(version, sizeof version, "%u.%s", abg_get_machine()->cuda_version / 1000, abg_get_machine()->driver_version);
    return give_text(text, room, version);
}
ABG_EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    *version = (int)abg_get_machine()->cuda_version;
    return NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }
ABG_EXPORT nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned room) {
    char path[64], text[512] = "";
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "r");
    if (!file) return NVML_ERROR_NOT_FOUND;
    if (!fgets(text, sizeof text, file)) text[0] = 0;
    fclose(file);
    snprintf(name, room, "%s", text);
    return NVML_SUCCESS;
}

/* ---- finding a card ------------------------------------------------------------------------- */

ABG_EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    *count = abg_get_machine()->device_count;
    return NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
ABG_EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    *handle = (void *)(uintptr_t)(index + 1);
    return card_of(*handle) ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, void **handle) { return nvmlDeviceGetHandleByIndex_v2(index, handle); }

static void format_uuid(const uint8_t *uuid, char *text) {
    char *end = text + sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++) end += sprintf(end, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
}

ABG_EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    for (unsigned i = 0; i < abg_get_machine()->device_count; i++) {
        char text[48];
        format_uuid(abg_get_machine()->devices[i].uuid, text);
        if (strcmp(text, uuid) == 0) return nvmlDeviceGetHandleByIndex_v2(i, handle);
    }
    return NVML_ERROR_NOT_FOUND;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **handle) {
    unsigned domain = 0, bus = 0;
    if (!sessions) return NVML_ERROR_UNINITIALIZED;
    if (sscanf(bus_id, "%x:%x:", &domain, &bus) != 2 || bus < 1) return NVML_ERROR_NOT_FOUND;
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle) == NVML_SUCCESS ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

/* ---- one card --------------------------------------------------------------------------------- */

ABG_EXPORT nvmlReturn_t nvmlDeviceGetName(void *handle, char *text, unsigned room) {
    NEEDS_CARD(handle)
    return give_text(text, room, card->name);
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetUUID(void *handle, char *text, unsigned room) {
    char uuid[48];
    NEEDS_CARD(handle)
    format_uuid(card->uuid, uuid);
    return give_text(text, room, uuid);
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetIndex(void *handle, unsigned *index) {
    NEEDS_CARD(handle)(void)card;
    *index = (unsigned)index_of(handle);
    return NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetMinorNumber(void *handle, unsigned *number) { return nvmlDeviceGetIndex(handle, number); }
ABG_EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    NEEDS_CARD(handle)
    *major = card->major;
    *minor = card->minor;
    return NVML_SUCCESS;
}

/* nvmlPciInfo_t: legacy id[16], domain, bus, device, device id, subsystem id, id[32]. */
ABG_EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(void *handle, void *info) {
    struct { char legacy[16]; unsigned domain, bus, device, device_id, subsystem; char id[32]; } pci;
    NEEDS_CARD(handle)(void)card;
    memset(&pci, 0, sizeof pci);
    pci.bus = (unsigned)index_of(handle) + 1;
    snprintf(pci.legacy, sizeof pci.legacy, "0000:%02X:00.0", pci.bus);
    snprintf(pci.id, sizeof pci.id, "00000000:%02X:00.0", pci.bus);
    memcpy(info, &pci, sizeof pci);
    return NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v2(void *handle, void *info) { return nvmlDeviceGetPciInfo_v3(handle, info); }

static void read_memory(const abg_device *card, int index, uint64_t *reserved, uint64_t *unused, uint64_t *used) {
    *reserved = card->nvml_total_bytes - card->cuda_total_bytes; /* what the driver keeps: CUDA never sees it */
    *used = abg_used_bytes(index);
    *unused = *used < card->cuda_total_bytes ? card->cuda_total_bytes - *used : 0;
}

/* nvmlMemory_t: total, free, used; `used` counts the driver's own part, as in the drivers since 510. */
ABG_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(void *handle, uint64_t *info) {
    uint64_t reserved, unused, used;
    NEEDS_CARD(handle)
    read_memory(card, index_of(handle), &reserved, &unused, &used);
    info[0] = card->nvml_total_bytes;
    info[1] = unused;
    info[2] = used + reserved;
    return NVML_SUCCESS;
}
/* nvmlMemory_v2_t: version (size and 2 << 24), total, reserved, free, used. */
ABG_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(void *handle, uint64_t *info) {
    uint64_t reserved, unused, used;
    NEEDS_CARD(handle)
    if ((uint32_t)info[0] != (40u | 2u << 24)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    read_memory(card, index_of(handle), &reserved, &unused, &used);
    info[1] = card->nvml_total_bytes;
    info[2] = reserved;
    info[3] = unused;
    info[4] = used;
    return NVML_SUCCESS;
}

/* nvmlProcessInfo_t (v2 and v3): pid, used bytes, GPU instance, compute instance; v1 has the first two. */
typedef struct { unsigned pid; uint64_t bytes; unsigned gpu_instance, compute_instance; } process_v2;
typedef struct { unsigned pid; uint64_t bytes; } process_v1;

static void put_process(void *list, unsigned position, int version, unsigned pid, uint64_t bytes) {
    if (version == 1) ((process_v1 *)list)[position] = (process_v1){pid, bytes};
    else ((process_v2 *)list)[position] = (process_v2){pid, bytes, 0xFFFFFFFFu, 0xFFFFFFFFu};
}

static nvmlReturn_t list_processes(const abg_device *card, int index, unsigned *count, void *list, int version) {
    abg_machine *machine = abg_get_machine();
    unsigned room = *count, found = 0;
    abg_used_bytes(index); /* drops the slots of processes that have ended */
    if (card->tenant_bytes && ++found <= room) put_process(list, found - 1, version, machine->owner_pid, card->tenant_bytes);
    for (int i = 0; i < ABG_MAX_PROCESSES; i++) {
        const abg_process *process = &machine->processes[i];
        if (!process->pid || !(process->has_context & (1u << index))) continue;
        if (++found <= room) put_process(list, found - 1, version, process->pid, process->bytes[index]);
    }
    *count = found;
    return found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *list) {
    NEEDS_CARD(handle)
    return list_processes(card, index_of(handle), count, list, 3);
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, void *list) {
    return nvmlDeviceGetComputeRunningProcesses_v3(handle, count, list);
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, void *list) {
    NEEDS_CARD(handle)
    return list_processes(card, index_of(handle), count, list, 1);
}
#define NO_PROCESSES(name)                                            \
    ABG_EXPORT nvmlReturn_t name(void *handle, unsigned *count, void *list) { \
        NEEDS_CARD(handle)(void)card, (void)list;                     \
        *count = 0;                                                   \
        return NVML_SUCCESS;                                          \
    }
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)

/* A card on which nothing runs in time: its clocks, heat and load are not there to be read. */
#define NOT_SUPPORTED(name) \
    ABG_EXPORT nvmlReturn_t name(void) { return sessions ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_UNINITIALIZED; }
NOT_SUPPORTED(nvmlDeviceGetUtilizationRates)
NOT_SUPPORTED(nvmlDeviceGetTemperature)
NOT_SUPPORTED(nvmlDeviceGetPowerUsage)
NOT_SUPPORTED(nvmlDeviceGetFanSpeed)
NOT_SUPPORTED(nvmlDeviceGetClockInfo)
NOT_SUPPORTED(nvmlDeviceGetTemperatureV)
NOT_SUPPORTED(nvmlDeviceGetMaxClockInfo)
NOT_SUPPORTED(nvmlDeviceGetPowerManagementLimit)
NOT_SUPPORTED(nvmlDeviceGetEnforcedPowerLimit)
NOT_SUPPORTED(nvmlDeviceGetTotalEnergyConsumption)
NOT_SUPPORTED(nvmlDeviceGetEncoderUtilization)
NOT_SUPPORTED(nvmlDeviceGetDecoderUtilization)
NOT_SUPPORTED(nvmlDeviceGetPerformanceState)
NOT_SUPPORTED(nvmlDeviceGetTotalEccErrors)
NOT_SUPPORTED(nvmlDeviceGetPcieThroughput)
NOT_SUPPORTED(nvmlDeviceGetDisplayActive)
NOT_SUPPORTED(nvmlDeviceGetDisplayMode)
NOT_SUPPORTED(nvmlDeviceGetDriverModel)
NOT_SUPPORTED(nvmlDeviceGetProcessUtilization)
NOT_SUPPORTED(nvmlDeviceGetMigMode)
NOT_SUPPORTED(nvmlDeviceGetNvLinkState)
NOT_SUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
NOT_SUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOT_SUPPORTED(nvmlDeviceGetP2PStatus)

/* nvmlGpuFabricInfoV_t: version, cluster uuid[16], status, clique, state; state 0 says that there is no fabric. */
ABG_EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(void *handle, unsigned *info) {
    NEEDS_CARD(handle)(void)card;
    memset(info + 1, 0, 16 + 3 * sizeof *info);
    return NVML_SUCCESS;
}

ABG_EXPORT nvmlReturn_t nvmlDeviceGetPersistenceMode(void *handle, int *mode) {
    NEEDS_CARD(handle)(void)card;
    *mode = 1;
    return NVML_SUCCESS;
}
ABG_EXPORT nvmlReturn_t nvmlDeviceGetComputeMode(void *handle, int *mode) {
    NEEDS_CARD(handle)(void)card;
    *mode = 0;
    return NVML_SUCCESS;
}
