#include "xkv-attn-op.h"

#include <algorithm>
#include <cstring>
#include <iterator>

static_assert(sizeof(xkv_attn_params) <= GGML_MAX_OP_PARAMS, "parameters of XKV_ATTN do not fit");

ggml_tensor * xkv_attn(ggml_context * ctx, xkv_attn_src src, const xkv_attn_params * params) {
    const auto & [q, k, v, mask, coef, basis, turn, fill, mean, sinks] = src;

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[0] == k->ne[0] && q->ne[1] % k->ne[1] == 0 && q->ne[3] == k->ne[3]);
    GGML_ASSERT(k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && mask->ne[0] == k->ne[2] && mask->ne[1] >= q->ne[2]);
    GGML_ASSERT(!coef == !fill && !coef == !mean && (coef || (!basis && !turn)));
    GGML_ASSERT(!coef || (fill->type == GGML_TYPE_I32 && fill->ne[0] == coef->ne[1] && fill->ne[1] == q->ne[2] && fill->ne[2] == q->ne[3]));

    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[1]));

    ggml_tensor * res = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], q->ne[3]);
    memcpy(res->op_params, params, sizeof(*params));
    res->op = GGML_OP_XKV_ATTN;

    ggml_tensor * const list[] = { q, k, v, mask, coef, basis, turn, fill, mean, sinks };
    std::copy(std::begin(list), std::end(list), res->src);
    return res;
}
