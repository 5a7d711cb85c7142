// The cases of the op that every backend is tested with.

#pragma once

#include "case.h"

#include <string>
#include <utility>

// check(name, case, limit of the relative error); without a tolerance the limit is of sums of rounded numbers, float has 1e-5
template <typename F> static inline void xkv_each_case(F && check) {
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
        c      = with(f32(96));
        c.mask = GGML_TYPE_F32;
        check("mask as f32" + at, c, 1e-5);
        c       = with(f32(96));
        c.flags = 0;
        check("pairs of neighbours" + at, c, 1e-5);
        c.n_rot     = 32;
        c.rot_first = 32;
        check("partly turned" + at, c, 1e-5);
        c.n_rot     = 0;
        c.rot_first = 0;
        check("not turned" + at, c, 1e-5);
        for (bool stored : { true, false }) {
            const std::string of = stored ? "" : ", exact only";
            c                    = with(f32(96));
            c.n_stored           = stored ? c.n_stored : 0;
            c.softcap            = 1.5f;
            check("scores capped" + of + at, c, 1e-5);
            c.sinks = true;
            check("scores capped, and sinks" + of + at, c, 1e-5);
            c.softcap = 0.0f;
            check("sinks" + of + at, c, 1e-5);
        }
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
        c.softcap = 3.0f;
        c.sinks   = true;
        check("refined nearly everywhere, capped, with sinks" + at, c, 2e-4);
        c.softcap   = 0.0f;
        c.sinks     = false;
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

        // sums of numbers that 8 bits hold: a code, a scale or a zero that is wrong is no rounding error
        for (int i = 2; i < XKV_ATTN_N_TYPE; ++i) {
            const std::string of = std::string(ggml_type_name(xkv_attn_type(i))) + at;

            c                = with(xkv_case());
            c.n_chunk        = 128;
            c.n_stored       = 512;
            c.n_rot          = 0;
            c.decay          = 1e6f;
            c.whole          = XKV_WHOLE_QUERIES;
            c.rank[XKV_K][i] = 128;
            c.rank[XKV_V][0] = 64;
            for (ggml_type basis : { GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0 }) {
                c.basis[XKV_K][i] = basis;
                check("whole queries, " + std::string(ggml_type_name(basis)) + ", K as " + of, c, 1e-5);
            }
            std::swap(c.rank[XKV_K], c.rank[XKV_V]);
            c.whole           = XKV_WHOLE_WEIGHTS;
            c.basis[XKV_V][i] = GGML_TYPE_F32;
            check("the same weights, V as " + of, c, 1e-5);
            c.rank[XKV_K][2] = c.rank[XKV_V][2] = 128;
            c.lead[0] = c.lead[1] = 64;
            c.tolerance           = 1e-6f;
            check("the same weights, refined, V as q8_0 and " + of, c, 1e-5);
            c.tolerance       = 0.0f;
            c.whole           = XKV_WHOLE_SUMS;
            c.rank[XKV_V][i]  = i == 2 ? 128 : 0;
            c.basis[XKV_V][2] = xkv_attn_type(i);
            check("the same sums, basis of V as " + of, c, 1e-5);
        }

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
}
