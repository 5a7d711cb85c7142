// Times the op on one thread beside f16 flash attention of the same build, on random coefficients: what is within reach.
//   bench TOKENS N_HEAD N_HEAD_KV HEAD_DIM FRAME SHAPE TOLERANCE N_TPS
// SHAPE: ranks of K and V by type, f32,f16,q8_0,q5_0,q4_0,q2_0,q1_0, as "0,0,64,64,128,192,0:0,0,64,64,128,128,0"; leads as ":128:128"
#include "case.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <atomic>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct spin_barrier {
    int              n;
    std::atomic<int> count{ 0 }, phase{ 0 };
    void             wait() {
        const int p = phase.load();
        if (count.fetch_add(1) == n - 1) {
            count = 0;
            phase.fetch_add(1);
        } else {
            while (phase.load() == p) {
            }
        }
    }
};

int main(int argc, char ** argv) {
    if (argc < 10) {
        fprintf(stderr, "see the top of bench.cpp\n");
        return 1;
    }
    const int64_t N = atoi(argv[1]), H = atoi(argv[2]), HK = atoi(argv[3]), D = atoi(argv[4]), C = atoi(argv[5]);
    const float   tol  = atof(argv[7]);
    const int64_t T    = atoi(argv[8]);
    const int     nth  = atoi(argv[9]);
    const int64_t NE   = 320 + (T > 8 ? T : 0); // exact tokens
    const int     reps = argc > 10 ? atoi(argv[10]) : 20;

    xkv_attn_params par = {};
    {
        std::string s  = argv[6];
        size_t      at = 0;
        for (int kd = 0; kd < 2; ++kd) {
            for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
                size_t e        = s.find_first_of(",:", at);
                par.rank[kd][i] = atoi(s.substr(at, e - at).c_str());
                at              = e + 1;
            }
        }
        size_t e    = s.find(':', at);
        par.lead[0] = atoi(s.substr(at, e - at).c_str());
        par.lead[1] = atoi(s.substr(e + 1).c_str());
    }
    xkv_case c;
    c.n_stored  = N;
    c.n_head    = H;
    c.n_head_kv = HK;
    c.dim_k = c.dim_v = D;
    c.n_chunk         = C;
    c.n_tps           = T;
    c.n_exact         = NE;
    c.exact           = GGML_TYPE_Q8_0;
    c.tolerance       = tol;
    c.full            = true;
    c.causal          = T > 8;
    c.decay           = 64;
    for (int kd = 0; kd < 2; ++kd) {
        c.lead[kd] = par.lead[kd];
        for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
            c.rank[kd][i]  = par.rank[kd][i];
            c.basis[kd][i] = xkv_attn_type(i < 2 ? i : i < 5 ? 2 : 4);
        }
    }
    ggml_context *       ctx = ggml_init({ (size_t) 8 << 30, nullptr, false });
    std::mt19937         rng(1);
    ggml_tensor *        dst    = xkv_make_case(ctx, c, 1);
    ggml_tensor *        q      = dst->src[0];
    const int64_t        n_coef = dst->src[4]->ne[0];
    const xkv_attn_layer l(dst);

    const bool        prefill = T > XKV_ATTN_MAX_QUERY;
    std::vector<char> work((prefill ? xkv_attn_prefill_bytes(l, nth) : xkv_attn_decode_bytes(l, nth)));
    char *            w = (char *) (((uintptr_t) work.data() + 63) / 64 * 64);
    spin_barrier      bar;
    bar.n           = nth;
    const auto wait = [](void * u) { ((spin_barrier *) u)->wait(); };
    double     best = 1e9;
    for (int r = 0; r < reps; ++r) {
        const double             t0 = now();
        std::vector<std::thread> ts;
        const auto               body = [&](int ith) { (prefill ? xkv_attn_prefill : xkv_attn_decode)(l, ith, nth, w, wait, &bar); };
        for (int i = 1; i < nth; ++i) {
            ts.emplace_back(body, i);
        }
        body(0);
        for (auto & t : ts) {
            t.join();
        }
        best = std::min(best, now() - t0);
    }
    double sum = 0;
    for (int64_t i = 0; i < ggml_nelements(dst); ++i) {
        sum += ((float *) dst->data)[i];
    }

    // f16 flash attention over as many tokens
    ggml_backend_t be = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(be, nth);
    const int64_t NA = N + NE;
    ggml_tensor * fk = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, D, NA, HK, 1);
    ggml_tensor * fv = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, D, NA, HK, 1);
    for (ggml_tensor * t : { fk, fv }) {
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16((rng() % 1000) * 1e-3f);
        }
    }
    ggml_tensor * fm = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, NA, T, 1, 1);
    memset(fm->data, 0, ggml_nbytes(fm));
    ggml_tensor * fq = ggml_permute(ctx, q, 0, 2, 1, 3);
    ggml_tensor * fo = ggml_flash_attn_ext(ctx, fq, fk, fv, fm, 1.0f / sqrtf(D), 0, 0);
    ggml_flash_attn_ext_set_prec(fo, GGML_PREC_F32);
    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, fo);
    double bestf = 1e9;
    for (int r = 0; r < reps; ++r) {
        const double t0 = now();
        ggml_backend_graph_compute(be, gf);
        bestf = std::min(bestf, now() - t0);
    }

    printf("tokens %ld heads %ld/%ld of %ld frame %ld rank %ld+%ld lead %ld+%ld tol %g queries %ld threads %d: xkv %.3f ms, f16 flash "
           "attention %.3f ms, ratio %.2f; %.1f KiB of work, chunk %ld B/token (f16 %ld) [%g]\n",
           N, H, HK, D, C, l.rank[0], l.rank[1], l.lead[0], l.lead[1], tol, T, nth, best * 1e3, bestf * 1e3, best / bestf,
           work.size() / 1024.0, n_coef / C, 4 * HK * D, sum);
}
