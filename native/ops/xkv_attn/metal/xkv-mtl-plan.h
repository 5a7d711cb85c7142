// XKV_ATTN on Metal: which kernels run over what. Nothing of ggml and nothing of Metal, so that tests run the same plan on the CPU.

#pragma once

#include "xkv-mtl-args.h"

#include <stddef.h>

#include <vector>

// what the kernels are compiled for, by XKV_MTL_FC_*
struct xkv_mtl_shape {
    int32_t fc[XKV_MTL_N_FC];
};

struct xkv_mtl_launch {
    const char * kernel; // kernel_xkv_attn_ is left out
    int          grid[3];
    int          n_thread;
    int          n_shared; // bytes of threadgroup memory
    xkv_mtl_step step;
    bool         waits; // for all before it
};

struct xkv_mtl_plan {
    xkv_mtl_args                args;
    size_t                      n_scratch; // bytes
    std::vector<xkv_mtl_launch> launches;
    std::vector<size_t>         guards; // where pieces of scratch memory end
};

// n_core: cores of the GPU that there is to be work for
xkv_mtl_plan xkv_mtl_make_plan(const xkv_mtl_args & args, const xkv_mtl_shape & shape, int n_core);
