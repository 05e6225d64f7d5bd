/* The driver's modules and kernels, which are names without code, and its calls by name. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
ABG_EXPORT CUresult cuLibraryLoadFromFile(void **library, const char *path, int *jit, void **jit_values, unsigned jit_count, int *options,
                                          void **values, unsigned count) {
    return cuLibraryLoadData(library, path, jit, jit_values, jit_count, options, values, count);
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
/* By the names without a version, as cuDNN's compiler at run time looks them up. */
ABG_EXPORT CUresult cuLinkCreate(unsigned count, int *options, void **values, void **state) { return cuLinkCreate_v2(count, options, values, state); }
ABG_EXPORT CUresult cuLinkAddData(void *state, int type, void *data, size_t bytes, const char *name, unsigned count, int *options, void **values) {
    return cuLinkAddData_v2(state, type, data, bytes, name, count, options, values);
}
ABG_EXPORT CUresult cuLinkComplete(void *state, void **cubin, size_t *bytes) {
    *cubin = state;
    *bytes = 16;
    return CUDA_SUCCESS;
}
ABG_EXPORT CUresult cuLinkDestroy(void *state) { return free(state), CUDA_SUCCESS; }

ABG_EXPORT CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
    (void)function;
    const abg_device *card = abg_device_at(abg_current_ordinal());
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
ABG_EXPORT CUresult cuKernelSetAttribute(int attribute, int value, void *kernel, CUdevice device) { return (void)device, cuFuncSetAttribute(kernel, attribute, value); }
ABG_EXPORT CUresult cuFuncSetCacheConfig(void *function, int config) { return (void)function, (void)config, CUDA_SUCCESS; }

ABG_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, void *function, int threads, size_t shared, unsigned flags) {
    (void)function, (void)flags;
    const abg_device *card = abg_device_at(abg_current_ordinal());
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
ABG_EXPORT CUresult cuOccupancyMaxPotentialClusterSize(int *size, void *function, const void *config) {
    return (void)function, (void)config, *size = 8, CUDA_SUCCESS; /* CUDA C++ Programming Guide: what every card with clusters can do */
}
ABG_EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) {
    (void)function, (void)config;
    const abg_device *card = abg_device_at(abg_current_ordinal());
    *clusters = card ? card->sm_count / 2 : 0;
    return CUDA_SUCCESS;
}

static CUresult launch(void) {
    abg_kernel_ran();
    return abg_result(abg_ensure_context(abg_current_ordinal()));
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
pthread_mutex_t abg_absent_lock = PTHREAD_MUTEX_INITIALIZER;

#define ABSENT(n) \
    static CUresult absent_##n(void) { return abg_not_supported(absent_names[0x##n]); }
#define ABSENT_ROW(f, r) f(r##0) f(r##1) f(r##2) f(r##3) f(r##4) f(r##5) f(r##6) f(r##7) f(r##8) f(r##9) f(r##A) f(r##B) f(r##C) f(r##D) f(r##E) f(r##F)
#define ABSENT_ALL(f)                                                                                                                   \
    ABSENT_ROW(f, 0) ABSENT_ROW(f, 1) ABSENT_ROW(f, 2) ABSENT_ROW(f, 3) ABSENT_ROW(f, 4) ABSENT_ROW(f, 5) ABSENT_ROW(f, 6) ABSENT_ROW(f, 7) \
    ABSENT_ROW(f, 8) ABSENT_ROW(f, 9) ABSENT_ROW(f, A) ABSENT_ROW(f, B) ABSENT_ROW(f, C) ABSENT_ROW(f, D) ABSENT_ROW(f, E) ABSENT_ROW(f, F)
ABSENT_ALL(ABSENT)
#define ABSENT_ENTRY(n) absent_##n,
static CUresult (*const absent_calls[MOST_ABSENT])(void) = {ABSENT_ALL(ABSENT_ENTRY)};

/* For a library that asks on our behalf: it looks up all that the driver has, and would leave the program no place. */
static CUresult absent_unsaid(void) { return CUDA_ERROR_NOT_SUPPORTED; }

static CUresult absent_beyond(void) { return abg_not_supported("one more of the driver's calls"); }

static void *absent_call(const char *name) {
    if (strncmp(name, "cu", 2) != 0) return NULL;
    if (abg_notes_are_held()) return (void *)absent_unsaid;
    pthread_mutex_lock(&abg_absent_lock);
    int i = 0;
    while (i < absent_count && strncmp(absent_names[i], name, sizeof absent_names[0] - 1) != 0) i++;
    if (i == absent_count && i < MOST_ABSENT) snprintf(absent_names[absent_count++], sizeof absent_names[0], "%s", name);
    pthread_mutex_unlock(&abg_absent_lock);
    return i < MOST_ABSENT ? (void *)absent_calls[i] : (void *)absent_beyond;
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

/* A runtime linked statically into an extension asks for tables that are not public. */
ABG_EXPORT CUresult cuGetExportTable(const void **table, const void *id) {
    (void)id;
    *table = NULL;
    return abg_not_supported("cuGetExportTable (a statically linked CUDA runtime)");
}
