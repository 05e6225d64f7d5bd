/* The shared machine, and this process's view of it. */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define GRANULE (2ull << 20)
/* Below this the driver packs several allocations into one granule. */
#define SMALL (1ull << 20)
#define MOST_ADDRESSES (64ull << 40)
#define LEAST_ADDRESSES (64ull << 30)

static abg_machine *machine;
static int visible[ABG_MAX_DEVICES];
static int visible_count;
static abg_process *_Atomic own_slot;
static int is_forked; /* from a process that had a context */
static pthread_mutex_t local_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- processes ---------------------------------------------------------------------------- */

/* When a process began, in clock ticks since boot: with the pid, it tells one process from the next of that number.
 * 0 where it has ended, or is a zombie, whose memory the card has back; UNKNOWN where that cannot be read. */
#define UNKNOWN UINT64_MAX

static uint64_t start_time_of(uint32_t pid) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return errno == ENOENT ? 0 : UNKNOWN; /* no descriptor left, say, is no sign of another's death */
    ssize_t length = read(file, text, sizeof text - 1);
    int error = errno;
    close(file);
    if (length <= 0) return length < 0 && error == ESRCH ? 0 : UNKNOWN;
    text[length] = 0;
    char *field = strrchr(text, ')'); /* the name before it may hold spaces */
    if (!field || field[1] != ' ') return UNKNOWN;
    char state = field[2];
    long threads = 0;
    for (int number = 3; number <= 22; number++) { /* fields as proc(5) counts them */
        field = strchr(field + 1, ' ');
        if (!field) return UNKNOWN;
        if (number == 20) threads = strtol(field + 1, NULL, 10);
    }
    if ((state == 'Z' || state == 'X') && threads <= 1) return 0; /* with more, only its first thread has ended */
    return strtoull(field + 1, NULL, 10);
}

static int is_alive(const abg_process *process) {
    uint64_t start = start_time_of(process->pid);
    return start == UNKNOWN || (start != 0 && start == process->start_time);
}

/* ---- the lock ----------------------------------------------------------------------------- */

static void lock_machine(void) {
    /* Nothing to mend after an owner's death: what it wrote half was its own slot, which goes with it, or is a single store. */
    if (pthread_mutex_lock(&machine->lock.mutex) == EOWNERDEAD) pthread_mutex_consistent(&machine->lock.mutex);
}

static void unlock_machine(void) { pthread_mutex_unlock(&machine->lock.mutex); }

/* ---- attaching ---------------------------------------------------------------------------- */

static void format_uuid(const uint8_t *uuid, char *text) {
    char *end = text + sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++) end += sprintf(end, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
}

static int device_of_uuid(const char *entry) {
    int found = -1;
    for (uint32_t i = 0; i < machine->device_count; i++) {
        char uuid[48];
        format_uuid(machine->devices[i].uuid, uuid);
        if (strncmp(uuid, entry, strlen(entry)) != 0) continue;
        if (found >= 0) return -1; /* ambiguous */
        found = (int)i;
    }
    return found;
}

static int device_of_index(const char *entry) {
    char *end;
    long index = strtol(entry, &end, 10);
    return end != entry && index >= 0 && index < (long)machine->device_count ? (int)index : -1;
}

/* Indices, or UUIDs also by an unambiguous beginning: the first entry settles which. As the driver: the first invalid
 * entry ends the list, and one that comes twice leaves no device at all. */
static void choose_visible(void) {
    const char *wanted = getenv("CUDA_VISIBLE_DEVICES");
    visible_count = 0;
    if (!wanted) {
        for (uint32_t i = 0; i < machine->device_count; i++) visible[visible_count++] = (int)i;
        return;
    }
    char list[4096];
    snprintf(list, sizeof list, "%s", wanted);
    char *rest = list;
    int by_uuid = -1;
    for (char *entry = strsep(&rest, ","); entry; entry = strsep(&rest, ",")) {
        entry += strspn(entry, " \t");
        entry[strcspn(entry, " \t")] = 0;
        int is_uuid = strncmp(entry, "GPU-", 4) == 0;
        if (by_uuid < 0) by_uuid = is_uuid;
        int index = is_uuid != by_uuid ? -1 : is_uuid ? device_of_uuid(entry) : device_of_index(entry);
        if (index < 0) return;
        for (int i = 0; i < visible_count; i++) {
            if (visible[i] != index) continue;
            visible_count = 0;
            return;
        }
        visible[visible_count++] = index;
    }
}

static void before_fork(void) { /* in the order in which calls take them */
    abg_lock_driver();
    pthread_mutex_lock(&local_lock);
    abg_lock_contents();
}

static void after_fork_in_parent(void) {
    abg_unlock_contents();
    pthread_mutex_unlock(&local_lock);
    abg_unlock_driver();
}

/* The child is another process on the card; as with the real driver, it cannot use what its parent set up. */
static void after_fork_in_child(void) {
    if (own_slot) is_forked = 1;
    own_slot = NULL;
    after_fork_in_parent();
}

/* A shared lock for as long as this process lives: the machine's file is removed as an orphan once nobody holds one. The
 * descriptor is a high one, since shells and daemons take the low ones for themselves. */
static void hold(int file) {
    int high = fcntl(file, F_DUPFD_CLOEXEC, 500);
    if (high < 0) high = fcntl(file, F_DUPFD_CLOEXEC, 3);
    if (high >= 0) flock(high, LOCK_SH | LOCK_NB);
}

static void attach(void) {
    const char *path = getenv("AUTOBATCH_EMULATED_GPU");
    if (!path || !*path) return;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    struct stat status;
    if (fstat(file, &status) == 0 && (uint64_t)status.st_size >= sizeof(abg_machine)) {
        abg_machine *mapped = mmap(NULL, sizeof(abg_machine), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED) {
            if (mapped->magic == ABG_MAGIC && mapped->layout_version == ABG_LAYOUT_VERSION) {
                machine = mapped;
                choose_visible();
                hold(file);
                pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
            } else {
                munmap(mapped, sizeof(abg_machine));
            }
        }
    }
    close(file);
}

abg_machine *abg_get_machine(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, attach);
    return machine;
}

int abg_visible_count(void) { return abg_get_machine() ? visible_count : 0; }

int abg_visible_device(int ordinal) {
    return ordinal >= 0 && ordinal < abg_visible_count() ? visible[ordinal] : -1;
}

const abg_device *abg_device_at(int ordinal) {
    int index = abg_visible_device(ordinal);
    return index < 0 ? NULL : &machine->devices[index];
}

/* ---- the ledger --------------------------------------------------------------------------- */

static uint64_t used_locked(int index) {
    uint64_t used = machine->devices[index].tenant_bytes;
    for (int i = 0; i < ABG_MAX_PROCESSES; i++) {
        abg_process *process = &machine->processes[i];
        if (!process->pid) continue;
        if (process != own_slot && !is_alive(process)) {
            process->pid = 0;
            continue;
        }
        used += process->bytes[index];
    }
    return used;
}

static int claim_slot(void) {
    if (own_slot) return ABG_OK;
    uint32_t pid = (uint32_t)getpid();
    for (int i = 0; i < ABG_MAX_PROCESSES; i++) {
        abg_process *process = &machine->processes[i];
        if (process->pid && process->pid != pid && is_alive(process)) continue;
        memset(process, 0, sizeof *process);
        process->start_time = start_time_of(pid);
        process->pid = pid;
        own_slot = process;
        return ABG_OK;
    }
    return ABG_TOO_MANY;
}

static int charge_locked(int index, uint64_t bytes) {
    const abg_device *device = &machine->devices[index];
    if (bytes > device->cuda_total_bytes) return ABG_NO_MEMORY; /* before any sum, which could wrap */
    uint64_t wanted = bytes;
    uint32_t bit = 1u << index;
    if (!own_slot || !(own_slot->has_context & bit)) wanted += device->context_bytes;
    if (used_locked(index) + wanted > device->cuda_total_bytes) return ABG_NO_MEMORY;
    int status = claim_slot();
    if (status != ABG_OK) return status;
    own_slot->bytes[index] += wanted;
    __atomic_fetch_or(&own_slot->has_context, bit, __ATOMIC_RELEASE);
    return ABG_OK;
}

int abg_charge(int ordinal, uint64_t bytes) {
    int index = abg_visible_device(ordinal);
    if (index < 0) return machine ? ABG_BAD_DEVICE : ABG_NO_MACHINE;
    if (is_forked) return ABG_FORKED;
    lock_machine();
    int status = charge_locked(index, bytes);
    unlock_machine();
    return status;
}

void abg_discharge(int ordinal, uint64_t bytes) {
    int index = abg_visible_device(ordinal);
    if (index < 0) return;
    lock_machine();
    if (own_slot && own_slot->bytes[index] >= bytes) own_slot->bytes[index] -= bytes;
    unlock_machine();
}

int abg_has_context(int ordinal) {
    int index = abg_visible_device(ordinal);
    const abg_process *slot = own_slot;
    return index >= 0 && slot && (__atomic_load_n(&slot->has_context, __ATOMIC_ACQUIRE) & (1u << index));
}

int abg_ensure_context(int ordinal) {
    return abg_has_context(ordinal) ? ABG_OK : abg_charge(ordinal, 0);
}

uint64_t abg_used_bytes(int index) {
    if (!abg_get_machine() || index < 0 || index >= (int)machine->device_count) return 0;
    lock_machine();
    uint64_t used = used_locked(index);
    unlock_machine();
    return used;
}

int abg_memory_info(int ordinal, uint64_t *free_bytes, uint64_t *total_bytes) {
    int status = abg_ensure_context(ordinal);
    if (status != ABG_OK) return status;
    const abg_device *device = abg_device_at(ordinal);
    uint64_t used = abg_used_bytes(abg_visible_device(ordinal));
    *total_bytes = device->cuda_total_bytes;
    *free_bytes = used < device->cuda_total_bytes ? device->cuda_total_bytes - used : 0;
    return ABG_OK;
}

/* ---- addresses ---------------------------------------------------------------------------- */
/* A range that nobody may touch: a program that reads device memory from the host faults, as on a
 * real card. Extents lie side by side, in order; a free one is taken lowest first. */

typedef struct {
    uint64_t address;
    uint64_t bytes;   /* of addresses */
    uint64_t charged; /* of memory; 0 for reserved addresses */
    uint64_t small;   /* bytes taken from a granule that is shared with other small allocations */
    int ordinal;      /* -1: free */
    int is_reserved;  /* addresses alone, to which memory is mapped by other calls */
} extent;

static extent *extents;
static size_t extent_count, extent_room;
static _Atomic uint64_t space_start;
static uint64_t space_bytes;
static uint64_t small_bytes[ABG_MAX_DEVICES], small_granules[ABG_MAX_DEVICES];

/* Addresses cost nothing, but a limit on them (ulimit -v) or a small machine may leave fewer. */
static int open_space(void) {
    if (space_start) return ABG_OK;
    uint64_t bytes = MOST_ADDRESSES;
    void *space = MAP_FAILED;
    for (; bytes >= LEAST_ADDRESSES; bytes /= 2) {
        space = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (space != MAP_FAILED) break;
    }
    if (space == MAP_FAILED) return ABG_NO_MEMORY;
    extent_room = 1024;
    extents = malloc(extent_room * sizeof *extents);
    if (!extents) {
        munmap(space, bytes);
        return ABG_NO_MEMORY;
    }
    uint64_t start = ((uint64_t)space + GRANULE - 1) & ~(GRANULE - 1);
    space_bytes = bytes - GRANULE;
    extents[0] = (extent){.address = start, .bytes = space_bytes, .ordinal = -1};
    extent_count = 1;
    space_start = start;
    return ABG_OK;
}

/* The extent that holds an address; -1 where none does. */
static long extent_at(uint64_t address) {
    if (!space_start || address < space_start || address - space_start >= space_bytes) return -1;
    size_t low = 0, high = extent_count;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (extents[middle].address <= address) low = middle;
        else high = middle;
    }
    return (long)low;
}

static int insert_extent(size_t position, extent value) {
    if (extent_count == extent_room) {
        extent *more = realloc(extents, 2 * extent_room * sizeof *extents);
        if (!more) return ABG_NO_MEMORY;
        extents = more;
        extent_room *= 2;
    }
    memmove(extents + position + 1, extents + position, (extent_count - position) * sizeof *extents);
    extents[position] = value;
    extent_count++;
    return ABG_OK;
}

static int take_addresses(uint64_t bytes, extent value, uint64_t *address) {
    int status = open_space();
    if (status != ABG_OK) return status;
    if (bytes > space_bytes) return ABG_NO_MEMORY; /* before rounding, which could wrap */
    uint64_t rounded = (bytes + GRANULE - 1) & ~(GRANULE - 1);
    for (size_t i = 0; i < extent_count; i++) {
        if (extents[i].ordinal != -1 || extents[i].bytes < rounded) continue;
        uint64_t start = extents[i].address, rest = extents[i].bytes - rounded;
        if (rest) {
            status = insert_extent(i + 1, (extent){.address = start + rounded, .bytes = rest, .ordinal = -1});
            if (status != ABG_OK) return status;
        }
        value.address = *address = start;
        value.bytes = rounded;
        extents[i] = value;
        return ABG_OK;
    }
    return ABG_NO_MEMORY;
}

static void drop_extent(size_t position) {
    memmove(extents + position, extents + position + 1, (extent_count - position - 1) * sizeof *extents);
    extent_count--;
}

static void give_addresses(size_t i) {
    extents[i] = (extent){.address = extents[i].address, .bytes = extents[i].bytes, .ordinal = -1};
    if (i + 1 < extent_count && extents[i + 1].ordinal == -1) {
        extents[i].bytes += extents[i + 1].bytes;
        drop_extent(i + 1);
    }
    if (i > 0 && extents[i - 1].ordinal == -1) {
        extents[i - 1].bytes += extents[i].bytes;
        drop_extent(i);
    }
}

/* What an allocation adds to the card: whole granules, small ones sharing theirs. `bytes` is at most a card's. */
static uint64_t charge_for(int ordinal, uint64_t bytes) {
    if (bytes >= SMALL) return (bytes + GRANULE - 1) & ~(GRANULE - 1);
    uint64_t rounded = (bytes + 511) & ~511ull;
    if (small_bytes[ordinal] + rounded <= small_granules[ordinal] * GRANULE) return 0;
    return GRANULE;
}

/* A granule goes back when what is left fits into the others. */
static void give_small(int ordinal, uint64_t bytes) {
    small_bytes[ordinal] -= bytes;
    uint64_t needed = (small_bytes[ordinal] + GRANULE - 1) / GRANULE;
    if (small_granules[ordinal] <= needed) return;
    abg_discharge(ordinal, (small_granules[ordinal] - needed) * GRANULE);
    small_granules[ordinal] = needed;
}

static int alloc_locked(int ordinal, uint64_t bytes, uint64_t *address) {
    uint64_t charge = charge_for(ordinal, bytes);
    int status = abg_charge(ordinal, charge);
    if (status != ABG_OK) return status;
    extent value = {.ordinal = ordinal};
    if (bytes < SMALL) value.small = (bytes + 511) & ~511ull;
    else value.charged = charge;
    status = take_addresses(bytes, value, address);
    if (status != ABG_OK) {
        abg_discharge(ordinal, charge);
        return status;
    }
    small_bytes[ordinal] += value.small;
    if (value.small) small_granules[ordinal] += charge / GRANULE;
    return ABG_OK;
}

int abg_alloc(int ordinal, uint64_t bytes, uint64_t *address) {
    const abg_device *device = abg_device_at(ordinal);
    if (!device) return machine ? ABG_BAD_DEVICE : ABG_NO_MACHINE;
    if (bytes > device->cuda_total_bytes) return ABG_NO_MEMORY; /* before rounding, which could wrap */
    pthread_mutex_lock(&local_lock);
    int status = alloc_locked(ordinal, bytes, address);
    pthread_mutex_unlock(&local_lock);
    return status;
}

static int give_back(uint64_t address, int is_reserved) {
    if (is_forked) return ABG_FORKED;
    pthread_mutex_lock(&local_lock);
    long i = extent_at(address);
    int is_ours = i >= 0 && extents[i].address == address && extents[i].ordinal >= 0 && extents[i].is_reserved == is_reserved;
    if (is_ours) {
        abg_forget_device(address, extents[i].bytes);
        abg_discharge(extents[i].ordinal, extents[i].charged);
        if (extents[i].small) give_small(extents[i].ordinal, extents[i].small);
        give_addresses((size_t)i);
    }
    pthread_mutex_unlock(&local_lock);
    return is_ours ? ABG_OK : ABG_BAD_POINTER;
}

int abg_free(uint64_t address) { return give_back(address, 0); }

int abg_reserve_addresses(uint64_t bytes, uint64_t alignment, uint64_t *address) {
    if (!bytes || alignment > GRANULE) return ABG_BAD_POINTER;
    if (is_forked) return ABG_FORKED;
    pthread_mutex_lock(&local_lock);
    int status = take_addresses(bytes, (extent){.ordinal = 0, .is_reserved = 1}, address);
    pthread_mutex_unlock(&local_lock);
    return status;
}

int abg_release_addresses(uint64_t address) { return give_back(address, 1); }

void abg_assign_addresses(uint64_t address, int ordinal) {
    pthread_mutex_lock(&local_lock);
    long i = extent_at(address);
    if (i >= 0 && extents[i].is_reserved) extents[i].ordinal = ordinal;
    pthread_mutex_unlock(&local_lock);
}

int abg_is_device_address(uint64_t address) {
    return space_start && address >= space_start && address - space_start < space_bytes;
}

int abg_address_device(uint64_t address, uint64_t *base, uint64_t *bytes) {
    pthread_mutex_lock(&local_lock);
    long i = extent_at(address);
    int ordinal = i < 0 ? -1 : extents[i].ordinal;
    if (ordinal >= 0 && base) *base = extents[i].address;
    if (ordinal >= 0 && bytes) *bytes = extents[i].bytes;
    pthread_mutex_unlock(&local_lock);
    return ordinal;
}

/* ---- calls that are not implemented ------------------------------------------------------- */

static _Thread_local char unsupported_text[160];
static _Thread_local int held;
static _Atomic uint64_t said; /* a bit for each of the machine's noted calls */
_Static_assert(ABG_MAX_UNSUPPORTED <= 64, "one bit for each call");

/* The index of a call in the machine's list, which it joins where there is room; else the list's length. */
static uint32_t note_locked(const char *call) {
    uint32_t count = atomic_load(&machine->unsupported_count);
    uint32_t i = 0;
    while (i < count && strncmp(machine->unsupported[i], call, sizeof machine->unsupported[i] - 1) != 0) i++;
    if (i == count && count < ABG_MAX_UNSUPPORTED) {
        snprintf(machine->unsupported[count], sizeof machine->unsupported[count], "%s", call);
        atomic_store(&machine->unsupported_count, count + 1);
    }
    return i;
}

/* In one write, so that no other line comes between. */
static void say(const char *text) {
    char line[192];
    int length = snprintf(line, sizeof line, "autobatch: %s\n", text);
    if (write(STDERR_FILENO, line, (size_t)length) < 0) return; /* nobody is there to be told */
}

void abg_hold_notes(int hold) { held = hold; }
int abg_notes_are_held(void) { return held; }

void abg_note_unsupported(const char *call) {
    if (held) return;
    snprintf(unsupported_text, sizeof unsupported_text, "the emulated GPU does not implement %s", call);
    if (!abg_get_machine()) return;
    lock_machine();
    uint32_t i = note_locked(call);
    unlock_machine();
    uint64_t bit = i < ABG_MAX_UNSUPPORTED ? 1ull << i : 0; /* one beyond the list is said each time */
    if (!bit || !(atomic_fetch_or(&said, bit) & bit)) say(unsupported_text);
}

void abg_forget_unsupported(void) { *unsupported_text = 0; }

const char *abg_unsupported_text(void) { return *unsupported_text ? unsupported_text : NULL; }
