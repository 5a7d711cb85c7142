// Times the op on one thread beside f16 flash attention of the same build, on random coefficients: what is within reach.
//   bench TOKENS N_HEAD N_HEAD_KV HEAD_DIM FRAME SHAPE TOLERANCE N_TPS
// SHAPE: ranks of K and V by type, f32,f16,q8_0,q5_0,q4_0,q2_0,q1_0, as "0,0,64,64,128,192,0:0,0,64,64,128,128,0"; leads as ":128:128"
#include "../cpu/xkv-attn-layer.h"

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
    int n;
    std::atomic<int> count{0}, phase{0};
    void wait() {
        const int p = phase.load();
        if (count.fetch_add(1) == n - 1) { count = 0; phase.fetch_add(1); } else { while (phase.load() == p) {} }
    }
};

int main(int argc, char ** argv) {
    if (argc < 10) { fprintf(stderr, "see the top of bench.cpp\n"); return 1; }
    const int64_t N = atoi(argv[1]), H = atoi(argv[2]), HK = atoi(argv[3]), D = atoi(argv[4]), C = atoi(argv[5]);
    const float tol = atof(argv[7]);
    const int64_t T = atoi(argv[8]);
    const int nth = atoi(argv[9]);
    const int64_t NE = 320 + (T > 8 ? T : 0); // exact tokens
    const int reps = argc > 10 ? atoi(argv[10]) : 20;

    xkv_attn_params par = {};
    par.scale = 1.0f/sqrtf(D); par.tolerance = tol; par.n_chunk = C; par.flags = XKV_ATTN_ROPE_NEOX;
    {
        std::string s = argv[6]; size_t at = 0;
        for (int kd = 0; kd < 2; ++kd) for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
            size_t e = s.find_first_of(",:", at); par.rank[kd][i] = atoi(s.substr(at, e - at).c_str()); at = e + 1;
        }
        size_t e = s.find(':', at); par.lead[0] = atoi(s.substr(at, e - at).c_str()); par.lead[1] = atoi(s.substr(e + 1).c_str());
        for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
            const int b = i < 2 ? i : i < 5 ? 2 : 4;
            par.type_basis[i] = b | b << 4;
        }
    }
    ggml_init_params ip = { (size_t) 8 << 30, nullptr, false };
    ggml_context * ctx = ggml_init(ip);
    std::mt19937 rng(1);
    std::normal_distribution<float> nd;
    const auto fill_f32 = [&](ggml_tensor * t, float s) { for (int64_t i = 0; i < ggml_nelements(t); ++i) ((float *) t->data)[i] = s*nd(rng); };

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, H, T, 1); fill_f32(q, 1);
    ggml_tensor * k = ggml_new_tensor_4d(ctx, GGML_TYPE_Q8_0, D, HK, NE, 1);
    ggml_tensor * v = ggml_new_tensor_4d(ctx, GGML_TYPE_Q8_0, D, HK, NE, 1);
    for (ggml_tensor * t : { k, v }) { std::vector<float> x(ggml_nelements(t)); for (auto & y : x) y = nd(rng); ggml_quantize_chunk(GGML_TYPE_Q8_0, x.data(), t->data, 0, HK*NE, D, nullptr); }
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, NE, T, 1, 1);
    for (int64_t t = 0; t < T; ++t) for (int64_t j = 0; j < NE; ++j) ((ggml_fp16_t *) mask->data)[t*NE + j] = ggml_fp32_to_fp16(T > 8 && j > 320 + t ? -INFINITY : 0.0f);
    const int64_t F = N/C;
    ggml_tensor * dst = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, H, T, 1);
    // sizes by a first reading without tensors
    dst->src[0] = q; dst->src[1] = k; dst->src[2] = v; dst->src[3] = mask;
    memcpy(dst->op_params, &par, sizeof(par));
    xkv_attn_layer l0(dst);
    int64_t n_coef = 0;
    for (int kd = 0; kd < 2; ++kd) n_coef += l0.head_coef[kd];
    const int64_t n_basis = l0.kind_basis[1] + HK*l0.head_basis[1];
    ggml_tensor * coef  = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, n_coef, F, 1);
    ggml_tensor * basis = ggml_new_tensor_2d(ctx, GGML_TYPE_I8, n_basis, 1);
    ggml_tensor * turn  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, 1, F);
    ggml_tensor * fill  = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, F, T, 1);
    for (int64_t i = 0; i < ggml_nelements(fill); ++i) ((int32_t *) fill->data)[i] = C;
    for (int64_t f = 0; f < F; ++f) for (int64_t i = 0; i < D/2; ++i) { const double a = f*C*pow(10000.0, -2.0*i/D); ((float *) turn->data)[f*D + i] = cos(a); ((float *) turn->data)[f*D + D/2 + i] = sin(-a); }
    // random codes with scales of a decaying spectrum
    const auto fill_tiles = [&](uint8_t * p, ggml_type type, int64_t bytes, float size) {
        const size_t tb = xkv_tile_bytes(type, 16, xkv_tile_cols(type));
        for (int64_t i = 0; i < bytes; i += tb) {
            for (size_t j = 0; j < tb; ++j) p[i + j] = rng();
            if (type == GGML_TYPE_F32) { for (size_t j = 0; j < tb/4; ++j) ((float *) (p + i))[j] = size*nd(rng); continue; }
            if (type == GGML_TYPE_F16) { for (size_t j = 0; j < tb/2; ++j) ((ggml_fp16_t *) (p + i))[j] = ggml_fp32_to_fp16(size*nd(rng)); continue; }
            const float m = type == GGML_TYPE_Q8_0 ? 64 : type == GGML_TYPE_Q5_0 ? 8 : type == GGML_TYPE_Q4_0 ? 4 : 1;
            for (int r = 0; r < 16; ++r) ((ggml_fp16_t *) (p + i))[r] = ggml_fp32_to_fp16(size/m);
        }
    };
    for (int64_t f = 0; f < F; ++f) for (int kd = 0; kd < 2; ++kd) for (int is = 0; is < l0.n_segment[kd]; ++is) {
        const auto & seg = l0.segments[kd][is];
        fill_tiles((uint8_t *) coef->data + f*n_coef + seg.coef, seg.type, xkv_tile_bytes(seg.type, C, seg.rank), 1.0f/(1 + seg.first/16.0f));
    }
    memset(basis->data, 0, n_basis);
    for (int kd = 0; kd < 2; ++kd) for (int64_t h = 0; h < HK; ++h) for (int is = 0; is < l0.n_segment[kd]; ++is) {
        const auto & seg = l0.segments[kd][is];
        fill_tiles((uint8_t *) basis->data + l0.kind_basis[kd] + h*l0.head_basis[kd] + seg.basis, seg.type_basis, xkv_tile_bytes(seg.type_basis, seg.rank, D), 0.5f);
    }
    dst->src[4] = coef; dst->src[5] = basis; dst->src[6] = turn; dst->src[7] = fill;
    const xkv_attn_layer l(dst);

    const bool prefill = T > XKV_ATTN_MAX_QUERY;
    std::vector<char> work((prefill ? xkv_attn_prefill_bytes(l, nth) : xkv_attn_decode_bytes(l, nth)));
    char * w = (char *) (((uintptr_t) work.data() + 63)/64*64);
    spin_barrier bar; bar.n = nth;
    const auto wait = [](void * u) { ((spin_barrier *) u)->wait(); };
    double best = 1e9;
    for (int r = 0; r < reps; ++r) {
        const double t0 = now();
        std::vector<std::thread> ts;
        const auto body = [&](int ith) { (prefill ? xkv_attn_prefill : xkv_attn_decode)(l, ith, nth, w, wait, &bar); };
        for (int i = 1; i < nth; ++i) ts.emplace_back(body, i);
        body(0);
        for (auto & t : ts) t.join();
        best = std::min(best, now() - t0);
    }
    double sum = 0; for (int64_t i = 0; i < ggml_nelements(dst); ++i) sum += ((float *) dst->data)[i];

    // f16 flash attention over as many tokens
    ggml_backend_t be = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(be, nth);
    const int64_t NA = N + NE;
    ggml_tensor * fk = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, D, NA, HK, 1);
    ggml_tensor * fv = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, D, NA, HK, 1);
    for (ggml_tensor * t : { fk, fv }) for (int64_t i = 0; i < ggml_nelements(t); ++i) ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16((rng() % 1000)*1e-3f);
    ggml_tensor * fm = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, NA, T, 1, 1);
    memset(fm->data, 0, ggml_nbytes(fm));
    ggml_tensor * fq = ggml_permute(ctx, q, 0, 2, 1, 3);
    ggml_tensor * fo = ggml_flash_attn_ext(ctx, fq, fk, fv, fm, par.scale, 0, 0);
    ggml_flash_attn_ext_set_prec(fo, GGML_PREC_F32);
    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, fo);
    double bestf = 1e9;
    for (int r = 0; r < reps; ++r) { const double t0 = now(); ggml_backend_graph_compute(be, gf); bestf = std::min(bestf, now() - t0); }

    printf("tokens %ld heads %ld/%ld of %ld frame %ld rank %ld+%ld lead %ld+%ld tol %g queries %ld threads %d: xkv %.3f ms, f16 flash attention %.3f ms, ratio %.2f; %.1f KiB of work, chunk %ld B/token (f16 %ld) [%g]\n",
           N, H, HK, D, C, l.rank[0], l.rank[1], l.lead[0], l.lead[1], tol, T, nth, best*1e3, bestf*1e3, best/bestf, work.size()/1024.0, n_coef/C, 4*HK*D, sum);
}
