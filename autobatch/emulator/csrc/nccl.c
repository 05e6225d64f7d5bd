/* NCCL: its version and the text of its errors. Collectives are not emulated yet and fail by name (unsupported.h). */
#define _GNU_SOURCE
#include "real.h"
#include "state.h"

ABG_EXPORT int ncclGetVersion(int *version) {
    int (*real)(int *) = (int (*)(int *))ABG_REAL("ncclGetVersion", "libnccl.so.2");
    return real ? real(version) : (*version = 0, 0);
}

ABG_EXPORT const char *ncclGetLastError(void *communicator) {
    (void)communicator;
    const char *text = abg_unsupported_text();
    return text ? text : "";
}

ABG_EXPORT const char *ncclGetErrorString(int status) { return status == 0 ? "no error" : ncclGetLastError(0); }
