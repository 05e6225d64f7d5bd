/* NCCL: its version and the text of its errors. Collectives are not emulated yet and fail by name (unsupported.h). */
#define _GNU_SOURCE
#include "real.h"
#include "state.h"

#include <stdio.h>

ABG_EXPORT int ncclGetVersion(int *version) {
    int (*real)(int *) = (int (*)(int *))ABG_REAL("ncclGetVersion", "libnccl.so.2");
    return real ? real(version) : (*version = 0, 0);
}

ABG_EXPORT const char *ncclGetLastError(void *communicator) {
    static _Thread_local char text[160];
    (void)communicator;
    if (!abg_last_unsupported()) return "";
    snprintf(text, sizeof text, "the emulated GPU does not implement %s", abg_last_unsupported());
    return text;
}

ABG_EXPORT const char *ncclGetErrorString(int status) { return status == 0 ? "no error" : ncclGetLastError(0); }
