// What the device says of itself, its streams and its events.
#include "device.h"
#include <time.h>

static __thread int current;

static const char* device_name(void) {
    const char* text = getenv("NOCUDA_NAME");
    return text ? text : "NVIDIA H200";
}

// Compute capability 9.0: CUDA C++ programming guide, table "technical specifications per compute capability".
int attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return THREADS_LIMIT;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return GRID_YZ_LIMIT;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_LIMIT;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrL2CacheSize: return 60 << 20;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    default: return 0;
    }
}

cudaError_t cudaGetDeviceCount(int* count) {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = !visible || *visible;
    return *count ? OK : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) { return *device = current, OK; }
cudaError_t cudaSetDevice(int device) { return current = device, OK; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, OK; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, OK; }
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int device) { return *value = attribute(which), OK; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", device_name());
    p->major = 9;
    p->totalGlobalMem = total_memory();
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = SHARED_LIMIT;
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_LIMIT;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    p->maxGridSize[1] = p->maxGridSize[2] = GRID_YZ_LIMIT;
    p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->asyncEngineCount = 3;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
    return OK;
}

cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int device) { return snprintf(out, size, "0000:00:00.0"), OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, OK; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the rehearsal"; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "nocuda"; }

// ---- streams and events

void* handle(void) { return calloc(1, 64); }

static double milliseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

cudaError_t cudaStreamCreate(cudaStream_t* out) { return *out = stream_made(1), OK; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
    return *out = stream_made(!(flags & cudaStreamNonBlocking)), OK;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* out) { return *out = 0, OK; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* out, unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* number) {
    return *out = 0, OK;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    note(WAIT, "stream", 0, 0, 0);
    return host_waits_for_stream(stream), OK;
}
cudaError_t cudaDeviceSynchronize(void) {
    note(WAIT, "device", 0, 0, 0);
    return host_waits_for_all(), OK;
}
cudaError_t cudaEventCreate(cudaEvent_t* out) { return *out = event_made(), OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) { return cudaEventCreate(out); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return event_gone(event), OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return event_recorded(event, stream, milliseconds()), OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    note(WAIT, "event", 0, 0, 0);
    return host_waits_for_event(event), OK;
}
cudaError_t cudaEventElapsedTime(float* out, cudaEvent_t from, cudaEvent_t to) {
    if (!event_is_over(from) || !event_is_over(to)) return cudaErrorNotReady;
    return *out = event_time(to) - event_time(from), OK;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return event_is_over(event) ? OK : cudaErrorNotReady; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return stream_is_over(stream) ? OK : cudaErrorNotReady; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return stream_waits(stream, event), OK; }

// ---- the driver's calls of the same kind

static int nothing(void) { return 0; }
static CUresult primary_state(CUdevice device, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    return *active = 1, 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult* result) {
    *out = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void*)nothing : (void*)primary_state;
    if (result) *result = cudaDriverEntryPointSuccess;
    return OK;
}
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, 0; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, 0; }
CUresult cuDeviceGetCount(int* count) { return (CUresult)cudaGetDeviceCount(count); }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) { return *value = attribute(which), 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) { return primary_state(device, flags, active); }
CUresult cuCtxGetCurrent(CUcontext* out) {
    static long context;
    return *out = (CUcontext)&context, 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) { return cuCtxGetCurrent(out); }
CUresult cuGetErrorString(CUresult error, const char** out) { return *out = "error of the rehearsal", 0; }

// ---- calls that have nothing to do here

cudaError_t cudaGetLastError(void) { return OK; }
cudaError_t cudaPeekAtLastError(void) { return OK; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) { return *priority = 0, OK; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) { return OK; }
cudaError_t cudaFuncSetAttribute(const void* stub, enum cudaFuncAttribute which, int value) { return OK; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) { return *can = 1, OK; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return OK; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, 0; } // Triton's buffer of printf
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
