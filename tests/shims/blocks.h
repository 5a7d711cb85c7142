// What kernels of a GPU need on the CPU, whatever their language: a grid of blocks one after the other, threads as fibers (fibers.h),
// shared memory that begins as NaN, guard zones, and faults that can be planted to see that tests find them.

#pragma once

#include "fibers.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
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

    size_t most_shared = 48 << 10; // bytes of shared memory, without guard zones

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

// of a warp
static inline void warp_barrier(int place, const char * name) {
    if (!left_out(place, name)) {
        get().block.share(0, -place);
    }
}

static inline int lane() {
    return get().block.now % fibers::n_lane;
}

// whether the thread is one that a fault is of
static inline bool struck() {
    return get().faulty && lane() == 7;
}

static inline void launch(const char * name, dim3 grid, dim3 threads, size_t shared, std::function<void()> body) {
    state & s = get();
    if (!s.error.empty()) {
        return;
    }
    const int n = (int) (threads.x * threads.y * threads.z);
    if (n > 1024 || n % 32 != 0 || shared > s.most_shared + 32 * guard_bytes || (uint64_t) grid.x * grid.y * grid.z == 0) {
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
                if (s.error.empty() && !s.block.error.empty()) {
                    s.error = std::string(name) + ": " + s.block.error;
                }
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
