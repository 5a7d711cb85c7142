// XKV_ATTN of ggml-metal, for its dispatch. Read by C++ and by Objective-C.

#pragma once

#include "ggml-metal/ggml-metal-device.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

bool ggml_metal_xkv_attn_supported(const struct ggml_metal_device_props * props, const struct ggml_tensor * op);

// bytes behind the op's output that its kernels use
size_t ggml_metal_xkv_attn_extra(const struct ggml_tensor * op);

void ggml_metal_xkv_attn(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
