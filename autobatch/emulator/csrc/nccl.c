/* NCCL: communicators that know their size and rank, and collectives that move nothing between processes.
 *
 * Each collective leaves in this process what it would where every rank held the same: the sum of gradients is the rank's own
 * gradient, what is gathered is the rank's own part at each place. Only the last small copies from the host have contents at
 * all (contents.c); DistributedDataParallel compares the ranks' parameter shapes by them. Nobody waits for anybody, and NCCL's
 * own buffers count 0 bytes.
 *
 * Signatures, types and codes as in NCCL's documentation ("API", "Types"). */
#define _GNU_SOURCE
#include "real.h"
#include "state.h"

#include <stdlib.h>
#include <string.h>

enum { NCCL_SUCCESS = 0, NCCL_SYSTEM_ERROR = 2, NCCL_INVALID_ARGUMENT = 4 };

typedef struct {
    char bytes[128];
} unique_id;

typedef struct {
    int ranks;
    int rank;
} communicator;

/* ncclInt8, Uint8, Int32, Uint32, Int64, Uint64, Float16, Float32, Float64, Bfloat16, Float8e4m3, Float8e5m2 */
static const size_t type_bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

static size_t bytes_of(size_t count, int type) {
    int known = type >= 0 && type < (int)(sizeof type_bytes / sizeof *type_bytes);
    return known ? count * type_bytes[type] : 0;
}

static void copy(void *to, size_t offset_to, const void *from, size_t offset_from, size_t bytes) {
    uint64_t target = (uint64_t)(uintptr_t)to + offset_to, source = (uint64_t)(uintptr_t)from + offset_from;
    if (target != source) abg_copy_device(target, source, bytes);
}

/* ---- communicators ------------------------------------------------------------------------------------------- */

ABG_EXPORT int ncclGetVersion(int *version) {
    int (*real)(int *) = (int (*)(int *))ABG_REAL("ncclGetVersion", "libnccl.so.2");
    return real ? real(version) : (*version = 0, 0);
}

ABG_EXPORT const char *ncclGetLastError(void *comm) {
    (void)comm;
    const char *text = abg_unsupported_text();
    return text ? text : "";
}

ABG_EXPORT const char *ncclGetErrorString(int status) { return status == 0 ? "no error" : ncclGetLastError(0); }

ABG_EXPORT int ncclGetUniqueId(unique_id *id) {
    memset(id, 1, sizeof *id);
    return NCCL_SUCCESS;
}

static int make(communicator **comm, int ranks, int rank) {
    if (!comm || ranks < 1 || rank < 0 || rank >= ranks) return NCCL_INVALID_ARGUMENT;
    *comm = malloc(sizeof **comm);
    if (!*comm) return NCCL_SYSTEM_ERROR;
    (*comm)->ranks = ranks;
    (*comm)->rank = rank;
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclCommInitRank(communicator **comm, int ranks, unique_id id, int rank) {
    (void)id;
    return make(comm, ranks, rank);
}

ABG_EXPORT int ncclCommInitRankConfig(communicator **comm, int ranks, unique_id id, int rank, void *config) {
    (void)config;
    return ncclCommInitRank(comm, ranks, id, rank);
}

ABG_EXPORT int ncclCommInitRankScalable(communicator **comm, int ranks, int rank, int count, unique_id *ids, void *config) {
    (void)count, (void)ids, (void)config;
    return make(comm, ranks, rank);
}

ABG_EXPORT int ncclCommInitAll(communicator **comms, int count, const int *devices) {
    (void)devices;
    for (int rank = 0; rank < count; rank++) {
        int status = make(&comms[rank], count, rank);
        if (status) return status;
    }
    return NCCL_SUCCESS;
}

/* How many take the same colour only the other processes know: the part is taken to be this one alone. */
ABG_EXPORT int ncclCommSplit(communicator *comm, int colour, int key, communicator **part, void *config) {
    (void)key, (void)config;
    if (!comm || !part) return NCCL_INVALID_ARGUMENT;
    if (colour < 0) return *part = NULL, NCCL_SUCCESS; /* NCCL_SPLIT_NOCOLOR */
    return make(part, 1, 0);
}

ABG_EXPORT int ncclCommFinalize(communicator *comm) { return comm ? NCCL_SUCCESS : NCCL_INVALID_ARGUMENT; }

ABG_EXPORT int ncclCommDestroy(communicator *comm) {
    free(comm);
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclCommAbort(communicator *comm) { return ncclCommDestroy(comm); }

ABG_EXPORT int ncclCommGetAsyncError(communicator *comm, int *status) {
    if (!comm || !status) return NCCL_INVALID_ARGUMENT;
    return *status = NCCL_SUCCESS;
}

ABG_EXPORT int ncclCommCount(const communicator *comm, int *count) {
    return comm && count ? (*count = comm->ranks, NCCL_SUCCESS) : NCCL_INVALID_ARGUMENT;
}

ABG_EXPORT int ncclCommUserRank(const communicator *comm, int *rank) {
    return comm && rank ? (*rank = comm->rank, NCCL_SUCCESS) : NCCL_INVALID_ARGUMENT;
}

ABG_EXPORT int ncclCommRegister(communicator *comm, void *buffer, size_t bytes, void **handle) {
    (void)buffer, (void)bytes;
    return comm && handle ? (*handle = comm, NCCL_SUCCESS) : NCCL_INVALID_ARGUMENT;
}

ABG_EXPORT int ncclCommDeregister(communicator *comm, void *handle) {
    return comm && handle ? NCCL_SUCCESS : NCCL_INVALID_ARGUMENT;
}

/* ---- groups ------------------------------------------------------------------------------------------------------ */

/* A gathering may come as a group of broadcasts, one from each rank: what this rank sends, the others are taken to send too. */
typedef struct {
    const void *from;
    void *to;
    size_t bytes;
    int is_own;
} sent;

static _Thread_local sent *group;
static _Thread_local size_t group_used, group_room;
static _Thread_local int group_depth;

static void remember_broadcast(const void *from, void *to, size_t bytes, int is_own) {
    if (group_used == group_room) {
        size_t room = group_room ? 2 * group_room : 16;
        sent *larger = realloc(group, room * sizeof *larger);
        if (!larger) return; /* its contents stay unknown, as most are */
        group = larger;
        group_room = room;
    }
    group[group_used++] = (sent){from, to, bytes, is_own};
}

static void end_group(void) {
    for (size_t own = 0; own < group_used; own++) {
        if (!group[own].is_own) continue;
        for (size_t other = 0; other < group_used; other++) {
            if (group[other].is_own || group[other].bytes != group[own].bytes) continue;
            copy(group[other].to, 0, group[own].from, 0, group[own].bytes);
        }
    }
    free(group);
    group = NULL;
    group_used = group_room = 0;
}

ABG_EXPORT int ncclGroupStart(void) {
    group_depth++;
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclGroupEnd(void) {
    if (group_depth > 0 && --group_depth == 0) end_group();
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclRedOpCreatePreMulSum(int *operation, void *scalar, int type, int residence, communicator *comm) {
    (void)scalar, (void)type, (void)residence;
    return comm && operation ? (*operation = 5, NCCL_SUCCESS) : NCCL_INVALID_ARGUMENT; /* the first after ncclAvg */
}

ABG_EXPORT int ncclRedOpDestroy(int operation, communicator *comm) {
    (void)operation;
    return comm ? NCCL_SUCCESS : NCCL_INVALID_ARGUMENT;
}

/* ---- collectives ----------------------------------------------------------------------------------------------- */

ABG_EXPORT int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, communicator *comm, void *stream) {
    (void)op, (void)stream;
    if (!comm) return NCCL_INVALID_ARGUMENT;
    copy(to, 0, from, 0, bytes_of(count, type));
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclReduce(const void *from, void *to, size_t count, int type, int op, int root, communicator *comm, void *stream) {
    if (comm && comm->rank != root) return NCCL_SUCCESS;
    return ncclAllReduce(from, to, count, type, op, comm, stream);
}

ABG_EXPORT int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, communicator *comm, void *stream) {
    if (comm && group_depth) remember_broadcast(from, to, bytes_of(count, type), comm->rank == root);
    return ncclAllReduce(from, to, count, type, 0, comm, stream);
}

ABG_EXPORT int ncclBcast(void *buffer, size_t count, int type, int root, communicator *comm, void *stream) {
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

ABG_EXPORT int ncclAllGather(const void *from, void *to, size_t count, int type, communicator *comm, void *stream) {
    (void)stream;
    if (!comm) return NCCL_INVALID_ARGUMENT;
    size_t bytes = bytes_of(count, type);
    for (int rank = 0; rank < comm->ranks; rank++) copy(to, rank * bytes, from, 0, bytes);
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, communicator *comm, void *stream) {
    (void)op, (void)stream;
    if (!comm) return NCCL_INVALID_ARGUMENT;
    size_t bytes = bytes_of(count, type);
    copy(to, 0, from, comm->rank * bytes, bytes);
    return NCCL_SUCCESS;
}

ABG_EXPORT int ncclSend(const void *from, size_t count, int type, int peer, communicator *comm, void *stream) {
    (void)from, (void)count, (void)type, (void)peer, (void)stream;
    return comm ? NCCL_SUCCESS : NCCL_INVALID_ARGUMENT;
}

ABG_EXPORT int ncclRecv(void *to, size_t count, int type, int peer, communicator *comm, void *stream) {
    (void)peer, (void)stream;
    if (!comm) return NCCL_INVALID_ARGUMENT;
    abg_forget_device((uint64_t)(uintptr_t)to, bytes_of(count, type));
    return NCCL_SUCCESS;
}
