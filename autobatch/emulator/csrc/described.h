/* The real cuDNN, asked about a card that is only described to it.
 *
 * From 9.8 on cuDNN chooses algorithms, and says what workspace each needs, for a card that is not there: a descriptor of
 * device properties stands where a handle would (cudnn_graph.h: CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION and the
 * attributes that take one). So what it answers about an emulated card is its own word on that model. Only running is ours. */
#ifndef ABG_DESCRIBED_H
#define ABG_DESCRIBED_H

#include <stddef.h>
#include <stdint.h>

/* Numbers of cudnn_graph.h that both sides use. */
enum {
    CUDNN_STATUS_SUCCESS = 0,
    CUDNN_STATUS_BAD_PARAM = 2000,
    CUDNN_STATUS_NOT_SUPPORTED = 3000,
    CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED = 4003,
    ENGINECFG_WORKSPACE_SIZE = 303,
    EXECUTION_PLAN_WORKSPACE_SIZE = 402,
    TYPE_INT64 = 3,
    TYPE_DESCRIPTOR = 15,
};

typedef int cudnnStatus_t;
typedef struct { void *stream; int ordinal; } abg_cudnn_handle;

/* Whether the real library answers for the current card; looked up at the first call for each card. Descriptors that are made
 * where it does are the library's; they stay so, whatever card is current later. */
int abg_described(void);
/* The interface of backend descriptors, as cudnn_graph.h has it. */
cudnnStatus_t abg_described_create(int type, void **made);
cudnnStatus_t abg_described_destroy(void *self);
cudnnStatus_t abg_described_finalize(void *self);
cudnnStatus_t abg_described_set(void *self, int name, int type, int64_t count, const void *values);
cudnnStatus_t abg_described_get(void *self, int name, int type, int64_t wanted, int64_t *count, void *values);
/* What the real library calls a status, and why it last failed in this thread; NULL and 0 where it is not asked. */
const char *abg_described_status(cudnnStatus_t status);
int abg_described_reason(char *text, size_t room);

#endif
