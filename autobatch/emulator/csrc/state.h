/* The emulated machine: what every process on it shares, and the calls that read and change it.
 *
 * One file, mapped by every process, holds the cards and who uses how much of them, so that NVML
 * asked from one process sees the use of another. Its layout is mirrored by `autobatch/emulator/machine.py`;
 * `abg_layout_bytes` lets the two be compared. */
#ifndef ABG_STATE_H
#define ABG_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define ABG_EXPORT __attribute__((visibility("default")))
#define ABG_MAGIC 0x55504742u /* "BGPU" */
#define ABG_LAYOUT_VERSION 2u
#define ABG_MAX_DEVICES 16
#define ABG_MAX_PROCESSES 256
#define ABG_MAX_UNSUPPORTED 64
#define ABG_NAME_BYTES 96

typedef struct {
    char name[ABG_NAME_BYTES];
    uint8_t uuid[16];
    uint64_t nvml_total_bytes;
    uint64_t cuda_total_bytes;
    uint64_t context_bytes;
    uint64_t tenant_bytes; /* held by an imaginary other process for as long as the machine lives */
    uint64_t l2_bytes;
    int32_t major;
    int32_t minor;
    int32_t sm_count;
    int32_t max_threads_per_sm;
    int32_t max_blocks_per_sm;
    int32_t shared_per_block_optin;
    int32_t shared_per_sm;
    int32_t memory_bus_bits;
} abg_device;

typedef struct {
    uint32_t pid; /* 0: the slot is free */
    uint32_t has_context; /* a bit for each device */
    uint64_t start_time;
    uint64_t bytes[ABG_MAX_DEVICES];
} abg_process;

typedef struct {
    uint32_t magic;
    uint32_t layout_version;
    uint32_t device_count;
    uint32_t cuda_version; /* 13000 for CUDA 13.0 */
    char driver_version[32];
    uint32_t owner_pid; /* shown by NVML as the tenant's process */
    _Atomic uint32_t unsupported_count;
    char unsupported[ABG_MAX_UNSUPPORTED][64];
    abg_device devices[ABG_MAX_DEVICES];
    abg_process processes[ABG_MAX_PROCESSES];
    union {
        pthread_mutex_t mutex;
        uint8_t room[128];
    } lock;
} abg_machine;

/* Results of the calls below; the API layers translate them. */
enum { ABG_OK = 0, ABG_NO_MACHINE = 1, ABG_BAD_DEVICE = 2, ABG_NO_MEMORY = 3, ABG_BAD_POINTER = 4, ABG_TOO_MANY = 5, ABG_FORKED = 6 };

/* In a library of their own (layout.c), for whoever makes a machine: the driver's would be taken for the real one. */
ABG_EXPORT uint64_t abg_layout_bytes(void);
ABG_EXPORT int abg_make_lock(abg_machine *machine);
/* The mapped machine, or NULL where the environment names none or the file is not one. */
ABG_EXPORT abg_machine *abg_get_machine(void);
/* Devices that this process sees (CUDA_VISIBLE_DEVICES), and the machine's index of each. */
ABG_EXPORT int abg_visible_count(void);
ABG_EXPORT int abg_visible_device(int ordinal);
ABG_EXPORT const abg_device *abg_device_at(int ordinal);
/* Whether this process has a context on the device; made by the second where it has none. */
ABG_EXPORT int abg_has_context(int ordinal);
ABG_EXPORT int abg_ensure_context(int ordinal);
ABG_EXPORT int abg_memory_info(int ordinal, uint64_t *free_bytes, uint64_t *total_bytes);
/* Bytes of every live process and tenant on the machine's device `index`. */
ABG_EXPORT uint64_t abg_used_bytes(int index);
ABG_EXPORT int abg_alloc(int ordinal, uint64_t bytes, uint64_t *address);
ABG_EXPORT int abg_free(uint64_t address);
/* Physical memory apart from addresses, for the virtual memory calls of the driver. */
ABG_EXPORT int abg_charge(int ordinal, uint64_t bytes);
ABG_EXPORT void abg_discharge(int ordinal, uint64_t bytes);
ABG_EXPORT int abg_reserve_addresses(uint64_t bytes, uint64_t alignment, uint64_t *address);
ABG_EXPORT int abg_release_addresses(uint64_t address);
/* Reserved addresses belong to the device whose memory was mapped there last. */
ABG_EXPORT void abg_assign_addresses(uint64_t address, int ordinal);
ABG_EXPORT int abg_is_device_address(uint64_t address);
/* Around a fork, so that the child finds no lock held by a thread that it does not have. */
ABG_EXPORT void abg_lock_driver(void);
ABG_EXPORT void abg_unlock_driver(void);
ABG_EXPORT void abg_lock_contents(void);
ABG_EXPORT void abg_unlock_contents(void);
/* The ordinal that owns an address, or -1; base and size of its allocation where asked for. */
ABG_EXPORT int abg_address_device(uint64_t address, uint64_t *base, uint64_t *bytes);
/* Device memory holds nothing but the last few small copies from the host (see contents.c). */
ABG_EXPORT void abg_write_device(uint64_t address, const void *source, uint64_t bytes);
ABG_EXPORT void abg_copy_device(uint64_t to, uint64_t from, uint64_t bytes);
ABG_EXPORT void abg_read_device(uint64_t address, void *target, uint64_t bytes);
ABG_EXPORT void abg_forget_device(uint64_t address, uint64_t bytes);
ABG_EXPORT void abg_kernel_ran(void);
/* Notes a call that is not implemented, for the error's text and for the report, and says so on stderr: once in a process,
 * since few libraries' errors have room for the name. */
ABG_EXPORT void abg_note_unsupported(const char *call);
/* While held in this thread, nothing is noted: a library that asks on our behalf copes with what is missing by itself. */
ABG_EXPORT void abg_hold_notes(int hold);
ABG_EXPORT int abg_notes_are_held(void);
/* Forgets this thread's last such call. */
ABG_EXPORT void abg_forget_unsupported(void);
/* "the emulated GPU does not implement ..." of this thread's last such call; NULL where it has made none. */
ABG_EXPORT const char *abg_unsupported_text(void);

#endif
