// The record of what the host asked of the device.
#include "device.h"

typedef struct {
    Kind kind;
    const char* name;
    unsigned grid[3], block[3];
    size_t shared;
    const void* stream;
    long values[3]; // a copy's bytes, a product's m, n, k
    const char* where;
} Record;

static const char* const KINDS[] = {"launch", "product", "copy", "wait", "memory", "collective", "fault", "unknown"};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Record* records;
static long count, capacity;
static volatile int recording;

// Python's side gives the lines of its stack for records that need one: waits, faults and pageable copies.
static void (*locator)(char* out, int size);

static char traced[200]; // launches whose names hold this are located, too

void nocuda_locate(void (*function)(char*, int)) { locator = function; }

void nocuda_trace(const char* part) { snprintf(traced, sizeof traced, "%s", part); }

static int needs_place(Kind kind, const char* name) {
    if (kind == COPY) return strstr(name, "pageable") != NULL;
    if (kind == LAUNCH) return traced[0] && strstr(name, traced);
    return kind == WAIT || kind == FAULT;
}

void nocuda_record(int on) {
    pthread_mutex_lock(&lock);
    if (on) count = 0;
    recording = on;
    pthread_mutex_unlock(&lock);
}

long nocuda_count(void) { return count; }

const char* kept(const char* text) {
    enum { SLOTS = 1 << 16 };
    static char* table[SLOTS];
    static pthread_mutex_t names = PTHREAD_MUTEX_INITIALIZER;
    uint64_t hash = 1469598103934665603ull;
    for (const char* c = text; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211ull;
    pthread_mutex_lock(&names);
    size_t slot = hash % SLOTS;
    size_t first = slot;
    while (table[slot] && strcmp(table[slot], text)) {
        slot = (slot + 1) % SLOTS;
        if (slot == first) break; // full: the last text of that slot serves
    }
    if (!table[slot]) table[slot] = strdup(text);
    const char* result = table[slot];
    pthread_mutex_unlock(&names);
    return result;
}

void record(Kind kind, const char* name, dim3 grid, dim3 block, size_t shared, const void* stream, long a, long b, long c) {
    if (!recording) return;
    const char* where = "";
    if (locator && needs_place(kind, name)) {
        char text[2048] = "";
        locator(text, sizeof text); // before the lock: it runs Python
        where = kept(text);
    }
    pthread_mutex_lock(&lock);
    if (count == capacity) {
        capacity = capacity ? 2 * capacity : 1 << 16;
        records = realloc(records, capacity * sizeof *records);
        if (!records) abort();
    }
    records[count++] = (Record){kind, name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, stream, {a, b, c}, where};
    pthread_mutex_unlock(&lock);
}

void note(Kind kind, const char* name, long a, long b, long c) {
    const dim3 one = {1, 1, 1};
    record(kind, name, one, one, 0, 0, a, b, c);
}

void fault(const char* what, const char* where) {
    char text[512];
    snprintf(text, sizeof text, "%s: %s", what, where);
    if (recording) note(FAULT, kept(text), 0, 0, 0);
    else fprintf(stderr, "nocuda: %s\n", text);
}

const char* who_and_where(const char* name) {
    char where[2048] = "", text[2600];
    if (locator) locator(where, sizeof where);
    snprintf(text, sizeof text, "%s%s%s", name, *where ? " at " : "", where);
    return kept(text);
}

void unmodeled(const char* name) { note(UNKNOWN, name, 0, 0, 0); }

// Lines of kind, name, grid, block, shared bytes, stream, three numbers, where; separated by tabs. 0: written.
int nocuda_write(const char* path) {
    FILE* file = fopen(path, "w");
    if (!file) return 1;
    pthread_mutex_lock(&lock);
    for (long i = 0; i < count; i++) {
        const Record* r = records + i;
        fprintf(file, "%s\t%s\t%u,%u,%u\t%u,%u,%u\t%zu\t%p\t%ld,%ld,%ld\t%s\n", KINDS[r->kind], r->name, r->grid[0], r->grid[1],
                r->grid[2], r->block[0], r->block[1], r->block[2], r->shared, r->stream, r->values[0], r->values[1], r->values[2],
                r->where);
    }
    pthread_mutex_unlock(&lock);
    return fclose(file) != 0;
}
