// Device memory and pinned memory are both address space of this process; copies look up which is which.
#include "device.h"
#include <sys/mman.h>

typedef struct {
    char* begin;
    size_t bytes;
    Place place;
} Range;

static const size_t CONTEXT = (size_t)600 << 20; // what a context and its libraries take of a real device
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
static Range* ranges; // in ascending order
static size_t count, capacity, used;

size_t total_memory(void) {
    const char* text = getenv("NOCUDA_MEMORY");
    return text ? (size_t)atof(text) : (size_t)150754820096ull; // an H200 as torch reports it
}

// Index of the first range that begins after `address`.
static size_t after(const void* address) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].begin <= (const char*)address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static Range* find(const void* address) {
    size_t next = after(address);
    if (!next) return NULL;
    Range* range = ranges + next - 1;
    return (const char*)address < range->begin + range->bytes ? range : NULL;
}

static void add(char* begin, size_t bytes, Place place) {
    pthread_rwlock_wrlock(&lock);
    if (count == capacity) {
        capacity = capacity ? 2 * capacity : 1024;
        ranges = realloc(ranges, capacity * sizeof *ranges);
        if (!ranges) abort();
    }
    size_t at = after(begin);
    memmove(ranges + at + 1, ranges + at, (count - at) * sizeof *ranges);
    ranges[at] = (Range){begin, bytes, place};
    count++;
    if (place == ON_DEVICE) used += bytes;
    pthread_rwlock_unlock(&lock);
}

// Forget a range; its size, or 0 where there is none.
static size_t drop(void* begin) {
    pthread_rwlock_wrlock(&lock);
    Range* range = find(begin);
    size_t bytes = 0;
    if (range && range->begin == begin) {
        bytes = range->bytes;
        if (range->place == ON_DEVICE) used -= bytes;
        memmove(range, range + 1, (ranges + count - range - 1) * sizeof *ranges);
        count--;
    }
    pthread_rwlock_unlock(&lock);
    return bytes;
}

Place place_of(const void* address) {
    pthread_rwlock_rdlock(&lock);
    Range* range = find(address);
    Place place = range ? range->place : ON_HOST;
    pthread_rwlock_unlock(&lock);
    return place;
}

// Whether somebody computes what the device is asked to (NOCUDA_NUMBERS; numbers.py). If nobody does, what the device
// holds is no number: nothing is written to it, and the host reads zeros.
int numbers_count(void) {
    static int count = -1;
    if (count < 0) count = getenv("NOCUDA_NUMBERS") != NULL;
    return count;
}

void* map(size_t bytes, Place place) {
    if (!bytes) bytes = 4096;
    void* begin = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return NULL;
    add(begin, bytes, place);
    return begin;
}

void need_on_device(const char* who, const void* address) {
    if (address && place_of(address) != ON_DEVICE) fault("operand on the host", who);
}

cudaError_t cudaMalloc(void** out, size_t bytes) {
    *out = NULL;
    if (used + bytes + CONTEXT > total_memory()) return cudaErrorMemoryAllocation;
    *out = map(bytes, ON_DEVICE);
    note(MEMORY, "cudaMalloc", bytes, 0, 0);
    return *out ? OK : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* begin) {
    if (!begin) return OK;
    note(MEMORY, "cudaFree", 0, 0, 0); // it waits for the device, and torch calls it only when memory is short
    host_waits_for_all();
    size_t bytes = drop(begin);
    forget(begin, bytes);
    if (bytes) munmap(begin, bytes);
    return OK;
}

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned flags) {
    *out = map(bytes, PINNED);
    note(MEMORY, "cudaHostAlloc", bytes, 0, 0);
    return *out ? OK : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* begin) {
    host_waits_for_all(); // as the real one
    size_t bytes = drop(begin);
    forget(begin, bytes);
    if (bytes) munmap(begin, bytes);
    note(MEMORY, "cudaFreeHost", bytes, 0, 0);
    return OK;
}

// NOCUDA_PINNED: bytes that may be registered, to rehearse a host that refuses more.
cudaError_t cudaHostRegister(void* begin, size_t bytes, unsigned flags) {
    static size_t registered;
    const char* limit = getenv("NOCUDA_PINNED");
    if (limit && registered + bytes > (size_t)atof(limit)) return cudaErrorMemoryAllocation;
    registered += bytes;
    add(begin, bytes, PINNED);
    note(MEMORY, "cudaHostRegister", bytes, 0, 0);
    return OK;
}

cudaError_t cudaHostUnregister(void* begin) {
    host_waits_for_all();
    size_t bytes = drop(begin);
    forget(begin, bytes);
    note(MEMORY, "cudaHostUnregister", bytes, 0, 0);
    return OK;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    *total = total_memory();
    *available = *total - used - CONTEXT;
    return OK;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* out, const void* address) {
    memset(out, 0, sizeof *out);
    Place place = place_of(address);
    out->type = place == ON_DEVICE ? cudaMemoryTypeDevice : place == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (place != ON_HOST) out->devicePointer = (void*)address;
    if (place == PINNED) out->hostPointer = (void*)address;
    return OK;
}

CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr address) {
    if (place_of((void*)address) == ON_HOST) return CUDA_ERROR_INVALID_VALUE; // so Triton refuses tensors on the host
    *(CUdeviceptr*)out = address;
    return 0;
}

void copy_memory(void* to, const void* from, size_t bytes, const char* how, const void* stream) {
    Place target = place_of(to), source = place_of(from);
    const char* name;
    if (target == ON_DEVICE && source == ON_DEVICE) name = "device to device";
    else if (target == ON_DEVICE) name = source == PINNED ? "host to device, pinned" : "host to device, pageable";
    else if (source == ON_DEVICE) name = target == PINNED ? "device to host, pinned" : "device to host, pageable";
    else name = "host to host";
    const dim3 one = {1, 1, 1};
    record(COPY, name, one, one, 0, stream, bytes, 0, 0);
    if (how[0] == 's') note(WAIT, "copy that waits", bytes, 0, 0);
    if (bytes < LIMIT && to != from) {
        nocuda_open(1);
        if (numbers_count() || (target != ON_DEVICE && source != ON_DEVICE)) memmove(to, from, bytes);
        else if (target != ON_DEVICE) memset(to, 0, bytes);
        nocuda_open(0);
    }
    copy_by(stream, to, from, bytes, name);
    // the host waits for a copy from the device to memory that is not pinned, and for what is staged on its way there
    int pageable = (target == ON_DEVICE && source == ON_HOST) || (source == ON_DEVICE && target == ON_HOST);
    if (how[0] == 's' || pageable) host_waits_for_stream(stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
    copy_memory(to, from, bytes, "synchronous", 0);
    return OK;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    copy_memory(to, from, bytes, "asynchronous", stream);
    return OK;
}

cudaError_t cudaMemsetAsync(void* begin, int value, size_t bytes, cudaStream_t stream) {
    need_on_device("memset", begin);
    const dim3 one = {1, 1, 1};
    record(COPY, "memset", one, one, 0, stream, bytes, 0, 0);
    access_by(stream, begin, bytes, 1, "memset");
    if (bytes < LIMIT && numbers_count()) memset(begin, value, bytes);
    return OK;
}

cudaError_t cudaMemset(void* begin, int value, size_t bytes) { return cudaMemsetAsync(begin, value, bytes, 0); }

cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
    *out = map(4096, ON_DEVICE);
    return OK;
}
