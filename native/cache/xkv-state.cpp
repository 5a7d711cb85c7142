// Saved states: window, chunks, bases and what is known of the tokens, of all sequences or of one. All of it is read and checked
// before anything is changed.

#include "base/xkv-bytes.h"
#include "cache/xkv-cache.h"
#include "flow/xkv-flow.h"

#include "llama-cparams.h"
#include "llama-io.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <limits>
#include <numeric>

static const uint32_t XKV_STATE_MAGIC   = 0x53564b58; // XKVS
static const uint32_t XKV_STATE_VERSION = 2;

namespace {

// a stream of a state, before it is taken over
struct saved_stream {
    uint32_t         stream; // of this cache
    bool             alone;  // no other sequence has tokens in it
    xkv_saved_store  store;
    xkv_saved_tokens exact;

    size_t n_token() const { return store.n_token + exact.tokens.size(); }
};

} // namespace

// calibrations of the same name can differ
static uint64_t xkv_identity(const xkv_sidecar & sidecar) {
    uint64_t res = xkv_hash(&sidecar.frame, sizeof(sidecar.frame));
    for (uint32_t g = 0; g < sidecar.groups.size(); ++g) {
        for (auto kd : { xkv_sidecar::K, xkv_sidecar::V }) {
            for (const auto & x : { sidecar.mean(g, kd), sidecar.spectrum(g, kd) }) {
                res = xkv_hash(x.data(), x.size() * sizeof(float), res);
            }
        }
    }
    return res;
}

// A model of the same shapes has the same cache but not the same K and V: names and shapes of its tensors, and of the numbers those that
// every device keeps on the host.
static uint64_t xkv_model_identity(const llama_model & model) {
    static const size_t XKV_SAMPLE_BYTES = 4096;

    uint64_t res = xkv_hash(nullptr, 0);
    for (const auto & [name, t] : model.tensors_by_name) {
        res = xkv_hash(name.data(), name.size(), res);
        res = xkv_hash(&t->type, sizeof(t->type), res);
        res = xkv_hash(t->ne, sizeof(t->ne), res);
        if (name == "token_embd.weight" && t->buffer && ggml_backend_buffer_is_host(t->buffer)) {
            const size_t n = std::min(ggml_nbytes(t), XKV_SAMPLE_BYTES);
            res            = xkv_hash(t->data, n, res);
            res            = xkv_hash((const uint8_t *) t->data + ggml_nbytes(t) - n, n, res);
        }
    }
    return res;
}

// llama.cpp keeps what it catches to itself
void llama_kv_cache_xkv::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);
    try {
        write_state(io, seq_id);
    } catch (...) {
        xkv_set_last_error(xkv_caught().text);
        throw;
    }
}

void llama_kv_cache_xkv::write_state(llama_io_write_i & io, llama_seq_id seq_id) const {
    if (seq_id >= (llama_seq_id) n_seq_max) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "a state of sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
    }
    if (broken) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", refusal.text);
    }
    if (window->has_shift()) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "positions were shifted before the context's first batch; call xkv_attach, or decode a token first");
    }
    xkv_bytes_out out;
    out.put(xkv_identity(*sidecar));
    out.put(xkv_model_identity(setup.model));
    out.put((uint8_t) config.online);
    out.put((uint8_t) (seq_id >= 0));
    out.put((uint32_t) (seq_id >= 0 ? 1 : tables.size()));
    for (uint32_t s = 0; s < tables.size(); ++s) {
        if (seq_id < 0 || get_stream(seq_id) == s) {
            flow->save(s, seq_id, out);
            window->save(s, seq_id, out);
        }
    }
    const uint64_t size = out.data.size();
    const uint64_t hash = xkv_hash(out.data.data(), size);
    io.write(&XKV_STATE_MAGIC, sizeof(XKV_STATE_MAGIC));
    io.write(&XKV_STATE_VERSION, sizeof(XKV_STATE_VERSION));
    io.write(&size, sizeof(size));
    io.write(&hash, sizeof(hash));
    io.write(out.data.data(), size);
}

// the bytes of a state, checked as a whole
static std::vector<uint8_t> xkv_read_state(llama_io_read_i & io) {
    uint32_t magic, version;
    uint64_t size, hash;
    io.read(&magic, sizeof(magic));
    io.read(&version, sizeof(version));
    io.read(&size, sizeof(size));
    io.read(&hash, sizeof(hash));
    if (magic != XKV_STATE_MAGIC) {
        xkv_throw(XKV_STATUS_FORMAT,
                  "the state is not one of an xkv cache; load it into a context with the kv_mode that it was saved with");
    }
    if (version != XKV_STATE_VERSION) {
        xkv_throw(XKV_STATUS_VERSION, "the state has version %u, expected %u; %s", version, XKV_STATE_VERSION,
                  version > XKV_STATE_VERSION ? "upgrade xkv-gguf" : "evaluate the prompt again");
    }
    // in pieces, so that a wrong size takes no more memory than there are bytes
    std::vector<uint8_t> data;
    while (data.size() < size) {
        const size_t n = std::min<size_t>(size - data.size(), 16 << 20);
        data.resize(data.size() + n);
        io.read(data.data() + data.size() - n, n);
    }
    if (xkv_hash(data.data(), size) != hash) {
        xkv_throw(XKV_STATUS_FORMAT, "the state is damaged: its checksum is not that of its bytes");
    }
    return data;
}

// the sequences of a saved stream have to be those of this cache's stream
void llama_kv_cache_xkv::check_members(uint32_t stream, llama_seq_id seq_id, const xkv_seq_set & seqs) const {
    for (llama_seq_id s = 0; seq_id < 0 && s < (llama_seq_id) n_seq_max; ++s) {
        if (seqs.test(s) && get_stream(s) != stream) {
            xkv_throw(XKV_STATUS_FORMAT, "the state has tokens of sequences that are not those of stream %u", stream);
        }
    }
}

bool llama_kv_cache_xkv::is_alone(llama_seq_id seq_id) const {
    for (llama_seq_id other = 0; other < (llama_seq_id) n_seq_max; ++other) {
        if (other != seq_id && get_stream(other) == get_stream(seq_id) && seq_pos_max(other) >= 0) {
            return false;
        }
    }
    return true;
}

void llama_kv_cache_xkv::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags);
    try {
        read_state(io, seq_id);
    } catch (...) {
        xkv_set_last_error(xkv_caught().text);
        throw;
    }
}

void llama_kv_cache_xkv::read_state(llama_io_read_i & io, llama_seq_id seq_id) {
    if (seq_id >= (llama_seq_id) n_seq_max) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "a state for sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
    }
    const auto   data = xkv_read_state(io);
    xkv_bytes_in in(data.data(), data.size());
    check_origin(in, seq_id);
    std::vector<saved_stream> streams;
    const uint32_t            n_stream = in.get<uint32_t>();
    if (n_stream != (seq_id >= 0 ? 1 : tables.size())) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH,
                  "the state has %u streams, this context %zu; give it the n_seq_max and kv_unified of the one "
                  "that saved it",
                  n_stream, seq_id >= 0 ? 1 : tables.size());
    }
    for (uint32_t s = 0; s < n_stream; ++s) {
        const uint32_t stream = seq_id >= 0 ? get_stream(seq_id) : s;
        // of one sequence, the number that it had does not matter
        const uint32_t n_seq = seq_id >= 0 ? LLAMA_MAX_SEQ : n_seq_max;
        streams.push_back({ stream, seq_id < 0 || is_alone(seq_id), flow->parse(in, n_seq), {} });
        auto & st = streams.back();
        st.exact  = window->parse(in, n_seq);
        auto seqs = st.store.seqs;
        for (const auto & token : st.exact.tokens) {
            seqs |= token.seqs;
        }
        check_members(stream, seq_id, seqs);
        check_size(seq_id, st.alone, stream, st.n_token());

        // what has no room in the window is going to follow into the store
        const size_t n_cell = seq_id < 0 ? window->size() : window->n_free(seq_id, 0, std::numeric_limits<llama_pos>::max());
        const size_t n_over = st.exact.tokens.size() - std::min(st.exact.tokens.size(), n_cell);
        if (n_over > 0 && !lctx) {
            xkv_throw(XKV_STATUS_UNSUPPORTED,
                      "the state has %zu exact tokens, the window has room for %zu before the context's first batch; call xkv_attach, or "
                      "decode a token first",
                      st.exact.tokens.size(), n_cell);
        }
        const size_t n_exact = st.exact.tokens.size();
        const size_t n_leave = n_exact - std::min<size_t>(n_exact, config.n_sink + config.n_window);
        // each sequence of a stream can leave one chunk that is not full
        const size_t n_more = n_over > 0 ? (n_leave + store->n_chunk - 1) / store->n_chunk + (tables.size() == 1 ? n_seq_max - 1 : 0) : 0;
        flow->prepare(lctx, stream, st.alone, n_stay(seq_id, stream), n_more, st.store);
    }

    // from here on the cache changes: what fails leaves it empty, or without the sequence
    try {
        if (seq_id < 0) {
            empty(true);
        } else {
            seq_rm_one(seq_id, 0, std::numeric_limits<llama_pos>::max());
            window->drop_sinks();
        }
        for (auto & st : streams) {
            for (auto & c : st.store.chunks) {
                if (seq_id >= 0) {
                    c.chunk.seqs = xkv_seq_set().set(seq_id);
                }
            }
            flow->take(lctx, st.stream, st.alone, st.store);
            st.store.image.reset();
            take_exact(st.stream, seq_id, st.exact);
        }
    } catch (...) {
        const auto failure = xkv_caught();
        if (flow->half_changed()) {
            fail("a state", true, failure);
        }
        if (seq_id < 0) {
            clear(true);
        } else {
            seq_rm(seq_id, -1, -1);
        }
        throw xkv_error(failure.status, std::string("the state could not be taken over, and its tokens are gone: ") + failure.text);
    }
}

void llama_kv_cache_xkv::check_origin(xkv_bytes_in & in, llama_seq_id seq_id) const {
    if (in.get<uint64_t>() != xkv_identity(*sidecar)) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state was saved with another sidecar or model than %s",
                  sidecar->path.empty() ? "this one, which has no sidecar" : sidecar->path.c_str());
    }
    if (in.get<uint64_t>() != xkv_model_identity(setup.model)) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state was saved with another model than this one");
    }
    if ((in.get<uint8_t>() != 0) != config.online) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state is of a cache with online %s, this one has it %s; give both the same",
                  config.online ? "off" : "on", config.online ? "on" : "off");
    }
    if (in.get<uint8_t>() != (seq_id >= 0)) {
        xkv_throw(XKV_STATUS_FORMAT, "the state is of %s, expected one of %s", seq_id >= 0 ? "all sequences" : "one sequence",
                  seq_id >= 0 ? "one sequence" : "all sequences");
    }
}

void llama_kv_cache_xkv::check_size(llama_seq_id seq_id, bool alone, uint32_t stream, size_t n_token) const {
    size_t n_other = 0;
    if (!alone) {
        const auto both = [&](llama_seq_id s) { return window->n_token(s) + tables[stream].n_token(s); };
        n_other         = window->n_used(stream) + tables[stream].n_token();
        n_other -= std::min<size_t>(n_other, both(seq_id)); // what it shares with others is counted less than once
    }
    if (n_token + n_other > setup.cparams.n_ctx_seq) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state has %zu tokens, expected at most %zu; raise n_ctx", n_token,
                  setup.cparams.n_ctx_seq - std::min<size_t>(n_other, setup.cparams.n_ctx_seq));
    }
}

size_t llama_kv_cache_xkv::n_stay(llama_seq_id seq_id, uint32_t stream) const {
    if (seq_id < 0) {
        return 0;
    }
    const auto & table = tables[stream];
    const auto   used  = table.used();
    return std::count_if(used.begin(), used.end(), [&](uint32_t ic) {
        auto seqs = table[ic].seqs;
        return seqs.reset(seq_id).any();
    });
}

void llama_kv_cache_xkv::take_exact(uint32_t stream, llama_seq_id seq_id, xkv_saved_tokens & exact) {
    // more sinks than this cache keeps would take the room of recent tokens
    std::vector<uint32_t> n_sink(n_seq_max, 0);
    for (auto & token : exact.tokens) {
        for (llama_seq_id s = 0; token.sink && s < (llama_seq_id) n_seq_max; ++s) {
            if (seq_id < 0 ? token.seqs.test(s) : s == seq_id) {
                token.sink = ++n_sink[s] <= config.n_text_sink;
            }
        }
    }
    const auto n_free = [&] { return window->size() - window->n_used(stream); };

    // in the order of their cells; those that have no room come last, and the oldest make room for them
    std::vector<uint32_t> which(exact.tokens.size());
    std::iota(which.begin(), which.end(), 0);
    if (which.size() > n_free()) {
        std::stable_sort(which.begin(), which.end(), [&](uint32_t a, uint32_t b) { return exact.tokens[a].pos < exact.tokens[b].pos; });
    }
    for (size_t done = 0; done < which.size();) {
        for (llama_seq_id s = 0; n_free() < which.size() - done && s < (llama_seq_id) n_seq_max; ++s) {
            if (get_stream(s) == stream) {
                flow->leave(lctx, s);
            }
        }
        const size_t n = std::min<size_t>(n_free(), which.size() - done);
        if (n == 0) {
            xkv_throw(XKV_STATUS_INTERNAL, "%zu exact tokens have no room in the window of %u", which.size() - done, window->size());
        }
        window->load(stream, exact, { which.begin() + done, which.begin() + done + n }, seq_id);
        done += n;
    }
}
