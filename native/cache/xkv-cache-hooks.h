#pragma once

// What the patches of llama.cpp call where it makes and uses a llama_memory_i.

#include <cstdint>

struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;

// a new xkv cache when the thread is inside an xkv scope, else nullptr; throws xkv_error
llama_memory_i * xkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// passes mem through; throws xkv_error (and frees mem) when an xkv cache was asked for and mem is another kind
llama_memory_i * xkv_check_memory(llama_memory_i * mem);

// graph nodes that an xkv cache needs beyond the model's own
uint32_t xkv_graph_max_nodes(const llama_memory_i * mem);
