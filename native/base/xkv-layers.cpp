#include "base/xkv-layers.h"

#include "llama-hparams.h"

bool xkv_v_in_k(const llama_hparams & hparams, uint32_t il) {
    (void) il; // all layers of today's models are of one kind
    return hparams.is_mla();
}

uint32_t xkv_n_embd_v(const llama_hparams & hparams, uint32_t il) {
    return xkv_v_in_k(hparams, il) ? 0 : hparams.n_embd_v_gqa(il);
}
