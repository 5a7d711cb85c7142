// The kernels for CUDA on the CPU (tests/shims/cuda.h) against the reference: the cases of all backends, in three orders of threads,
// and planted faults that have to be found.

#include "cases.h"
#include "reference.h"

#include "../cuda/xkv-attn-args.h"
#include "../cuda/xkv-attn.cu"

#include "ggml-cpp.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include <sys/wait.h>
#include <unistd.h>

static int n_pass = 0;
static int n_fail = 0;
static int n_of   = 1; // one case of so many runs

static void note(bool ok, const std::string & what) {
    (ok ? n_pass : n_fail)++;
    if (!ok || getenv("XKV_TEST_VERBOSE")) {
        printf("%s %s\n", ok ? "ok" : "FAIL", what.c_str());
        fflush(stdout);
    }
}

struct outcome {
    std::string        error; // of the run
    double             diff;  // relative root mean square
    std::vector<float> values;
};

struct instance {
    ggml_context_ptr    ctx;
    ggml_tensor *       t;
    std::vector<double> ref;

    instance(const xkv_case & c, int seed) : ctx(ggml_init({ (size_t) 512 << 20, nullptr, false })) {
        t   = xkv_make_case(ctx.get(), c, seed);
        ref = xkv_ref_attn(t);
    }

    // on a card with n_sm multiprocessors
    outcome run(int n_sm, fibers::order order, const xkv_shim::fault & fault = {},
                const std::function<void(xkv_cu_attn &)> & change = nullptr) const {
        xkv_cu_attn a = xkv_cu_attn_args(t);
        if (change) {
            change(a);
        }
        const size_t         size = xkv_cu_attn_scratch(a, n_sm);
        std::vector<uint8_t> scratch(size + 64, 0xff);
        xkv_shim::state &    shim  = xkv_shim::get();
        uint8_t * const      begin = (uint8_t *) (((uintptr_t) scratch.data() + 15) / 16 * 16);
        memset(t->data, 0xff, ggml_nbytes(t));
        shim.order   = order;
        shim.planted = fault;
        shim.regions = { { begin, begin + size } };
        shim.guards.clear();
        shim.error.clear();
        xkv_cu_attn_run(a, n_sm, begin, nullptr);
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

// limit of the error where K, V and weights are rounded to f16
static const double in_f16 = 2e-3;

static void check(const std::string & name, const xkv_case & c, double limit, bool orders = false, int n_sm = 1) {
    static int n_case = 0;
    if (n_case++ % n_of != 0) {
        return;
    }
    const instance one(c, 1);
    const double   most = c.n_tps > XKV_ATTN_MAX_QUERY ? in_f16 : limit;
    outcome        first;
    for (fibers::order order : all_orders) {
        const outcome res  = one.run(n_sm, order);
        const bool    same = order == all_orders[0] || res.values == first.values;
        char          text[512];
        snprintf(text, sizeof(text), "%s: error %.3g, expected below %.3g%s%s%s", name.c_str(), res.diff, most,
                 res.error.empty() ? "" : "; ", res.error.c_str(), same ? "" : "; other result in another order of threads");
        note(res.error.empty() && res.diff < most && same, text);
        if (!orders) {
            break;
        }
        first = order == all_orders[0] ? res : first;
    }
}

// small cases that together go through all kernels, several times through their loops
static std::vector<std::pair<xkv_case, double>> small_cases() {
    xkv_case c;
    c.n_chunk  = 64;
    c.n_stored = 24 * 64;
    c.n_exact  = 40;
    c.dim_k = c.dim_v = 64;
    c.n_head          = 4;
    c.n_tps           = 3;
    c.decay           = 64.0f;
    for (int kd = 0; kd < 2; ++kd) {
        c.rank[kd][0]  = 64;
        c.rank[kd][2]  = 160;
        c.basis[kd][2] = GGML_TYPE_Q8_0;
        c.lead[kd]     = 96;
    }
    std::vector<std::pair<xkv_case, double>> res = { { c, 8e-3 } };
    c.tolerance                                  = 1e-4f;
    res.push_back({ c, 8e-3 });
    c.n_tps    = 40;
    c.n_stored = 10 * 64;
    res.push_back({ c, in_f16 });
    c.n_stored  = 0;
    c.n_exact   = 530;
    c.n_tps     = 1;
    c.n_head    = 2;
    c.n_head_kv = 1;
    res.push_back({ c, 1e-5 });

    // what rounds nothing
    c             = xkv_case();
    c.n_head      = 8;
    c.n_rot       = 0;
    c.decay       = 1e6f;
    c.whole       = XKV_WHOLE_QUERIES;
    c.rank[0][4]  = 64;
    c.rank[1][0]  = 64;
    c.basis[0][4] = GGML_TYPE_Q5_0;
    res.push_back({ c, 2e-6 });
    c.whole       = XKV_WHOLE_SUMS;
    c.rank[1][0]  = 0;
    c.rank[1][2]  = 64;
    c.basis[1][2] = GGML_TYPE_Q4_0;
    res.push_back({ c, 2e-6 });
    c.whole      = XKV_WHOLE_WEIGHTS;
    c.rank[0][4] = 128;
    c.rank[1][2] = 0;
    c.rank[1][3] = 128;
    c.lead[0] = c.lead[1] = 64;
    c.tolerance           = 1e-6f;
    res.push_back({ c, 2e-6 });
    c.whole      = XKV_WHOLE_QUERIES;
    c.rank[1][0] = 64;
    c.rank[1][3] = 0;
    res.push_back({ c, 2e-6 });
    return res;
}

// A number of a query that is none: its output is none at all, and that of others is as it was.
static void check_nan(const std::string & name, const xkv_case & c) {
    const instance one(c, 1);
    const outcome  before                                                    = one.run(1, fibers::order::forward);
    const int64_t  head                                                      = 1;
    const int64_t  token                                                     = c.n_tps - 1;
    ((float *) one.t->src[0]->data)[(token * c.n_head + head) * c.dim_k + 5] = NAN;
    const outcome after                                                      = one.run(1, fibers::order::forward);
    bool          ok                                                         = after.error.empty();
    for (size_t i = 0; i < after.values.size(); ++i) {
        const bool own = (int64_t) i / c.dim_v == token * c.n_head + head;
        ok             = ok && (own ? std::isnan(after.values[i]) : after.values[i] == before.values[i]);
    }
    note(ok, name + ": a query that is no number " + after.error);
}

struct planted {
    std::string                        name;
    xkv_shim::fault                    fault;
    std::function<void(xkv_cu_attn &)> change;
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
    for (const char * kernel : { "xkv_cu_lead", "xkv_cu_exact_span", "xkv_cu_project_list", "xkv_cu_refine", "xkv_cu_values",
                                 "xkv_cu_merge", "xkv_cu_make", "xkv_cu_attend" }) {
        index("thread index", kernel, 1, 0, 0);
        index("block index", kernel, 0, 1, 0);
        index("shuffle", kernel, 0, 0, 1);
    }
    for (const char * kernel : { "xkv_cu_mark", "xkv_cu_turn_back", "xkv_cu_load_exact" }) {
        index("thread index", kernel, 1, 0, 0);
        index("block index", kernel, 0, 1, 0);
    }
    for (const char * kernel : { "xkv_cu_lead", "xkv_cu_project_list", "xkv_cu_refine", "xkv_cu_values", "xkv_cu_merge" }) {
        planted p;
        p.name         = std::string("sum of bytes off by one in ") + kernel;
        p.fault.kernel = kernel;
        p.fault.dot    = 1;
        res.push_back(p);
        if (p.fault.kernel != "xkv_cu_values") { // rounds nothing
            p.name       = std::string("code off by one in ") + kernel;
            p.fault.dot  = 0;
            p.fault.code = 1;
            res.push_back(p);
        }
    }
    const auto change = [&](const char * name, const std::function<void(xkv_cu_attn &)> & f) { res.push_back({ name, {}, f }); };
    change("mask of the next token", [](xkv_cu_attn & a) { a.mask += 2; });
    change("mask of the next query", [](xkv_cu_attn & a) { a.nb_mask[0] = 0; });
    change("fill of the next chunk", [](xkv_cu_attn & a) { a.fill += a.nb_fill[0]; });
    change("frame of the next chunk", [](xkv_cu_attn & a) { a.turn += a.nb_turn; });
    change("next tile of coefficients", [](xkv_cu_attn & a) { a.segments[XKV_CU_K][1].coef += 16 * 34; });
    change("next tile of a basis", [](xkv_cu_attn & a) { a.segments[XKV_CU_V][1].basis += 16 * 34; });
    change("mean of the next number", [](xkv_cu_attn & a) { a.mean += 1; });
    change("other pairs", [](xkv_cu_attn & a) { a.neox = false; });
    return res;
}

// what is wrong with a run
static std::string find(const instance & one, double limit, const planted & p) {
    std::vector<float> first;
    for (fibers::order order : all_orders) {
        const outcome res = one.run(2, order, p.fault, p.change);
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

// In a process of its own, since a fault may write anywhere.
static std::string find_apart(const std::vector<instance> & list, const std::vector<double> & limits, const planted & p) {
    int ends[2];
    fflush(stdout);
    if (pipe(ends) != 0) {
        return "";
    }
    const pid_t child = fork();
    if (child == 0) {
        std::string found;
        for (size_t i = 0; i < list.size() && found.empty(); ++i) {
            found = find(list[i], limits[i], p);
        }
        const bool written = write(ends[1], found.data(), found.size()) == (ssize_t) found.size();
        _exit(written ? 0 : 1);
    }
    close(ends[1]);
    std::string res;
    char        text[256];
    for (ssize_t n; (n = read(ends[0], text, sizeof(text))) > 0;) {
        res.append(text, n);
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? "the process ended" : res;
}

static void check_faults() {
    std::vector<instance> list;
    std::vector<double>   limits;
    for (const auto & c : small_cases()) {
        list.emplace_back(c.first, 1);
        limits.push_back(c.second);
        const std::string wrong = find(list.back(), c.second, {});
        note(wrong.empty(), "small case, error " + std::to_string(list.back().run(1, all_orders[0]).diff) + ": " + wrong);
    }
    for (const planted & p : list_faults()) {
        const std::string found = find_apart(list, limits, p);
        note(!found.empty(), "planted fault: " + p.name + (found.empty() ? " is not found" : ": " + found));
    }
}

static void check_nans() {
    for (const auto & c : small_cases()) {
        check_nan(std::to_string(c.first.n_tps) + " queries, " + std::to_string(c.first.n_stored) + " tokens", c.first);
    }
    xkv_case c;
    c.rank[0][0] = c.rank[1][0] = 32;
    for (int64_t n_tps : { 1, 9 }) {
        c.n_tps   = n_tps;
        c.n_exact = 0;
        check_nan("no exact tokens, " + std::to_string(n_tps) + " queries", c);
        c.n_exact = 40;
        c.sinks   = true;
        c.softcap = 2.0f;
        check_nan("capped, with sinks, " + std::to_string(n_tps) + " queries", c);
        c.sinks   = false;
        c.softcap = 0.0f;
    }
}

static void check_cases() {
    check_nans();
    xkv_each_case([](const std::string & name, const xkv_case & c, double limit) { check(name, c, limit); });
    for (int64_t n_tps : { 1, 8, 9 }) {
        const std::string at = " queries " + std::to_string(n_tps);
        xkv_case          c;
        c.n_tps      = n_tps;
        c.rank[0][0] = c.rank[1][0] = 48;
        for (int64_t dim : { 16, 512 }) {
            c.dim_k = c.dim_v = dim;
            check("heads of " + std::to_string(dim) + at, c, 1e-5);
        }
        c.dim_k = c.dim_v = 32;
        c.n_head          = 3;
        c.n_head_kv       = 3;
        check("a KV head for each head" + at, c, 1e-5, true);
        c.n_head    = 20;
        c.n_head_kv = 1;
        check("one KV head" + at, c, 1e-5, true);
        c.n_exact = 600;
        check("many exact tokens" + at, c, 1e-5);
        check("a large card" + at, c, 1e-5, true, 132);
        c.n_exact = 0;
        check("no exact tokens" + at, c, 1e-5);

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
        check("all types, of bases as well" + at, c, 5e-2);
        c.flags |= XKV_ATTN_PLAIN;
        for (int kd = 0; kd < 2; ++kd) {
            for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
                c.rank[kd][i] = i == 2 || i == 4 ? 64 : 0;
            }
        }
        check("plain in two types" + at, c, 2e-2);
    }
}

// `test-cuda [faults | cases | all] [N]`: planted faults alone, what should be right alone, or both; one case of N
int main(int argc, char ** argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    n_of                   = argc > 2 ? atoi(argv[2]) : 1;
    if (part != "cases") {
        check_faults();
    }
    if (part != "faults") {
        check_cases();
    }
    printf("%d passed, %d failed\n", n_pass, n_fail);
    return n_fail > 0;
}
