#pragma once

#include "base/xkv-layers.h"
#include "format/xkv-sidecar.h"
#include "store/xkv-config.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

// tokens of a graph's slot range, so that a graph is rebuilt once per so many flushed tokens only
static const uint32_t XKV_SLOT_PAD = 256;

// The compressed part of the cache: coefficients per group and token, bases and means per layer. Tensors only, the
// bookkeeping of chunks is the cache's.
//
// A slot is a token, a chunk is n_chunk consecutive slots. The directions of a group and kind are ordered by variance and split
// into segments, one type each. Where a layer's device has the op XKV_ATTN, coefficients and bases are packed as it reads
// them: a chunk of a group is one piece of memory, the bases of a layer another. Elsewhere they are laid out for stock ops, in
// one tensor per segment:
//   K: one row per slot, so that a chunk is contiguous and a query meets it as one matrix
//   V: one row per direction, so that a quantization block is one direction over the tokens of one chunk
//
// Coefficients and bases share one buffer per device, which a stage of the store divides: while few tokens are stored, each
// has more directions and bits. The first stage can be plain: K (in the frames of chunks) and V as they are, in one segment per
// layer whose directions are the layer's numbers, without bases.
class xkv_store {
public:
    using kind = xkv_sidecar::kind;

    struct segment {
        ggml_type type;
        ggml_type type_basis; // GGML_TYPE_COUNT in a plain store
        float     noise;      // of type
        uint32_t  first;      // direction
        uint32_t  rank;       // padded to whole blocks; directions beyond the plan are zero

        ggml_tensor * coef;   // not packed: K [rank, n_slot, n_stream], V [n_slot, rank, n_stream]
        size_t        offset; // packed: bytes from the chunk's begin
        uint32_t      n_head; // packed, in a plain store: KV heads that follow each other; else 1
    };

    struct group {
        std::vector<uint32_t> layers; // of the model

        uint32_t dim[2];  // numbers per token of all layers; of V none where it is the first numbers of K
        uint32_t rank[2]; // of all segments

        std::vector<segment> segments[2];

        bool          pack;   // as XKV_ATTN reads it
        ggml_tensor * packed; // I8 [bytes of a chunk, n_slot/n_chunk, n_stream], or nullptr
    };

    struct layer {
        uint32_t il; // of the model
        uint32_t ig;
        uint32_t place;  // in the group
        uint32_t off[2]; // the layer's first number among its group's

        bool v_in_k; // V is the first numbers of each head of K: K's coefficients serve both

        ggml_tensor * mean_k; // [n_embd_k] f32
        ggml_tensor * mean_v; // [n_embd_v] f32, with V of its own
        ggml_tensor * mean_o; // [n_embd_head_v*n_head] f32: what the mean of V adds to the attention output, before it is unscaled
                              // with V of its own
    };

    // bases that streams share, or a stream's own: per kind, layer of the store and segment
    struct basis_set {
        std::vector<std::vector<ggml_tensor *>> tensors[2];

        std::vector<ggml_tensor *> packed; // per layer of the store: I8 [bytes], or nullptr
    };

    // tensors of one stage
    struct layout {
        uint32_t           stage;
        std::vector<group> groups;
        basis_set          bases;

        // per group: bases, then coefficients
        std::vector<ggml_context_ptr> ctxs;
        std::vector<ggml_backend_buffer_ptr>
            bufs; // in host memory: of a group that is packed its bases until it ends, else all until the commit
    };

    // starts in the last stage; throws xkv_error
    xkv_store(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config, const xkv_layers & layers,
              uint32_t n_stream, bool offload);

    const std::vector<group> & groups() const { return now.groups; }

    // kinds that are stored of a group: K, and V unless K's coefficients serve both
    std::vector<kind> kinds(uint32_t ig) const;

    const std::vector<layer> & layers() const { return layer_list; }

    // by its index in the model, as everywhere; of a layer that attends to another's K and V, that one
    const layer & layer_of(uint32_t il) const { return layer_list[slot_of.at(il)]; }

    uint32_t stage() const { return now.stage; }
    uint32_t n_stage() const { return stages.size(); }

    std::vector<uint32_t> stage_slots() const; // per stage

    // of the present stage
    bool     plain() const { return stages[now.stage].plain(); }
    uint32_t n_slot_now() const { return stages[now.stage].n_slot; }

    // an empty store in another stage, with the calibrated bases
    void restart(uint32_t stage);

    // Another stage with room for n_used slots, to be filled group by group, first by set_basis, then by xkv_carry_stage. What is
    // packed has its coefficients in the place of those that the store has of the group now, so that no more than one group's bases are allocated beside the store; what is not, or takes more than now, is in host memory until the
    // commit. begin and begin_group throw xkv_error.
    layout begin(uint32_t stage, uint32_t n_used) const;
    void   begin_group(layout & next, uint32_t ig) const;
    void   end_group(layout & next, uint32_t ig) const;
    void   commit(layout && next);

    // of a store with one stream: chunks of the next stage that can be written while those of the present one from `unread` on are
    // still to be read
    uint32_t n_free(const layout & next, uint32_t ig, uint32_t unread) const;

    // most bytes of the next stage in host memory at once
    size_t staged_peak() const { return n_staged; }

    // basis of a layer and segment for a stream: K [n_embd_k, rank], V [rank, n_embd_v]; there are none in a plain store
    ggml_tensor * basis(kind kd, uint32_t il, uint32_t is, uint32_t stream) const;

    // bases of a layer as XKV_ATTN reads them, in a group that is packed
    ggml_tensor * packed_basis(uint32_t il, uint32_t stream) const;

    // of a plain store: K or V of a layer
    const segment & plain_segment(kind kd, uint32_t il) const;

    // true when none of the streams has bases of its own
    bool shares_bases(uint32_t s0, uint32_t n) const;

    // grows whenever a stream gets or loses bases of its own or the stage changes, so that graphs with old tensors are rebuilt
    uint32_t n_change() const { return n_tensor_change; }

    // directions of a group as rows [rank, dim]
    xkv_floats get_basis(kind kd, uint32_t ig, uint32_t stream, int n_thread = 1) const;
    void       set_basis(kind kd, uint32_t ig, uint32_t stream, const xkv_floats & rows, const layout * next = nullptr, int n_thread = 1);

    // before set_basis: bases of the stream's own where several streams share the calibrated ones; throws xkv_error
    void own_bases(uint32_t stream);

    // back to the calibrated bases; throws xkv_error
    void reset_bases(uint32_t stream);

    // the part of a layer, [rank, n_embd]
    xkv_floats get_basis_layer(kind kd, uint32_t il, uint32_t stream, int n_thread = 1) const;

    // coefficients of a chunk, [n_chunk, rank]: one row of all directions per token
    xkv_floats get_coef(kind kd, uint32_t ig, uint32_t stream, uint32_t ic) const;
    void       set_coef(kind kd, uint32_t ig, uint32_t stream, uint32_t ic, const float * coef) const {
        set_coef(now.groups[ig], kd, stream, ic, coef);
    }
    void set_coef(const group & gr, kind kd, uint32_t stream, uint32_t ic, const float * coef) const;

    // the same as bytes of a packed chunk
    void pack_coef(const group & gr, kind kd, const float * coef, uint8_t * chunk) const;
    void set_packed(const group & gr, uint32_t stream, uint32_t ic, const std::vector<uint8_t> & chunk) const;

    void copy_stream(uint32_t src, uint32_t dst);

    //
    // for saved states (xkv-image.cpp): bytes as they stand in the present stage
    //

    // what those bytes mean in a stage: two stages with the same one can exchange them
    std::vector<uint32_t> signature(uint32_t stage) const;

    // An empty store in host memory, of one stream and stage, that has this signature and room for n chunks: bytes of another
    // plan are read in it. Throws xkv_error.
    std::unique_ptr<xkv_store> image(const std::vector<uint32_t> & signature, size_t n) const;

    // the present stage, for bases and coefficients that come from another store
    const layout & present() const { return now; }

    // of the coefficients of a chunk, all groups
    size_t chunk_bytes(uint32_t stage) const;
    size_t chunk_bytes() const { return chunk_bytes(now.stage); }
    void   get_chunk(uint32_t stream, uint32_t ic, uint8_t * data) const;
    void   set_chunk(uint32_t stream, uint32_t ic, const uint8_t * data) const;

    // whether a stream's bases are not the calibrated ones; of all bases
    bool   has_own_bases(uint32_t stream) const;
    size_t basis_bytes(uint32_t stage) const;
    size_t basis_bytes() const { return basis_bytes(now.stage); }
    void   get_bases(uint32_t stream, uint8_t * data) const;
    void   set_bases(uint32_t stream, const uint8_t * data);

    // bases of a single stream were written by way of present()
    void set_changed() { changed = true; }

    // where a layer's tensors are
    ggml_backend_buffer_type_t buft(uint32_t il) const;

    // bytes allocated, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    // by buffer type
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> buffers() const;

    const uint32_t n_chunk;
    const uint32_t n_slot;
    const uint32_t n_stream;

private:
    enum part { PART_COEF_K, PART_COEF_V, PART_BASES, PART_MEANS, PART_COUNT };

    // memory of one type: of a model without memory (llama_model_params.no_alloc) an empty buffer, and the bytes that it would have
    struct block {
        ggml_backend_buffer_ptr buf;
        size_t                  size;
    };

    // tensors of one part and their memory
    struct pool {
        part                          what;
        std::vector<ggml_context_ptr> ctxs;
        std::vector<block>            blocks;
    };

    struct own_bases_t {
        pool      mem;
        basis_set bases;
    };

    const llama_model & model;
    const xkv_sidecar & sidecar;
    const bool          offload;
    const bool          no_alloc; // sizes only: tensors have no memory
    const uint32_t      fused;    // xkv_fused

    std::vector<xkv_config::stage> stages;

    std::vector<layer>           layer_list; // those that the cache holds, group by group
    std::map<uint32_t, uint32_t> slot_of;    // index in the model to place in the list

    std::map<ggml_backend_buffer_type_t, block> arena;                        // coefficients and bases
    size_t                                      arena_bytes[PART_COUNT] = {}; // as the last stage divides them

    layout now;
    pool   means;

    bool                                      changed = false; // a single stream has changed the calibrated bases
    std::vector<std::unique_ptr<own_bases_t>> own;             // per stream, empty while the calibrated ones are used

    uint32_t n_tensor_change = 0;

    mutable size_t n_staged = 0;

    ggml_backend_dev_t device(uint32_t il) const;

    // the layers of a group share coefficients; throws xkv_error where they are on several devices
    void check_devices() const;

    // whether the device of the layers has XKV_ATTN for them
    bool can_pack(const std::vector<uint32_t> & layers) const;

    // tensors that make creates, allocated and zeroed; ctx_of gives the context for a layer's buffer type
    using ctx_of_t = std::function<ggml_context *(uint32_t il)>;

    pool make_pool(part what, size_t n_tensors, const std::function<void(const ctx_of_t & ctx_of)> & make) const;

    void make_arena();

    // tensors without memory, for n_used slots where groups are packed
    layout    make_layout(uint32_t stage, uint32_t n_used) const;
    void      make_coef(layout & l, uint32_t ig, uint32_t n_used) const;
    basis_set make_bases(const std::vector<group> & groups, const ctx_of_t & ctx_of) const;

    // puts a layout without memory into the arena
    void place(layout & l) const;

    // where a group lies in its arena [begin, end)
    std::pair<size_t, size_t> region(const layout & l, uint32_t ig) const;

    template <typename F> void each_piece(uint32_t stream, uint32_t ic, F && f) const;

    std::vector<ggml_tensor *> basis_tensors(uint32_t stream) const;

    const basis_set & bases_of(uint32_t stream) const { return own[stream] ? own[stream]->bases : now.bases; }

    void write_basis(const std::vector<group> & groups, const basis_set & bases, kind kd, uint32_t ig, const xkv_floats & rows,
                     int n_thread) const;

    // f(segment, KV head, bytes from the begin of the layer's packed bases) for what is packed of one kind, on n_thread threads
    void each_basis(const group & gr, kind kd, uint32_t il, int n_thread,
                    const std::function<void(const segment & seg, uint32_t head, size_t at)> & f) const;

    uint32_t n_head_dim(kind kd, uint32_t il) const; // numbers of a head
    void     fill_bases(const layout & l) const;
    void     copy_bases(const basis_set & src, const basis_set & dst) const;
    void     fill_means();
};

// gives a context's tensors an empty buffer, so that the scheduler does not take them for its own
void xkv_pretend(ggml_context * ctx, ggml_backend_buffer_t buf);

// of a server on another machine
bool xkv_is_rpc(ggml_backend_dev_t dev);

// whether a device has XKV_ATTN for heads of these sizes
bool xkv_has_attn(ggml_backend_dev_t dev, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv);

// products with quantized rows need the rows as they are stored, so the other direction goes through f32
ggml_tensor * xkv_transposed_f32(ggml_context * ctx, ggml_tensor * basis);

// with a basis as it is stored: x [n_embd, n] of coefficients [rank, n]
ggml_tensor * xkv_from_coef(ggml_context * ctx, xkv_store::kind kd, ggml_tensor * basis, ggml_tensor * coef);
