// A CUDA device that computes nothing, for rehearsals: what its parts share.
//
// The library is preloaded before a CUDA build of torch. It answers the calls of the CUDA runtime, the CUDA driver,
// cuBLAS and NCCL. Host code, torch's allocator, autograd, streams, events, NCCL's wrappers and Triton's compiler
// and launcher run for real. Device memory is host memory that is only touched when somebody writes to it. Kernels
// and products are recorded and left out.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cudaGetDeviceProperties
#undef cuDeviceGetAttribute
#undef cuDevicePrimaryCtxRetain

enum { OK = 0, SHARED_LIMIT = 232448, THREADS_LIMIT = 1024, GRID_YZ_LIMIT = 65535 };
static const size_t LIMIT = (size_t)64 << 20; // copies of more bytes are not made even where numbers count

// What a record is. The names are those of KINDS in record.c.
typedef enum { LAUNCH, PRODUCT, COPY, WAIT, MEMORY, COLLECTIVE, FAULT, UNKNOWN } Kind;

// record.c
void record(Kind kind, const char* name, dim3 grid, dim3 block, size_t shared, const void* stream, long a, long b, long c);
void note(Kind kind, const char* name, long a, long b, long c); // a record without a launch's sizes
void fault(const char* what, const char* where);
const char* kept(const char* text); // the same text, kept for as long as the process lives
void unmodeled(const char* name);   // a call that has no meaning here was made
const char* who_and_where(const char* name); // the name and the lines of Python that called

// memory.c
typedef enum { ON_HOST, PINNED, ON_DEVICE } Place;
Place place_of(const void* address);
void* map(size_t bytes, Place place);
void copy_memory(void* to, const void* from, size_t bytes, const char* how, const void* stream);
void need_on_device(const char* who, const void* address);
size_t total_memory(void);
int numbers_count(void);

// order.c; each does nothing without NOCUDA_ORDER
int order_counts(void);
void access_by(const void* stream, const void* begin, size_t bytes, int writes, const char* who);
void copy_by(const void* stream, void* to, const void* from, size_t bytes, const char* name);
void nocuda_open(int open);
void forget(const void* begin, size_t bytes);
void* stream_made(int waits_for_legacy);
void* event_made(void);
void event_gone(void* event);
double event_time(const void* event);
void event_recorded(void* event, const void* stream, double milliseconds);
void stream_waits(const void* stream, const void* event);
void host_waits_for_event(const void* event);
void host_waits_for_stream(const void* stream);
void host_waits_for_all(void);
int event_is_over(const void* event);
int stream_is_over(const void* stream);

// device.c
int attribute(int which);
void* handle(void);
