// What the shim for Metal finds by itself: small kernels, each with a mistake, and right ones.

#include <metal_stdlib>

using namespace metal;

struct in {
    float *             memory; // of the device
    char *              shared;
    int                 lane, warp, thread_index;
    threadgroup float * floats() const { return (threadgroup float *) shared; }
};

typedef void (*body)(const in &);

// each thread's number to its neighbour in another SIMD group
static void pass_on(const in & t) {
    t.floats()[t.thread_index] = (float) t.thread_index;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    t.memory[t.thread_index] = t.floats()[(t.thread_index + 32) % 64];
}

static void pass_on_without_barrier(const in & t) {
    t.floats()[t.thread_index] = (float) t.thread_index;
    t.memory[t.thread_index]   = t.floats()[(t.thread_index + 32) % 64];
}

static void barrier_of_device_memory(const in & t) {
    t.floats()[t.thread_index] = 1.0f;
    threadgroup_barrier(mem_flags::mem_device);
}

static void barrier_of_some(const in & t) {
    if (t.warp == 0) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

static void barriers_in_two_places(const in & t) {
    if (t.warp == 0) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

static void sum_of_some_lanes(const in & t) {
    if (t.lane < 16) {
        t.memory[t.thread_index] = simd_sum(1.0f);
    }
}

static void lanes_in_two_operations(const in & t) {
    t.memory[t.thread_index] = t.lane < 16 ? simd_sum(1.0f) : simd_max(1.0f);
}

static void past_the_end(const in & t) {
    XKV_GUARD(t.shared + 64 * sizeof(float));
    t.floats()[t.thread_index + 1] = 1.0f;
}

static void reduce(const in & t) {
    const float x            = (float) (t.thread_index % 32);
    const float sum          = simd_sum(x);
    const float most         = simd_max(x);
    const uint  bits         = simd_or(1u << t.lane);
    const bool  any          = simd_any(t.lane == 7);
    const float other        = simd_shuffle_xor(x, 16);
    const bool  right        = sum == 496.0f && most == 31.0f && bits == 0xffffffffu && any && other == (float) (t.lane ^ 16);
    t.memory[t.thread_index] = right ? 1.0f : 0.0f;
}

// memory[0..64) = a b + 1, memory[64..128) = a^T b, of a and b behind them
static void multiply(const in & t) {
    if (t.warp == 0) {
        simdgroup_float8x8 a, b, flipped;
        simdgroup_float8x8 x = make_filled_simdgroup_matrix<float, 8>(1.0f);
        simdgroup_float8x8 y = make_filled_simdgroup_matrix<float, 8>(0.0f);
        simdgroup_load(a, t.memory + 128, 8);
        simdgroup_load(flipped, t.memory + 128, 8, 0, true);
        simdgroup_load(b, t.memory + 192, 8);
        simdgroup_multiply_accumulate(x, a, b, x);
        simdgroup_multiply_accumulate(y, flipped, b, y);
        simdgroup_store(x, t.memory, 8);
        simdgroup_store(y, t.memory + 64, 8);
    }
}

// a matrix is stored by all lanes, so that one may not read it before the others have come
static void read_a_store_too_early(const in & t) {
    const simdgroup_float8x8 x = make_filled_simdgroup_matrix<float, 8>((float) (t.warp + 1));
    simdgroup_store(x, t.floats() + 64 * t.warp, 8);
    float sum = 0.0f;
    for (int i = 0; i < 64; ++i) {
        sum += t.floats()[64 * t.warp + i];
    }
    t.memory[t.thread_index] = sum;
}

static void read_a_store(const in & t) {
    const simdgroup_float8x8 x = make_filled_simdgroup_matrix<float, 8>((float) (t.warp + 1));
    simdgroup_store(x, t.floats() + 64 * t.warp, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0.0f;
    for (int i = 0; i < 64; ++i) {
        sum += t.floats()[64 * t.warp + i];
    }
    t.memory[t.thread_index] = sum;
}

XKV_MTL_CONSTANT(fc_number, 3)

static void constant_of_the_function(const in & t) {
    t.memory[t.thread_index] = (float) fc_number;
}

#include "end.h"

#include <cstdio>

static int n_fail = 0;

static void note(bool ok, const std::string & what) {
    n_fail += !ok;
    if (!ok) {
        printf("FAIL %s\n", what.c_str());
    }
}

struct outcome {
    std::string        error;
    std::vector<float> memory;
};

static outcome run(body f, fibers::order order, std::vector<float> memory = std::vector<float>(256), size_t n_shared = 1024) {
    xkv_shim::state & shim = xkv_shim::get();
    shim.order             = order;
    shim.planted           = {};
    shim.most_shared       = 32 << 10;
    shim.regions.clear();
    shim.guards.clear();
    shim.error.clear();
    xkv_shim::launch("kernel", 1, 64, n_shared, [&] {
        const int thread_index = (int) xkv_shim::thread_index().x;
        f({ memory.data(), (char *) xkv_shim::shared_memory(), thread_index % 32, thread_index / 32, thread_index });
    });
    return { shim.error, memory };
}

static const fibers::order all_orders[] = { fibers::order::forward, fibers::order::backward, fibers::order::shuffled };

static void finds(const char * name, body f, const std::string & expected) {
    const std::string found = run(f, fibers::order::forward).error;
    note(found.find(expected) != std::string::npos, std::string(name) + ": expected '" + expected + "', found '" + found + "'");
}

static void is_right(const char * name, body f, const std::vector<float> & memory, const std::vector<float> & expected) {
    for (fibers::order order : all_orders) {
        const outcome res = run(f, order, memory);
        note(res.error.empty() && std::equal(expected.begin(), expected.end(), res.memory.begin()),
             std::string(name) + " gives other numbers; " + res.error);
    }
}

static void is_wrong(const char * name, body f, const std::vector<float> & expected) {
    bool same = true;
    for (fibers::order order : all_orders) {
        const outcome res = run(f, order);
        same              = same && res.error.empty() && std::equal(expected.begin(), expected.end(), res.memory.begin());
    }
    note(!same, std::string(name) + " is not found");
}

int main() {
    std::vector<float> passed(64), sums(64), matrices(256), products(128);
    for (int i = 0; i < 64; ++i) {
        passed[i] = (float) ((i + 32) % 64);
        sums[i]   = i < 32 ? 64.0f : 128.0f;
    }
    for (int i = 0; i < 128; ++i) {
        matrices[128 + i] = (float) ((7 * i) % 13 - 6);
    }
    for (int i = 0; i < 64; ++i) {
        products[i] = 1.0f;
        for (int r = 0; r < 8; ++r) {
            products[i] += matrices[128 + i / 8 * 8 + r] * matrices[192 + 8 * r + i % 8];
            products[64 + i] += matrices[128 + 8 * r + i / 8] * matrices[192 + 8 * r + i % 8];
        }
    }
    is_right("a barrier", pass_on, std::vector<float>(256), passed);
    is_right("reductions", reduce, std::vector<float>(256), std::vector<float>(64, 1.0f));
    is_right("products of matrices", multiply, matrices, products);
    is_right("a stored matrix", read_a_store, std::vector<float>(256), sums);
    xkv_shim::constants()[3] = 5;
    is_right("a function constant", constant_of_the_function, std::vector<float>(256), std::vector<float>(64, 5.0f));

    is_wrong("a missing barrier", pass_on_without_barrier, passed);
    is_wrong("a missing barrier of a SIMD group", read_a_store_too_early, sums);
    finds("a barrier of device memory", barrier_of_device_memory, "leaves threadgroup memory out");
    finds("a barrier of some", barrier_of_some, "a barrier that not all threads reach");
    finds("barriers in two places", barriers_in_two_places, "threads wait at different barriers");
    finds("a sum of some lanes", sum_of_some_lanes, "some lanes of a warp wait for others");
    finds("lanes in two operations", lanes_in_two_operations, "lanes of a warp wait in different places");
    finds("a write past the end", past_the_end, "a write past the end of a piece of memory");
    note(!run(pass_on, fibers::order::forward, std::vector<float>(256), 40 << 10).error.empty(), "40 KiB of threadgroup memory");
    note(run(pass_on, fibers::order::forward).error.empty(), "a run after one that failed");
    printf("%d failed\n", n_fail);
    return n_fail > 0;
}
