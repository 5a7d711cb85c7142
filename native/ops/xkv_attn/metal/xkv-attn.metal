// XKV_ATTN on Metal, all kernels. native/cmake/metal.py makes one text of it, which ggml-metal embeds or compiles as its own.

#include "xkv-attn-decode.metal"
#include "xkv-attn-exact.metal"
#include "xkv-attn-make.metal"
#include "xkv-attn-attend.metal"
