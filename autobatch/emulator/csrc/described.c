/* See described.h. */
#define _GNU_SOURCE
#include "described.h"
#include "real.h"
#include "state.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

ABG_EXPORT int cuCtxGetDevice(int *ordinal);

/* Attributes and descriptors by cudnn_graph.h; those of device properties came with cuDNN 9.8. */
enum {
    ENGINEHEUR_OPERATION_GRAPH = 201,
    ENGINEHEUR_DEVICEPROP = 204,
    EXECUTION_PLAN_HANDLE = 400,
    EXECUTION_PLAN_ENGINE_CONFIG = 401,
    EXECUTION_PLAN_DEVICEPROP = 407,
    OPERATIONGRAPH_HANDLE = 800,
    ENGINE_OPERATION_GRAPH = 1300,
    ENGINE_DEVICEPROP = 1307,
    DEVICEPROP_DEVICE_ID = 2700,
    DEVICEPROP_HANDLE = 2701,
    DEVICEPROP_JSON = 2702,
    BACKEND_EXECUTION_PLAN = 5,
    BACKEND_DEVICEPROP = 38,
    TYPE_CHAR = 24,
};

static struct {
    cudnnStatus_t (*create)(int, void **);
    cudnnStatus_t (*destroy)(void *);
    cudnnStatus_t (*finalize)(void *);
    cudnnStatus_t (*set)(void *, int, int, int64_t, const void *);
    cudnnStatus_t (*get)(void *, int, int, int64_t, int64_t *, void *);
    const char *(*status)(cudnnStatus_t);
    void (*reason)(char *, size_t);
    size_t (*version)(void);
    int is_whole;
} real;
static pthread_once_t found = PTHREAD_ONCE_INIT;

/* Engines of the real library call the library's own interface, and by its names find ours (LD_PRELOAD): such calls go through
 * as they are. They also try calls of the driver that no emulated one has, and do without: the program is told nothing of it. */
static _Thread_local int depth;
static void enter(void) {
    if (depth++ == 0) abg_hold_notes(1);
}
static cudnnStatus_t leave(cudnnStatus_t status) {
    if (--depth == 0) abg_hold_notes(0);
    if (status != CUDNN_STATUS_SUCCESS) abg_forget_unsupported(); /* an earlier call that was refused is not the reason */
    return status;
}
#define REALLY(call) (enter(), leave(real.call))

static void find_real(void) {
    const char *choice = getenv("AUTOBATCH_EMULATED_WORKSPACES");
    if (choice && strcmp(choice, "0") == 0) return;
#define FIND(field, name) ((*(void **)&real.field = ABG_REAL(name, "libcudnn.so.9")) != NULL)
    real.is_whole = FIND(create, "cudnnBackendCreateDescriptor") && FIND(destroy, "cudnnBackendDestroyDescriptor") &&
                    FIND(finalize, "cudnnBackendFinalize") && FIND(set, "cudnnBackendSetAttribute") &&
                    FIND(get, "cudnnBackendGetAttribute") && FIND(status, "cudnnGetErrorString") &&
                    FIND(reason, "cudnnGetLastErrorString") && FIND(version, "cudnnGetVersion");
}

/* ---- cards ---------------------------------------------------------------------------------- */

/* A card as JSON. Which keys there are is cuDNN's choice; what a card does not say of itself is the same for all of compute
 * capability 7.0 and later (CUDA C++ Programming Guide, technical specifications), or, as clocks are, without influence. */
static int write_card(int ordinal, char *text, size_t room) {
    const abg_device *card = abg_device_at(ordinal);
    const abg_machine *machine = abg_get_machine();
    if (!card || !machine) return 0;
    int length = snprintf(
        text, room,
        "{\"deviceName\":\"%s\",\"deviceVer\":%d,\"driverVer\":%u,\"cudaDeviceId\":%d,\"pciDeviceId\":0,\"isTccDriver\":0,"
        "\"multiProcessorCount\":%d,\"smCountOrigin\":0,\"maxThreadsPerSM\":%d,\"maxCtasPerSM\":%d,\"maxRegistersPerSM\":65536,"
        "\"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":%d,\"reservedSharedMemoryPerBlock\":%d,"
        "\"oversizedSharedMemoryPerBlock\":0,\"warpSize\":32,\"maxThreadsPerBlock\":1024,\"regsPerBlock\":65536,"
        "\"maxBlockSize\":[1024,1024,64],\"maxGridSize\":[2147483647,65535,65535],\"supportCoopLaunch\":1,"
        "\"totalGlobalMem\":%llu,\"l2CacheSize\":%llu,\"smClockRateKHz\":1410000,\"memClockRateKHz\":1215000}",
        card->name, 100 * card->major + 10 * card->minor, machine->cuda_version, ordinal, card->sm_count, card->max_threads_per_sm,
        card->max_blocks_per_sm, card->shared_per_block_optin, card->major >= 8 ? 1024 : 0, (unsigned long long)card->cuda_total_bytes,
        (unsigned long long)card->l2_bytes);
    return length > 0 && (size_t)length < room ? length + 1 : 0;
}

static cudnnStatus_t set_card(void *properties, int ordinal) {
    char text[2048];
    int length = write_card(ordinal, text, sizeof text);
    return length ? REALLY(set(properties, DEVICEPROP_JSON, TYPE_CHAR, length, text)) : CUDNN_STATUS_BAD_PARAM;
}

/* 9.10 ends the process when it is asked about compute capability 10.0 (seen with 9.10.2; 9.19 and later answer). */
static int is_safe(int ordinal) {
    const abg_device *card = abg_device_at(ordinal);
    return card && (card->major != 10 || real.version() >= 91900);
}

/* Each card's description, made where it is first needed; one that the library refuses (before 9.8 it knows none) is not tried
 * again. Without a lock, which a fork could leave taken: of two threads that make one the second gives its own up. */
static _Atomic(void *) cards[ABG_MAX_DEVICES];
static char refused;

static void *card_at(int ordinal) {
    if (ordinal < 0 || ordinal >= ABG_MAX_DEVICES) return NULL;
    void *known = atomic_load(&cards[ordinal]);
    if (!known) {
        void *made = NULL, *expected = NULL;
        if (!is_safe(ordinal) || REALLY(create(BACKEND_DEVICEPROP, &made)) != CUDNN_STATUS_SUCCESS) made = NULL;
        if (made && (set_card(made, ordinal) != CUDNN_STATUS_SUCCESS || REALLY(finalize(made)) != CUDNN_STATUS_SUCCESS)) {
            REALLY(destroy(made));
            made = NULL;
        }
        known = made ? made : &refused;
        if (!atomic_compare_exchange_strong(&cards[ordinal], &expected, known)) {
            if (made) REALLY(destroy(made));
            known = expected;
        }
    }
    return known == &refused ? NULL : known;
}

static void *current_card(void) {
    int ordinal = 0;
    return cuCtxGetDevice(&ordinal) == 0 ? card_at(ordinal) : NULL;
}

/* The ordinal of a handle that an attribute is set to; -1 where it is none. */
static int ordinal_of(const void *values) {
    const abg_cudnn_handle *handle = values ? *(abg_cudnn_handle *const *)values : NULL;
    return handle ? handle->ordinal : -1;
}

int abg_described(void) {
    if (depth) return 1;
    pthread_once(&found, find_real);
    return real.is_whole && current_card() != NULL;
}

/* ---- plans ---------------------------------------------------------------------------------- */

/* A plan never runs, so it is never finalized: that would load and compile kernels, up to a second for each. What it would take
 * stands in its configuration. The caller holds ours; the library's own goes with it. */
static const char plan_mark;
typedef struct {
    const char *mark;
    void *itself;
    int64_t workspace;
    cudnnStatus_t state;
} plan;

static plan *as_plan(void *self) {
    plan *one = self;
    return !depth && one && one->mark == &plan_mark ? one : NULL; /* no descriptor of the library begins with this address */
}

static cudnnStatus_t make_plan(void **made) {
    plan *self = calloc(1, sizeof *self);
    if (!self) return CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
    cudnnStatus_t status = REALLY(create(BACKEND_EXECUTION_PLAN, &self->itself));
    if (status != CUDNN_STATUS_SUCCESS) return free(self), status;
    self->mark = &plan_mark;
    self->state = CUDNN_STATUS_BAD_PARAM; /* until it has a configuration */
    *made = self;
    return status;
}

/* ---- the interface -------------------------------------------------------------------------- */

cudnnStatus_t abg_described_create(int type, void **made) {
    return !depth && type == BACKEND_EXECUTION_PLAN ? make_plan(made) : REALLY(create(type, made));
}

cudnnStatus_t abg_described_destroy(void *self) {
    plan *one = as_plan(self);
    if (!one) return REALLY(destroy(self));
    cudnnStatus_t status = REALLY(destroy(one->itself));
    free(one);
    return status;
}

cudnnStatus_t abg_described_finalize(void *self) {
    plan *one = as_plan(self);
    return one ? one->state : REALLY(finalize(self));
}

static cudnnStatus_t configure(plan *self, int type, int64_t count, const void *values) {
    if (!values || count < 1) return CUDNN_STATUS_BAD_PARAM;
    cudnnStatus_t status = REALLY(set(self->itself, EXECUTION_PLAN_ENGINE_CONFIG, type, count, values));
    if (status != CUDNN_STATUS_SUCCESS) return status;
    void *configuration = *(void *const *)values;
    int64_t found = 0;
    self->state = REALLY(get(configuration, ENGINECFG_WORKSPACE_SIZE, TYPE_INT64, 1, &found, &self->workspace));
    return status;
}

/* Handles are ours, and the library never sees one: in its place stands the description of its card. */
cudnnStatus_t abg_described_set(void *self, int name, int type, int64_t count, const void *values) {
    if (depth) return real.set(self, name, type, count, values);
    plan *one = as_plan(self);
    if (one && name == EXECUTION_PLAN_ENGINE_CONFIG) return configure(one, type, count, values);
    if (one) self = one->itself;
    void *card = NULL;
    cudnnStatus_t status;
    switch (name) {
    case OPERATIONGRAPH_HANDLE: return CUDNN_STATUS_SUCCESS;
    case EXECUTION_PLAN_HANDLE:
        card = card_at(ordinal_of(values));
        return card ? REALLY(set(self, EXECUTION_PLAN_DEVICEPROP, TYPE_DESCRIPTOR, 1, &card)) : CUDNN_STATUS_BAD_PARAM;
    case DEVICEPROP_HANDLE: return set_card(self, ordinal_of(values));
    case DEVICEPROP_DEVICE_ID: return set_card(self, values ? *(const int32_t *)values : -1);
    case ENGINEHEUR_OPERATION_GRAPH:
    case ENGINE_OPERATION_GRAPH:
        status = REALLY(set(self, name, type, count, values));
        if (status != CUDNN_STATUS_SUCCESS) return status;
        card = current_card();
        if (!card) return CUDNN_STATUS_BAD_PARAM;
        return REALLY(set(self, name == ENGINE_OPERATION_GRAPH ? ENGINE_DEVICEPROP : ENGINEHEUR_DEVICEPROP, TYPE_DESCRIPTOR, 1, &card));
    default: return REALLY(set(self, name, type, count, values));
    }
}

cudnnStatus_t abg_described_get(void *self, int name, int type, int64_t wanted, int64_t *count, void *values) {
    plan *one = as_plan(self);
    if (one && name == EXECUTION_PLAN_WORKSPACE_SIZE) {
        if (count) *count = 1;
        if (values && wanted > 0) *(int64_t *)values = one->workspace;
        return CUDNN_STATUS_SUCCESS;
    }
    return REALLY(get(one ? one->itself : self, name, type, wanted, count, values));
}

const char *abg_described_status(cudnnStatus_t status) { return real.is_whole ? real.status(status) : NULL; }

int abg_described_reason(char *text, size_t room) {
    if (real.is_whole) real.reason(text, room);
    return real.is_whole;
}

/* For whoever asks from Python whether workspaces of this process are cuDNN's own: 1, or 0 where they count 0 bytes. */
ABG_EXPORT int abg_workspaces_are_known(void);
ABG_EXPORT int abg_workspaces_are_known(void) { return abg_described(); }
