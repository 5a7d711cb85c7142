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

int main() {
    xkv_each_case(check);
    printf("%d passed, %d failed\n", n_pass, n_fail);
    return n_fail > 0;
}
