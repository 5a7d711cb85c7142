// What the CPU backend calls for GGML_OP_XKV_ATTN.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

bool   xkv_attn_cpu_supported(const struct ggml_tensor * t);
size_t xkv_attn_cpu_work_size(const struct ggml_tensor * t, int n_tasks);

void xkv_attn_cpu(const struct ggml_compute_params * params, struct ggml_tensor * t);

#ifdef __cplusplus
}
#endif
