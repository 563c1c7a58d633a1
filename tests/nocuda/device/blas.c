// cuBLAS and cuBLASLt: products are recorded as m, n, k with their formats. Nothing is multiplied.
#include "device.h"

static const char* format(int type) {
    switch (type) {
    case 0: return "fp32";
    case 1: return "fp64";
    case 2: return "fp16";
    case 14: return "bf16";
    case 28: return "e4m3";
    case 29: return "e5m2";
    default: return "?";
    }
}

static void product(const char* name, long m, long n, long k, const void* a, const void* b, const void* c, const void* stream) {
    need_on_device(name, a);
    need_on_device(name, b);
    need_on_device(name, c);
    const dim3 one = {1, 1, 1};
    record(PRODUCT, name, one, one, 0, stream, m, n, k);
}

// A handle remembers its stream.
typedef struct {
    void* stream;
} Handle;

int cublasCreate_v2(void** out) { return *out = handle(), 0; }
int cublasDestroy_v2(void* h) { return free(h), 0; }
int cublasSetStream_v2(Handle* h, void* stream) { return h->stream = stream, 0; }
int cublasGetMathMode(void* h, int* mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void* h, int* mode) { return *mode = 0, 0; }
size_t cublasLtGetVersion(void) { return 130100; }

int cublasGemmEx(Handle* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int at, int lda, const void* b, int bt,
                 int ldb, const void* beta, void* c, int ct, int ldc, int compute, int algorithm) {
    char text[96];
    const char* adds = *(const float*)beta ? ", adds" : "";
    snprintf(text, sizeof text, "gemm %c%c %s -> %s%s", ta ? 'T' : 'N', tb ? 'T' : 'N', format(at), format(ct), adds);
    return product(kept(text), m, n, k, a, b, c, h->stream), 0;
}
int cublasSgemm_v2(Handle* h, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda, const float* b, int ldb,
                   const float* beta, float* c, int ldc) {
    return product("gemm fp32", m, n, k, a, b, c, h->stream), 0;
}
int cublasDgemm_v2(Handle* h, int ta, int tb, int m, int n, int k, const double* alpha, const double* a, int lda, const double* b, int ldb,
                   const double* beta, double* c, int ldc) {
    return product("gemm fp64", m, n, k, a, b, c, h->stream), 0;
}
int cublasGemmStridedBatchedEx(Handle* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int at, int lda,
                               long long sa, const void* b, int bt, int ldb, long long sb, const void* beta, void* c, int ct, int ldc,
                               long long sc, int batch, int compute, int algorithm) {
    return product("gemm, batched", m, n, k * (long)batch, a, b, c, h->stream), 0;
}
int cublasSgemmStridedBatched(Handle* h, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda, long long sa,
                              const float* b, int ldb, long long sb, const float* beta, float* c, int ldc, long long sc, int batch) {
    return product("gemm fp32, batched", m, n, k * (long)batch, a, b, c, h->stream), 0;
}

// ---- cuBLASLt, by which torch multiplies FP8

typedef struct {
    int type;
    uint64_t rows, columns;
} Layout;
typedef struct {
    int ta, tb, fast, scale_a, scale_b;
} Description;
enum { TRANSA = 3, TRANSB = 4, FAST_ACCUM = 25, A_SCALE_MODE = 31, B_SCALE_MODE = 32 }; // cublasLtMatmulDescAttributes_t

int cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *out = handle();
    return **out = (Layout){type, rows, columns}, 0;
}
int cublasLtMatrixLayoutDestroy(void* layout) { return free(layout), 0; }
int cublasLtMatmulDescCreate(void** out, int compute, int scale) { return *out = handle(), 0; }
int cublasLtMatmulDescDestroy(void* description) { return free(description), 0; }
int cublasLtMatmulDescSetAttribute(Description* d, int which, const void* value, size_t bytes) {
    switch (which) {
    case TRANSA: return d->ta = *(const int*)value, 0;
    case TRANSB: return d->tb = *(const int*)value, 0;
    case FAST_ACCUM: return d->fast = *(const int8_t*)value, 0;
    case A_SCALE_MODE: return d->scale_a = *(const int*)value, 0;
    case B_SCALE_MODE: return d->scale_b = *(const int*)value, 0;
    default: return 0;
    }
}
int cublasLtMatmulPreferenceCreate(void** out) { return *out = handle(), 0; }
int cublasLtMatmulPreferenceDestroy(void* preference) { return free(preference), 0; }
int cublasLtMatmulAlgoGetHeuristic(void* h, Description* d, Layout* a, Layout* b, Layout* c, Layout* out, void* preference, int wanted,
                                   void* results, int* found) {
    // block scales take two operands in e4m3: cuBLAS documentation, "1D and 2D block scaling for FP8 data types"
    int blocks = d->scale_a > 2 || d->scale_b > 2;
    if (blocks && (a->type == 29 || b->type == 29)) return *found = 0, 15; // CUBLAS_STATUS_NOT_SUPPORTED
    memset(results, 0, 96); // one cublasLtMatmulHeuristicResult_t: state 0 is success
    return *found = 1, 0;
}
int cublasLtMatmul(void* h, Description* d, const void* alpha, const void* a, Layout* la, const void* b, Layout* lb, const void* beta,
                   const void* c, Layout* lc, void* out, Layout* lout, const void* algorithm, void* space, size_t bytes, void* stream) {
    char text[128];
    snprintf(text, sizeof text, "gemm lt %c%c %s x %s -> %s, scales %d and %d%s%s", d->ta ? 'T' : 'N', d->tb ? 'T' : 'N', format(la->type),
             format(lb->type), format(lout->type), d->scale_a, d->scale_b, d->fast ? ", fast" : "", *(const float*)beta ? ", adds" : "");
    return product(kept(text), lout->rows, lout->columns, d->ta ? la->rows : la->columns, a, b, out, stream), 0;
}

// ---- settings, which change nothing that is recorded

int cublasSetMathMode(void* h, int mode) { return 0; }
int cublasSetPointerMode_v2(void* h, int mode) { return 0; }
int cublasSetWorkspace_v2(void* h, void* space, size_t bytes) { return need_on_device("cublasSetWorkspace", space), 0; }
int cublasLtMatmulPreferenceSetAttribute(void* preference, int which, const void* value, size_t bytes) { return 0; }
int cublasLtMatrixLayoutSetAttribute(void* layout, int which, const void* value, size_t bytes) { return 0; }
