#include "xkv-attn-cuda.cuh"

#include "xkv-attn-args.h"

bool ggml_cuda_xkv_attn_supported(int device, const ggml_tensor * op) {
    const auto & card = ggml_cuda_info().devices[device];
    return card.cc >= GGML_CUDA_CC_TURING && card.warp_size == XKV_CU_WARP && card.smpb >= XKV_CU_SHARED && xkv_cu_attn_can(op);
}

void ggml_cuda_xkv_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const xkv_cu_attn a    = xkv_cu_attn_args(dst);
    const int         n_sm = ggml_cuda_info().devices[ctx.device].nsm;

    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), xkv_cu_attn_scratch(a, n_sm));
    xkv_cu_attn_run(a, n_sm, scratch.get(), ctx.stream());
    CUDA_CHECK(cudaGetLastError());
}
