#include "xkv-attn-op.h"

#include <cstring>

static_assert(sizeof(xkv_attn_params) <= GGML_MAX_OP_PARAMS, "parameters of XKV_ATTN do not fit");

ggml_tensor * xkv_attn(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, ggml_tensor * coef,
                       ggml_tensor * basis, ggml_tensor * turn, ggml_tensor * fill, const xkv_attn_params * params) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[0] == k->ne[0] && q->ne[1] % k->ne[1] == 0 && q->ne[3] == k->ne[3]);
    GGML_ASSERT(k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && mask->ne[0] == k->ne[2] && mask->ne[1] >= q->ne[2]);
    GGML_ASSERT(!coef == !basis && !coef == !fill && (coef || !turn));
    GGML_ASSERT(!coef || (fill->type == GGML_TYPE_I32 && fill->ne[0] == coef->ne[1] && fill->ne[1] == q->ne[2] && fill->ne[2] == q->ne[3]));

    ggml_tensor * res = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], q->ne[3]);
    memcpy(res->op_params, params, sizeof(*params));
    res->op     = GGML_OP_XKV_ATTN;
    res->src[0] = q;
    res->src[1] = k;
    res->src[2] = v;
    res->src[3] = mask;
    res->src[4] = coef;
    res->src[5] = basis;
    res->src[6] = turn;
    res->src[7] = fill;
    return res;
}
