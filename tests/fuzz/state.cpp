// Saved states with damage, most with a checksum that is right all the same: they are refused and leave the cache as it was, or empty
// when it says so, or are taken. The cache decodes in either case.
// Arguments: a model, a sidecar, a folder, the number of inputs, a seed.

#include "limit.h"
#include "mutate.h"

#include "../native/faults/scenes.h"

#include "base/xkv-bytes.h"

static const size_t N_FRONT = 2 * sizeof(uint32_t) + 2 * sizeof(uint64_t); // magic, version, size, checksum

static std::vector<uint8_t> save(llama_context * ctx) {
    std::vector<uint8_t> res(llama_state_seq_get_size(ctx, 0));
    res.resize(llama_state_seq_get_data(ctx, res.data(), res.size(), 0));
    return res;
}

int main(int argc, char ** argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: %s MODEL SIDECAR FOLDER COUNT SEED\n", argv[0]);
        return 1;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const scenes   all(argv[1], argv[2], argv[3]);
    const uint64_t count = strtoull(argv[4], nullptr, 10);
    mutator        mutate(strtoull(argv[5], nullptr, 10));

    std::vector<std::vector<uint8_t>> states; // in the window alone, and in each stage
    for (int32_t n_token : { 20, 270, 470, 700 }) {
        llama_context * ctx = all.open();
        if (!ctx || all.decode(ctx, 0, n_token) != 0) {
            fprintf(stderr, "the context without damage: %s\n", xkv_last_error());
            return 1;
        }
        states.push_back(save(ctx));
        llama_free(ctx);
    }
    const uint8_t   magic[] = { 'X', 'K', 'V', 'S' };
    uint64_t        n_ok    = 0;
    uint64_t        n_gone  = 0;
    llama_context * ctx     = all.open();
    llama_memory_t  mem     = llama_get_memory(ctx);
    for (uint64_t i = 0; i < count; ++i) {
        fuzz_begin(i);
        auto         data = states[i % states.size()];
        const size_t at   = std::search(data.begin(), data.end(), std::begin(magic), std::end(magic)) - data.begin();
        if (i >= states.size()) {
            const bool front = mutate.below(50) == 0;
            mutate.change(data, front ? 0 : at + N_FRONT, front ? at + N_FRONT : 512);
            if (!front && data.size() >= at + N_FRONT) {
                const uint64_t size = data.size() - at - N_FRONT;
                const uint64_t hash = xkv_hash(data.data() + at + N_FRONT, size);
                memcpy(data.data() + at + 8, &size, sizeof(size));
                memcpy(data.data() + at + 16, &hash, sizeof(hash));
            }
        }
        const llama_pos before = llama_memory_seq_pos_max(mem, 0);
        const bool      ok     = llama_state_seq_set_data(ctx, data.data(), data.size(), 0) > 0;
        const llama_pos after  = llama_memory_seq_pos_max(mem, 0);
        n_ok += ok;
        n_gone += !ok && after != before;
        if ((i < states.size() && !ok) || (!ok && after != before && after != -1) || xkv_context_refusal(ctx) != 0) {
            fprintf(stderr, "input %llu: %s, tokens up to %d become %d: %s\n", (unsigned long long) i, ok ? "taken" : "refused", before,
                    after, xkv_last_error());
            return 1;
        }
        // what was taken can hold positions of any size
        if (i % 16 == 0 && after < 800 && all.decode(ctx, after + 1, 1) != 0) {
            fprintf(stderr, "input %llu: the cache does not decode: %s\n", (unsigned long long) i, xkv_last_error());
            return 1;
        }
    }
    llama_free(ctx);
    printf("%llu states: %llu taken, the rest refused, %llu of them with the loss of what was there\n", (unsigned long long) count,
           (unsigned long long) n_ok, (unsigned long long) n_gone);
    return 0;
}
