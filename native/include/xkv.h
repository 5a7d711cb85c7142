// xkv.h - C API of the xKV cache, beside llama.h in the same shared library
//
// Plain types and status codes only: no C++ exception leaves these functions. Every function that returns an
// xkv_status leaves a one-line text in xkv_last_error() when it fails. The text is per thread.
//
// The block between the CFFI markers is read by the Python package as it stands: no preprocessor lines inside.

#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#    define XKV_API __declspec(dllexport)
#else
#    define XKV_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_model;
struct llama_context;

// CFFI-BEGIN

enum xkv_status {
    XKV_STATUS_OK               = 0,
    XKV_STATUS_INVALID_ARGUMENT = 1, // a value that is out of range; the text names it, what was found, what was expected
    XKV_STATUS_IO               = 2, // the sidecar cannot be opened
    XKV_STATUS_FORMAT           = 3, // the sidecar is not one, is truncated, or holds impossible values
    XKV_STATUS_VERSION          = 4, // the sidecar's format version is newer than this library
    XKV_STATUS_MODEL_MISMATCH   = 5, // the sidecar's shapes are not the model's
    XKV_STATUS_UNSUPPORTED      = 6, // the model's architecture or a context setting cannot be used with xkv
    XKV_STATUS_NO_MEMORY        = 7,
    XKV_STATUS_INTERNAL         = 8,
};

// Directions of one kind of one group whose coefficients share a type.
struct xkv_segment {
    uint32_t group;
    uint32_t kind;       // 0 = K, 1 = V
    uint32_t rank;       // a multiple of 32 and, for K, of the type's block; the last of a group and kind may end at its dimension
    int32_t  type;       // ggml_type of the coefficients: F32, F16, Q8_0, Q5_0, Q4_0, Q2_0, Q1_0
    int32_t  type_basis; // ggml_type of the directions themselves: F32, F16, Q8_0, Q5_0, Q4_0
    float    noise;      // of type: mean squared error over variance of what is stored, 0 to below 1
};

// A division of the same bytes for at most n_slot tokens: they get more directions and bits than those of a full store.
struct xkv_stage {
    uint32_t                   n_slot;   // a multiple of 256
    const struct xkv_segment * segments; // NULL, for the first stage only: K and V as they are, in heads of multiples of 32
    uint32_t                   n_segment;
    int32_t                    type;  // ggml_type of K and V without segments: F32, F16, Q8_0
    float                      noise; // of type
};

// How the next llama_context of this thread keeps its KV cache. Sizes are in tokens. The context's type_k and type_v are
// those of the window: F16, F32 or Q8_0.
struct xkv_params {
    const char *               sidecar; // path of the sidecar GGUF file; NULL: no calibration, bases are learnt from the first tokens
    const uint32_t *           layers;  // without a sidecar: layers of the model, ascending in a group, group by group
    const uint32_t *           count;   // [n_group] layers of each group
    uint32_t                   n_group;
    uint32_t                   frame;    // without a sidecar: chunk length
    const struct xkv_segment * segments; // by group, K before V, then by descending variance; none of V where it is a part of K
    uint32_t                   n_segment;
    const struct xkv_stage *   stages; // before the store fills, by ascending n_slot; used by contexts with one stream
    uint32_t                   n_stage;
    int32_t                    n_sink; // first tokens of a sequence that stay exact
    int32_t n_text_sink;               // most later tokens of a sequence that stay exact because the model uses them as attention sinks
    int32_t n_window;                  // fewest recent tokens that stay exact
    int32_t n_absorb;                  // most queries of a micro-batch for which attention is absorbed (several streams: 1 per sequence)
    int32_t online;                    // 1: bases follow the prompt, 0: they stay as calibrated
    int32_t n_prior;                   // tokens that the calibration is worth when bases are updated
    int32_t fused;                     // the op XKV_ATTN on these kinds of device, where they have it: 1 CPU + 2 RPC server + 4 others
    float   tolerance;                 // 0 to 1: with few queries, share of a query's softmax up to which a block of 16 stored tokens
                                       // counts by its first n_lead directions alone; 0: all directions. Stock ops take them all
    int32_t          n_lead;           // a multiple of 32
    const uint32_t * leads;            // [n_leads] in place of it, of each of the model's first layers, whose devices may differ
    uint32_t         n_leads;
    uint32_t         n_keep; // of a stream: cells of the window that tokens stay in, of all its sequences
    uint32_t         n_cell; // of a stream: those, and the ones through which a micro-batch passes
    uint32_t         n_slot; // of a stream: tokens that the store has room for, a multiple of 256
};

// How the bases of a stream followed its tokens.
struct xkv_online_info {
    uint32_t n_check;  // times that the residual of the bases was compared with the calibrated one
    uint32_t n_update; // times that the bases were updated
    float    residual; // at the last check: share of the variance that compression loses, mean over groups, K and V
    float    expected; // the same for the calibration data
    double   seconds;  // that checks and updates took
};

// One line of a memory report: bytes that are allocated now.
struct xkv_report_part {
    char     name[32];
    uint64_t bytes;
};

// A device that ggml knows.
struct xkv_device {
    char     name[64];
    char     description[128];
    char     backend[32]; // of ggml, that it belongs to: CPU, CUDA, Metal, RPC ...
    uint64_t free;        // bytes
    uint64_t total;       // bytes
    int32_t  kind;        // 0 = CPU, 1 = GPU, 2 = GPU with the host's memory, 3 = of an RPC server, 4 = other
    int32_t  fused;       // 1 where it has XKV_ATTN, 0 where attention is made of stock ops; of an RPC server not known: 1
};

// What a context has on one device.
struct xkv_device_part {
    char     name[64]; // of the device's memory, such as CPU or RPC0[HOST:PORT]
    uint64_t weights;  // bytes of the model's tensors
    uint64_t cache;    // bytes of the KV cache, with the cells through which a micro-batch passes
    uint64_t compute;  // bytes of compute buffers
    uint32_t n_layer;  // of an xkv cache: layers whose K and V are there
    uint32_t n_fused;  // those of them whose attention is the op XKV_ATTN
};

// What the cache of one layer looks like, for calibration and for predicting sizes.
struct xkv_layer_info {
    uint32_t il;       // of the model
    uint32_t n_embd_k; // K numbers per token: n_head_kv * n_embd_head_k
    uint32_t n_embd_v; // V numbers per token; 0 where V is the first n_embd_head_v numbers of each head of K
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v;
    uint32_t n_head; // of queries
    uint32_t sinks;  // 1 when a logit of the model's has a part of the softmax: then V is stored without taking off its mean
};

struct xkv_capture;

// hash of the sources this library was built from; the Python package holds the same text
const char * xkv_build_id(void);

// the last failure on this thread, "" when there was none
const char * xkv_last_error(void);
void         xkv_clear_error(void);

// 0 when the model can be used with xkv, else XKV_STATUS_UNSUPPORTED with the reason
int xkv_model_check(const struct llama_model * model);

// the layers that an xkv cache of the model holds, those with K and V of all tokens: fills layers[0 .. *n_layer - 1]; *n_layer is
// the room on entry and their number on return
int xkv_model_layers(const struct llama_model * model, struct xkv_layer_info * layers, uint32_t * n_layer);

// between begin and end, a llama_context that this thread creates keeps its KV cache as xkv
int  xkv_scope_begin(const struct xkv_params * params);
void xkv_scope_end(void);

// tells an xkv cache its context, which it knows by itself from the first batch on: a state can be loaded and cut before
void xkv_attach(struct llama_context * ctx);

// 1 when the context's memory is an xkv cache
int xkv_context_is_xkv(const struct llama_context * ctx);

// fills parts[0 .. *n_parts - 1] for any kind of KV cache; *n_parts is the room on entry and the count on return
int xkv_report(const struct llama_context * ctx, struct xkv_report_part * parts, uint32_t * n_parts);

// the same for scratch: what does not grow with n_ctx, or is given back; for any kind of KV cache
int xkv_scratch(const struct llama_context * ctx, struct xkv_report_part * parts, uint32_t * n_parts);

// The devices of a context, and the parts into which its last graph was cut between them; for any kind of KV cache. Of a model
// without memory (llama_model_params.no_alloc), bytes here and in reports are those that would be allocated.
int xkv_context_devices(const struct llama_context * ctx, struct xkv_device_part * parts, uint32_t * n_parts);
int xkv_context_splits(struct llama_context * ctx, uint32_t * n_split);

// all devices, in ggml's order
int xkv_devices(struct xkv_device * devices, uint32_t * n_device);

// Servers of llama.cpp's RPC backend. The version [3] of the protocol is that of ggml-rpc.h; a patch level from 128 on belongs to
// a library with XKV_ATTN. ggml ends the process where an endpoint "HOST:PORT" does not answer: ask it before.
int xkv_rpc_version(uint32_t * version);
int xkv_rpc_add(const char * endpoint);

// serves devices with commas between, or by default the GPUs, or the CPU; returns when it cannot, else never
int xkv_rpc_serve(const char * endpoint, const char * devices, uint32_t n_thread);

// tokens of a sequence by where they are kept: exact (sinks and window) and compressed
int xkv_seq_tokens(const struct llama_context * ctx, int32_t seq_id, uint32_t * n_exact, uint32_t * n_stored);

// of the stream that holds the sequence
int xkv_online(const struct llama_context * ctx, int32_t seq_id, struct xkv_online_info * info);

// The status of the operation that an xkv context refused or that failed since the last call, with its text in
// xkv_last_error(); OK when there was none. Where the cache cannot be used until it is cleared, it is returned until then.
int xkv_context_refusal(struct llama_context * ctx);

// Calibration: Gram matrices of chunk-frame K and of V, per group of layers, taken from a plain f16 or f32 cache.
// layers: of the model, ascending in a group, group by group; count [n_group] is how many each group has. Tokens at positions
// below n_sink are left out.
int  xkv_capture_new(struct llama_context * ctx, const uint32_t * layers, const uint32_t * count, uint32_t n_group, uint32_t frame,
                     uint32_t n_sink, struct xkv_capture ** capture);
void xkv_capture_free(struct xkv_capture * capture);

// adds the tokens that sequence seq_id holds in the cache now
int xkv_capture_add(struct xkv_capture * capture, int32_t seq_id);

// reads the sums so far, also when the context is gone. kind 0 = K, 1 = V; D = sum of n_embd over the group's layers.
// gram [D*D] row-major sum of x x^T, sum [D] sum of x, n_tokens: tokens added
int xkv_capture_read(const struct xkv_capture * capture, uint32_t group, int32_t kind, double * gram, double * sum, uint64_t * n_tokens);

// frees the sums of one kind of one group; they read as zeros of no tokens from now on
int xkv_capture_drop(struct xkv_capture * capture, uint32_t group, int32_t kind);

// The numbers that the sums are of: x [n*D], those of the tokens of sequence seq_id at positions pos .. pos + n - 1, from
// n_sink on. get takes them from the cache, put writes others in their place, as f16 where the cache is.
int xkv_capture_get(struct xkv_capture * capture, int32_t seq_id, uint32_t group, int32_t kind, int32_t pos, uint32_t n, float * x);
int xkv_capture_put(struct xkv_capture * capture, int32_t seq_id, uint32_t group, int32_t kind, int32_t pos, uint32_t n, const float * x);

// CFFI-END

#ifdef __cplusplus
}
#endif
