// The op on a device of ggml against the reference: test-device NAME, as `xkv-gguf doctor` lists them. 77: the device lacks the op.

#include "cases.h"
#include "reference.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdio>
#include <cstdlib>
#include <string>

static int n_pass = 0;
static int n_fail = 0;

// the case's tensors in the device's memory
struct on_device {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           dst;

    on_device(ggml_backend_t backend, const ggml_tensor * t) : ctx(ggml_init({ (size_t) 1 << 20, nullptr, true })) {
        ggml_tensor * src[GGML_MAX_SRC] = {};
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            src[i] = t->src[i] ? ggml_dup_tensor(ctx.get(), t->src[i]) : nullptr;
        }
        dst = ggml_dup_tensor(ctx.get(), t);
        std::copy(std::begin(src), std::end(src), dst->src);
        dst->op = t->op;
        memcpy(dst->op_params, t->op_params, sizeof(t->op_params));
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        for (int i = 0; buffer && i < GGML_MAX_SRC; ++i) {
            if (src[i]) {
                ggml_backend_tensor_set(src[i], t->src[i]->data, 0, ggml_nbytes(src[i]));
            }
        }
    }
};

static void check(ggml_backend_t backend, const std::string & name, const xkv_case & c, double limit) {
    ggml_context_ptr    host(ggml_init({ (size_t) 512 << 20, nullptr, false }));
    const ggml_tensor * t = xkv_make_case(host.get(), c, 1);
    const on_device     one(backend, t);
    const char *        wrong = nullptr;
    double              norm = 0.0, diff = 0.0;
    if (!one.buffer) {
        wrong = "its tensors do not fit";
    } else if (!ggml_backend_supports_op(backend, one.dst)) {
        wrong = "the device refuses it";
    } else {
        std::vector<float> poison(ggml_nelements(t), NAN);
        ggml_backend_tensor_set(one.dst, poison.data(), 0, ggml_nbytes(t));
        ggml_cgraph * gf = ggml_new_graph(host.get());
        ggml_build_forward_expand(gf, one.dst);
        if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
            wrong = "the device fails";
        } else {
            const auto ref = xkv_ref_attn(t);
            ggml_backend_tensor_get(one.dst, poison.data(), 0, ggml_nbytes(t));
            for (size_t i = 0; i < ref.size(); ++i) {
                const double d = poison[i] - ref[i];
                norm += ref[i] * ref[i];
                diff += std::isfinite(d) ? d * d : INFINITY;
            }
        }
    }
    const double error = sqrt(diff / norm);
    const bool   ok    = !wrong && error < limit;
    (ok ? n_pass : n_fail)++;
    if (!ok || getenv("XKV_TEST_VERBOSE")) {
        printf("%s %s: error %.3g, expected below %.3g%s%s\n", ok ? "ok" : "FAIL", name.c_str(), error, limit, wrong ? "; " : "",
               wrong ? wrong : "");
    }
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();
    ggml_backend_dev_t dev = argc == 2 ? ggml_backend_dev_by_name(argv[1]) : nullptr;
    if (!dev) {
        fprintf(stderr, "usage: %s NAME; devices:", argv[0]);
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            fprintf(stderr, " %s", ggml_backend_dev_name(ggml_backend_dev_get(i)));
        }
        fprintf(stderr, "\n");
        return 1;
    }
    ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    {
        ggml_context_ptr ctx(ggml_init({ (size_t) 16 << 20, nullptr, false }));
        xkv_case         c;
        c.rank[0][0] = c.rank[1][0] = 32;
        if (!backend || !ggml_backend_supports_op(backend.get(), xkv_make_case(ctx.get(), c, 1))) {
            printf("%s lacks the op XKV_ATTN\n", argv[1]);
            return 77;
        }
    }
    // sums of floats in another order, and exponentials of a GPU's own
    xkv_each_case(
        [&](const std::string & name, const xkv_case & c, double limit) { check(backend.get(), name, c, std::max(limit, 1e-4)); });
    printf("%s: %d passed, %d failed\n", argv[1], n_pass, n_fail);
    return n_fail > 0;
}
