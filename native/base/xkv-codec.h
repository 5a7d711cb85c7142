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

// Expected squared error of storing a unit Gaussian as type, relative to its variance. Coefficients are near enough to
// that: the planner (xkv_gguf/plan/coef_types.py) holds the same numbers.
float xkv_noise(ggml_type type);
