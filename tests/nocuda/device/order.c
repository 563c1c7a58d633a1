// The order of what streams and the host do, with NOCUDA_ORDER=FILE: each access of memory is held against the accesses
// before it that conflict with it, and must come after them by a stream, an event or a wait of the host.
//
// Vector clocks (Mattern 1988; as race detectors of threads use them). A stream's clock knows, for each stream, up to
// which of its operations everything has happened before the stream's next one. An event keeps the clock of its stream; a
// wait for it joins the two. What the host has waited for has happened before all that it asks for from then on.
//
// The device is as slow as it may be: an event has happened when the host has waited for it, and not earlier. Pinned memory
// that a copy reads is read-only until then, and what a copy writes is closed altogether: an early access of the host,
// whoever makes it, is a fault of a page. Who the device's accesses are by comes from ordered.py, copies and collectives
// from here.
#define _GNU_SOURCE // the error code of a fault
#include "device.h"
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

enum { STREAMS = 32, PAGE = 4096 }; // streams that do something; torch makes more

typedef struct {
    uint32_t at[STREAMS];
} Clock;
typedef struct {
    int index, blocking; // 0: the legacy stream, or none yet
} Stream;
typedef struct {
    double milliseconds;
    Clock clock;
} Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Clock host, clocks[STREAMS];
static int blocking[STREAMS], streams = 1;
static long accesses, guarded, found;

int order_counts(void) {
    static int counts = -1;
    if (counts < 0) counts = getenv("NOCUDA_ORDER") != NULL;
    return counts;
}

static void join(Clock* into, const Clock* other) {
    for (int i = 0; i < streams; i++)
        if (other->at[i] > into->at[i]) into->at[i] = other->at[i];
}

static int knows(const Clock* clock, const Clock* other) {
    for (int i = 0; i < streams; i++)
        if (other->at[i] > clock->at[i]) return 0;
    return 1;
}

static int index_of(const void* stream) {
    if ((uintptr_t)stream <= 2) return 0; // legacy, and the names of the default streams
    Stream* s = (Stream*)stream;
    if (!s->index) {
        if (streams == STREAMS) {
            fprintf(stderr, "nocuda: more than %d streams are in use\n", STREAMS);
            abort();
        }
        blocking[streams] = s->blocking;
        s->index = streams++;
    }
    return s->index;
}

// The stream is given work: all that the host has waited for is before it.
static int given(const void* stream) {
    int s = index_of(stream);
    join(clocks + s, &host);
    for (int i = 1; i < streams; i++) { // CUDA programming guide, "legacy default stream"
        if (s == 0 && blocking[i]) join(clocks, clocks + i);
        if (s == i && blocking[i]) join(clocks + s, clocks);
    }
    return s;
}

static void tell(const char* what, const char* now, const char* before) {
    enum { SEEN = 4096 };
    static const char* seen[SEEN];
    static int number;
    char text[2600];
    snprintf(text, sizeof text, "%s: %.900s%s%.900s", what, now, *before ? "; before it, unordered: " : "", before);
    const char* whole = kept(text);
    for (int i = 0; i < number; i++)
        if (seen[i] == whole) return;
    if (number < SEEN) seen[number++] = whole;
    found++;
    fault("order", whole);
    FILE* file = fopen(getenv("NOCUDA_ORDER"), "a");
    if (!file) abort();
    fprintf(file, "%s\n", whole);
    fclose(file);
}

// ---- what was accessed last: disjoint ranges in ascending order

typedef struct {
    const char *begin, *end;
    int writer; // a stream, or -1
    uint32_t written;
    const char* write;
    uint32_t read[STREAMS]; // 0: never
    const char* reads[STREAMS];
} Segment;

static Segment** segments;
static size_t number, room;

static size_t first_after(const char* address) { // the first segment that ends after it
    size_t low = 0, high = number;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (segments[middle]->end <= address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static Segment* insert(size_t at, const char* begin, const char* end) {
    if (number == room) {
        room = room ? 2 * room : 1024;
        segments = realloc(segments, room * sizeof *segments);
        if (!segments) abort();
    }
    memmove(segments + at + 1, segments + at, (number++ - at) * sizeof *segments);
    Segment* made = segments[at] = calloc(1, sizeof *made);
    if (!made) abort();
    made->begin = begin;
    made->end = end;
    made->writer = -1;
    return made;
}

static void cut(const char* address) { // so that no segment reaches across it
    size_t at = first_after(address);
    if (at == number || segments[at]->begin >= address) return;
    Segment* whole = segments[at];
    Segment* left = insert(at, whole->begin, address);
    const char* begin = left->begin;
    *left = *whole;
    left->begin = begin;
    left->end = whole->begin = address;
}

static void erase(size_t from, size_t to) {
    for (size_t i = from; i < to; i++) free(segments[i]);
    memmove(segments + from, segments + to, (number - to) * sizeof *segments);
    number -= to - from;
}

static void check(const Segment* segment, int s, int writes, const char* who) {
    const Clock* clock = clocks + s;
    int writer = segment->writer;
    if (writer >= 0 && writer != s && segment->written > clock->at[writer])
        tell(writes ? "written on two streams" : "read before it is written", who, segment->write);
    for (int i = 0; writes && i < streams; i++)
        if (i != s && segment->read[i] > clock->at[i]) tell("written before it is read", who, segment->reads[i]);
}

static uint32_t access_locked(const void* stream, const char* begin, size_t bytes, int writes, const char* who) {
    const char* end = begin + bytes;
    int s = given(stream);
    uint32_t now = ++clocks[s].at[s];
    accesses++;
    cut(begin);
    cut(end);
    size_t at = first_after(begin), last = at;
    const char* reached = begin;
    while (reached < end) {
        if (last < number && segments[last]->begin <= reached) {
            check(segments[last], s, writes, who);
            reached = segments[last]->end;
        } else {
            const char* next = last < number && segments[last]->begin < end ? segments[last]->begin : end;
            insert(last, reached, next);
            reached = next;
        }
        Segment* segment = segments[last++];
        if (!writes) {
            segment->read[s] = now;
            segment->reads[s] = who;
        }
    }
    if (writes) { // it comes after all before it, or was told of: one segment is enough from now on
        erase(at, last);
        Segment* segment = insert(at, begin, end);
        segment->writer = s;
        segment->written = now;
        segment->write = who;
    }
    return now;
}

void access_by(const void* stream, const void* begin, size_t bytes, int writes, const char* who) {
    if (!order_counts() || !bytes) return;
    const char* name = who_and_where(who); // before the lock: it runs Python
    pthread_mutex_lock(&lock);
    access_locked(stream, begin, bytes, writes, name);
    pthread_mutex_unlock(&lock);
}

// Python's side: a stream's work reads or writes device memory. `who` says where, too.
void nocuda_access(const void* stream, const void* begin, size_t bytes, int writes, const char* who) {
    if (!order_counts() || !bytes || place_of(begin) != ON_DEVICE) return;
    const char* name = kept(who);
    pthread_mutex_lock(&lock);
    access_locked(stream, begin, bytes, writes, name);
    pthread_mutex_unlock(&lock);
}

// ---- pinned memory that copies are at

typedef struct {
    char *begin, *end;
    int stream, writes;
    uint32_t time;
    const char* who;
} Guard;

static Guard* guards;
static size_t guards_number, guards_room;
static struct sigaction before;

static char* down(const char* address) { return (char*)((uintptr_t)address & ~(uintptr_t)(PAGE - 1)); }
static char* up(const char* address) { return down(address + PAGE - 1); }

static void protect(const Guard* g) { mprotect(down(g->begin), up(g->end) - down(g->begin), g->writes ? PROT_NONE : PROT_READ); }

// The strictest guard of a page is that of what writes to it.
static void protect_again(const char* from, const char* to) {
    for (int writes = 0; writes < 2; writes++)
        for (size_t i = 0; i < guards_number; i++)
            if (guards[i].writes == writes && down(guards[i].begin) < to && up(guards[i].end) > from) protect(guards + i);
}

static void open_pages(const char* begin, const char* end) { mprotect(down(begin), up(end) - down(begin), PROT_READ | PROT_WRITE); }

// The host knows more: what is over is open again.
static void settle(void) {
    for (size_t i = 0; i < guards_number;) {
        Guard g = guards[i];
        if (g.time > host.at[g.stream]) {
            i++;
            continue;
        }
        guards[i] = guards[--guards_number];
        open_pages(g.begin, g.end);
        protect_again(down(g.begin), up(g.end));
    }
}

static void on_fault(int signal, siginfo_t* info, void* context) {
    char* address = info->si_addr;
    int writing = (((ucontext_t*)context)->uc_mcontext.gregs[REG_ERR] & 2) != 0, ours = 0;
    const char* where = who_and_where("the host");
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < guards_number;) {
        Guard g = guards[i];
        if (address < down(g.begin) || address >= up(g.end)) {
            i++;
            continue;
        }
        ours = 1; // opened for good: the instruction is to go on
        if (address >= g.begin && address < g.end)
            tell(writing ? "pinned memory is written before a copy is known to have ended" : "pinned memory is read too early", where,
                 g.who);
        guards[i] = guards[--guards_number];
        open_pages(g.begin, g.end);
    }
    if (ours) protect_again(down(address) - PAGE, down(address)); // neighbors of what was opened stay as they were
    pthread_mutex_unlock(&lock);
    if (!ours) sigaction(SIGSEGV, &before, NULL); // a fault of somebody else: it comes again at once
}

// The shim and numbers.py compute what the device would later: pinned memory is open to them. 1: open, 0: as it was.
void nocuda_open(int open) {
    if (!order_counts()) return;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < guards_number; i++)
        if (open) open_pages(guards[i].begin, guards[i].end);
    if (!open) protect_again(NULL, (char*)UINTPTR_MAX);
    pthread_mutex_unlock(&lock);
}

// A copy was asked for: what it reads and writes, the host's part of it guarded.
void copy_by(const void* stream, void* to, const void* from, size_t bytes, const char* name) {
    if (!order_counts() || !bytes) return;
    const char* who = who_and_where(name);
    pthread_mutex_lock(&lock);
    uint32_t time = 0;
    if (place_of(from) == ON_DEVICE) time = access_locked(stream, from, bytes, 0, who);
    if (place_of(to) == ON_DEVICE) time = access_locked(stream, to, bytes, 1, who);
    for (int writes = 0; time && writes < 2; writes++) {
        char* memory = writes ? to : (char*)from;
        if (place_of(memory) != PINNED) continue;
        if (guards_number == guards_room) {
            guards_room = guards_room ? 2 * guards_room : 256;
            guards = realloc(guards, guards_room * sizeof *guards);
            if (!guards) abort();
        }
        if (!guarded++) {
            struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
            sigaction(SIGSEGV, &action, &before);
        }
        guards[guards_number++] = (Guard){memory, memory + bytes, index_of(stream), writes, time, who};
        protect_again(down(memory), up(memory + bytes));
    }
    pthread_mutex_unlock(&lock);
}

// Memory is given back: nothing of it is remembered, and it is open.
void forget(const void* begin, size_t bytes) {
    if (!order_counts()) return;
    const char *from = begin, *to = from + bytes;
    pthread_mutex_lock(&lock);
    cut(from);
    cut(to);
    erase(first_after(from), first_after(to));
    for (size_t i = 0; i < guards_number;) {
        if (guards[i].begin >= to || guards[i].end <= from) {
            i++;
            continue;
        }
        open_pages(guards[i].begin, guards[i].end);
        guards[i] = guards[--guards_number];
    }
    pthread_mutex_unlock(&lock);
}

// ---- streams, events, waits

void* stream_made(int waits_for_legacy) {
    Stream* made = calloc(1, 64);
    made->blocking = waits_for_legacy;
    return made;
}

void* event_made(void) { return calloc(1, sizeof(Event)); }
void event_gone(void* event) { free(event); }
double event_time(const void* event) { return ((const Event*)event)->milliseconds; }

void event_recorded(void* event, const void* stream, double milliseconds) {
    Event* e = event;
    e->milliseconds = milliseconds;
    if (!order_counts()) return;
    pthread_mutex_lock(&lock);
    e->clock = clocks[given(stream)];
    pthread_mutex_unlock(&lock);
}

void stream_waits(const void* stream, const void* event) {
    if (!order_counts()) return;
    pthread_mutex_lock(&lock);
    join(clocks + given(stream), &((const Event*)event)->clock);
    pthread_mutex_unlock(&lock);
}

static void host_knows(const Clock* clock) {
    join(&host, clock);
    settle();
}

void host_waits_for_event(const void* event) {
    if (!order_counts()) return;
    pthread_mutex_lock(&lock);
    host_knows(&((const Event*)event)->clock);
    pthread_mutex_unlock(&lock);
}

void host_waits_for_stream(const void* stream) {
    if (!order_counts()) return;
    pthread_mutex_lock(&lock);
    host_knows(clocks + given(stream));
    pthread_mutex_unlock(&lock);
}

void host_waits_for_all(void) {
    if (!order_counts()) return;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < streams; i++) host_knows(clocks + i);
    pthread_mutex_unlock(&lock);
}

// NCCL's watchdog polls until a collective is over. What it learns the rest of the program does not.
static int polls(void) {
    char name[32] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    return !strncmp(name, "pt_nccl", 7);
}

int event_is_over(const void* event) { return !order_counts() || polls() || knows(&host, &((const Event*)event)->clock); }
int stream_is_over(const void* stream) { return !order_counts() || knows(&host, clocks + index_of(stream)); }

// The last line of the file: how much was looked at.
__attribute__((destructor)) static void conclude(void) {
    if (!order_counts() || !accesses) return;
    FILE* file = fopen(getenv("NOCUDA_ORDER"), "a");
    if (!file) return;
    fprintf(file, "accesses %ld, guarded copies %ld, streams %d, found %ld, process %d\n", accesses, guarded, streams, found, getpid());
    fclose(file);
}
