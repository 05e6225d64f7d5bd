/* cuDNN: plans that compute nothing.
 *
 * What algorithm it takes, and with what workspace, the real library says of the card that is described to it (described.h).
 * Where it does not (before 9.8), descriptors remember what they were told, and every plan asks for 0 bytes. */
#define _GNU_SOURCE
#include "described.h"
#include "real.h"
#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

ABG_EXPORT int cuCtxGetDevice(int *ordinal);

ABG_EXPORT size_t cudnnGetVersion(void) {
    size_t (*real)(void) = (size_t (*)(void))ABG_REAL("cudnnGetVersion", "libcudnn.so.9");
    return real ? real() : 0;
}
ABG_EXPORT size_t cudnnGetCudartVersion(void) {
    abg_machine *machine = abg_get_machine();
    return machine ? machine->cuda_version : 0;
}
ABG_EXPORT cudnnStatus_t cudnnGetProperty(int property, int *value) {
    cudnnStatus_t (*real)(int, int *) = (cudnnStatus_t (*)(int, int *))ABG_REAL("cudnnGetProperty", "libcudnn.so.9");
    return real ? real(property, value) : CUDNN_STATUS_NOT_SUPPORTED;
}
ABG_EXPORT const char *cudnnGetErrorString(cudnnStatus_t status) {
    static _Thread_local char text[200];
    if (status == CUDNN_STATUS_SUCCESS) return "CUDNN_STATUS_SUCCESS";
    if (status == CUDNN_STATUS_BAD_PARAM) return "CUDNN_STATUS_BAD_PARAM";
    const char *reason = status == CUDNN_STATUS_NOT_SUPPORTED ? abg_unsupported_text() : NULL;
    if (!reason && abg_described_status(status)) return abg_described_status(status);
    if (!reason) return status == CUDNN_STATUS_NOT_SUPPORTED ? "CUDNN_STATUS_NOT_SUPPORTED" : "CUDNN_STATUS_INTERNAL_ERROR";
    snprintf(text, sizeof text, "CUDNN_STATUS_NOT_SUPPORTED: %s", reason);
    return text;
}
ABG_EXPORT void cudnnGetLastErrorString(char *text, size_t room) {
    const char *reason = abg_unsupported_text();
    if (!reason && abg_described_reason(text, room)) return;
    if (room) snprintf(text, room, "%s", reason ? reason : "");
}
ABG_EXPORT cudnnStatus_t cudnnCreate(void **made) {
    abg_cudnn_handle *self = calloc(1, sizeof *self);
    if (self) cuCtxGetDevice(&self->ordinal);
    *made = self;
    return self ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
}
ABG_EXPORT cudnnStatus_t cudnnDestroy(void *self) { return free(self), CUDNN_STATUS_SUCCESS; }
ABG_EXPORT cudnnStatus_t cudnnSetStream(void *self, void *stream) { return ((abg_cudnn_handle *)self)->stream = stream, CUDNN_STATUS_SUCCESS; }
ABG_EXPORT cudnnStatus_t cudnnGetStream(void *self, void **stream) { return *stream = ((abg_cudnn_handle *)self)->stream, CUDNN_STATUS_SUCCESS; }

/* ---- the graph interface ------------------------------------------------------------------- */

typedef struct attribute {
    struct attribute *next;
    int name;
    int type;
    int64_t count;
    unsigned char *values;
} attribute;

typedef struct {
    const char *mark;
    int type;
    attribute *attributes;
} descriptor;

/* Ours where it begins with this address, which no descriptor of the library does; else the library's own. */
static const char descriptor_mark;
static int is_ours(const void *pointer) { return !pointer || ((const descriptor *)pointer)->mark == &descriptor_mark; }

/* Bytes of one element by cudnnBackendAttributeType_t; pointers and enumerations by what they are. */
static size_t element_bytes(int type) {
    switch (type) {
    case 0: return sizeof(void *);          /* handle */
    case 2: case 24: return 1;              /* bool, char */
    case 3: case 5: case 6: case 15: return 8; /* int64, double, void pointer, descriptor */
    case 26: return 16;                     /* fraction: two int64 */
    default: return 4;                      /* enumerations, float, int32 */
    }
}

ABG_EXPORT cudnnStatus_t cudnnBackendCreateDescriptor(int type, void **made) {
    if (abg_described()) return abg_described_create(type, made);
    descriptor *self = calloc(1, sizeof *self);
    if (!self) return CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
    self->mark = &descriptor_mark;
    self->type = type;
    *made = self;
    return CUDNN_STATUS_SUCCESS;
}
ABG_EXPORT cudnnStatus_t cudnnBackendDestroyDescriptor(void *pointer) {
    if (!is_ours(pointer)) return abg_described_destroy(pointer);
    descriptor *self = pointer;
    if (!self) return CUDNN_STATUS_SUCCESS;
    for (attribute *entry = self->attributes; entry;) {
        attribute *next = entry->next;
        free(entry->values);
        free(entry);
        entry = next;
    }
    free(self);
    return CUDNN_STATUS_SUCCESS;
}
ABG_EXPORT cudnnStatus_t cudnnBackendInitialize(void *pointer) { return (void)pointer, CUDNN_STATUS_SUCCESS; }
ABG_EXPORT cudnnStatus_t cudnnBackendFinalize(void *pointer) { return is_ours(pointer) ? CUDNN_STATUS_SUCCESS : abg_described_finalize(pointer); }

ABG_EXPORT cudnnStatus_t cudnnBackendSetAttribute(void *pointer, int name, int type, int64_t count, const void *values) {
    if (!is_ours(pointer)) return abg_described_set(pointer, name, type, count, values);
    descriptor *self = pointer;
    if (!self || !values || count < 0) return CUDNN_STATUS_BAD_PARAM;
    attribute *entry = self->attributes;
    while (entry && entry->name != name) entry = entry->next;
    if (!entry) {
        entry = calloc(1, sizeof *entry);
        if (!entry) return CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
        entry->name = name;
        entry->next = self->attributes;
        self->attributes = entry;
    }
    size_t bytes = (size_t)count * element_bytes(type);
    unsigned char *copy = malloc(bytes ? bytes : 1);
    if (!copy) return CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
    memcpy(copy, values, bytes);
    free(entry->values);
    entry->type = type;
    entry->count = count;
    entry->values = copy;
    return CUDNN_STATUS_SUCCESS;
}

enum { ENGINEHEUR_RESULTS = 202, ENGINECFG_SHARED_MEMORY_USED = 304, OPERATIONGRAPH_ENGINE_GLOBAL_COUNT = 802, ENGINE_GLOBAL_INDEX = 1301 };

static cudnnStatus_t answer_int32(int64_t wanted, int64_t *count, void *values, int32_t value) {
    if (count) *count = 1;
    if (values && wanted > 0) *(int32_t *)values = value;
    return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t answer_int64(int64_t wanted, int64_t *count, void *values, int64_t value) {
    if (count) *count = 1;
    if (values && wanted > 0) *(int64_t *)values = value;
    return CUDNN_STATUS_SUCCESS;
}

/* What was set is given back; of what cuDNN works out itself there is one engine, one configuration, no workspace and no note. */
ABG_EXPORT cudnnStatus_t cudnnBackendGetAttribute(void *pointer, int name, int type, int64_t wanted, int64_t *count, void *values) {
    if (!is_ours(pointer)) return abg_described_get(pointer, name, type, wanted, count, values);
    descriptor *self = pointer;
    if (!self) return CUDNN_STATUS_BAD_PARAM;
    for (attribute *entry = self->attributes; entry; entry = entry->next) {
        if (entry->name != name) continue;
        int64_t given = wanted < entry->count ? wanted : entry->count;
        if (count) *count = wanted > 0 ? given : entry->count;
        if (values && type != TYPE_DESCRIPTOR) memcpy(values, entry->values, (size_t)given * element_bytes(type));
        return CUDNN_STATUS_SUCCESS;
    }
    switch (name) {
    case ENGINEHEUR_RESULTS:
        if (count) *count = 1; /* the caller's own first descriptor stands for it */
        return CUDNN_STATUS_SUCCESS;
    case EXECUTION_PLAN_WORKSPACE_SIZE: case ENGINECFG_WORKSPACE_SIZE: return answer_int64(wanted, count, values, 0);
    case ENGINECFG_SHARED_MEMORY_USED: return answer_int32(wanted, count, values, 0); /* any: no kernel runs */
    case OPERATIONGRAPH_ENGINE_GLOBAL_COUNT: return answer_int64(wanted, count, values, 1);
    case ENGINE_GLOBAL_INDEX: return answer_int64(wanted, count, values, 0);
    default: break;
    }
    if (count) *count = type == TYPE_DESCRIPTOR && wanted > 0 ? 1 : 0;
    if (values && type == TYPE_INT64 && wanted > 0) *(int64_t *)values = 0;
    return CUDNN_STATUS_SUCCESS;
}

ABG_EXPORT cudnnStatus_t cudnnBackendExecute(void *self, void *plan, void *variants) {
    (void)self, (void)plan, (void)variants;
    abg_kernel_ran();
    return CUDNN_STATUS_SUCCESS;
}

/* ---- the older interface: what batch normalisation uses ---------------------------------------- */

#define MAKES(name)                                                                                            \
    ABG_EXPORT cudnnStatus_t name(void **made) {                                                               \
        *made = calloc(1, 256);                                                                                \
        return *made ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;                \
    }
#define ENDS(name) \
    ABG_EXPORT cudnnStatus_t name(void *self) { return free(self), CUDNN_STATUS_SUCCESS; }
#define NOTES(name) \
    ABG_EXPORT cudnnStatus_t name(void) { return CUDNN_STATUS_SUCCESS; }
#define COMPUTES(name) \
    ABG_EXPORT cudnnStatus_t name(void) { return abg_kernel_ran(), CUDNN_STATUS_SUCCESS; }

MAKES(cudnnCreateTensorDescriptor)
ENDS(cudnnDestroyTensorDescriptor)
NOTES(cudnnSetTensorNdDescriptor)
MAKES(cudnnCreateFilterDescriptor)
ENDS(cudnnDestroyFilterDescriptor)
NOTES(cudnnSetFilterNdDescriptor)
MAKES(cudnnCreateConvolutionDescriptor)
ENDS(cudnnDestroyConvolutionDescriptor)
NOTES(cudnnSetConvolutionNdDescriptor)
NOTES(cudnnSetConvolutionGroupCount)
NOTES(cudnnSetConvolutionMathType)
MAKES(cudnnCreateActivationDescriptor)
ENDS(cudnnDestroyActivationDescriptor)
NOTES(cudnnSetActivationDescriptor)
COMPUTES(cudnnBatchNormalizationForwardTrainingEx)
COMPUTES(cudnnBatchNormalizationForwardInference)
COMPUTES(cudnnBatchNormalizationBackwardEx)

ABG_EXPORT cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *self, int mode, int operation, void *x, void *z, void *y, void *scale,
                                                                                  void *activation, size_t *bytes) {
    (void)self, (void)mode, (void)operation, (void)x, (void)z, (void)y, (void)scale, (void)activation;
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}
ABG_EXPORT cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *self, int mode, int operation, void *x, void *y, void *dy, void *dz, void *dx,
                                                                           void *scale, void *activation, size_t *bytes) {
    (void)self, (void)mode, (void)operation, (void)x, (void)y, (void)dy, (void)dz, (void)dx, (void)scale, (void)activation;
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}
ABG_EXPORT cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *self, int mode, int operation, void *activation, void *x, size_t *bytes) {
    (void)self, (void)mode, (void)operation, (void)activation, (void)x;
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}
