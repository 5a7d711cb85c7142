// Two threads, each with contexts of its own of one model and one sidecar: what one computes is what it computes alone. For
// `make test-tsan`, which looks for data that both touch.
// Arguments: a model, a sidecar, a folder.

#include "faults/scenes.h"

#include <cstdio>
#include <functional>
#include <thread>

struct result {
    std::vector<float>   logits;
    std::vector<uint8_t> state;
    bool                 ok = false;
};

// a context from its opening to its end, by two threads of its own
static void live(const scenes & all, const char * sidecar, result & res) {
    llama_context * ctx = all.open();
    if (!ctx) {
        return;
    }
    llama_memory_t mem = llama_get_memory(ctx);
    llama_set_n_threads(ctx, 2, 2);
    res.ok = all.decode(ctx, 0, 720) == 0 && llama_memory_seq_rm(mem, 0, 333, -1) && all.decode(ctx, 333, 100) == 0;

    res.state.resize(llama_state_seq_get_size(ctx, 0));
    res.ok = res.ok && llama_state_seq_get_data(ctx, res.state.data(), res.state.size(), 0) == res.state.size();
    llama_memory_clear(mem, true);
    res.ok     = res.ok && llama_state_seq_set_data(ctx, res.state.data(), res.state.size(), 0) == res.state.size();
    res.logits = all.decode(ctx, 433, 60) == 0 ? all.logits(ctx) : std::vector<float>();

    xkv_params wrong = {};
    wrong.sidecar    = sidecar; // without segments: errors are of their thread
    res.ok           = res.ok && xkv_scope_begin(&wrong) == XKV_STATUS_INVALID_ARGUMENT && *xkv_last_error() != '\0';
    llama_free(ctx);
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL SIDECAR FOLDER\n", argv[0]);
        return 1;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const scenes all(argv[1], argv[2], argv[3]);

    result alone, one, two;
    live(all, argv[2], alone);
    std::thread first(live, std::cref(all), argv[2], std::ref(one));
    std::thread second(live, std::cref(all), argv[2], std::ref(two));
    first.join();
    second.join();
    for (const auto * res : { &alone, &one, &two }) {
        if (!res->ok || res->logits.empty() || res->logits != alone.logits || res->state.size() != alone.state.size()) {
            fprintf(stderr, "a context beside another %s\n", res->ok ? "computes other numbers than alone" : "fails");
            return 1;
        }
    }
    return 0;
}
