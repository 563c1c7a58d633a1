/* Tokens from memory maps into batches, and the documents of rows, without the interpreter.
 *
 * Reading a memory map can fail: a disk error, or a file that was cut off while in use, arrives as the signal SIGBUS. Every
 * read of a map goes through `guarded`, which turns the signal into a return value; a bus error anywhere else stays what
 * it was. Nothing here allocates, and nothing calls Python: any number of threads may run it.
 *
 * native.py is the other side of each function and says what the arguments are. What comes from files and says where to read
 * is checked before (index_check.py); should an index change afterwards, what is found in it is wrong but lies within arrays.
 */
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST 0
#endif

/* Of this file, as it was compiled (setup.py): arguments of another version would be read as what they are not. */
EXPORT int64_t source_digest(void) { return SOURCE_DIGEST; }

/* ---- reads that may fail ---- */

static _Thread_local sigjmp_buf *volatile armed;
static _Thread_local const char *volatile failed_at;
static struct sigaction before;

static void on_bus_error(int number, siginfo_t *info, void *context) {
    if (armed != NULL) {
        failed_at = info->si_addr;
        siglongjmp(*armed, 1);
    }
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        sigaction(number, &before, NULL); /* back at the instruction it comes again, and ends the process */
    }
}

static void fill_bytes_of_bits(void);

/* Once per process. 0, or -1 where the system does not allow it. */
EXPORT int64_t catch_bus_errors(void) {
    struct sigaction own;
    fill_bytes_of_bits();
    memset(&own, 0, sizeof own);
    own.sa_sigaction = on_bus_error;
    /* NODEFER: the handler is left by a jump, after which the signal must not stay blocked */
    own.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&own.sa_mask);
    return sigaction(SIGBUS, &own, &before);
}

/* Address at which this thread's last failed read failed. */
EXPORT int64_t failed_address(void) { return (int64_t)(intptr_t)failed_at; }

/* Run `body(task)`: 1, or 0 when a read in it failed. What `body` did until then can be seen in volatile fields only. */
static int guarded(void (*body)(void *), void *task) {
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        armed = NULL;
        return 0;
    }
    armed = &here;
    body(task);
    armed = NULL;
    return 1;
}

/* ---- copying ---- */

/* Compiled for several kinds of processor; the one at hand picks its own when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef CLONES
#define CLONES
#endif

enum { PAGE = 4096 };

/* 1 when an id was negative or above `last`. */
typedef int (*copier)(const char *from, char *to, int64_t count, const char *next, int64_t last);

/* While one row is copied the next one, at an unrelated place, is fetched into the cache: that is what makes rows at random
 * places as fast as rows in order. A prefetch of an address that is not mapped does nothing.
 *
 * Each id is held against the vocabulary as it passes, in the type WIDE: the sign bit of `negative` is set by a negative id,
 * that of `above` by one for which last - id is negative. Compilers add up both after each round of the inner loop: rounds of 32
 * numbers of four bytes make that free, rounds of 16 cost a sixth of the time. */
#define COPIER(NAME, FROM, TO, WIDE)                                                                       \
    CLONES static int NAME(const char *from_, char *to_, int64_t count, const char *next, int64_t last_) { \
        const FROM *from = (const FROM *)from_;                                                            \
        TO *to = (TO *)to_;                                                                                \
        const WIDE last = (WIDE)last_;                                                                     \
        enum { LINE = 64, BYTES = sizeof(FROM) < 4 ? LINE : 2 * LINE, STEP = BYTES / sizeof(FROM) };       \
        WIDE negative = 0, above = 0;                                                                      \
        int64_t i = 0;                                                                                     \
        for (; i + STEP <= count; i += STEP) {                                                             \
            for (int at = 0; at < BYTES; at += LINE)                                                       \
                __builtin_prefetch(next + i * (int64_t)sizeof(FROM) + at);                                 \
            for (int k = 0; k < STEP; k++) {                                                               \
                negative |= (WIDE)from[i + k];                                                             \
                above |= last - (WIDE)from[i + k];                                                         \
                to[i + k] = (TO)from[i + k];                                                               \
            }                                                                                              \
        }                                                                                                  \
        if (i < count && i) { /* the rest once more in a whole round, with some tokens before it */        \
            __builtin_prefetch(next + i * (int64_t)sizeof(FROM));                                          \
            __builtin_prefetch(next + (count - 1) * (int64_t)sizeof(FROM));                                \
            from += count - STEP;                                                                          \
            to += count - STEP;                                                                            \
            for (int k = 0; k < STEP; k++) {                                                               \
                negative |= (WIDE)from[k];                                                                 \
                above |= last - (WIDE)from[k];                                                             \
                to[k] = (TO)from[k];                                                                       \
            }                                                                                              \
            return (int)((negative | above) >> (8 * sizeof(WIDE) - 1));                                    \
        }                                                                                                  \
        __builtin_prefetch(next);                                                                          \
        for (; i < count; i++) {                                                                           \
            negative |= (WIDE)from[i];                                                                     \
            above |= last - (WIDE)from[i];                                                                 \
            to[i] = (TO)from[i];                                                                           \
        }                                                                                                  \
        return (int)((negative | above) >> (8 * sizeof(WIDE) - 1));                                        \
    }
#define COPIERS(FROM, WIDE) COPIER(FROM##_to_32, FROM, int32_t, WIDE) COPIER(FROM##_to_64, FROM, int64_t, WIDE)
COPIERS(uint8_t, uint32_t)
COPIERS(int8_t, uint32_t)
COPIERS(int16_t, uint32_t)
COPIERS(int32_t, uint32_t)
COPIERS(int64_t, uint64_t)
COPIERS(uint16_t, uint32_t)

/* By the code of the type in an index file: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16. */
static const copier COPIER_OF[9][2] = {
    [1] = {uint8_t_to_32, uint8_t_to_64}, [2] = {int8_t_to_32, int8_t_to_64},   [3] = {int16_t_to_32, int16_t_to_64},
    [4] = {int32_t_to_32, int32_t_to_64}, [5] = {int64_t_to_32, int64_t_to_64}, [8] = {uint16_t_to_32, uint16_t_to_64},
};
static const int64_t BYTES_OF[9] = {0, 1, 1, 2, 4, 8, 0, 0, 2};

struct rows {
    const int64_t *const *maps;  /* [sources] of each, where its shards lie in memory: [shards], 0 for one that does not */
    const int64_t *codes;        /* [sources] code of its token type */
    const int64_t *lasts;        /* [sources] largest id of its vocabulary, that fits in the type WIDE; -1: it is not known */
    const int64_t *source_ids;   /* [rows] */
    const int64_t *shards;       /* [rows] shard of the source; -1: the row cannot be copied from one shard */
    const int64_t *begins;       /* [rows] first token in the shard */
    int64_t rows, length;        /* tokens of a row */
    int64_t wide;                /* 1: to int64, 0: to int32 */
    const int64_t *views;        /* [sources] address of a struct view, 0 for a source whose rows lie in one shard each */
    const int64_t *runs;         /* [rows] run of the view that holds the first token, 0 for a row of a source without */
    const int64_t *learned;      /* [sources] address of where the files of learned tokens of its shards lie in memory: [shards],
                                    0 for one that does not; 0 for a source whose tokens are all learned */
};

/* Runs of tokens that make the stream of a source. `begins` of its rows are places in that stream. */
struct view {
    const int64_t *starts;       /* [runs + 1] first token of each run in the stream, and the end of the last */
    const int64_t *shards;       /* [runs] */
    const int64_t *begins;       /* [runs] first token in the shard */
    int64_t runs;
};

/* A part of a row that lies in one place. */
struct part {
    int64_t row, at, run;        /* first token in the row; number of the run in a view */
    int64_t count;               /* tokens */
    const char *from;            /* NULL: it cannot be copied from a map */
    const unsigned char *bits;   /* the file of learned tokens; NULL: all are learned */
    int64_t bit;                 /* of the first token in it */
    int64_t width;               /* bytes of a token */
};

enum { TOGETHER = 16 };

struct finding {
    const struct rows *table;
    int64_t *runs;
    volatile int64_t row;
};

static void find_some(void *task) {
    struct finding *finding = task;
    const struct rows *table = finding->table;
    int64_t *runs = finding->runs;
    for (int64_t first = 0; first < table->rows; first += TOGETHER) {
        finding->row = first;
        const int64_t *starts[TOGETHER];
        int64_t tokens[TOGETHER], low[TOGETHER], runs_left[TOGETHER], most = 1;
        int number = (int)(table->rows - first < TOGETHER ? table->rows - first : TOGETHER);
        for (int i = 0; i < number; i++) {
            const struct view *view = (const struct view *)(intptr_t)table->views[table->source_ids[first + i]];
            starts[i] = view ? view->starts : NULL;
            tokens[i] = table->begins[first + i];
            low[i] = 0;
            runs_left[i] = view ? view->runs : 1;
            if (runs_left[i] > most) most = runs_left[i];
        }
        for (; most > 1; most -= most >> 1) {
            for (int i = 0; i < number; i++) __builtin_prefetch(&starts[i][low[i] + (runs_left[i] >> 1)]);
            for (int i = 0; i < number; i++) {
                int64_t half = runs_left[i] >> 1;
                if (!half) continue;
                /* no branch: which half it is cannot be foreseen */
                low[i] += -(int64_t)(starts[i][low[i] + half] <= tokens[i]) & half;
                runs_left[i] -= half;
            }
        }
        for (int i = 0; i < number; i++) runs[first + i] = low[i];
    }
    finding->row = table->rows;
}

/* Fill `runs` [rows]: of each row the last run that starts at its first token or before. Rows are looked for in step, so
 * that what one waits for in memory the others wait for at the same time. The number of rows, or -1 - row where a read failed. */
EXPORT int64_t find_runs(const struct rows *table, int64_t *runs) {
    struct finding finding = {table, runs, 0};
    return guarded(find_some, &finding) ? finding.row : -1 - finding.row;
}

/* Fill what is missing of a part that has row, place and run. */
static void locate(const struct rows *table, struct part *part) {
    int64_t source = table->source_ids[part->row], shard = table->shards[part->row], begin = table->begins[part->row] + part->at;
    const struct view *view = (const struct view *)(intptr_t)table->views[source];
    part->count = table->length - part->at;
    part->width = BYTES_OF[table->codes[source]];
    if (view) {
        int64_t within = begin - view->starts[part->run], left = view->starts[part->run + 1] - begin;
        if (left < part->count) part->count = left;
        shard = view->shards[part->run];
        begin = view->begins[part->run] + within;
    }
    int64_t map = shard < 0 ? 0 : table->maps[source][shard];
    const int64_t *learned = (const int64_t *)(intptr_t)table->learned[source];
    part->bits = NULL;
    part->bit = begin;
    if (map && learned) {
        part->bits = (const unsigned char *)(intptr_t)learned[shard];
        if (!part->bits) map = 0;
    }
    part->from = map ? (const char *)(intptr_t)map + begin * part->width : NULL;
}

static void begin_row(const struct rows *table, struct part *part, int64_t row) {
    part->row = row;
    part->at = 0;
    if (row >= table->rows) return;
    part->run = table->runs[row];
    locate(table, part);
}

/* Go on by `count` tokens of a part, to the next part where these are all. */
static void go_on(const struct rows *table, struct part *part, int64_t count) {
    part->at += count;
    part->count -= count;
    part->bit += count;
    if (part->from) part->from += count * part->width;
    if (part->count) return;
    if (part->at == table->length) {
        begin_row(table, part, part->row + 1);
        return;
    }
    part->run++;
    locate(table, part);
}

/* Eight bytes of 0 or 1 for each value of a byte, the lowest bit first. */
static uint64_t bytes_of_bits[256];

static void fill_bytes_of_bits(void) {
    for (int value = 0; value < 256; value++) {
        unsigned char bytes[8];
        for (int bit = 0; bit < 8; bit++) bytes[bit] = (unsigned char)(value >> bit & 1);
        memcpy(&bytes_of_bits[value], bytes, 8);
    }
}

/* `count` bits of a file, from `bit` on, into bytes of 0 or 1. No byte beyond the last bit is read. */
static void spread(const unsigned char *bits, int64_t bit, int64_t count, unsigned char *out) {
    const unsigned char *from = bits + (bit >> 3);
    int shift = (int)(bit & 7);
    for (; count >= 72; count -= 64, out += 64, from += 8) { /* mostly 64 of a kind */
        uint64_t word;
        memcpy(&word, from, 8);
        if (shift) word = word >> shift | (uint64_t)from[8] << (64 - shift);
        if (word == 0 || word == ~(uint64_t)0) {
            memset(out, (int)(word & 1), 64);
        } else {
            for (int byte = 0; byte < 8; byte++) memcpy(out + 8 * byte, &bytes_of_bits[word >> (8 * byte) & 255], 8);
        }
    }
    for (; count >= 8; count -= 8, out += 8, from++) {
        unsigned value = shift ? (unsigned)(from[0] >> shift) | (unsigned)from[1] << (8 - shift) : from[0];
        memcpy(out, &bytes_of_bits[value & 255], 8);
    }
    for (int64_t i = 0; i < count; i++) out[i] = (unsigned char)(from[(shift + i) >> 3] >> ((shift + i) & 7) & 1);
}

struct copying {
    const struct rows *table;
    volatile int64_t row;
    int64_t end;
    char *out;
    unsigned char *learned;      /* [end - begin, length - 1] whether each label is learned, NULL: not asked for */
};

/* Fetch into the cache what says where a row lies. */
static void fetch_runs(const struct rows *table, int64_t row) {
    if (row >= table->rows) return;
    const struct view *view = (const struct view *)(intptr_t)table->views[table->source_ids[row]];
    if (!view) return;
    __builtin_prefetch(&view->starts[table->runs[row]]);
    __builtin_prefetch(&view->shards[table->runs[row]]);
    __builtin_prefetch(&view->begins[table->runs[row]]);
}

/* Fetch one line of every page that a row lies in, all at once: finding out where a page is in memory takes longer than a line, and
 * a processor finds several at a time. */
static void fetch_pages(const struct rows *table, int64_t row) {
    struct part part = {0};
    for (begin_row(table, &part, row); part.row == row && row < table->rows; go_on(table, &part, part.count)) {
        if (!part.from) continue;
        const char *end = part.from + part.count * part.width;
        __builtin_prefetch(part.from);
        for (const char *page = (const char *)(((intptr_t)part.from | (PAGE - 1)) + 1); page < end; page += PAGE) __builtin_prefetch(page);
    }
}

/* One cursor copies, another is a row ahead of it and fetches into the cache: in step, token for token. */
static void copy_some(void *task) {
    struct copying *copying = task;
    const struct rows *table = copying->table;
    int64_t width = table->wide ? 8 : 4;
    struct part part = {0}, ahead = {0};
    begin_row(table, &part, copying->row);
    fetch_runs(table, copying->row + 2);
    fetch_pages(table, copying->row);
    fetch_pages(table, copying->row + 1);
    begin_row(table, &ahead, copying->row + 1);
    fetch_pages(table, copying->row + 2);
    fetch_runs(table, copying->row + 3);
    char *out = copying->out;
    unsigned char *learned = copying->learned;
    while (part.row < copying->end && part.from) {
        copying->row = part.row;
        int64_t source = table->source_ids[part.row], count = part.count;
        const char *next = part.from;
        if (ahead.row < table->rows) {
            if (ahead.count < count) count = ahead.count;
            /* where tokens are wider there, what is left over is fetched as it is read */
            if (ahead.from) next = ahead.from;
            if (ahead.bits && learned)
                for (int64_t at = ahead.bit >> 3; at <= (ahead.bit + count - 1) >> 3; at += 64) __builtin_prefetch(ahead.bits + at);
        }
        int beyond = COPIER_OF[table->codes[source]][table->wide](part.from, out, count, next, table->lasts[source]);
        if (beyond && table->lasts[source] >= 0) return;
        if (learned) {
            int64_t skip = part.at == 0; /* the first token of a row is no label */
            if (part.bits) spread(part.bits, part.bit + skip, count - skip, learned);
            else memset(learned, 1, (size_t)(count - skip));
            learned += count - skip;
        }
        out += count * width;
        if (ahead.row < table->rows) {
            go_on(table, &ahead, count);
            if (ahead.at == 0) {
                fetch_pages(table, ahead.row + 1);
                fetch_runs(table, ahead.row + 2);
            }
        }
        go_on(table, &part, count);
    }
    copying->row = part.row;
}

/* Rows [begin, end) of a table into `out` [end - begin, length], and which labels are learned into `learned`, unless it is NULL.
 * Returns `end`; or the first row that lies in no map, or that holds an id beyond its vocabulary, and is not to be used; or
 * -1 - row for one whose read failed. */
EXPORT int64_t copy_rows(const struct rows *table, int64_t begin, int64_t end, char *out, unsigned char *learned) {
    struct copying copying = {table, begin, end, out, learned};
    if (begin >= end) return end;
    return guarded(copy_some, &copying) ? copying.row : -1 - copying.row;
}

struct reading {
    const char *from;
    char *to;
    int64_t bytes;
};

static void read_some(void *task) {
    struct reading *reading = task;
    memcpy(reading->to, reading->from, (size_t)reading->bytes);
}

/* `bytes` bytes of a map. 1, or 0 when the read failed. */
EXPORT int64_t read_map(const char *from, char *to, int64_t bytes) {
    struct reading reading = {from, to, bytes};
    return guarded(read_some, &reading);
}

/* ---- documents ---- */

struct index {
    const char *pointers;        /* int64 [num_pointers] byte offset of each sequence, at any address */
    const char *documents;       /* int64 [entries + 1] first sequence of each document, at any address; NULL: each is one */
    int64_t num_pointers, entries, num_tokens, token_bytes;
    int64_t *sample;             /* [samples] first token of every step-th document */
    int64_t samples, step;
};

static int64_t load(const char *array, int64_t at) {
    int64_t value;
    memcpy(&value, array + 8 * at, 8);
    return value;
}

/* First token of a document; without a sequence at the end of the shard it starts where that ends. */
static int64_t first_token(const struct index *index, int64_t entry) {
    int64_t sequence = index->documents ? load(index->documents, entry) : entry;
    /* unsigned: a negative number, in an index that was changed after it was checked, is beyond the end too */
    if ((uint64_t)sequence >= (uint64_t)index->num_pointers) return index->num_tokens;
    return load(index->pointers, sequence) / index->token_bytes;
}

static void sample_some(void *task) {
    const struct index *index = task;
    for (int64_t i = 0; i < index->samples; i++) index->sample[i] = first_token(index, i * index->step);
}

/* Fill `sample`. 1, or 0 when reading the index failed. */
EXPORT int64_t sample_documents(struct index *index) { return guarded(sample_some, index); }

/* The first document that starts at `position` or later. */
static int64_t first_from(const struct index *index, int64_t position) {
    int64_t low = 0, high = index->samples;
    while (low < high) {
        int64_t middle = (low + high) >> 1;
        if (index->sample[middle] >= position) high = middle;
        else low = middle + 1;
    }
    int64_t after = low;
    low = after ? (after - 1) * index->step + 1 : 0;
    high = after * index->step < index->entries ? after * index->step : index->entries;
    while (low < high) {
        int64_t middle = (low + high) >> 1;
        if (first_token(index, middle) >= position) high = middle;
        else low = middle + 1;
    }
    return low;
}

struct numbering {
    const struct index *index;
    const int64_t *positions;    /* [number] */
    int64_t number;
    int64_t *found;              /* [number] out */
};

static void number_some(void *task) {
    const struct numbering *numbering = task;
    for (int64_t i = 0; i < numbering->number; i++)
        numbering->found[i] = first_from(numbering->index, numbering->positions[i]);
}

/* Of each position the first document that starts there or later. 1, or 0 when reading the index failed. */
EXPORT int64_t first_documents(const struct index *index, const int64_t *positions, int64_t number, int64_t *found) {
    struct numbering numbering = {index, positions, number, found};
    return guarded(number_some, &numbering);
}

struct searching {
    const int64_t *const *indexes; /* [sources] of each: [shards] address of a struct index, 0 for one that is not open */
    const int64_t *source_ids;   /* [rows] */
    const int64_t *shards;       /* [rows] shard of the source; -1: the row lies in several */
    const int64_t *begins;       /* [rows] first token in the shard */
    const int64_t *ends;         /* [rows] token after the last */
    int64_t rows;
    int64_t *counts;             /* [rows] out: how many documents start in each */
    int64_t *offsets;            /* [capacity] out: where, row by row */
    int64_t capacity;
    volatile int64_t row, used;  /* in and out: how far it came */
    volatile int64_t full;       /* out: 1 if it stopped for want of a place in `offsets` */
};

static void search_some(void *task) {
    struct searching *search = task;
    for (int64_t row = search->row; row < search->rows; row++) {
        int64_t shard = search->shards[row];
        int64_t opened = shard < 0 ? 0 : search->indexes[search->source_ids[row]][shard];
        search->row = row;
        if (!opened) return;
        const struct index *index = (const struct index *)(intptr_t)opened;
        int64_t begin = search->begins[row], used = search->used, previous = -1;
        for (int64_t entry = first_from(index, begin); entry < index->entries; entry++) {
            int64_t start = first_token(index, entry);
            if (start >= search->ends[row]) break;
            if (start < begin) continue; /* only in an index that was changed after it was checked */
            if (start == previous) continue; /* an empty document starts where the next one does: one start */
            if (used == search->capacity) {
                search->full = 1;
                return;
            }
            search->offsets[used++] = start - begin;
            previous = start;
        }
        search->counts[row] = used - search->used;
        search->used = used;
    }
    search->row = search->rows;
}

/* Where documents start in rows, from `row` on until the end, or to one whose index is not open, or whose
 * documents find no place in `offsets`. 1, or 0 when reading the index failed at `row`. */
EXPORT int64_t document_starts(struct searching *search) { return guarded(search_some, search); }

/* ---- arrays of batches ---- */

struct layout {
    const int64_t *counts;       /* [batches x rows] documents that start in each row */
    const int64_t *offsets;      /* where: ascending in each row, in [0, length] */
    int64_t batches, rows, length;
    int32_t *edges;              /* out: places at which stretches begin in a batch's line of rows x length, and its end */
    int64_t *edges_split;        /* [batches + 1] out: where each batch begins in edges */
    int64_t *ends;               /* out: places in the same line whose label belongs to another document */
    int64_t *ends_split;         /* [batches + 1] out */
};

EXPORT void lay_out(const struct layout *layout) {
    const int64_t *counts = layout->counts, *offsets = layout->offsets;
    int64_t length = layout->length;
    int32_t *edge = layout->edges;
    int64_t *end = layout->ends;
    for (int64_t batch = 0; batch < layout->batches; batch++) {
        layout->edges_split[batch] = edge - layout->edges;
        layout->ends_split[batch] = end - layout->ends;
        for (int64_t row = 0; row < layout->rows; row++) {
            int64_t first = row * length;
            *edge++ = (int32_t)first; /* a row begins a stretch, whether a document starts there or not */
            for (int64_t i = *counts++; i > 0; i--) {
                int64_t offset = *offsets++;
                if (offset == 0) continue;
                *end++ = first + offset - 1;
                if (offset < length) *edge++ = (int32_t)(first + offset); /* at `length` it is the last input's label */
            }
        }
        *edge++ = (int32_t)(layout->rows * length);
    }
    layout->edges_split[layout->batches] = edge - layout->edges;
    layout->ends_split[layout->batches] = end - layout->ends;
}

/* `mask` [count] is 1, or what it was where `kept`, but 0 at each of `places` [number]. */
EXPORT void mask_out(char *mask, int64_t count, const int64_t *places, int64_t number, int64_t kept) {
    if (!kept) memset(mask, 1, (size_t)count);
    for (int64_t i = 0; i < number; i++) mask[places[i]] = 0;
}

/* `out` counts from 0 within each stretch [edges[i], edges[i + 1]), `stretches` of them. */
EXPORT void count_up(const int32_t *edges, int64_t stretches, int32_t *out) {
    for (int64_t i = 0; i < stretches; i++) {
        int32_t *from = out + edges[i];
        int32_t length = edges[i + 1] - edges[i];
        for (int32_t k = 0; k < length; k++) from[k] = k;
    }
}
