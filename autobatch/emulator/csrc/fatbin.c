/* Reads the architectures off the fat binaries that a program registers at its start. The kernels in them never run,
 * but which of them a card would choose decides what code on the host does: CUB picks its algorithms, and their
 * temporaries, by the version that `cudaFuncGetAttributes` reports, and refuses one that it was not compiled for. Some
 * of torch's binaries have code for more architectures than the rest, so each kernel is looked up in its own.
 *
 * The format is not documented by its maker. Read off the binaries of torch 2.8 (CUDA 12.8) and 2.15 (CUDA 13.2), where
 * it agrees with `torch.cuda.get_arch_list()`: a wrapper (magic, version, pointer); a header (magic, version, its own
 * size, bytes that follow); then entries (kind: 1 PTX, 2 machine code; own header's size at 4, bytes that follow at 8,
 * architecture at 28). */
#include "fatbin.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WRAPPER_MAGIC 0x466243b1u
#define HEADER_MAGIC 0xba55ed50u
#define MOST_ARCHITECTURES 256
enum { PTX = 1, MACHINE_CODE = 2 };

typedef struct {
    void *handle; /* first: the address of this field is what the program holds */
    uint64_t machine_code[MOST_ARCHITECTURES / 64]; /* bit n: architecture n is there */
    uint64_t ptx[MOST_ARCHITECTURES / 64];
} binary;

typedef struct {
    const void *kernel;
    const binary *owner;
} registered;

/* Open addressing; never more than half full. */
static registered *table;
static size_t table_size, table_used;
static pthread_rwlock_t table_lock = PTHREAD_RWLOCK_INITIALIZER;

static uint16_t read16(const unsigned char *at) { uint16_t value; return memcpy(&value, at, sizeof value), value; }
static uint32_t read32(const unsigned char *at) { uint32_t value; return memcpy(&value, at, sizeof value), value; }
static uint64_t read64(const unsigned char *at) { uint64_t value; return memcpy(&value, at, sizeof value), value; }

static void add(uint64_t *set, uint32_t architecture) {
    if (architecture < MOST_ARCHITECTURES) set[architecture / 64] |= 1ull << (architecture % 64);
}
static int has(const uint64_t *set, int architecture) { return (int)(set[architecture / 64] >> (architecture % 64)) & 1; }

void **abg_register_fatbin(const void *wrapper) {
    binary *made = calloc(1, sizeof *made);
    const unsigned char *at = wrapper;
    if (!made || !at || read32(at) != WRAPPER_MAGIC) return (void **)made;
    const unsigned char *header = (const unsigned char *)(uintptr_t)read64(at + 8);
    if (!header || read32(header) != HEADER_MAGIC) return (void **)made;
    const unsigned char *entry = header + read16(header + 6), *end = entry + read64(header + 8);
    while (entry + 32 <= end) {
        uint16_t kind = read16(entry);
        uint64_t length = read32(entry + 4) + read64(entry + 8);
        if (length < 32) break; /* not as it is known: better nothing than a guess */
        if (kind == MACHINE_CODE) add(made->machine_code, read32(entry + 28));
        if (kind == PTX) add(made->ptx, read32(entry + 28));
        entry += length;
    }
    return (void **)made;
}

static size_t place_of(const registered *in, size_t size, const void *kernel) {
    size_t place = ((uintptr_t)kernel >> 4) * 0x9e3779b97f4a7c15ull & (size - 1);
    while (in[place].kernel && in[place].kernel != kernel) place = (place + 1) & (size - 1);
    return place;
}

static int grow(void) {
    size_t size = table_size ? 2 * table_size : 1 << 14;
    registered *larger = calloc(size, sizeof *larger);
    if (!larger) return 0;
    for (size_t i = 0; i < table_size; i++)
        if (table[i].kernel) larger[place_of(larger, size, table[i].kernel)] = table[i];
    free(table);
    table = larger;
    table_size = size;
    return 1;
}

void abg_register_kernel(void **handle, const void *kernel) {
    if (!handle || !kernel) return;
    pthread_rwlock_wrlock(&table_lock);
    if (2 * table_used < table_size || grow()) {
        registered *entry = &table[place_of(table, table_size, kernel)];
        if (!entry->kernel) table_used++;
        *entry = (registered){kernel, (const binary *)handle};
    }
    pthread_rwlock_unlock(&table_lock);
}

static const binary *owner_of(const void *kernel) {
    const binary *owner = NULL;
    pthread_rwlock_rdlock(&table_lock);
    if (table) owner = table[place_of(table, table_size, kernel)].owner;
    pthread_rwlock_unlock(&table_lock);
    return owner;
}

int abg_chosen_architecture(const void *kernel, int major, int minor) {
    int card = 10 * major + minor, known = 0;
    const binary *owner = kernel ? owner_of(kernel) : NULL;
    for (int i = 0; owner && i < MOST_ARCHITECTURES / 64; i++) known |= owner->machine_code[i] || owner->ptx[i];
    if (!known) return card;
    for (int version = card; version >= 10 * major; version--)
        if (has(owner->machine_code, version)) return version;
    for (int version = card; version > 0; version--)
        if (has(owner->ptx, version)) return version;
    return 0;
}
