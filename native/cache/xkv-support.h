#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct llama_model;

// layers that keep K and V of their own, ascending
std::vector<uint32_t> xkv_kv_layers(const llama_model & model);

// why a model cannot be used with an xkv cache, "" when it can
std::string xkv_unsupported_reason(const llama_model & model);
