// The kernels for Metal on the CPU (tests/shims/metal) against the reference: the cases of all backends, in three orders of threads,
// and planted faults that have to be found.

#include <metal_stdlib>

#include "../metal/xkv-attn-decode.metal"
#include "../metal/xkv-attn-exact.metal"
#include "../metal/xkv-attn-make.metal"
#include "../metal/xkv-attn-attend.metal"

#include "end.h"

#include "../metal/xkv-mtl-op.h"
#include "../metal/xkv-mtl-plan.cpp"

#include "apart.h"
#include "cases.h"
#include "reference.h"

#include "ggml-cpp.h"

#include <functional>
#include <string>

struct outcome {
    std::string        error; // of the run
    double             diff;  // relative root mean square
    std::vector<float> values;
};

#define KERNEL(name) { #name, kernel_xkv_attn_##name }

static const std::map<std::string, decltype(&kernel_xkv_attn_lead)> all_kernels = {
    KERNEL(lead),      KERNEL(exact),      KERNEL(least),  KERNEL(refine), KERNEL(merge), KERNEL(make),
    KERNEL(turn_back), KERNEL(load_exact), KERNEL(attend), KERNEL(begin),  KERNEL(end),
};

// what the kernels are given; changed by some planted faults
struct buffers {
    const char *    q;
    const char *    exact[2];
    const char *    mask;
    const uint8_t * coef;
    const uint8_t * basis;
    const char *    turn;
    const char *    fill;
    const float *   mean;
    const float *   sinks;
    float *         dst;
    char *          scratch;

    explicit buffers(const ggml_tensor * t) {
        const auto at = [&](int i) { return t->src[i] ? (const char *) t->src[i]->data : nullptr; };

        q        = at(0);
        exact[0] = at(1);
        exact[1] = at(2);
        mask     = at(3);
        coef     = (const uint8_t *) at(4);
        basis    = (const uint8_t *) at(5);
        turn     = at(6);
        fill     = at(7);
        mean     = (const float *) at(8);
        sinks    = (const float *) at(9);
        dst      = (float *) t->data;
    }
};

static void launch(const xkv_mtl_launch & l, const xkv_mtl_args & a, const buffers & b) {
    const auto kernel = all_kernels.at(l.kernel);
    const dim3 grid(l.grid[0], l.grid[1], l.grid[2]);
    xkv_shim::launch(l.kernel, grid, l.n_thread, std::max(l.n_shared, 16), [&] {
        const dim3 index  = xkv_shim::block_index();
        const int  thread = (int) xkv_shim::thread_index().x;
        kernel(a, l.step, b.q, b.exact[0], b.exact[1], b.mask, b.coef, b.basis, b.turn, b.fill, b.mean, b.sinks, b.dst, b.scratch,
               (char *) xkv_shim::shared_memory(), uint3{ index.x, index.y, index.z }, (ushort) (thread % fibers::n_lane),
               (ushort) (thread / fibers::n_lane));
    });
}

struct instance {
    ggml_context_ptr    ctx;
    ggml_tensor *       t;
    std::vector<double> ref;

    instance(const xkv_case & c, int seed) : ctx(ggml_init({ (size_t) 512 << 20, nullptr, false })) {
        t   = xkv_make_case(ctx.get(), c, seed);
        ref = xkv_ref_attn(t);
    }

    // on a GPU with n_core cores
    outcome run(int n_core, fibers::order order, const xkv_shim::fault & fault = {},
                const std::function<void(xkv_mtl_plan &, buffers &)> & change = nullptr) const {
        const xkv_mtl_shape  shape = xkv_mtl_op_shape(t);
        xkv_mtl_plan         plan  = xkv_mtl_make_plan(xkv_mtl_op_args(t), shape, n_core);
        buffers              b(t);
        std::vector<uint8_t> scratch(plan.n_scratch + 64, 0xff);
        xkv_shim::state &    shim = xkv_shim::get();

        std::copy(std::begin(shape.fc), std::end(shape.fc), xkv_shim::constants());
        b.scratch = (char *) (((uintptr_t) scratch.data() + 15) / 16 * 16);
        if (change) {
            change(plan, b);
        }
        memset(t->data, 0xff, ggml_nbytes(t));
        shim.order       = order;
        shim.planted     = fault;
        shim.most_shared = XKV_MTL_SHARED;
        shim.regions     = { { (uint8_t *) b.scratch, (uint8_t *) b.scratch + plan.n_scratch } };
        shim.guards.clear();
        shim.error.clear();
        for (size_t at : plan.guards) {
            xkv_shim::guard(b.scratch + at);
        }
        for (const xkv_mtl_launch & l : plan.launches) {
            launch(l, plan.args, b);
        }
        xkv_shim::check_guards();

        outcome res  = { shim.error, 0.0, {} };
        double  norm = 0.0;
        for (size_t i = 0; i < ref.size(); ++i) {
            const float  x = ((const float *) t->data)[i];
            const double d = x - ref[i];
            norm += ref[i] * ref[i];
            res.diff += std::isfinite(d) ? d * d : INFINITY;
            res.values.push_back(x);
        }
        res.diff = sqrt(res.diff / norm);
        return res;
    }
};

static const fibers::order all_orders[] = { fibers::order::forward, fibers::order::backward, fibers::order::shuffled };

struct test {
    std::string name;
    xkv_case    c;
    double      limit;
    int         n_core;
};

static void check(const test & one) {
    const instance inst(one.c, 1);
    const double   most = one.c.tolerance > 0.0f ? one.limit : 1e-5; // sums are of floats, so only what is left out makes a difference
    outcome        first;
    for (fibers::order order : all_orders) {
        const outcome res  = inst.run(one.n_core, order);
        const bool    same = order == all_orders[0] || res.values == first.values;
        char          text[512];
        snprintf(text, sizeof(text), "%s: error %.3g, expected below %.3g%s%s%s", one.name.c_str(), res.diff, most,
                 res.error.empty() ? "" : "; ", res.error.c_str(), same ? "" : "; other result in another order of threads");
        note(res.error.empty() && res.diff < most && same, text);
        first = order == all_orders[0] ? res : first;
    }
}

// small cases that together go through all kernels, several times through their loops
static std::vector<std::pair<xkv_case, double>> small_cases() {
    xkv_case c;
    c.n_chunk  = 64;
    c.n_stored = 16 * 64;
    c.n_exact  = 40;
    c.dim_k = c.dim_v = 32;
    c.n_head          = 4;
    c.n_tps           = 3;
    for (int kd = 0; kd < 2; ++kd) {
        c.rank[kd][0]  = 96;
        c.rank[kd][2]  = 96;
        c.basis[kd][2] = GGML_TYPE_Q8_0;
        c.lead[kd]     = 32;
    }
    std::vector<std::pair<xkv_case, double>> res = { { c, 1e-5 } };
    c.tolerance                                  = 0.004f;
    c.softcap                                    = 2.0f;
    c.sinks                                      = true;
    res.push_back({ c, 3e-2 });
    c.n_tps    = 20;
    c.n_stored = 10 * 64;
    c.dim_k    = 64;
    res.push_back({ c, 1e-5 });
    c.n_stored  = 0;
    c.n_exact   = 530;
    c.n_tps     = 1;
    c.n_head    = 2;
    c.n_head_kv = 1;
    res.push_back({ c, 1e-5 });
    return res;
}

struct planted {
    std::string                                    name;
    xkv_shim::fault                                fault;
    std::function<void(xkv_mtl_plan &, buffers &)> change;
};

static std::vector<planted> list_faults() {
    std::vector<planted> res;
    for (const auto & place : xkv_shim::get().barriers) {
        planted p;
        p.fault.skip_barrier = place.first;
        p.name               = "without the barrier at " + place.second.substr(place.second.find_last_of('/') + 1);
        res.push_back(p);
        p.fault.lone_thread = 37;
        p.name += " for one thread";
        res.push_back(p);
    }
    const auto index = [&](const char * name, const char * kernel, int thread, int block, int lane) {
        planted p;
        p.name         = std::string(name) + " off by one in " + kernel;
        p.fault.kernel = kernel;
        p.fault.thread = thread;
        p.fault.block  = block;
        p.fault.lane   = lane;
        res.push_back(p);
    };
    for (const char * name : { "lead", "exact", "refine", "merge", "make", "turn_back", "load_exact", "attend", "begin", "end" }) {
        index("thread index", name, 1, 0, 0);
        index("block index", name, 0, 1, 0);
    }
    for (const char * name : { "lead", "refine", "merge" }) {
        index("shuffle", name, 0, 0, 1);
    }
    for (const char * name : { "make", "attend" }) {
        index("elements of matrices", name, 0, 0, 1);
    }
    const auto change = [&](const char * name, const std::function<void(xkv_mtl_plan &, buffers &)> & f) {
        res.push_back({ name, {}, f });
    };
    change("mask of the next token", [](xkv_mtl_plan &, buffers & b) { b.mask += 2; });
    change("mask of the next query", [](xkv_mtl_plan & p, buffers &) { p.args.nb_mask[0] = 0; });
    change("fill of the next chunk", [](xkv_mtl_plan & p, buffers & b) { b.fill += p.args.nb_fill[0]; });
    change("frame of the next chunk", [](xkv_mtl_plan & p, buffers & b) { b.turn += p.args.nb_turn; });
    change("next tile of coefficients", [](xkv_mtl_plan & p, buffers &) { p.args.segments[XKV_MTL_K][1].coef += 16 * 34; });
    change("next tile of a basis", [](xkv_mtl_plan & p, buffers &) { p.args.segments[XKV_MTL_V][1].basis += 16 * 34; });
    change("mean of the next number", [](xkv_mtl_plan &, buffers & b) { b.mean += 1; });
    change("sink of the next head", [](xkv_mtl_plan &, buffers & b) { b.sinks += b.sinks != nullptr; });
    change("no sinks", [](xkv_mtl_plan & p, buffers &) { p.args.has_sinks = 0; });
    change("scores that are not capped", [](xkv_mtl_plan & p, buffers &) { p.args.softcap = 0.0f; });
    change("other pairs", [](xkv_mtl_plan &, buffers &) { xkv_shim::constants()[XKV_MTL_FC_NEOX] = 0; });
    return res;
}

// what is wrong with a run
static std::string find(const instance & one, double limit, const planted & p) {
    std::vector<float> first;
    for (fibers::order order : all_orders) {
        const outcome res = one.run(1, order, p.fault, p.change);
        if (!res.error.empty()) {
            return res.error;
        }
        if (!(res.diff < limit)) {
            return "error " + std::to_string(res.diff);
        }
        if (order != all_orders[0] && res.values != first) {
            return "other result in another order of threads";
        }
        first = res.values;
    }
    return "";
}

static void check_faults() {
    std::vector<instance> list;
    std::vector<double>   limits;
    for (const auto & c : small_cases()) {
        list.emplace_back(c.first, 1);
        limits.push_back(c.second);
        const std::string wrong = find(list.back(), c.second, {});
        note(wrong.empty(), "small case: " + wrong);
    }
    const std::vector<planted> faults = list_faults();
    in_parallel(faults.size(), [&](size_t i) {
        const std::string found = apart([&] {
            std::string res;
            for (size_t k = 0; k < list.size() && res.empty(); ++k) {
                res = find(list[k], limits[k], faults[i]);
            }
            return res;
        });
        note(!found.empty(), "planted fault: " + faults[i].name + (found.empty() ? " is not found" : ": " + found));
    });
}

static std::vector<test> list_tests() {
    std::vector<test> res;
    const auto        add = [&](const std::string & name, const xkv_case & c, double limit, int n_core = 1) {
        res.push_back({ name, c, limit, n_core });
    };
    xkv_each_case([&](const std::string & name, const xkv_case & c, double limit) { add(name, c, limit); });
    for (int64_t n_tps : { 1, 8, 9 }) {
        const std::string at = " queries " + std::to_string(n_tps);
        xkv_case          c;
        c.n_tps      = n_tps;
        c.rank[0][0] = c.rank[1][0] = 48;
        for (int64_t dim : { 16, 512 }) {
            c.dim_k = c.dim_v = dim;
            add("heads of " + std::to_string(dim) + at, c, 1e-5);
        }
        c.n_chunk  = 256; // the most threadgroup memory
        c.n_stored = 512;
        add("heads of 512 and chunks of 256" + at, c, 1e-5);
        c.lead[0] = c.lead[1] = 16;
        c.tolerance           = 1e-6f;
        add("heads of 512 and chunks of 256, refined" + at, c, 2e-4);
        c            = xkv_case();
        c.n_tps      = n_tps;
        c.rank[0][0] = c.rank[1][0] = 48;
        c.dim_k = c.dim_v = 32;
        c.n_head          = 3;
        c.n_head_kv       = 3;
        add("a KV head for each head" + at, c, 1e-5);
        c.n_head    = 20;
        c.n_head_kv = 1;
        add("one KV head" + at, c, 1e-5);
        c.n_exact = 600;
        add("many exact tokens" + at, c, 1e-5);
        add("a large GPU" + at, c, 1e-5, 80);
        c.n_exact = 0;
        add("no exact tokens" + at, c, 1e-5);

        c       = xkv_case();
        c.n_tps = n_tps;
        c.dim_k = c.dim_v = 128;
        c.n_chunk         = 128;
        for (int kd = 0; kd < 2; ++kd) {
            for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
                c.rank[kd][i]  = 128;
                c.basis[kd][i] = xkv_attn_type(XKV_ATTN_N_TYPE - 1 - i);
            }
        }
        c.decay = 1e6f;
        add("all types, of bases as well" + at, c, 1e-5);
        c.flags |= XKV_ATTN_PLAIN;
        for (int kd = 0; kd < 2; ++kd) {
            for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
                c.rank[kd][i] = i == 2 || i == 4 ? 64 : 0;
            }
        }
        add("plain in two types" + at, c, 1e-5);
    }
    return res;
}

static void check_refusals() {
    const auto refuses = [](const std::string & expected, const xkv_case & c, const std::function<void(ggml_tensor *)> & change = nullptr) {
        ggml_context_ptr ctx(ggml_init({ (size_t) 512 << 20, nullptr, false }));
        ggml_tensor *    t = xkv_make_case(ctx.get(), c, 1);
        if (change) {
            change(t);
        }
        const char * why = xkv_mtl_op_refusal(t);
        note(expected.empty() ? !why : why && std::string(why).find(expected) != std::string::npos,
             "refusal: expected '" + expected + "', found '" + (why ? why : "") + "'");
    };
    xkv_case usual;
    usual.rank[0][0] = usual.rank[1][0] = 32;
    refuses("", usual);
    refuses("heads are not", usual, [](ggml_tensor * t) { t->src[0]->ne[0] = 24; });
    refuses("heads are not", usual, [](ggml_tensor * t) { t->src[0]->ne[0] = 528; });
    xkv_case c = usual;
    c.exact    = GGML_TYPE_Q4_0;
    refuses("exact K and V", c);
    c          = usual;
    c.n_chunk  = 288;
    c.n_stored = 576;
    refuses("chunks are not", c);
    c            = usual;
    c.rank[1][0] = 7200;
    refuses("V has more", c);
    refuses("queries are not", usual, [](ggml_tensor * t) { t->src[0]->nb[0] = 8; });
    refuses("the mask is", usual, [](ggml_tensor * t) { t->src[3]->type = GGML_TYPE_BF16; });
    refuses("the output is", usual, [](ggml_tensor * t) { t->nb[1] += 16; });
    refuses("multiples of 4", usual, [](ggml_tensor * t) { t->src[4]->nb[1] += 2; });
}

// one case of N is run: `test-metal [N]`
int main(int argc, char ** argv) {
    const size_t n_of = argc > 1 ? atoi(argv[1]) : 1;
    check_refusals();
    check_faults();
    const std::vector<test> tests = list_tests();
    in_parallel((tests.size() + n_of - 1) / n_of, [&](size_t i) { check(tests[n_of * i]); });
    printf("%d passed, %d failed\n", n_pass, n_fail);
    return n_fail > 0;
}
