/* What the maker of a machine needs before any process is on it. */
#include "state.h"

uint64_t abg_layout_bytes(void) { return sizeof(abg_machine); }

/* Robust: a process killed while it holds the lock gives it to the next that asks. Returns an errno. */
int abg_make_lock(abg_machine *machine) {
    pthread_mutexattr_t attributes;
    int error = pthread_mutexattr_init(&attributes);
    if (error) return error;
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    error = pthread_mutex_init(&machine->lock.mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return error;
}
