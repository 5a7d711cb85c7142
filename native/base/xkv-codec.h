#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

// Numbers between f32 and the types of the store, on the host. Storing is rare (once per token), so that any type that
// a backend can multiply with can be used, whether or not the backend can quantize to it.

// numbers per quantization block; 1 for types without blocks
uint32_t xkv_block_size(ggml_type type);

// n numbers, a multiple of the block
void xkv_encode(ggml_type type, const float * x, void * dst, size_t n);
void xkv_decode(ggml_type type, const void * src, float * x, size_t n);
