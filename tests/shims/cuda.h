// As much of CUDA as our kernels need, on the CPU: blocks one after the other, threads as fibers (fibers.h). Shared memory begins as
// NaN and its pieces end in guard zones. Faults can be planted, to see that tests find them.

#pragma once

#include "fibers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

static inline float2 make_float2(float x, float y) {
    return { x, y };
}

static inline float4 make_float4(float x, float y, float z, float w) {
    return { x, y, z, w };
}

typedef void * cudaStream_t;

struct half {
    uint16_t bits;
};

namespace xkv_shim {

struct fault {
    int         skip_barrier = 0;  // a place that all threads leave out
    int         lone_thread  = -1; // only this one
    int         lane         = 0;  // shuffles are off by this
    int         thread       = 0;  // threadIdx.x of every 32nd thread is off by this
    int         block        = 0;  // blockIdx.x is off by this, where the grid is not of one
    int         code         = 0;  // so are numbers that are rounded to whole ones, of every 32nd thread
    int         dot          = 0;  // and sums of products of bytes, there too
    std::string kernel;            // which one; all if empty
};

struct region {
    const uint8_t * begin;
    const uint8_t * end;
};

struct state {
    fibers::block              block;
    fibers::order              order = fibers::order::forward;
    fault                      planted;
    bool                       faulty = false; // the kernel that runs
    std::string                error;          // the first one
    std::map<int, std::string> barriers;       // those that were met, by place
    std::vector<uint8_t>       shared;
    std::vector<region>        regions; // where guard zones are: shared memory, then what a test adds
    std::set<const uint8_t *>  guards;  // of 64 bytes

    dim3 grid, threads, index;
};

inline state now;

inline state & get() {
    return now;
}

static constexpr int place(const char * file, int line) {
    unsigned res = (unsigned) line;
    for (; *file; ++file) {
        res = res * 31 + (unsigned char) *file;
    }
    return (int) (res >> 1);
}

static const int guard_bytes = 64;

static inline void guard(const void * p) {
    state & s = get();
    for (const region & r : s.regions) {
        if ((const uint8_t *) p >= r.begin && (const uint8_t *) p + guard_bytes <= r.end) {
            s.guards.insert((const uint8_t *) p);
        }
    }
}

static inline void check_guards() {
    state & s = get();
    for (const uint8_t * p : s.guards) {
        for (int i = 0; i < guard_bytes; ++i) {
            if (p[i] != 0xff && s.error.empty()) {
                s.error = "a write past the end of a piece of memory";
            }
        }
    }
}

static inline dim3 thread_index() {
    const state & s = get();
    const int     i = s.block.now;
    return dim3(i + (s.faulty && i % 32 == 7 ? s.planted.thread : 0));
}

static inline dim3 block_index() {
    const state & s   = get();
    dim3          res = s.index;
    if (s.faulty && s.grid.x > 1) {
        res.x = std::min(res.x + s.planted.block, s.grid.x - 1);
    }
    return res;
}

static inline bool left_out(int place, const char * name) {
    state & s = get();
    if (s.barriers.count(place) == 0) {
        s.barriers[place] = name;
    }
    return s.faulty && s.planted.skip_barrier == place && (s.planted.lone_thread < 0 || s.planted.lone_thread == s.block.now);
}

static inline void barrier(int place, const char * name) {
    if (!left_out(place, name)) {
        get().block.wait(fibers::waiting::block, place);
    }
}

static inline int barrier_or(bool x, int place, const char * name) {
    const int * any = get().block.vote(x);
    barrier(place, name);
    return *any;
}

template <typename T> static inline T shuffle(T x, int lane, int place) {
    static_assert(sizeof(T) <= 8, "a value for a shuffle is too large");
    const state & s    = get();
    uint64_t      bits = 0;
    memcpy(&bits, &x, sizeof(x));
    const uint64_t * list = get().block.share(bits, place);
    T                res;
    memcpy(&res, &list[(lane + (s.faulty ? s.planted.lane : 0)) & 31], sizeof(res));
    return res;
}

static inline unsigned ballot(bool x, int place) {
    const uint64_t * list = get().block.share(x, place);
    unsigned         res  = 0;
    for (int i = 0; i < fibers::n_lane; ++i) {
        res |= (unsigned) (list[i] != 0) << i;
    }
    return res;
}

static inline int lane() {
    return get().block.now % fibers::n_lane;
}

// what all lanes of a warp have in N registers, by lane
template <int N> struct of_lanes {
    uint32_t value[fibers::n_lane][N];

    of_lanes(const uint32_t (&x)[N], int place) {
        for (int i = 0; i < N; i += 2) {
            const uint64_t * list = get().block.share(x[i] | (uint64_t) x[i + 1] << 32, place);
            for (int k = 0; k < fibers::n_lane; ++k) {
                value[k][i]     = (uint32_t) list[k];
                value[k][i + 1] = (uint32_t) (list[k] >> 32);
            }
        }
    }
};

// c += a b by plain loops, with the registers where xkv-cu-mma.cuh has them; n of part() numbers in a register
template <int n, typename T, typename F>
static inline void mma(T (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int place, F && part) {
    const of_lanes<4> as(a, place);
    const of_lanes<2> bs(b, place);
    const int         l = lane() + (get().faulty ? get().planted.lane : 0);
    for (int i = 0; i < 4; ++i) {
        const int row = l / 4 % 8;
        const int col = l % 4 * 2 + i % 2;
        for (int half = 0; half < 2; ++half) {
            for (int j = 0; j < 4; ++j) {
                for (int k = 0; k < n; ++k) {
                    c[i] += part(as.value[row * 4 + j][half * 2 + i / 2], k) * part(bs.value[col * 4 + j][half], k);
                }
            }
        }
    }
}

// whether the thread is one that a fault is of
static inline bool struck() {
    return get().faulty && lane() == 7;
}

static inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<4>(c, a, b, -9, [](uint32_t x, int k) { return (int) (int8_t) (x >> 8 * k); });
    c[0] += struck() ? get().planted.dot : 0;
}

static inline uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000;
    const float    size = std::fabs(x);
    if (!(size < 65520.0f)) {
        return (uint16_t) (sign | (size == size ? 0x7c00 : 0x7e00));
    }
    if (size < 0x1p-14f) {
        return (uint16_t) (sign | (uint32_t) std::nearbyint(size * 0x1p24f));
    }
    bits &= 0x7fffffff;
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t) (sign | ((bits >> 13) - (112 << 10)));
}

static inline float make_float(uint16_t h) {
    const float size = (h & 0x7fff) >= 0x7c00 ? ((h & 0x3ff) ? NAN : INFINITY) :
                       (h & 0x7c00) == 0      ? (float) (h & 0x3ff) * 0x1p-24f :
                                                std::ldexp((float) ((h & 0x3ff) | 0x400), (h >> 10 & 31) - 25);
    return h & 0x8000 ? -size : size;
}

static inline float from_half(uint16_t h) {
    static const std::vector<float> all = [] {
        std::vector<float> res(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) {
            res[i] = make_float((uint16_t) i);
        }
        return res;
    }();
    return all[h];
}

static inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<2>(c, a, b, -10, [](uint32_t x, int k) { return from_half((uint16_t) (x >> 16 * k)); });
}

static inline void launch(const char * name, dim3 grid, dim3 threads, size_t shared, std::function<void()> body) {
    state & s = get();
    if (!s.error.empty()) {
        return;
    }
    const int n = (int) (threads.x * threads.y * threads.z);
    if (n > 1024 || n % 32 != 0 || shared > (48 << 10) + 32 * guard_bytes || (uint64_t) grid.x * grid.y * grid.z == 0) {
        s.error = std::string(name) + ": a launch that a card refuses";
        return;
    }
    s.faulty     = s.planted.kernel.empty() || s.planted.kernel == name;
    s.grid       = grid;
    s.threads    = threads;
    s.block.body = std::move(body);

    const auto outer = s.guards;
    s.shared.resize(shared + 256);
    uint8_t * begin = (uint8_t *) (((uintptr_t) s.shared.data() + 127) / 128 * 128);
    s.regions.insert(s.regions.begin(), region{ begin, begin + shared });
    for (unsigned z = 0; z < grid.z && s.error.empty(); ++z) {
        for (unsigned y = 0; y < grid.y && s.error.empty(); ++y) {
            for (unsigned x = 0; x < grid.x && s.error.empty(); ++x) {
                s.index  = dim3(x, y, z);
                s.guards = outer;
                memset(s.shared.data(), 0xff, s.shared.size());
                s.block.run(n, s.order, x * 7919 + y * 31 + z + 1);
                s.error = s.block.error.empty() ? "" : std::string(name) + ": " + s.block.error;
                check_guards();
            }
        }
    }
    s.guards = outer;
    s.regions.erase(s.regions.begin());
}

static inline void * shared_memory() {
    return (void *) get().regions[0].begin;
}

} // namespace xkv_shim

#define XKV_LAUNCH(kernel, grid, block, smem, stream, ...)                                                                                 \
    xkv_shim::launch(#kernel, grid, block, smem, [&] { kernel(__VA_ARGS__); });                                                            \
    (void) (stream)
#define XKV_DYNAMIC_SHARED(name) float4 * name = (float4 *) xkv_shim::shared_memory()
#define XKV_GUARD_BYTES          xkv_shim::guard_bytes
#define XKV_GUARD(p)             xkv_shim::guard(p)

#define threadIdx (xkv_shim::thread_index())
#define blockIdx  (xkv_shim::block_index())
#define blockDim  (xkv_shim::get().threads)
#define gridDim   (xkv_shim::get().grid)

#define XKV_SHIM_TEXT_(x) #x
#define XKV_SHIM_TEXT(x)  XKV_SHIM_TEXT_(x)
#define XKV_SHIM_NAME     __FILE__ ":" XKV_SHIM_TEXT(__LINE__)
#define XKV_SHIM_PLACE                                                                                                                     \
    [] {                                                                                                                                   \
        constexpr int place = xkv_shim::place(__FILE__, __LINE__);                                                                         \
        return place;                                                                                                                      \
    }()

// places below 0: operations of a warp
#define __syncthreads()              xkv_shim::barrier(XKV_SHIM_PLACE, XKV_SHIM_NAME)
#define __syncthreads_or(x)          xkv_shim::barrier_or(x, XKV_SHIM_PLACE, XKV_SHIM_NAME)
#define __syncwarp()                 ((void) xkv_shim::ballot(false, -1))
#define __shfl_sync(mask, x, l)      xkv_shim::shuffle(x, l, -2)
#define __shfl_xor_sync(mask, x, l)  xkv_shim::shuffle(x, xkv_shim::lane() ^ (l), -3)
#define __shfl_down_sync(mask, x, l) xkv_shim::shuffle(x, std::min(xkv_shim::lane() + (l), 31), -4)
#define __shfl_up_sync(mask, x, l)   xkv_shim::shuffle(x, std::max(xkv_shim::lane() - (l), 0), -5)
#define __ballot_sync(mask, x)       xkv_shim::ballot(x, -6)
#define __any_sync(mask, x)          (xkv_shim::ballot(x, -7) != 0)
#define __all_sync(mask, x)          (xkv_shim::ballot(!(x), -8) == 0)

using std::max;
using std::min;

static inline float __half2float(half h) {
    return xkv_shim::from_half(h.bits);
}

static inline half __float2half(float x) {
    return { xkv_shim::to_half(x) };
}

static inline float __uint_as_float(uint32_t x) {
    float res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

static inline uint32_t __float_as_uint(float x) {
    uint32_t res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

static inline int __float_as_int(float x) {
    return (int) __float_as_uint(x);
}

static inline float __int_as_float(int x) {
    return __uint_as_float((uint32_t) x);
}

static inline int __float2int_rn(float x) {
    const int off = xkv_shim::struck() ? xkv_shim::get().planted.code : 0;
    return x == x ? (int) std::nearbyint(std::min(std::max(x, -2e9f), 2e9f)) + off : 0;
}

static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
    const uint64_t all = (uint64_t) y << 32 | x;
    uint32_t       res = 0;
    for (int i = 0; i < 4; ++i) {
        res |= (uint32_t) ((all >> 8 * ((s >> 4 * i) & 7)) & 255) << 8 * i;
    }
    return res;
}

static inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}

static inline int __ffs(int x) {
    return __builtin_ffs(x);
}

static inline int __dp4a(int x, int y, int sum) {
    for (int i = 0; i < 4; ++i) {
        sum += (int) (int8_t) (x >> 8 * i) * (int) (int8_t) (y >> 8 * i);
    }
    return sum + (xkv_shim::struck() ? xkv_shim::get().planted.dot : 0);
}

template <typename T> static inline T atomicAdd(T * p, T x) {
    const T old = *p;
    *p          = old + x;
    return old;
}

template <typename T> static inline T atomicMax(T * p, T x) {
    const T old = *p;
    *p          = std::max(old, x);
    return old;
}
