// What an application does with an xkv cache, each once before and once while calls fail.

#pragma once

#include "llama.h"
#include "xkv.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// a model, its sidecar, and contexts whose store has two stages before the last one
class scenes {
public:
    scenes(const char * model, const char * sidecar, std::string folder);

    // with so many times the usual n_ctx and stages; nullptr with a text in xkv_last_error()
    llama_context * open(int32_t n_times = 1) const;

    // n tokens from position pos on; nullptr where there is no context
    llama_batch_ext * batch(llama_context * ctx, int32_t pos, int32_t n) const;

    // n tokens from position pos on, in batches of 64; what llama_process returned
    int decode(llama_context * ctx, int32_t pos, int32_t n) const;

    // logits of a prompt in an empty cache, {} where it did not decode
    std::vector<float> prompt(llama_context * ctx) const;

    // of the last token
    std::vector<float> logits(llama_context * ctx) const;

    std::string state_path() const { return folder + "/faults.state"; }
    std::string moved_path() const { return folder + "/faults.moved"; } // of a context of twice n_ctx

private:
    const std::string sidecar;
    const std::string folder;
    llama_model *     model;
};

// an operation that may fail, on a context that has been prepared
struct scene {
    const char * name;
    int32_t      n_token; // in the cache before; -1: there is no context
    int32_t      n_thread;

    // next: a batch of the tokens that follow
    std::function<bool(const scenes & all, llama_context *& ctx, llama_batch_ext * next)> act;
};

std::vector<scene> list_scenes();
