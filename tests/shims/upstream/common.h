// What upstream's test-llama-archs.cpp uses of upstream's common library to run models; here they are only made.

#pragma once

#include "llama.h"

#include <stdexcept>

struct common_batch {
    explicit common_batch(llama_context *) {}

    void add(llama_token, llama_pos, llama_seq_id, bool) { throw std::logic_error("models are not run"); }
    void clear() {}

    llama_batch_ext * get() { throw std::logic_error("models are not run"); }
};

static inline void common_init() {}
