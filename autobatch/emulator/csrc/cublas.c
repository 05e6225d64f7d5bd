/* cuBLAS and cuBLASLt: matrix products that compute nothing. Their workspaces are torch's own allocations
 * (torch gives each handle one), so nothing is taken here. */
#define _GNU_SOURCE
#include "real.h"
#include "state.h"

#include <stdlib.h>
#include <string.h>

typedef int cublasStatus_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_ALLOC_FAILED = 3 };

typedef struct { void *stream; int math_mode; int pointer_mode; } handle;

ABG_EXPORT cublasStatus_t cublasCreate_v2(void **made) {
    *made = calloc(1, sizeof(handle));
    return *made ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
ABG_EXPORT cublasStatus_t cublasDestroy_v2(void *self) { return free(self), CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasSetStream_v2(void *self, void *stream) { return ((handle *)self)->stream = stream, CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasSetWorkspace_v2(void *self, void *workspace, size_t bytes) { return (void)self, (void)workspace, (void)bytes, CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasSetSmCountTarget(void *self, int count) { return (void)self, (void)count, CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasSetMathMode(void *self, int mode) { return ((handle *)self)->math_mode = mode, CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasGetMathMode(void *self, int *mode) { return *mode = ((handle *)self)->math_mode, CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasSetPointerMode_v2(void *self, int mode) { return ((handle *)self)->pointer_mode = mode, CUBLAS_STATUS_SUCCESS; }
ABG_EXPORT cublasStatus_t cublasGetPointerMode_v2(void *self, int *mode) { return *mode = ((handle *)self)->pointer_mode, CUBLAS_STATUS_SUCCESS; }

/* Products, sums and solutions: kernels that return at once. */
#define COMPUTES(name) \
    ABG_EXPORT cublasStatus_t name(void) { return abg_kernel_ran(), CUBLAS_STATUS_SUCCESS; }
#define COMPUTES_SDCZ(head, tail) COMPUTES(head##S##tail) COMPUTES(head##D##tail) COMPUTES(head##C##tail) COMPUTES(head##Z##tail)

COMPUTES_SDCZ(cublas, gemm_v2)
COMPUTES_SDCZ(cublas, gemmStridedBatched)
COMPUTES_SDCZ(cublas, gemmBatched)
COMPUTES_SDCZ(cublas, gemv_v2)
COMPUTES_SDCZ(cublas, trsm_v2)
COMPUTES_SDCZ(cublas, trsmBatched)
COMPUTES(cublasSgemmEx)
COMPUTES(cublasGemmEx)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasGemmBatchedEx)
COMPUTES(cublasSdot_v2)
COMPUTES(cublasDdot_v2)
COMPUTES(cublasDotEx)
COMPUTES(cublasCdotu_v2)
COMPUTES(cublasCdotc_v2)
COMPUTES(cublasZdotu_v2)
COMPUTES(cublasZdotc_v2)

/* ---- cuBLASLt ----------------------------------------------------------------------------- */
/* Descriptors are written by inline code of its header as well; only those made by a call are made here. */

#define MAKES(name)                                                     \
    ABG_EXPORT cublasStatus_t name(void **made) {                       \
        *made = calloc(1, 256);                                         \
        return *made ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED; \
    }
#define ENDS(name) \
    ABG_EXPORT cublasStatus_t name(void *self) { return free(self), CUBLAS_STATUS_SUCCESS; }
#define NOTES(name) \
    ABG_EXPORT cublasStatus_t name(void) { return CUBLAS_STATUS_SUCCESS; }

MAKES(cublasLtCreate)
ENDS(cublasLtDestroy)
MAKES(cublasLtMatmulDescCreate)
ENDS(cublasLtMatmulDescDestroy)
NOTES(cublasLtMatmulDescSetAttribute)
MAKES(cublasLtMatrixLayoutCreate)
ENDS(cublasLtMatrixLayoutDestroy)
NOTES(cublasLtMatrixLayoutSetAttribute)
MAKES(cublasLtMatmulPreferenceCreate)
ENDS(cublasLtMatmulPreferenceDestroy)
NOTES(cublasLtMatmulPreferenceSetAttribute)
COMPUTES(cublasLtMatmul)

ABG_EXPORT size_t cublasLtGetVersion(void) {
    size_t (*real)(void) = (size_t (*)(void))ABG_REAL("cublasLtGetVersion", "libcublasLt.so.13", "libcublasLt.so.12");
    return real ? real() : 0;
}

/* One algorithm that needs no workspace beyond what torch has allocated. The result: 64 bytes of algorithm, workspace
 * size, status, waves, room. */
ABG_EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(void *self, void *operation, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                                         void *results, int *found) {
    (void)self, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    if (wanted < 1) return *found = 0, CUBLAS_STATUS_SUCCESS;
    memset(results, 0, 64 + 8 + 4 + 4 + 16);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
