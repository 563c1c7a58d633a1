// Kernels: their names are learned when libraries register them, their launches are checked and recorded.
#include "device.h"

// ---- names, by the address of the host's stub: an open hash table

typedef struct {
    const void* stub;
    const char* name;
} Kernel;

static Kernel* kernels;
static size_t number, slots;

static Kernel* slot(const void* stub) {
    size_t i = ((uintptr_t)stub >> 4) * 0x9E3779B97F4A7C15ull >> 24 & (slots - 1);
    while (kernels[i].stub && kernels[i].stub != stub) i = (i + 1) & (slots - 1);
    return kernels + i;
}

void** __cudaRegisterFatBinary(void* binary) { return handle(); }
void __cudaRegisterFatBinaryEnd(void** binary) {}
void __cudaUnregisterFatBinary(void** binary) {}
void __cudaRegisterVar(void** binary, char* host, char* device, const char* name, int a, size_t bytes, int b, int c) {}

void __cudaRegisterFunction(void** binary, const char* stub, char* device, const char* name, int limit, void* a, void* b, void* c,
                            void* d, int* e) {
    if (2 * number >= slots) {
        Kernel* old = kernels;
        size_t before = slots;
        slots = slots ? 4 * slots : 1 << 17;
        kernels = calloc(slots, sizeof *kernels);
        if (!kernels) abort();
        for (size_t i = 0; i < before; i++)
            if (old[i].stub) *slot(old[i].stub) = old[i];
        free(old);
    }
    Kernel* kernel = slot(stub);
    number += !kernel->stub;
    *kernel = (Kernel){stub, name};
}

static const char* name_of(const void* stub) {
    Kernel* kernel = slots ? slot(stub) : NULL;
    return kernel && kernel->stub ? kernel->name : "kernel without a name";
}

// ---- launches

static void launch(const char* name, dim3 grid, dim3 block, size_t shared, const void* stream) {
    char text[400];
    if (!grid.x || !grid.y || !grid.z || grid.y > GRID_YZ_LIMIT || grid.z > GRID_YZ_LIMIT || grid.x > 2147483647u) {
        snprintf(text, sizeof text, "%.200s with a grid of %u x %u x %u", name, grid.x, grid.y, grid.z);
        fault("impossible launch", text);
    }
    if ((size_t)block.x * block.y * block.z > THREADS_LIMIT || !block.x) {
        snprintf(text, sizeof text, "%.200s with a block of %u x %u x %u", name, block.x, block.y, block.z);
        fault("impossible launch", text);
    }
    if (shared > SHARED_LIMIT) {
        snprintf(text, sizeof text, "%.200s with %zu bytes of shared memory", name, shared);
        fault("impossible launch", text);
    }
    record(LAUNCH, name, grid, block, shared, stream, 0, 0, 0);
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} pushed[8];
static __thread int depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    pushed[depth].grid = grid;
    pushed[depth].block = block;
    pushed[depth].shared = shared;
    pushed[depth++].stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    depth--;
    *grid = pushed[depth].grid;
    *block = pushed[depth].block;
    *shared = pushed[depth].shared;
    *(void**)stream = pushed[depth].stream;
    return OK;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* stub) { return *out = (cudaKernel_t)stub, OK; }

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return launch(name_of(kernel), grid, block, shared, stream), OK;
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return launch(name_of(stub), grid, block, shared, stream), OK;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* stub, void** arguments) {
    return launch(name_of(stub), c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream), OK;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* out, const void* stub) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = THREADS_LIMIT;
    out->numRegs = 64;
    out->binaryVersion = out->ptxVersion = 90;
    out->maxDynamicSharedSizeBytes = SHARED_LIMIT;
    return OK;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub, int threads, size_t shared, unsigned f) {
    return *blocks = 2, OK;
}

// ---- the driver's, by which Triton launches

typedef struct {
    char name[160];
} Loaded;

CUresult cuModuleLoadData(CUmodule* out, const void* image) { return *out = handle(), 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
    Loaded* loaded = calloc(1, sizeof *loaded);
    snprintf(loaded->name, sizeof loaded->name, "triton:%s", name);
    return *out = (CUfunction)loaded, 0;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS_LIMIT : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
    dim3 grid = {c->gridDimX, c->gridDimY, c->gridDimZ}, block = {c->blockDimX, c->blockDimY, c->blockDimZ};
    return launch(((Loaded*)function)->name, grid, block, c->sharedMemBytes, c->hStream), 0;
}
CUresult cuOccupancyMaxActiveClusters(int* out, CUfunction function, const CUlaunchConfig* config) { return *out = 66, 0; }
