/* The CUDA runtime: the names that torch's libraries import from libcudart, each a thin layer over the
 * driver. Loaded before the real one, so that these are the ones found. Layouts of CUDA 12 and 13. */
#include "driver.h"
#include "fatbin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int cudaError_t;
typedef struct { unsigned x, y, z; } dim3;

static _Thread_local cudaError_t last_error;

/* Not ready is an answer, not an error. */
static cudaError_t done(CUresult result) {
    if (result != CUDA_SUCCESS && result != CUDA_ERROR_NOT_READY) last_error = result;
    return result;
}

ABG_EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = CUDA_SUCCESS;
    return error;
}
ABG_EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
ABG_EXPORT const char *cudaGetErrorString(cudaError_t error) { return abg_error_string(error); }
ABG_EXPORT const char *cudaGetErrorName(cudaError_t error) { return abg_error_name(error); }

/* ---- devices ------------------------------------------------------------------------------ */

ABG_EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    *count = abg_visible_count();
    return *count ? CUDA_SUCCESS : done(CUDA_ERROR_NO_DEVICE);
}
ABG_EXPORT cudaError_t cudaGetDevice(int *ordinal) {
    *ordinal = abg_current_ordinal();
    return CUDA_SUCCESS;
}
/* As the runtime since CUDA 12: the device's context is made here. */
ABG_EXPORT cudaError_t cudaSetDevice(int ordinal) {
    CUresult result = abg_set_current(ordinal);
    return done(result == CUDA_SUCCESS ? abg_result(abg_ensure_context(ordinal)) : result);
}
ABG_EXPORT cudaError_t cudaDeviceSynchronize(void) { return done(abg_wait_for_device()); }
ABG_EXPORT cudaError_t cudaDeviceReset(void) { return done(abg_not_supported("cudaDeviceReset")); }
ABG_EXPORT cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int ordinal) { return done(cuDeviceGetAttribute(value, attribute, ordinal)); }
ABG_EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int ordinal) { return done(cuDeviceGetPCIBusId(text, length, ordinal)); }
ABG_EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int ordinal, int peer) {
    *can = ordinal != peer && abg_device_at(ordinal) && abg_device_at(peer);
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    (void)flags;
    return done(abg_device_at(peer) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}
ABG_EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaDriverGetVersion(int *version) { return cuDriverGetVersion(version); }
ABG_EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return cuDriverGetVersion(version); }
ABG_EXPORT cudaError_t cudaProfilerStart(void) { return CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaProfilerStop(void) { return CUDA_SUCCESS; }

/* Where the fields of cudaDeviceProp lie, in bytes: CUDA 12 (read off 12.8's header) and CUDA 13 (13.0's), which
 * dropped the clocks and two flags from the middle of it. */
typedef struct {
    int multiprocessors, concurrent, pci_bus, pci_device, pci_domain, copy_engines, unified, bus_bits, l2, persisting_l2, threads_per_sm,
        priorities, l1_global, l1_local, shared_per_sm, registers_per_sm, managed, preemption, cooperative, shared_optin, blocks_per_sm,
        reserved_shared, host_register, clusters, can_map, size;
} property_layout;

static const property_layout cuda12_layout = {388, 576, 584, 588, 592, 600, 604, 612, 616, 620, 624, 628, 632,
                                              636, 640, 648, 652, 680, 688, 696, 712, 720, 728, 772, 400, 1032};
static const property_layout cuda13_layout = {384, 560, 568, 572, 576, 584, 588, 592, 596, 600, 604, 608, 612,
                                              616, 624, 632, 636, 660, 668, 672, 688, 696, 704, 748, 392, 1008};

static void put_int(char *properties, int offset, int value) { memcpy(properties + offset, &value, sizeof value); }
static void put_size(char *properties, int offset, size_t value) { memcpy(properties + offset, &value, sizeof value); }

static cudaError_t fill_properties(char *p, int ordinal, const property_layout *at) {
    const abg_device *card = abg_device_at(ordinal);
    if (!card) return done(CUDA_ERROR_INVALID_DEVICE);
    memset(p, 0, (size_t)at->size);
    memcpy(p, card->name, sizeof card->name); /* the first fields lie alike in both */
    memcpy(p + 256, card->uuid, sizeof card->uuid);
    put_size(p, 288, card->cuda_total_bytes);
    put_size(p, 296, 49152);
    put_int(p, 304, 65536);
    put_int(p, 308, 32);
    put_size(p, 312, 2147483647);
    put_int(p, 320, 1024);
    static const int block[3] = {1024, 1024, 64}, grid[3] = {2147483647, 65535, 65535};
    memcpy(p + 324, block, sizeof block);
    memcpy(p + 336, grid, sizeof grid);
    put_size(p, 352, 65536);
    put_int(p, 360, card->major);
    put_int(p, 364, card->minor);
    put_size(p, 368, 512);
    put_size(p, 376, 32);
    put_int(p, at->multiprocessors, card->sm_count);
    put_int(p, at->can_map, 1);
    put_int(p, at->concurrent, 1);
    put_int(p, at->pci_bus, abg_visible_device(ordinal) + 1);
    put_int(p, at->copy_engines, 3);
    put_int(p, at->unified, 1);
    put_int(p, at->bus_bits, card->memory_bus_bits);
    put_int(p, at->l2, (int)card->l2_bytes);
    put_int(p, at->persisting_l2, (int)(card->l2_bytes / 4 * 3));
    put_int(p, at->threads_per_sm, card->max_threads_per_sm);
    put_int(p, at->priorities, 1);
    put_int(p, at->l1_global, 1);
    put_int(p, at->l1_local, 1);
    put_size(p, at->shared_per_sm, (size_t)card->shared_per_sm);
    put_int(p, at->registers_per_sm, 65536);
    put_int(p, at->managed, 1);
    put_int(p, at->preemption, 1);
    put_int(p, at->cooperative, 1);
    put_size(p, at->shared_optin, (size_t)card->shared_per_block_optin);
    put_int(p, at->blocks_per_sm, card->max_blocks_per_sm);
    put_size(p, at->reserved_shared, card->major >= 8 ? 1024 : 0);
    put_int(p, at->host_register, 1);
    put_int(p, at->clusters, card->major >= 9);
    return CUDA_SUCCESS;
}

ABG_EXPORT cudaError_t cudaGetDeviceProperties(void *properties, int ordinal) { return fill_properties(properties, ordinal, &cuda13_layout); }
ABG_EXPORT cudaError_t cudaGetDeviceProperties_v2(void *properties, int ordinal) { return fill_properties(properties, ordinal, &cuda12_layout); }

/* ---- memory ------------------------------------------------------------------------------- */

ABG_EXPORT cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    CUdeviceptr address = 0;
    if (!bytes) return *pointer = NULL, CUDA_SUCCESS;
    cudaError_t error = done(cuMemAlloc_v2(&address, bytes));
    if (error == CUDA_SUCCESS) *pointer = (void *)(uintptr_t)address;
    return error;
}
ABG_EXPORT cudaError_t cudaFree(void *pointer) {
    if (!pointer) return done(abg_result(abg_ensure_context(abg_current_ordinal()))); /* the idiom that makes a context */
    return done(cuMemFree_v2((CUdeviceptr)(uintptr_t)pointer));
}
ABG_EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) { return done(cuMemGetInfo_v2(free_bytes, total_bytes)); }
ABG_EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return done(cuMemHostAlloc(pointer, bytes, flags)); }
ABG_EXPORT cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return done(cuMemHostAlloc(pointer, bytes, 0)); }
ABG_EXPORT cudaError_t cudaFreeHost(void *pointer) { return done(cuMemFreeHost(pointer)); }
extern CUresult cuMemHostRegister_v2(void *pointer, size_t bytes, unsigned flags);
extern CUresult cuMemHostUnregister(void *pointer);
ABG_EXPORT cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) { return done(cuMemHostRegister_v2(pointer, bytes, flags)); }
ABG_EXPORT cudaError_t cudaHostUnregister(void *pointer) { return done(cuMemHostUnregister(pointer)); }

/* The direction is read off the addresses: `cudaMemcpyDefault` says nothing, and the others say the same. */
static cudaError_t copy(void *to, const void *from, size_t bytes) {
    int device_to = abg_is_device_address((uint64_t)(uintptr_t)to), device_from = abg_is_device_address((uint64_t)(uintptr_t)from);
    if (device_to && device_from) abg_copy_device((uint64_t)(uintptr_t)to, (uint64_t)(uintptr_t)from, bytes);
    else if (device_to) abg_write_device((uint64_t)(uintptr_t)to, from, bytes);
    else if (device_from) abg_read_device((uint64_t)(uintptr_t)from, to, bytes);
    else memmove(to, from, bytes);
    return CUDA_SUCCESS;
}

ABG_EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return (void)kind, copy(to, from, bytes); }
ABG_EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    (void)kind, (void)stream;
    return copy(to, from, bytes);
}
ABG_EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, void *stream) {
    (void)to_device, (void)from_device, (void)stream;
    return copy(to, from, bytes);
}
ABG_EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind,
                                         void *stream) {
    (void)kind, (void)stream;
    for (size_t row = 0; row < height; row++) copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
    (void)value;
    abg_forget_device((uint64_t)(uintptr_t)pointer, bytes);
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, void *stream) { return (void)stream, cudaMemset(pointer, value, bytes); }
/* Symbols are the device's own variables; kernels do not read them. */
ABG_EXPORT cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, int kind) {
    (void)symbol, (void)from, (void)bytes, (void)offset, (void)kind;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    (void)symbol;
    static uint64_t address[ABG_MAX_DEVICES]; /* one small piece stands for all symbols of a device */
    int ordinal = abg_current_ordinal();
    cudaError_t error = address[ordinal] ? CUDA_SUCCESS : done(abg_result(abg_alloc(ordinal, 4096, &address[ordinal])));
    *pointer = (void *)(uintptr_t)address[ordinal];
    return error;
}

/* cudaPointerAttributes: type (0 unregistered, 1 host, 2 device), device, device pointer, host pointer. CUDA 13 adds room behind them. */
ABG_EXPORT cudaError_t cudaPointerGetAttributes(void *attributes, const void *pointer) {
    struct { int type, device; const void *device_pointer, *host_pointer; } found = {0, -2, NULL, NULL};
    int ordinal = abg_address_device((uint64_t)(uintptr_t)pointer, NULL, NULL);
    if (ordinal >= 0) {
        found.type = 2;
        found.device = ordinal;
        found.device_pointer = pointer;
    } else if (abg_is_host_pinned(pointer)) {
        found.type = 1;
        found.device = 0;
        found.device_pointer = found.host_pointer = pointer;
    } else {
        found.host_pointer = pointer;
    }
    memcpy(attributes, &found, sizeof found);
    return CUDA_SUCCESS;
}

/* ---- streams and events -------------------------------------------------------------------- */

ABG_EXPORT cudaError_t cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return done(cuStreamCreateWithPriority(stream, flags, priority)); }
ABG_EXPORT cudaError_t cudaStreamCreateWithFlags(void **stream, unsigned flags) { return done(cuStreamCreateWithPriority(stream, flags, 0)); }
ABG_EXPORT cudaError_t cudaStreamCreate(void **stream) { return done(cuStreamCreateWithPriority(stream, 0, 0)); }
ABG_EXPORT cudaError_t cudaStreamDestroy(void *stream) { return done(cuStreamDestroy_v2(stream)); }
ABG_EXPORT cudaError_t cudaStreamSynchronize(void *stream) { return done(abg_wait_for_stream(stream)); }
ABG_EXPORT cudaError_t cudaStreamQuery(void *stream) { return done(abg_wait_for_stream(stream)); }
ABG_EXPORT cudaError_t cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return done(cuStreamWaitEvent(stream, event, flags)); }
ABG_EXPORT cudaError_t cudaStreamGetPriority(void *stream, int *priority) { return done(abg_stream_priority(stream, priority)); }
typedef void (*stream_callback)(void *stream, cudaError_t status, void *data);
ABG_EXPORT cudaError_t cudaStreamAddCallback(void *stream, stream_callback callback, void *data, unsigned flags) {
    (void)flags;
    callback(stream, CUDA_SUCCESS, data); /* all work before it is done */
    return CUDA_SUCCESS;
}
typedef void (*host_function)(void *data);
ABG_EXPORT cudaError_t cudaLaunchHostFunc(void *stream, host_function function, void *data) {
    if (!abg_capture_of(stream)) function(data);
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaEventCreateWithFlags(void **event, unsigned flags) { return done(cuEventCreate(event, flags)); }
ABG_EXPORT cudaError_t cudaEventCreate(void **event) { return done(cuEventCreate(event, 0)); }
ABG_EXPORT cudaError_t cudaEventDestroy(void *event) { return done(cuEventDestroy_v2(event)); }
ABG_EXPORT cudaError_t cudaEventRecord(void *event, void *stream) { return done(cuEventRecord(event, stream)); }
ABG_EXPORT cudaError_t cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return (void)flags, done(cuEventRecord(event, stream)); }
ABG_EXPORT cudaError_t cudaEventQuery(void *event) { return done(abg_wait_for_event(event)); }
ABG_EXPORT cudaError_t cudaEventSynchronize(void *event) { return done(abg_wait_for_event(event)); }
ABG_EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, void *begin, void *end) { return done(cuEventElapsedTime_v2(milliseconds, begin, end)); }

/* ---- graphs: captured work is nothing, and so is its replay ----------------------------------- */

ABG_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(int *mode) {
    static _Thread_local int current;
    int before = current;
    current = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaStreamIsCapturing(void *stream, int *status) {
    *status = abg_capture_status(stream);
    return CUDA_SUCCESS;
}
static cudaError_t capture_info(void *stream, int *status, unsigned long long *id, void **graph, const void **dependencies, const void **edges,
                                size_t *count) {
    uint64_t capture = abg_capture_of(stream);
    *status = abg_capture_status(stream);
    if (!capture) return CUDA_SUCCESS;
    if (id) *id = capture;
    if (graph) *graph = stream;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, const void **dependencies,
                                                const void **edges, size_t *count) {
    return capture_info(stream, status, id, graph, dependencies, edges, count);
}
ABG_EXPORT cudaError_t cudaStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id, void **graph, const void **dependencies,
                                                   size_t *count) {
    return capture_info(stream, status, id, graph, dependencies, NULL, count);
}
ABG_EXPORT cudaError_t cudaStreamBeginCapture(void *stream, int mode) {
    (void)mode;
    return done(abg_begin_capture(stream));
}
ABG_EXPORT cudaError_t cudaStreamEndCapture(void *stream, void **graph) {
    CUresult result = abg_end_capture(stream);
    *graph = NULL;
    if (result != CUDA_SUCCESS) return done(result);
    *graph = malloc(16);
    return *graph ? CUDA_SUCCESS : done(CUDA_ERROR_OUT_OF_MEMORY);
}
ABG_EXPORT cudaError_t cudaStreamUpdateCaptureDependencies(void *stream, void **dependencies, const void *edges, size_t count, unsigned flags) {
    (void)stream, (void)dependencies, (void)edges, (void)count, (void)flags;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    (void)graph, (void)flags;
    *executable = malloc(16);
    return *executable ? CUDA_SUCCESS : done(CUDA_ERROR_OUT_OF_MEMORY);
}
ABG_EXPORT cudaError_t cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) { return cudaGraphInstantiate(executable, graph, flags); }
ABG_EXPORT cudaError_t cudaGraphLaunch(void *executable, void *stream) { return (void)executable, (void)stream, abg_kernel_ran(), CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaGraphDestroy(void *graph) { return free(graph), CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaGraphExecDestroy(void *executable) { return free(executable), CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
    (void)graph, (void)nodes;
    *count = 1; /* not empty, of which torch would warn */
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaUserObjectCreate(void **object, void *data, host_function destroy, unsigned count, unsigned flags) {
    (void)data, (void)destroy, (void)count, (void)flags;
    *object = (void *)1;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaUserObjectRelease(void *object, unsigned count) { return (void)object, (void)count, CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaGraphRetainUserObject(void *graph, void *object, unsigned count, unsigned flags) {
    (void)graph, (void)object, (void)count, (void)flags;
    return CUDA_SUCCESS;
}

/* ---- kernels ------------------------------------------------------------------------------ */
/* Registration gives the host's stub of each kernel to the runtime; a launch then needs no more than its own call. */

ABG_EXPORT void **__cudaRegisterFatBinary(void *binary) { return abg_register_fatbin(binary); }
ABG_EXPORT void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
ABG_EXPORT void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
ABG_EXPORT void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
    (void)device, (void)name, (void)limit, (void)a, (void)b, (void)c, (void)d, (void)e;
    abg_register_kernel(handle, host);
}
ABG_EXPORT void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int is_extern, size_t bytes, int constant, int global) {
    (void)handle, (void)host, (void)device, (void)name, (void)is_extern, (void)bytes, (void)constant, (void)global;
}
ABG_EXPORT char __cudaInitModule(void **handle) { return (void)handle, 1; }

typedef struct { dim3 grid, block; size_t shared; void *stream; } launch_configuration;
static _Thread_local launch_configuration configurations[16];
static _Thread_local unsigned configuration_depth;

ABG_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    if (configuration_depth == 16) return 1;
    configurations[configuration_depth++] = (launch_configuration){grid, block, shared, stream};
    return 0;
}
ABG_EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!configuration_depth) return CUDA_ERROR_INVALID_VALUE;
    launch_configuration *top = &configurations[--configuration_depth];
    *grid = top->grid;
    *block = top->block;
    *shared = top->shared;
    *(void **)stream = top->stream;
    return CUDA_SUCCESS;
}

/* A launch computes nothing, but what the card would refuse is refused here too (CUDA: "invalid configuration argument"). */
static cudaError_t launch(const void *function, dim3 grid, dim3 block) {
    abg_kernel_ran();
    unsigned long long threads = (unsigned long long)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return done(CUDA_ERROR_INVALID_CONFIGURATION);
    const abg_device *card = abg_device_at(abg_current_ordinal());
    if (card && !abg_chosen_architecture(function, card->major, card->minor)) return done(CUDA_ERROR_NO_BINARY_FOR_GPU);
    return done(abg_result(abg_ensure_context(abg_current_ordinal())));
}
ABG_EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    (void)arguments, (void)shared, (void)stream;
    return launch(function, grid, block);
}
ABG_EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    (void)arguments, (void)shared, (void)stream;
    return launch(function, grid, block);
}
ABG_EXPORT cudaError_t cudaLaunchKernelExC(const void *configuration, const void *function, void **arguments) {
    (void)arguments;
    const dim3 *shape = configuration; /* cudaLaunchConfig_t begins with grid and block */
    return launch(function, shape[0], shape[1]);
}
ABG_EXPORT cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)(uintptr_t)function;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    (void)arguments, (void)shared, (void)stream;
    return launch(kernel, grid, block);
}
/* cudaFuncAttributes: shared, constant and local bytes; threads per block, registers, PTX and binary version, cache mode, dynamic shared bytes. */
ABG_EXPORT cudaError_t cudaFuncGetAttributes(void *attributes, const void *function) {
    const abg_device *card = abg_device_at(abg_current_ordinal());
    if (!card) return done(CUDA_ERROR_NO_DEVICE);
    int chosen = abg_chosen_architecture(function, card->major, card->minor);
    if (!chosen) return done(CUDA_ERROR_NO_BINARY_FOR_GPU);
    memset(attributes, 0, 144);
    int *numbers = (int *)((char *)attributes + 24);
    numbers[0] = 1024;
    numbers[1] = 32;
    numbers[2] = numbers[3] = chosen;
    numbers[5] = card->shared_per_block_optin;
    return CUDA_SUCCESS;
}
ABG_EXPORT cudaError_t cudaFuncSetAttribute(const void *function, int attribute, int value) { return (void)function, (void)attribute, (void)value, CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaFuncSetCacheConfig(const void *function, int config) { return (void)function, (void)config, CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int ordinal) {
    (void)kernel, (void)attribute, (void)value, (void)ordinal;
    return CUDA_SUCCESS;
}
extern CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, void *function, int threads, size_t shared, unsigned flags);
ABG_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
    return done(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, (void *)(uintptr_t)function, threads, shared, flags));
}
ABG_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
ABG_EXPORT cudaError_t cudaLibraryLoadData(void **library, const void *code, int *jit, void **jit_values, unsigned jit_count, int *options, void **values,
                                           unsigned count) {
    (void)code, (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    *library = malloc(16);
    return *library ? CUDA_SUCCESS : done(CUDA_ERROR_OUT_OF_MEMORY);
}
ABG_EXPORT cudaError_t cudaLibraryUnload(void *library) { return free(library), CUDA_SUCCESS; }
ABG_EXPORT cudaError_t cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    (void)library, (void)name;
    *kernel = malloc(16); /* lives as long as the process */
    return *kernel ? CUDA_SUCCESS : done(CUDA_ERROR_OUT_OF_MEMORY);
}

/* ---- the driver's calls by name --------------------------------------------------------------- */

static cudaError_t entry_point(const char *name, void **function, int *status) {
    if (cuGetProcAddress_v2(name, function, 0, 0, status) == CUDA_SUCCESS) return CUDA_SUCCESS;
    return CUDA_SUCCESS; /* the status says that the name was not found; the call itself succeeded */
}
ABG_EXPORT cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) { return (void)flags, entry_point(name, function, status); }
ABG_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    return entry_point(name, function, status);
}
