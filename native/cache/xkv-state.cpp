// Saved states: window, chunks, bases and what is known of the tokens, of all sequences or of one. All of it is read and checked
// before anything is changed.

#include "base/xkv-bytes.h"
#include "cache/xkv-cache.h"
#include "flow/xkv-flow.h"

#include "llama-cparams.h"
#include "llama-io.h"

#include "ggml-backend.h"

#include <algorithm>
#include <functional>
#include <limits>

static const uint32_t XKV_STATE_MAGIC   = 0x53564b58; // XKVS
static const uint32_t XKV_STATE_VERSION = 2;

namespace {

// what llama.cpp's own cache writes and reads, in memory
class memory_writer : public llama_io_write_i {
public:
    explicit memory_writer(xkv_bytes_out & out) : out(out) {}

    void write(const void * src, size_t size) override { memcpy(out.more(size), src, size); }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_get(tensor, out.more(size), offset, size);
    }
    size_t n_bytes() override { return out.data.size(); }

private:
    xkv_bytes_out & out;
};

class memory_reader : public llama_io_read_i {
public:
    explicit memory_reader(xkv_bytes_in & in) : in(in), size(in.rest()) {}

    void   read(void * dst, size_t n) override { memcpy(dst, in.take(n), n); }
    void   read_tensor(ggml_tensor * tensor, size_t offset, size_t n) override { ggml_backend_tensor_set(tensor, in.take(n), offset, n); }
    size_t n_bytes() override { return size - in.rest(); }

private:
    xkv_bytes_in & in;
    const size_t   size;
};

// bytes of a state that are looked at where they stand
struct span {
    const uint8_t * data;
    size_t          size;
};

// a chunk as it is saved
struct saved_chunk {
    xkv_chunk chunk;
    span      coef;
};

// a stream of a state, before it is taken over
struct saved_stream {
    uint32_t                  stream; // of this cache
    uint32_t                  stage;
    span                      flow;
    std::vector<saved_chunk>  chunks;
    xkv_seq_set               seqs; // of all chunks
    std::vector<llama_pos>    sinks;
    std::vector<llama_seq_id> sink_seqs; // a sequence that has the sink
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

std::vector<uint32_t> llama_kv_cache_xkv::window_signature() const {
    // V, where it is kept, has the type of K
    std::vector<uint32_t> res = { (uint32_t) get_window()->type_k(), (uint32_t) tables.size(), config.online };
    for (const auto & l : store->layers()) {
        res.push_back(l.il);
    }
    return res;
}

void llama_kv_cache_xkv::write_stream(llama_seq_id seq_id, uint32_t s, xkv_bytes_out & out) const {
    out.put_list(store->signature(store->stage()));

    xkv_bytes_out bases;
    flow->save(s, bases);
    out.put_list(bases.data);

    std::vector<uint32_t> list;
    for (uint32_t ic : tables[s].used()) {
        if (seq_id < 0 || tables[s][ic].seqs.test(seq_id)) {
            list.push_back(ic);
        }
    }
    out.put((uint64_t) store->chunk_bytes());
    out.put((uint32_t) list.size());
    for (uint32_t ic : list) {
        const auto & chunk = tables[s][ic];
        out.put(chunk.pos);
        out.put_list(chunk.offsets);
        out.put(chunk.seqs);
        store->get_chunk(s, ic, out.more(store->chunk_bytes()));
    }

    std::vector<llama_pos>    sinks;
    std::vector<llama_seq_id> sink_seqs;
    for (llama_seq_id seq = 0; seq < (llama_seq_id) n_seq_max; ++seq) {
        if ((seq_id >= 0 && seq != seq_id) || get_stream(seq) != s) {
            continue;
        }
        for (const auto & token : window->tokens(seq)) {
            if (token.sink) {
                sinks.push_back(token.pos);
                sink_seqs.push_back(seq);
            }
        }
    }
    out.put_list(sinks);
    out.put_list(sink_seqs);
}

void llama_kv_cache_xkv::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id >= (llama_seq_id) n_seq_max) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "a state of sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
    }
    if (broken) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", refusal.text);
    }
    if (window->has_shift()) {
        const char * why = "positions were shifted before the context's first batch; call xkv_attach, or decode a token first";
        xkv_set_last_error(why); // llama.cpp keeps what it catches to itself
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", why);
    }
    size_t n_byte = window_bytes() + (1 << 16);
    for (const auto & table : tables) {
        n_byte += table.used().size() * (store->chunk_bytes() + 4 * store->n_chunk) + store->basis_bytes();
    }
    xkv_bytes_out out;
    out.data.reserve(n_byte);
    out.put(xkv_identity(*sidecar));
    out.put_list(window_signature());
    out.put((uint8_t) (seq_id >= 0));
    out.put((uint32_t) (seq_id >= 0 ? 1 : tables.size()));
    for (uint32_t s = 0; s < tables.size(); ++s) {
        if (seq_id < 0 || get_stream(seq_id) == s) {
            write_stream(seq_id, s, out);
        }
    }
    uint32_t n_cell = 0;
    for (llama_seq_id seq = 0; seq < (llama_seq_id) n_seq_max; ++seq) {
        n_cell = std::max(n_cell, seq_id < 0 ? window->n_used(get_stream(seq)) : window->n_token(seq_id));
    }
    out.put(n_cell);
    memory_writer window_out(out);
    get_window()->state_write(window_out, seq_id, flags);

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
                  version > XKV_STATE_VERSION ? "update xkv-gguf" : "evaluate its prompt again");
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

static span xkv_take_span(xkv_bytes_in & in) {
    const auto n = in.get<uint64_t>();
    return { in.take(n), (size_t) n };
}

static saved_stream xkv_parse_stream(xkv_bytes_in & in, const xkv_store & store, uint32_t n_seq_max) {
    saved_stream res;
    const auto   sig = in.get_list<uint32_t>();
    for (res.stage = 0; res.stage < store.n_stage() && store.signature(res.stage) != sig; ++res.stage) {
    }
    if (res.stage == store.n_stage()) {
        xkv_throw(
            XKV_STATUS_MODEL_MISMATCH,
            "the state's coefficients have other ranks and types than any stage of this cache; load it into a context with the n_ctx, "
            "ratio and options of the one that saved it");
    }
    res.flow            = xkv_take_span(in);
    const auto   n_byte = in.get<uint64_t>();
    const size_t n      = in.get<uint32_t>();
    if (n * store.n_chunk > store.stage_slots()[res.stage]) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state has %zu chunks, expected at most %u; raise n_ctx", n,
                  store.stage_slots()[res.stage] / store.n_chunk);
    }
    for (size_t i = 0; i < n; ++i) {
        saved_chunk c;
        c.chunk.pos     = in.get<llama_pos>();
        c.chunk.offsets = in.get_list<uint16_t>();
        c.chunk.seqs    = in.get<xkv_seq_set>();
        c.chunk.n       = c.chunk.offsets.size();
        c.coef          = { in.take(n_byte), (size_t) n_byte };
        const bool ascend =
            std::adjacent_find(c.chunk.offsets.begin(), c.chunk.offsets.end(), std::greater<uint16_t>()) == c.chunk.offsets.end();
        if (c.chunk.n == 0 || c.chunk.n > store.n_chunk || c.chunk.first() < 0 || c.chunk.first() > (1 << 30) || !ascend ||
            c.chunk.seqs.none() || (c.chunk.seqs >> n_seq_max).any()) {
            xkv_throw(XKV_STATUS_FORMAT, "chunk %zu of the state has %u tokens from position %d, expected 1 to %u of sequences below %u", i,
                      c.chunk.n, c.chunk.pos, store.n_chunk, n_seq_max);
        }
        res.seqs |= c.chunk.seqs;
        res.chunks.push_back(std::move(c));
    }
    res.sinks     = in.get_list<llama_pos>();
    res.sink_seqs = in.get_list<llama_seq_id>();
    if (res.sinks.size() != res.sink_seqs.size()) {
        xkv_throw(XKV_STATUS_FORMAT, "the state has %zu sinks of %zu sequences", res.sinks.size(), res.sink_seqs.size());
    }
    return res;
}

// A stream that others have tokens in keeps its stage and bases: the state has to be of the same ones.
void llama_kv_cache_xkv::check_shared(llama_seq_id seq_id, uint32_t stage, const uint8_t * bases, size_t n_byte) const {
    const uint32_t s = get_stream(seq_id);
    xkv_bytes_out  mine;
    flow->save(s, mine);
    const size_t n = store->has_own_bases(s) ? 1 + store->basis_bytes() : 1;
    if (stage != store->stage() || n_byte < n || memcmp(mine.data.data(), bases, n) != 0) {
        xkv_throw(
            XKV_STATUS_UNSUPPORTED,
            "sequence %d shares a stream with others, whose stage and bases are not those of the state; load it into an empty context, "
            "or set kv_unified to False",
            seq_id);
    }
}

// the sequences of a saved stream have to be those of this cache's stream
void llama_kv_cache_xkv::check_members(uint32_t stream, llama_seq_id seq_id, const std::vector<llama_seq_id> & sinks,
                                       const xkv_seq_set & chunks) const {
    const auto other = [&](llama_seq_id s) { return s < 0 || s >= (llama_seq_id) n_seq_max || (seq_id < 0 && get_stream(s) != stream); };

    bool wrong = std::any_of(sinks.begin(), sinks.end(), other);
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        wrong = wrong || (chunks.test(s) && other(s));
    }
    if (wrong) {
        xkv_throw(XKV_STATUS_FORMAT, "the state has tokens of sequences that are not those of stream %u", stream);
    }
}

// chunks of the stage that others do not have
void llama_kv_cache_xkv::check_shared_room(llama_seq_id seq_id, size_t n_chunk) const {
    const auto & table  = tables[get_stream(seq_id)];
    const auto   used   = table.used();
    const size_t n_stay = std::count_if(used.begin(), used.end(), [&](uint32_t ic) {
        auto seqs = table[ic].seqs;
        return seqs.reset(seq_id).any();
    });
    const size_t n_room = store->n_slot_now() / store->n_chunk - n_stay;
    if (n_chunk > n_room) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "the state has %zu chunks, the stage has room for %zu; load it into an empty context", n_chunk,
                  n_room);
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
    try {
        read_state(io, seq_id, flags);
    } catch (...) {
        xkv_set_last_error(xkv_caught().text);
        throw;
    }
}

void llama_kv_cache_xkv::read_state(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id >= (llama_seq_id) n_seq_max) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "a state for sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
    }
    const auto   data = xkv_read_state(io);
    xkv_bytes_in in(data.data(), data.size());
    if (in.get<uint64_t>() != xkv_identity(*sidecar)) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state was saved with another sidecar or model than %s",
                  sidecar->path.empty() ? "this one, which has no sidecar" : sidecar->path.c_str());
    }
    if (in.get_list<uint32_t>() != window_signature()) {
        xkv_throw(
            XKV_STATUS_MODEL_MISMATCH,
            "the state's window has other types, layers, streams or options than this cache; load it into a context with the options of "
            "the one that saved it");
    }
    if (in.get<uint8_t>() != (seq_id >= 0)) {
        xkv_throw(XKV_STATUS_FORMAT, "the state is of %s, expected one of %s", seq_id >= 0 ? "all sequences" : "one sequence",
                  seq_id >= 0 ? "one sequence" : "all sequences");
    }
    const uint32_t n_stream = in.get<uint32_t>();
    if (n_stream != (seq_id >= 0 ? 1 : tables.size())) {
        xkv_throw(XKV_STATUS_FORMAT, "the state has %u streams, expected %zu", n_stream, seq_id >= 0 ? 1 : tables.size());
    }
    std::vector<saved_stream> streams;
    for (uint32_t s = 0; s < n_stream; ++s) {
        streams.push_back(xkv_parse_stream(in, *store, n_seq_max));
        streams.back().stream = seq_id >= 0 ? get_stream(seq_id) : s;
    }
    const uint32_t n_cell = in.get<uint32_t>();
    const uint32_t n_room = seq_id < 0 ? window->size() : window->n_free(seq_id, 0, std::numeric_limits<llama_pos>::max());
    if (n_cell > n_room) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state has %u exact tokens, the window has room for %u; raise n_ctx", n_cell, n_room);
    }
    for (const auto & st : streams) {
        check_members(st.stream, seq_id, st.sink_seqs, st.seqs);
        size_t n = n_cell;
        for (const auto & c : st.chunks) {
            n += c.chunk.n;
        }
        if (n > setup.cparams.n_ctx_seq) {
            xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state has %zu tokens, expected at most %u; raise n_ctx", n, setup.cparams.n_ctx_seq);
        }
    }
    const bool alone = seq_id < 0 || is_alone(seq_id);
    if (!alone) {
        check_shared(seq_id, streams[0].stage, streams[0].flow.data, streams[0].flow.size);
        check_shared_room(seq_id, streams[0].chunks.size());
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
            take_stream(st.stream, st.stage, alone, st.flow.data, st.flow.size);
            const auto free = tables[st.stream].free(st.chunks.size());
            for (size_t i = 0; i < st.chunks.size(); ++i) {
                auto & c = st.chunks[i];
                if (c.coef.size != store->chunk_bytes()) {
                    xkv_throw(XKV_STATUS_FORMAT, "a chunk of the state has %zu bytes, expected %zu", c.coef.size, store->chunk_bytes());
                }
                if (seq_id >= 0) {
                    c.chunk.seqs = xkv_seq_set().set(seq_id);
                }
                store->set_chunk(st.stream, free[i], c.coef.data);
                tables[st.stream].put(free[i], std::move(c.chunk));
            }
        }
        memory_reader window_in(in);
        get_window()->state_read(window_in, seq_id, flags);
        for (const auto & st : streams) {
            for (size_t i = 0; i < st.sinks.size(); ++i) {
                mark_sink(st.stream, seq_id >= 0 ? seq_id : st.sink_seqs[i], st.sinks[i]);
            }
        }
    } catch (...) {
        const auto failure = xkv_caught();
        if (seq_id < 0) {
            clear(true);
        } else {
            seq_rm(seq_id, -1, -1);
        }
        throw xkv_error(failure.status, std::string("the state could not be taken over, and its tokens are gone: ") + failure.text);
    }
}

void llama_kv_cache_xkv::take_stream(uint32_t stream, uint32_t stage, bool alone, const uint8_t * data, size_t n_byte) {
    if (!alone) {
        return;
    }
    if (tables.size() == 1) {
        flow->restart(stage);
    } else {
        flow->reset(stream);
    }
    xkv_bytes_in in(data, n_byte);
    flow->load(stream, in);
}

void llama_kv_cache_xkv::mark_sink(uint32_t stream, llama_seq_id seq_id, llama_pos pos) {
    for (const auto & token : window->tokens(seq_id)) {
        if (token.pos == pos) {
            window->set_sink(stream, token.cell);
        }
    }
}
