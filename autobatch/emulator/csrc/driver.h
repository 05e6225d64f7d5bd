/* The part of the CUDA driver's interface that this emulation has, declared here so that no toolkit is
 * needed to build it. Numbers and signatures as in the CUDA 12 and 13 driver API references. */
#ifndef ABG_DRIVER_H
#define ABG_DRIVER_H

#include "state.h"

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_CONFIGURATION = 9, /* the runtime's */
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_CAPTURED_EVENT = 907,
};

enum { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_INVALIDATED = 2 };

/* Locks of the driver's parts, all of which are held around a fork. */
extern pthread_mutex_t abg_mapping_lock, abg_pinned_lock, abg_object_lock, abg_absent_lock;

/* The context of a device, which is named by its ordinal. */
void *abg_context_of(int ordinal);

ABG_EXPORT CUresult abg_result(int status); /* ABG_* to CUresult */
ABG_EXPORT int abg_current_ordinal(void);
ABG_EXPORT CUresult abg_set_current(int ordinal);
ABG_EXPORT CUresult abg_not_supported(const char *call);
ABG_EXPORT const char *abg_error_string(int error);
ABG_EXPORT const char *abg_error_name(int error);
ABG_EXPORT int abg_is_host_pinned(const void *pointer);
ABG_EXPORT uint64_t abg_capture_of(const void *stream);
ABG_EXPORT int abg_capture_status(const void *stream); /* CAPTURE_* */
ABG_EXPORT CUresult abg_begin_capture(void *stream);
ABG_EXPORT CUresult abg_end_capture(void *stream);
ABG_EXPORT CUresult abg_wait_for_stream(void *stream);
ABG_EXPORT CUresult abg_wait_for_event(void *event);
ABG_EXPORT CUresult abg_wait_for_device(void);
ABG_EXPORT CUresult abg_stream_priority(const void *stream, int *priority);

ABG_EXPORT CUresult cuInit(unsigned flags);
ABG_EXPORT CUresult cuDeviceGetCount(int *count);
ABG_EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device);
ABG_EXPORT CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device);
ABG_EXPORT CUresult cuDriverGetVersion(int *version);
ABG_EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status);
ABG_EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes);
ABG_EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer);
ABG_EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes);
ABG_EXPORT CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags);
ABG_EXPORT CUresult cuMemFreeHost(void *pointer);
ABG_EXPORT CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority);
ABG_EXPORT CUresult cuStreamDestroy_v2(void *stream);
ABG_EXPORT CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags);
ABG_EXPORT CUresult cuEventCreate(void **event, unsigned flags);
ABG_EXPORT CUresult cuEventDestroy_v2(void *event);
ABG_EXPORT CUresult cuEventRecord(void *event, void *stream);
ABG_EXPORT CUresult cuEventElapsedTime_v2(float *milliseconds, void *begin, void *end);

#endif
