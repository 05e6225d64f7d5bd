/* The driver's streams, events and captures: marks without work between them. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

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
pthread_mutex_t abg_object_lock = PTHREAD_MUTEX_INITIALIZER; /* also of the captures */

#define MOST_CAPTURES 64
static struct { uint64_t id; int is_invalid; } captures[MOST_CAPTURES]; /* those under way */
static uint64_t next_capture = 1;

static object *make_object(uint32_t mark) {
    pthread_mutex_lock(&abg_object_lock);
    object *made = free_objects;
    if (made) free_objects = made->next_free;
    pthread_mutex_unlock(&abg_object_lock);
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
    pthread_mutex_lock(&abg_object_lock);
    if (gone->is_origin) end_capture_locked(gone);
    gone->mark = 0;
    gone->next_free = free_objects;
    free_objects = gone;
    pthread_mutex_unlock(&abg_object_lock);
    return CUDA_SUCCESS;
}

uint64_t abg_capture_of(const void *handle) {
    const object *stream = stream_of(handle);
    if (!stream) return 0;
    pthread_mutex_lock(&abg_object_lock);
    uint64_t id = capture_slot(stream->capture_id) < 0 ? 0 : stream->capture_id;
    pthread_mutex_unlock(&abg_object_lock);
    return id;
}

int abg_capture_status(const void *handle) {
    uint64_t id = abg_capture_of(handle);
    pthread_mutex_lock(&abg_object_lock);
    int i = capture_slot(id), status = i < 0 ? CAPTURE_NONE : captures[i].is_invalid ? CAPTURE_INVALIDATED : CAPTURE_ACTIVE;
    pthread_mutex_unlock(&abg_object_lock);
    return status;
}

/* What is not allowed in a capture spoils it. */
static CUresult refuse_in_capture(uint64_t id, CUresult error) {
    pthread_mutex_lock(&abg_object_lock);
    int i = capture_slot(id);
    if (i >= 0) captures[i].is_invalid = 1;
    pthread_mutex_unlock(&abg_object_lock);
    return i < 0 ? CUDA_SUCCESS : error;
}

CUresult abg_begin_capture(void *handle) {
    object *stream = stream_of(handle);
    if (!stream) return is_default_stream(handle) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_ERROR_INVALID_HANDLE;
    CUresult result = CUDA_ERROR_ILLEGAL_STATE;
    pthread_mutex_lock(&abg_object_lock);
    for (int i = 0; i < MOST_CAPTURES && capture_slot(stream->capture_id) < 0; i++) {
        if (captures[i].id) continue;
        captures[i].id = stream->capture_id = next_capture++;
        captures[i].is_invalid = 0;
        stream->is_origin = 1;
        result = CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&abg_object_lock);
    return result;
}

CUresult abg_end_capture(void *handle) {
    object *stream = stream_of(handle);
    if (!abg_capture_of(handle)) return CUDA_ERROR_ILLEGAL_STATE;
    if (!stream->is_origin) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    pthread_mutex_lock(&abg_object_lock);
    int is_invalid = end_capture_locked(stream);
    pthread_mutex_unlock(&abg_object_lock);
    return is_invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    (void)flags;
    CUresult result = abg_result(abg_ensure_context(abg_current_ordinal()));
    if (result != CUDA_SUCCESS) return result;
    object *made = make_object(STREAM_MARK);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    made->ordinal = abg_current_ordinal();
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
    *context = abg_context_of(self ? self->ordinal : abg_current_ordinal());
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
    (void)flags;
    object *stream = stream_of(handle);
    const object *event = event_of(event_handle);
    if (!event || (!stream && !is_default_stream(handle))) return CUDA_ERROR_INVALID_HANDLE;
    /* Work that waits for captured work is captured with it. */
    pthread_mutex_lock(&abg_object_lock);
    if (stream && !stream->is_origin && capture_slot(event->capture_id) >= 0) stream->capture_id = event->capture_id;
    pthread_mutex_unlock(&abg_object_lock);
    return CUDA_SUCCESS;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

CUresult cuEventCreate(void **event, unsigned flags) {
    CUresult result = abg_result(abg_ensure_context(abg_current_ordinal()));
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
