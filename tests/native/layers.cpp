// A store, a window and a sidecar over some of a model's layers, and a sidecar file that several threads read.
// Arguments: a model of at least 4 layers, a sidecar of it.

#include "base/xkv-error.h"
#include "base/xkv-parallel.h"
#include "format/xkv-sidecar.h"
#include "store/xkv-carry.h"
#include "store/xkv-store.h"
#include "window/xkv-window.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>

static int n_failed = 0;

#define CHECK(x)                                                                                                                           \
    do {                                                                                                                                   \
        if (!(x)) {                                                                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);                                                                        \
            n_failed++;                                                                                                                    \
        }                                                                                                                                  \
    } while (0)

using kind = xkv_sidecar::kind;

static const uint32_t N_CHUNK = 32;
static const uint32_t N_SLOT  = 256;
static const uint32_t N_CELL  = 64;

// groups of these layers, without calibration
static std::unique_ptr<xkv_sidecar> make_sidecar(const llama_model & model, const std::vector<std::vector<uint32_t>> & groups) {
    const auto & hparams = model.hparams;

    std::vector<uint32_t> n_embd[2];
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        n_embd[0].push_back(hparams.n_embd_k_gqa(il));
        n_embd[1].push_back(hparams.n_embd_v_gqa(il));
    }
    auto res = std::make_unique<xkv_sidecar>(groups, N_CHUNK);
    res->set_embd(n_embd[0], n_embd[1]);
    return res;
}

static bool refused(const llama_model & model, const std::vector<std::vector<uint32_t>> & groups) {
    try {
        make_sidecar(model, groups);
    } catch (const xkv_error & err) {
        return err.status == XKV_STATUS_FORMAT;
    }
    return false;
}

// all directions, in a store of one stream
static xkv_config make_config(const xkv_sidecar & sidecar, bool fused) {
    xkv_config res = {};
    res.fused      = fused;
    res.n_slot     = N_SLOT;

    xkv_config::stage stage = {};
    stage.n_slot            = N_SLOT;
    for (auto kd : { kind::K, kind::V }) {
        for (const auto & gr : sidecar.groups) {
            stage.segments[kd].push_back({ { gr.dim[kd], GGML_TYPE_Q8_0, GGML_TYPE_F16, 0.0f } });
        }
    }
    res.stages.push_back(stage);
    return res;
}

// different numbers of about 1 everywhere
static xkv_floats numbers(size_t n, float seed) {
    xkv_floats res(n);
    for (size_t i = 0; i < n; ++i) {
        res[i] = sinf(seed + 0.7f * i);
    }
    return res;
}

static bool close(const xkv_floats & a, const xkv_floats & b) {
    bool res = a.size() == b.size();
    for (size_t i = 0; res && i < a.size(); ++i) {
        res = fabsf(a[i] - b[i]) < 0.01f;
    }
    return res;
}

static void test_store(const llama_model & model, bool fused) {
    const auto sidecar = make_sidecar(model, { { 1, 3 }, { 2 } });
    const auto config  = make_config(*sidecar, fused);

    xkv_store store(model, *sidecar, config, { { 1, 2, 3 }, { { 0, 2 } } }, 1, false);
    CHECK(store.layer_of(0).il == 2 && store.layer_of(0).ig == 1); // attends to what layer 2 keeps

    std::vector<uint32_t> layers;
    for (const auto & l : store.layers()) {
        layers.push_back(l.il);
    }
    CHECK((layers == std::vector<uint32_t>{ 1, 3, 2 }));

    const uint32_t n_embd = model.hparams.n_embd_k_gqa(3);
    CHECK(store.layer_of(3).ig == 0 && store.layer_of(3).place == 1 && store.layer_of(3).off[0] == n_embd);
    CHECK(store.layer_of(2).ig == 1 && store.layer_of(2).off[0] == 0);
    CHECK(store.groups()[0].dim[0] == 2 * n_embd && store.groups()[1].dim[0] == n_embd);

    for (auto kd : { kind::K, kind::V }) {
        for (uint32_t ig = 0; ig < 2; ++ig) {
            const uint32_t dim  = store.groups()[ig].dim[kd];
            const uint32_t rank = store.groups()[ig].rank[kd];
            const auto     rows = numbers((size_t) rank * dim, 1.0f + ig);
            const auto     coef = numbers((size_t) N_CHUNK * rank, 2.0f + ig);
            store.set_basis(kd, ig, 0, rows);
            store.set_coef(kd, ig, 0, 5, coef.data());
            CHECK(close(store.get_basis(kd, ig, 0), rows));
            CHECK(close(store.get_coef(kd, ig, 0, 5), coef));
        }
        // layer 3 has the second half of each of its group's directions
        const auto rows = store.get_basis(kd, 0, 0);
        const auto part = store.get_basis_layer(kd, 3, 0);
        CHECK(fabsf(part[0] - rows[part.size() / store.groups()[0].rank[kd]]) < 0.01f);
    }
}

// From a plain stage to one in q4_0, whose bases are the plain numbers in reverse: what was stored is there, and nothing that
// grows with the store is allocated beside it.
static void test_stage(const llama_model & model, bool fused) {
    static const uint32_t N_PLAIN = 4096;

    const auto sidecar = make_sidecar(model, { { 1, 3 }, { 2 } });
    auto       config  = make_config(*sidecar, fused);
    config.n_slot      = 3 * N_PLAIN;
    for (auto kd : { kind::K, kind::V }) {
        for (auto & segments : config.stages[0].segments[kd]) {
            segments[0].type = GGML_TYPE_Q4_0;
        }
    }
    xkv_config::stage plain = {};
    plain.n_slot            = N_PLAIN;
    plain.type              = GGML_TYPE_Q8_0;
    config.stages.insert(config.stages.begin(), plain);

    xkv_store store(model, *sidecar, config, { { 1, 2, 3 }, { { 0, 2 } } }, 1, false);
    CHECK(store.layer_of(0).il == 2 && store.layer_of(0).ig == 1); // attends to what layer 2 keeps
    store.restart(0);
    CHECK(store.plain() && store.n_stage() == 2);

    std::vector<uint32_t> chunks; // with holes
    for (uint32_t ic = 0; ic < N_PLAIN / N_CHUNK; ++ic) {
        if (ic % 5 != 2) {
            chunks.push_back(ic);
        }
    }
    const auto stored = [&](kind kd, uint32_t ig, uint32_t ic) {
        return numbers((size_t) N_CHUNK * store.groups()[ig].dim[kd], 0.1f * ic + kd + 2 * ig);
    };
    size_t n_basis = 0; // bytes of the bases of the largest group
    for (uint32_t ig = 0; ig < 2; ++ig) {
        size_t n = 0;
        for (auto kd : { kind::K, kind::V }) {
            for (uint32_t ic : chunks) {
                store.set_coef(kd, ig, 0, ic, stored(kd, ig, ic).data());
            }
            n += sizeof(ggml_fp16_t) * store.groups()[ig].dim[kd] * store.groups()[ig].dim[kd];
        }
        n_basis = std::max(n_basis, n);
    }

    size_t waiting = 0;
    size_t n_chunk = 0; // bytes of a chunk of the largest group
    auto   next    = store.begin(1, N_PLAIN);
    for (uint32_t ig = 0; ig < 2; ++ig) {
        store.begin_group(next, ig);
        xkv_recodes turns;
        for (auto kd : { kind::K, kind::V }) {
            const uint32_t n = store.groups()[ig].dim[kd];
            xkv_floats     rows((size_t) n * n, 0.0f);
            for (uint32_t i = 0; i < n; ++i) {
                rows[(size_t) i * n + n - 1 - i] = 1.0f;
            }
            store.set_basis(kd, ig, 0, rows, &next, 2);
            turns[kd] = xkv_recode_all(rows, n, n);
        }
        waiting = std::max(waiting, xkv_carry_stage(store, ig, 0, chunks, turns, next, 2));
        store.end_group(next, ig);
        n_chunk = std::max<size_t>(n_chunk, fused ? next.groups[ig].packed->ne[0] : 0);
    }
    store.commit(std::move(next));
    CHECK(store.stage() == 1);
    if (fused) {
        const size_t n_round = 2 * 128 / N_CHUNK * n_chunk;
        CHECK(chunks.size() * n_chunk > 2 * (n_basis + n_round));
        CHECK(waiting > 0 && waiting <= n_basis + 2 * n_round);
        CHECK(store.staged_peak() <= n_basis + 16 * 1024);
    }
    for (uint32_t ig = 0; ig < 2; ++ig) {
        for (auto kd : { kind::K, kind::V }) {
            const size_t n = store.groups()[ig].dim[kd];
            for (uint32_t ic : chunks) {
                const auto expected = stored(kd, ig, ic);
                const auto found    = store.get_coef(kd, ig, 0, ic);
                double     error    = 0.0;
                for (size_t i = 0; i < found.size(); ++i) {
                    error = std::max(error, (double) fabsf(found[i] - expected[i / n * n + n - 1 - i % n]));
                }
                CHECK(found.size() == expected.size() && error < 0.15);
            }
            CHECK(store.get_basis(kd, ig, 0)[n - 1] == 1.0f);
        }
    }
}

static void test_window(const llama_model & model) {
    llama_memory_params params = {};
    params.type_k              = GGML_TYPE_F16;
    params.type_v              = GGML_TYPE_F16;

    llama_cparams cparams = {};
    cparams.n_seq_max     = 1;
    cparams.kv_unified    = true;

    xkv_window all(model, params, cparams, { { 0, 1, 2, 3 }, {} }, N_CELL);
    xkv_window some(model, params, cparams, { { 1, 3 }, {} }, N_CELL);

    // layer 2 attends to what layer 1 keeps
    const xkv_window shared(model, params, cparams, { { 1, 3 }, { { 2, 1 } } }, N_CELL);
    CHECK(shared.k(2, 0) == shared.k(1, 0) && shared.v(2, 0) == shared.v(1, 0));

    for (uint32_t il : { 1, 3 }) {
        CHECK(some.k(il, 0)->ne[0] == (int64_t) model.hparams.n_embd_k_gqa(il) && some.k(il, 0)->ne[1] == N_CELL);
        CHECK(some.v(il, 0)->ne[0] == (int64_t) model.hparams.n_embd_v_gqa(il));
    }
    const auto bytes = [](const xkv_window & w) {
        size_t res = 0;
        for (const auto & [buft, n] : w.get()->memory_breakdown()) {
            res += n;
        }
        return res;
    };
    CHECK(2 * bytes(some) == bytes(all));
}

static void test_threads(const char * path) {
    const xkv_sidecar sidecar(path);

    std::vector<xkv_floats> expected;
    for (uint32_t g = 0; g < sidecar.groups.size(); ++g) {
        expected.push_back(sidecar.basis(g, kind::K, sidecar.groups[g].dim[0]));
    }
    std::vector<char> same(400);
    xkv_parallel(same.size(), 4, [&](size_t i) {
        const uint32_t g = i % expected.size();
        same[i]          = sidecar.basis(g, kind::K, sidecar.groups[g].dim[0]) == expected[g];
    });
    CHECK(std::accumulate(same.begin(), same.end(), 0) == (int) same.size());
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL SIDECAR\n", argv[0]);
        return 1;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fprintf(stderr, "%s does not load\n", argv[1]);
        return 1;
    }
    test_store(*model, false);
    test_store(*model, true);
    test_stage(*model, false);
    test_stage(*model, true);
    test_window(*model);
    test_threads(argv[2]);

    CHECK(refused(*model, { { 1, 3 }, { 3 } }));
    CHECK(refused(*model, { { 3, 1 } }));
    CHECK(refused(*model, { { 1 }, {} }));
    CHECK(refused(*model, { { 4 } }));

    llama_model_free(model);
    return n_failed == 0 ? 0 : 1;
}
