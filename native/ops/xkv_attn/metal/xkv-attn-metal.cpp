#include "xkv-attn-metal.h"

#include "xkv-mtl-op.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstdio>
#include <string>

// Cores are not told by Metal: enough work for a middling GPU, and the same scratch memory on all.
static const int XKV_MTL_CORES = 32;

static xkv_mtl_plan xkv_mtl_plan_of(const ggml_tensor * op) {
    return xkv_mtl_make_plan(xkv_mtl_op_args(op), xkv_mtl_op_shape(op), XKV_MTL_CORES);
}

bool ggml_metal_xkv_attn_supported(const ggml_metal_device_props * props, const ggml_tensor * op) {
    const char * why = xkv_mtl_op_refusal(op);
    if (!props->has_simdgroup_reduction || !props->has_simdgroup_mm) {
        why = "the GPU lacks matrices of SIMD groups (Apple 7, which is M1 and A14, or newer)";
    } else if (props->max_theadgroup_memory_size < XKV_MTL_SHARED) {
        why = "the GPU has less than 32 KiB of threadgroup memory";
    }
    if (why) {
        GGML_LOG_DEBUG("%s: %s: %s\n", __func__, op->name, why);
    }
    return !why;
}

size_t ggml_metal_xkv_attn_extra(const ggml_tensor * op) {
    return xkv_mtl_plan_of(op).n_scratch;
}

// as ggml-metal-ops.cpp has it for itself
static ggml_metal_buffer_id xkv_mtl_buffer_of(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

static ggml_metal_pipeline_with_params xkv_mtl_pipeline(ggml_metal_library_t lib, const char * kernel, const xkv_mtl_shape & shape) {
    const std::string base = std::string("kernel_xkv_attn_") + kernel;
    std::string       name = base;
    for (int32_t x : shape.fc) {
        name += "_" + std::to_string(x);
    }
    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!res.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        for (int i = 0; i < XKV_MTL_N_FC; ++i) {
            ggml_metal_cv_set_int32(cv, shape.fc[i], XKV_MTL_FC + i);
        }
        res = ggml_metal_library_compile_pipeline(lib, base.c_str(), name.c_str(), cv);
        ggml_metal_cv_free(cv);
    }
    GGML_ASSERT(res.pipeline && "a kernel of XKV_ATTN does not compile");
    return res;
}

void ggml_metal_xkv_attn(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    const xkv_mtl_shape shape = xkv_mtl_op_shape(op);
    xkv_mtl_plan        plan  = xkv_mtl_plan_of(op);

    // what the op lacks is not read
    const int n_src = 10;
    for (int i = 0; i < n_src; ++i) {
        ggml_metal_encoder_set_buffer(enc, xkv_mtl_buffer_of(op->src[i] ? op->src[i] : op->src[0]), XKV_MTL_BUFFER_SRC + i);
    }
    ggml_metal_buffer_id dst = xkv_mtl_buffer_of(op);
    ggml_metal_encoder_set_buffer(enc, dst, XKV_MTL_BUFFER_DST);
    dst.offs += ggml_nbytes(op);
    ggml_metal_encoder_set_buffer(enc, dst, XKV_MTL_BUFFER_SCRATCH);
    ggml_metal_encoder_set_bytes(enc, &plan.args, sizeof(plan.args), XKV_MTL_BUFFER_ARGS);

    for (xkv_mtl_launch & l : plan.launches) {
        const auto pipeline = xkv_mtl_pipeline(lib, l.kernel, shape);
        GGML_ASSERT(l.n_shared <= XKV_MTL_SHARED && l.n_thread <= ggml_metal_pipeline_max_theads_per_threadgroup(pipeline));
        if (l.waits) {
            ggml_metal_encoder_memory_barrier(enc);
        }
        ggml_metal_encoder_set_pipeline(enc, pipeline);
        ggml_metal_encoder_set_bytes(enc, &l.step, sizeof(l.step), XKV_MTL_BUFFER_STEP);
        ggml_metal_encoder_set_threadgroup_memory_size(enc, std::max(l.n_shared, 16), 0);
        ggml_metal_encoder_dispatch_threadgroups(enc, l.grid[0], l.grid[1], l.grid[2], l.n_thread, 1, 1);
    }
}
