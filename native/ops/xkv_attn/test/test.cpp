// The op of a backend against the reference.

#include "cases.h"
#include "reference.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>
#include <string>

static int n_pass = 0;
static int n_fail = 0;

static std::vector<float> run(const xkv_case & c, int seed, int n_thread, double * norm, double * diff) {
    ggml_context_ptr ctx(ggml_init({ (size_t) 512 << 20, nullptr, false }));
    ggml_tensor *    t = xkv_make_case(ctx.get(), c, seed);

    ggml_backend_ptr cpu(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(cpu.get(), n_thread);
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, t);
    if (!ggml_backend_supports_op(cpu.get(), t) || ggml_backend_graph_compute(cpu.get(), gf) != GGML_STATUS_SUCCESS) {
        *diff = INFINITY;
        return {};
    }
    const auto ref = xkv_ref_attn(t);
    *norm = *diff = 0.0;
    for (size_t i = 0; i < ref.size(); ++i) {
        const double d = ((const float *) t->data)[i] - ref[i];
        *norm += ref[i] * ref[i];
        *diff += d * d;
        if (!std::isfinite(d)) {
            *diff = INFINITY;
        }
    }
    return std::vector<float>((const float *) t->data, (const float *) t->data + ref.size());
}

// relative root mean square error below limit; the same result for any number of threads
static void check(const std::string & name, const xkv_case & c, double limit) {
    double       norm, diff;
    const auto   one = run(c, 1, 1, &norm, &diff);
    const double err = sqrt(diff / norm);
    double       n2, d2;
    const auto   three = run(c, 1, 3, &n2, &d2);

    const bool ok = err < limit && one == three;
    (ok ? n_pass : n_fail)++;
    if (!ok || getenv("XKV_TEST_VERBOSE")) {
        printf("%s %s: error %.3g, expected below %.3g%s\n", ok ? "ok" : "FAIL", name.c_str(), err, limit,
               one == three ? "" : "; other result with three threads");
    }
}

// A query that is not a number has no number as its result, and others keep theirs.
static void check_nan(const std::string & name, const xkv_case & c) {
    ggml_backend_ptr cpu(ggml_backend_cpu_init());

    std::vector<float> res[2];
    const int64_t      bad = c.n_head * c.n_tps / 2;
    for (bool damaged : { false, true }) {
        ggml_context_ptr ctx(ggml_init({ (size_t) 512 << 20, nullptr, false }));
        ggml_tensor *    t = xkv_make_case(ctx.get(), c, 1);
        if (damaged) {
            ((float *) t->src[0]->data)[bad * c.dim_k + c.dim_k / 3] = NAN;
        }
        ggml_cgraph * gf = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(gf, t);
        ggml_backend_graph_compute(cpu.get(), gf);
        res[damaged].assign((const float *) t->data, (const float *) t->data + ggml_nelements(t));
    }
    bool ok = true;
    for (size_t i = 0; i < res[0].size(); ++i) {
        ok = ok && ((int64_t) i / c.dim_v == bad ? std::isnan(res[1][i]) : res[0][i] == res[1][i]);
    }
    (ok ? n_pass : n_fail)++;
    if (!ok) {
        printf("FAIL %s: a query that is not a number\n", name.c_str());
    }
}

static void check_nans() {
    for (int64_t n_tps : { 1, 3, 9, 70 }) {
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (int how = 0; how < 6; ++how) {
                xkv_case c;
                c.n_tps   = n_tps;
                c.n_exact = 48 + n_tps;
                for (int kd = 0; kd < 2; ++kd) {
                    c.rank[kd][xkv_attn_type_index(type)] = 96;
                    c.lead[kd]                            = how == 1 ? 32 : 96;
                }
                c.tolerance = how == 1 ? 0.01f : 0.0f;
                c.softcap   = how == 2 ? 1.5f : 0.0f;
                c.sinks     = how == 3;
                c.n_stored  = how == 4 ? 0 : c.n_stored;
                c.full      = how == 5;
                check_nan(ggml_type_name(type) + (" queries " + std::to_string(n_tps)) + " variant " + std::to_string(how), c);
            }
        }
    }
}

int main() {
    xkv_each_case(check);
    check_nans();
    printf("%d passed, %d failed\n", n_pass, n_fail);
    return n_fail > 0;
}
