#pragma once

#include <string>

struct llama_model;

// why a model cannot be used with an xkv cache, "" when it can
std::string xkv_unsupported_reason(const llama_model & model);
