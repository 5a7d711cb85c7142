// The op of a backend against the reference.

#include "case.h"
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
    const auto f32 = [](int64_t r) {
        xkv_case c;
        for (int kd = 0; kd < 2; ++kd) {
            c.rank[kd][0] = r;
        }
        return c;
    };
    const auto mixed = [](bool one_bit) {
        xkv_case c;
        for (int kd = 0; kd < 2; ++kd) {
            for (int i = 2; i < XKV_ATTN_N_TYPE; ++i) {
                c.rank[kd][i]  = i == 6 ? (one_bit && kd == XKV_K ? 128 : 0) : i == 5 ? 64 : 32;
                c.basis[kd][i] = i < 5 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0;
            }
        }
        return c;
    };
    for (int64_t n_tps : { 1, 2, 8, 9, 70 }) {
        const std::string at  = " queries " + std::to_string(n_tps);
        const bool        few = n_tps <= XKV_ATTN_MAX_QUERY;

        const auto with = [&](xkv_case c) {
            c.n_tps   = n_tps;
            c.n_exact = 48 + n_tps;
            return c;
        };
        xkv_case c = with(f32(96));
        check("f32" + at, c, 1e-5);
        c.n_stored = 0;
        check("exact only" + at, c, 1e-5);
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_Q8_0 }) {
            c       = with(f32(96));
            c.exact = type;
            check(std::string("exact as ") + ggml_type_name(type) + at, c, 1e-5);
        }
        c       = with(f32(96));
        c.flags = 0;
        check("pairs of neighbours" + at, c, 1e-5);
        c.n_rot     = 32;
        c.rot_first = 32;
        check("partly turned" + at, c, 1e-5);
        c.n_rot     = 0;
        c.rot_first = 0;
        check("not turned" + at, c, 1e-5);
        for (int64_t n_chunk : { 32, 128, 256 }) {
            c          = with(f32(64));
            c.n_stored = 4 * n_chunk;
            c.n_chunk  = n_chunk;
            check("chunks of " + std::to_string(n_chunk) + at, c, 1e-5);
        }
        for (int64_t dim : { 80, 96, 128, 256 }) {
            c       = with(f32(48));
            c.dim_k = dim;
            c.dim_v = dim == 256 ? 128 : dim;
            check("heads of " + std::to_string(dim) + at, c, 1e-5);
        }
        c          = with(f32(96));
        c.n_stream = 3;
        check("streams" + at, c, 1e-5);
        c = with(f32(96));
        for (int kd = 0; kd < 2; ++kd) {
            c.rank[kd][0]  = 32;
            c.rank[kd][1]  = 64;
            c.basis[kd][1] = GGML_TYPE_F16;
        }
        check("f32 and f16" + at, c, few ? 1e-5 : 1e-5);

        c = with(mixed(false));
        check("quantized" + at, c, few ? 2e-2 : 1e-5);
        c.n_chunk  = 128;
        c.n_stored = 512;
        check("quantized, chunks of 128" + at, c, few ? 2e-2 : 1e-5);
        c = with(mixed(true));
        check("quantized to one bit" + at, c, few ? 2e-2 : 1e-5);
        c          = with(mixed(false));
        c.n_stored = 40 * 64;
        check("more chunks than spans" + at, c, few ? 2e-2 : 1e-5);

        c = with(xkv_case());
        c.flags |= XKV_ATTN_PLAIN;
        c.rank[0][2] = c.rank[1][2] = 64;
        check("plain q8_0" + at, c, few ? 2e-2 : 1e-5);
        c.rank[0][2] = c.rank[1][2] = 0;
        c.rank[0][0] = c.rank[1][0] = 64;
        check("plain f32" + at, c, 1e-5);

        // with a small tolerance, what is left out is small
        c          = with(f32(96));
        c.n_stored = 1024;
        c.lead[0] = c.lead[1] = 32;
        c.tolerance           = 1e-6f;
        check("refined nearly everywhere" + at, c, 2e-4);
        c.tolerance = 0.02f;
        c.decay     = 8.0f;
        check("refined where it matters" + at, c, 4e-2);
        c          = with(mixed(false));
        c.n_stored = 1024;
        c.lead[0] = c.lead[1] = 64;
        c.tolerance           = 0.01f;
        check("quantized, refined where it matters" + at, c, 3e-2);
        c.lead[0] = c.lead[1] = 128; // inside the blocks of 64 directions
        c.tolerance           = 0.03f;
        check("quantized, lead ends in a tile" + at, c, 5e-2);

        // what the lead gives most of the softmax gets next to none of it
        c                = with(xkv_case());
        c.rank[XKV_K][0] = c.rank[XKV_K][1] = c.lead[XKV_K] = 32;
        c.basis[XKV_K][1]                                   = GGML_TYPE_F16;
        c.rank[XKV_V][2] = c.lead[XKV_V] = 64;
        c.basis[XKV_V][2]                = GGML_TYPE_Q8_0;
        c.n_stored                       = 1024;
        c.mislead                        = 3.0f;
        c.tolerance                      = 0.005f;
        check("misled by the lead" + at, c, 3e-2);
    }
    printf("%d passed, %d failed\n", n_pass, n_fail);
    return n_fail > 0;
}
