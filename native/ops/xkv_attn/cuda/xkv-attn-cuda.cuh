// XKV_ATTN of ggml-cuda, for its dispatch.

#pragma once

#include "ggml-cuda/common.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// its dispatch is the same source
static inline bool ggml_cuda_xkv_attn_supported(int, const ggml_tensor *) {
    return false;
}

static inline void ggml_cuda_xkv_attn(ggml_backend_cuda_context &, ggml_tensor *) {}

#else

bool ggml_cuda_xkv_attn_supported(int device, const ggml_tensor * op);

void ggml_cuda_xkv_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

#endif
