/* CUDA's built-ins for a host compiler: the text of kernels (codegen/gpu/cuda.py) is compiled as it stands, behind this header, and
   cuda_emulate.cpp runs its threads as fibers. A parameter is a span, which knows how many elements it has; arrays of a kernel's own are
   checked by -fsanitize=bounds, whose report __ubsan_handle_out_of_bounds is here. */
#pragma once

struct lt_dim { unsigned x, y, z; };
struct lt_arg { void* p; long long n; };
struct lt_block {
    lt_dim thread, block, group, grid;
    void (*barrier)(int line);
    const void* (*exchange)(const void* mine, int bytes, int line);
    void (*fault)(const char* buffer, long long index, long long extent, int line);
    void (*access)(void* p, int bytes, int writes);
    char *shared, *shared_end; /* the memory of __shared__ arrays */
};

#define LT_UNSEEN __attribute__((no_sanitize("thread"), noinline))
static lt_block* lt_now;
extern "C" __attribute__((weak, visibility("hidden"))) char __start_lt_shared[], __stop_lt_shared[];
extern "C" LT_UNSEEN void lt_bind(lt_block* b) { lt_now = b; b->shared = __start_lt_shared; b->shared_end = __stop_lt_shared; }

#define threadIdx (lt_now->thread)
#define blockIdx (lt_now->block)
#define blockDim (lt_now->group)
#define gridDim (lt_now->grid)
#define __global__
#define __device__ static
#define __forceinline__ inline
#define __shared__ static __attribute__((section("lt_shared")))
#define __launch_bounds__(n)
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads() lt_now->barrier(__LINE__)

template <class T> struct lt_span {
    T* p;
    long long n;
    const char* name;
    T& operator[](long long i) const {
        if (__builtin_expect((unsigned long long)i >= (unsigned long long)n, 0)) lt_now->fault(name, i, n, 0);
        return p[i];
    }
};
template <class T> static inline T lt_value(const lt_arg& a) { T v; __builtin_memcpy(&v, &a.p, sizeof v); return v; }

/* what -fsanitize=bounds calls: where, and the array's type */
struct lt_place { const char* file; unsigned line, column; };
struct lt_type { unsigned short kind, info; char name[1]; };
struct lt_bound { lt_place at; lt_type *array, *index; };
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(lt_bound* b, unsigned long i) {
    lt_now->fault(b->array->name, (long)i, -1, (int)b->at.line);
}

#define LT_VECTORS(T, N) \
    struct alignas(2 * sizeof(T)) N##2 { T x, y; }; \
    struct alignas(4 * sizeof(T)) N##4 { T x, y, z, w; }; \
    static inline N##2 make_##N##2(T x, T y) { return {x, y}; } \
    static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LT_VECTORS(float, float)
LT_VECTORS(int, int)
LT_VECTORS(unsigned, uint)
LT_VECTORS(short, short)
LT_VECTORS(unsigned short, ushort)
LT_VECTORS(signed char, char)
LT_VECTORS(unsigned char, uchar)

#define LT_MATH(T, S, B) \
    static inline T fabs##S(T x) { return __builtin_fabs##B(x); } \
    static inline T floor##S(T x) { return __builtin_floor##B(x); } \
    static inline T ceil##S(T x) { return __builtin_ceil##B(x); } \
    static inline T rint##S(T x) { return __builtin_rint##B(x); } \
    static inline T trunc##S(T x) { return __builtin_trunc##B(x); } \
    static inline T sqrt##S(T x) { return __builtin_sqrt##B(x); } \
    static inline T rsqrt##S(T x) { return 1 / __builtin_sqrt##B(x); } \
    static inline T fmod##S(T x, T y) { return __builtin_fmod##B(x, y); }
LT_MATH(float, f, f)
LT_MATH(double, , )
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

template <class R, class T> static inline R lt_bits(T x) { static_assert(sizeof(R) == sizeof(T), ""); R r; __builtin_memcpy(&r, &x, sizeof r); return r; }
static inline float __int_as_float(int x) { return lt_bits<float>(x); }
static inline int __float_as_int(float x) { return lt_bits<int>(x); }
static inline double __longlong_as_double(long long x) { return lt_bits<double>(x); }
static inline long long __double_as_longlong(double x) { return lt_bits<long long>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

static inline int __dp4a(int a, int b, int c) {
    for (int k = 0; k < 32; k += 8) c += (int)(signed char)(a >> k) * (signed char)(b >> k);
    return c;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int k = 0; k < 32; k += 8) c += (a >> k & 255) * (b >> k & 255);
    return c;
}

/* conversions stop at the ends of the range, NaN is 0 (of 64 bits: the printer asks for it) */
#define LT_CONVERT(T, F, I, N, LO, HI, END) \
    static inline I __##F##2##N##_rz(T x) { return x != x ? 0 : x <= (T)LO ? (I)LO : x >= (T)END ? (I)HI : (I)x; }
LT_CONVERT(float, float, int, int, (-2147483647 - 1), 2147483647, 2147483648.0)
LT_CONVERT(float, float, unsigned, uint, 0, 4294967295u, 4294967296.0)
LT_CONVERT(float, float, long long, ll, (-9223372036854775807ll - 1), 9223372036854775807ll, 9223372036854775808.0)
LT_CONVERT(float, float, unsigned long long, ull, 0, 18446744073709551615ull, 18446744073709551616.0)
LT_CONVERT(double, double, int, int, (-2147483647 - 1), 2147483647, 2147483648.0)
LT_CONVERT(double, double, unsigned, uint, 0, 4294967295u, 4294967296.0)
LT_CONVERT(double, double, long long, ll, (-9223372036854775807ll - 1), 9223372036854775807ll, 9223372036854775808.0)
LT_CONVERT(double, double, unsigned long long, ull, 0, 18446744073709551615ull, 18446744073709551616.0)

#ifdef __SANITIZE_THREAD__
/* what -fsanitize=thread calls before every access: cuda_emulate.cpp looks for two of different threads with no barrier between them */
#define LT_ACCESS(N) \
    extern "C" LT_UNSEEN __attribute__((visibility("hidden"))) void __tsan_read##N(void* p) { lt_now->access(p, N, 0); } \
    extern "C" LT_UNSEEN __attribute__((visibility("hidden"))) void __tsan_write##N(void* p) { lt_now->access(p, N, 1); } \
    extern "C" LT_UNSEEN __attribute__((visibility("hidden"))) void __tsan_unaligned_read##N(void* p) { lt_now->access(p, N, 0); } \
    extern "C" LT_UNSEEN __attribute__((visibility("hidden"))) void __tsan_unaligned_write##N(void* p) { lt_now->access(p, N, 1); }
LT_ACCESS(1)
LT_ACCESS(2)
LT_ACCESS(4)
LT_ACCESS(8)
LT_ACCESS(16)
extern "C" LT_UNSEEN __attribute__((visibility("hidden"))) void __tsan_read_range(void* p, long n) { lt_now->access(p, (int)n, 0); }
extern "C" LT_UNSEEN __attribute__((visibility("hidden"))) void __tsan_write_range(void* p, long n) { lt_now->access(p, (int)n, 1); }
extern "C" __attribute__((visibility("hidden"))) void __tsan_init() {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_func_exit() {}
#endif

/* threads run one at a time, and change only where they wait */
LT_UNSEEN static unsigned atomicAnd(unsigned* p, unsigned v) { unsigned old = *p; *p = old & v; return old; }
LT_UNSEEN static unsigned atomicOr(unsigned* p, unsigned v) { unsigned old = *p; *p = old | v; return old; }

/* lanes of a warp: every lane gives its value, and all have arrived before one takes another's */
template <class T> static inline T lt_lane(T x, int lane, int line) {
    const char* all = (const char*)lt_now->exchange(&x, sizeof x, line);
    T r;
    __builtin_memcpy(&r, all + 16 * (lane & 31), sizeof r);
    return r;
}
static inline int lt_own() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31; }
#define __shfl_xor_sync(mask, x, k) lt_lane(x, lt_own() ^ (k), __LINE__)
#define __shfl_sync(mask, x, k) lt_lane(x, k, __LINE__)
#define __syncwarp() (void)lt_lane(0, 0, __LINE__)

/* what the printer writes as PTX for a GPU */
static inline float lt_half_to_float(unsigned h) {
    unsigned sign = (h & 0x8000) << 16, x = (h & 0x7fff) << 13;
    float v = (h & 0x7c00) == 0 ? (float)(h & 0x3ff) * 0x1p-24f : __int_as_float((h & 0x7c00) == 0x7c00 ? x | 0x7f800000 : x + 0x38000000);
    return __int_as_float(__float_as_int(v) | sign);
}
static inline unsigned lt_float_to_half(float v) {
    unsigned b = __float_as_int(v), a = b & 0x7fffffff, r;
    if (a >= 0x47800000) r = a > 0x7f800000 ? 0x7e00 : 0x7c00;
    else if (a < 0x38800000) r = (unsigned)rintf(__int_as_float(a) * 0x1p24f);
    else r = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
    return r | (b >> 16 & 0x8000);
}

/* Four matrices of eight rows of eight 16-bit elements, whose rows lanes give the addresses of; transposed. Lane l gets elements 2 (l % 4) and the next
   of column l / 4 of each. */
static inline void lt_ldmatrix(unsigned* r, const unsigned short* p) {
    const char* all = (const char*)lt_now->exchange(&p, sizeof p, __LINE__);
    int l = lt_own();
    for (int q = 0; q < 4; q++) {
        unsigned v[2];
        for (int e = 0; e < 2; e++) {
            const unsigned short* row;
            __builtin_memcpy(&row, all + 16 * (8 * q + 2 * (l & 3) + e), sizeof row);
            if ((unsigned long)row & 15) lt_now->fault("ldmatrix", (long)row, 16, 0);
            v[e] = row[l >> 2];
        }
        r[q] = v[0] | v[1] << 16;
    }
}
/* m16n8k16: row g = l / 4 and columns t = 2 (l % 4), t + 1 are a lane's of the result, the same of rows g + 8. */
template <class F> static inline void lt_mma(float* c, int pitch, const unsigned* a, const unsigned* b, F to_float) {
    int l = lt_own();
    float x[2][16];
    const char* all = (const char*)lt_now->exchange(a, 16, __LINE__);
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 16; k++) {
            unsigned w;
            __builtin_memcpy(&w, all + 16 * ((l & 28) + (k & 7) / 2) + 4 * (i + (k >= 8 ? 2 : 0)), 4);
            x[i][k] = to_float(w >> (k & 1) * 16 & 0xffff);
        }
    all = (const char*)lt_now->exchange(b, 8, __LINE__);
    for (int j = 0; j < 2; j++)
        for (int k = 0; k < 16; k++) {
            unsigned w;
            __builtin_memcpy(&w, all + 16 * (4 * ((l & 3) * 2 + j) + (k & 7) / 2) + (k >= 8 ? 4 : 0), 4);
            float y = to_float(w >> (k & 1) * 16 & 0xffff);
            c[j] += x[0][k] * y;
            c[pitch + j] += x[1][k] * y;
        }
}
static inline float lt_bfloat_to_float(unsigned x) { return __int_as_float(x << 16); }
static inline void lt_mma_f16(float* c, int pitch, const unsigned* a, const unsigned* b) { lt_mma(c, pitch, a, b, lt_half_to_float); }
static inline void lt_mma_bf16(float* c, int pitch, const unsigned* a, const unsigned* b) { lt_mma(c, pitch, a, b, lt_bfloat_to_float); }
