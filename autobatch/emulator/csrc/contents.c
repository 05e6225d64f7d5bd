/* What device memory holds: nothing, but for the last small copies from the host.
 *
 * No kernel computes, so a tensor reads back as zeros. Start-up code of a framework, though, writes a
 * few numbers to the card and reads them back to compare them (DistributedDataParallel compares the
 * ranks' parameter shapes so). Those few are kept: at most `SLOTS` copies of at most `MOST` bytes, each
 * until its memory is written or freed, or any kernel runs. The caching allocator gives a block to one tensor
 * after another without a word to the driver: what a kernel has made there reads as zeros, as it does elsewhere. */
#include "state.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 64
#define MOST 65536u

typedef struct {
    uint64_t address;
    uint64_t bytes;
    uint64_t kernels_before;
    unsigned char *data;
} slot;

static slot slots[SLOTS];
static unsigned next_slot;
static _Atomic uint64_t kernels_run;
static pthread_mutex_t contents_lock = PTHREAD_MUTEX_INITIALIZER;

void abg_kernel_ran(void) { kernels_run++; }
void abg_lock_contents(void) { pthread_mutex_lock(&contents_lock); }
void abg_unlock_contents(void) { pthread_mutex_unlock(&contents_lock); }

static int overlaps(const slot *kept, uint64_t address, uint64_t bytes) {
    if (!kept->data) return 0;
    return kept->address >= address ? kept->address - address < bytes : address - kept->address < kept->bytes; /* no sum: it could wrap */
}

static void forget_locked(uint64_t address, uint64_t bytes) {
    for (int i = 0; i < SLOTS; i++) {
        if (!overlaps(&slots[i], address, bytes)) continue;
        free(slots[i].data);
        slots[i].data = NULL;
    }
}

void abg_forget_device(uint64_t address, uint64_t bytes) {
    pthread_mutex_lock(&contents_lock);
    forget_locked(address, bytes);
    pthread_mutex_unlock(&contents_lock);
}

static void keep_locked(uint64_t address, const void *source, uint64_t bytes) {
    slot *kept = &slots[next_slot++ % SLOTS];
    free(kept->data);
    kept->data = malloc(bytes);
    if (!kept->data) return;
    memcpy(kept->data, source, bytes);
    kept->address = address;
    kept->bytes = bytes;
    kept->kernels_before = kernels_run;
}

void abg_write_device(uint64_t address, const void *source, uint64_t bytes) {
    if (!bytes) return;
    pthread_mutex_lock(&contents_lock);
    forget_locked(address, bytes);
    if (bytes <= MOST) keep_locked(address, source, bytes);
    pthread_mutex_unlock(&contents_lock);
}

static void read_locked(uint64_t address, void *target, uint64_t bytes) {
    memset(target, 0, bytes);
    for (int i = 0; i < SLOTS; i++) {
        slot *kept = &slots[i];
        if (!overlaps(kept, address, bytes) || kept->kernels_before != kernels_run) continue;
        uint64_t start = kept->address > address ? kept->address : address;
        uint64_t end = kept->address + kept->bytes < address + bytes ? kept->address + kept->bytes : address + bytes;
        memcpy((unsigned char *)target + (start - address), kept->data + (start - kept->address), end - start);
    }
}

void abg_read_device(uint64_t address, void *target, uint64_t bytes) {
    pthread_mutex_lock(&contents_lock);
    read_locked(address, target, bytes);
    pthread_mutex_unlock(&contents_lock);
}

void abg_copy_device(uint64_t to, uint64_t from, uint64_t bytes) {
    if (!bytes) return;
    pthread_mutex_lock(&contents_lock);
    void *data = bytes <= MOST ? malloc(bytes) : NULL;
    if (data) read_locked(from, data, bytes);
    forget_locked(to, bytes);
    if (data) keep_locked(to, data, bytes);
    free(data);
    pthread_mutex_unlock(&contents_lock);
}
