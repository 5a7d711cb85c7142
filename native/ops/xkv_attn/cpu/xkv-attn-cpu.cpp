#include "xkv-attn-cpu.h"

#include "xkv-attn-layer.h"

#include "ggml-cpu-impl.h"

static bool xkv_is_prefill(const ggml_tensor * t) {
    return t->src[0]->ne[2] > XKV_ATTN_MAX_QUERY;
}

bool xkv_attn_cpu_supported(const ggml_tensor * t) {
#if defined(__GNUC__)
    const auto exact = [](const ggml_tensor * x) {
        return (x->type == GGML_TYPE_F32 || x->type == GGML_TYPE_F16 || x->type == GGML_TYPE_Q8_0) && x->nb[0] == ggml_type_size(x->type);
    };
    const auto * q = t->src[0];
    const auto * m = t->src[3];
    return xkv_attn_fits(t) && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && exact(t->src[1]) && exact(t->src[2]) &&
           (m->type == GGML_TYPE_F32 || m->type == GGML_TYPE_F16);
#else
    GGML_UNUSED(t);
    return false;
#endif
}

size_t xkv_attn_cpu_work_size(const ggml_tensor * t, int n_tasks) {
    const xkv_attn_layer l(t);
    return xkv_is_prefill(t) ? xkv_attn_prefill_bytes(l, n_tasks) : xkv_attn_decode_bytes(l, n_tasks);
}

void xkv_attn_cpu(const ggml_compute_params * params, ggml_tensor * t) {
    const xkv_attn_layer l(t);

    char *     work = (char *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    const auto wait = [](void * pool) { ggml_barrier((ggml_threadpool *) pool); };
    (xkv_is_prefill(t) ? xkv_attn_prefill : xkv_attn_decode)(l, params->ith, params->nth, work, wait, params->threadpool);
}
