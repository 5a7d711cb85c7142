#pragma once

#include "base/xkv-bytes.h"
#include "base/xkv-error.h"
#include "flow/xkv-flush.h"
#include "flow/xkv-saved.h"
#include "flow/xkv-select.h"
#include "store/xkv-carry.h"
#include "store/xkv-config.h"
#include "store/xkv-store.h"
#include "window/xkv-chunks.h"
#include "window/xkv-window.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

class xkv_online_bases;

// where a chunk's token comes from, and how far its K is turned, since its new frame or position is another
struct xkv_source {
    uint32_t  ic;
    uint32_t  slot;
    llama_pos by;
};

// How tokens leave the window for the store: select (which ones, into which chunks), adapt (bases), encode (coefficients),
// commit (tables and cells). And how they come back.
class xkv_flow {
public:
    xkv_flow(const xkv_setup & setup, xkv_store & store, xkv_window & window, std::vector<xkv_chunk_table> & tables);
    ~xkv_flow();

    // the oldest tokens of a sequence leave; throws xkv_error
    void leave(llama_context * lctx, llama_seq_id seq_id);

    // whether what was thrown left the store half changed: bases and coefficients may not belong together any more
    bool half_changed() { return std::exchange(changing, false); }

    // exact copies of the tokens of a chunk at positions inside [p0, p1) go back into the window for one sequence; throws xkv_error
    // returns their cells
    std::vector<uint32_t> restore(llama_context * lctx, uint32_t stream, uint32_t ic, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // all tokens of a chunk go back into the window
    void to_window(llama_context * lctx, uint32_t stream, uint32_t ic);

    //
    // chunks that are cut, and positions that change (xkv-cut.cpp); all throw xkv_error
    //

    // turns K of the window's tokens whose position was changed
    void shift(llama_context * lctx);

    // chunks of the present stage that are free, or can be made so
    size_t n_free(uint32_t stream, bool pack) const;

    // packs chunks until so many are free, or none can be packed; returns how many of them there are
    size_t make_free(llama_context * lctx, uint32_t stream, size_t n);
    // all of them, if need be in the next stage
    void need_free(llama_context * lctx, uint32_t stream, size_t n);

    // leaves the tokens in these slots of a chunk; no work where they are its first ones, and none that needs the context
    void keep(llama_context * lctx, uint32_t stream, uint32_t ic, const std::vector<uint32_t> & slots);

    // The tokens at positions inside [p0, p1) get a chunk of their own, which has to be free; returns it. Chunks where those are all
    // tokens stay.
    uint32_t split(llama_context * lctx, uint32_t stream, uint32_t ic, llama_pos p0, llama_pos p1);

    // positions over d: K of each token is turned on its own
    void divide(llama_context * lctx, uint32_t stream, uint32_t ic, int d);

    // Where so few stored tokens are left that they would be in an earlier stage, and the window has room for them, they go back
    // there: what follows is stored as finely as after them, with bases that do not know what was removed. Throws xkv_error.
    void start_over(llama_context * lctx, uint32_t stream);

    // an empty store in a stage, with calibrated bases
    void restart(uint32_t stage);

    // the stream has no tokens any more
    void reset(uint32_t stream);

    //
    // for saved states (xkv-move.cpp); all but save throw xkv_error
    //

    // chunks of all sequences or of one, the stream's bases and what is known of its tokens
    void            save(uint32_t stream, llama_seq_id seq_id, xkv_bytes_out & out) const;
    xkv_saved_store parse(xkv_bytes_in & in, uint32_t n_seq_max) const;

    // Whether there is room, and for which stage: for a stream that nothing is left in, or in the present stage beside n_stay chunks
    // of others. n_more chunks are going to follow. Changes nothing.
    void prepare(llama_context * lctx, uint32_t stream, bool alone, size_t n_stay, size_t n_more, xkv_saved_store & saved) const;

    // what was prepared; the stream's tokens, or those of the sequence, are gone
    void take(llama_context * lctx, uint32_t stream, bool alone, const xkv_saved_store & saved);

    // stream dst gets the coefficients and bases of stream src
    void copy(uint32_t src, uint32_t dst);

    // most bytes that were allocated at once for a flush, a renewal or a change of stage
    size_t peak() const;

    // how the bases of the stream followed its tokens
    xkv_online_info info(uint32_t stream) const;

private:
    using jobs_t = std::vector<xkv_flush_job>;

    const xkv_setup                setup;
    xkv_store &                    store;
    xkv_window &                   window;
    std::vector<xkv_chunk_table> & tables; // per stream

    xkv_flush                         flush;
    std::unique_ptr<xkv_online_bases> online; // empty while bases stay as calibrated

    bool   changing   = false; // the store is between two states
    size_t carry_peak = 0;     // most bytes of turns, and of chunks that waited for their place

    // f changes the store
    template <typename F> void change(const char * what, F && f) {
        changing = true;
        try {
            f();
        } catch (...) {
            const auto failure = xkv_caught();
            throw xkv_error(failure.status, std::string(what) + ": " + failure.text);
        }
        changing = false;
    }

    // the first free chunks of the present stage
    std::vector<uint32_t> free_chunks(uint32_t stream, size_t n) const;

    // chunks in use, by their set of sequences and by position
    std::vector<std::vector<uint32_t>> by_sequences(uint32_t stream) const;

    // the fewest chunks in a row whose tokens fit into one less; none where there are no such
    std::vector<uint32_t> find_run(uint32_t stream) const;
    void                  pack(llama_context * lctx, uint32_t stream, const std::vector<uint32_t> & run);

    // the coefficients of tokens into the first slots of a chunk
    void       write(llama_context * lctx, uint32_t stream, uint32_t to, const std::vector<xkv_source> & sources);
    xkv_floats gather(xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<xkv_source> & sources) const;
    void       turn_rows(llama_context * lctx, uint32_t ig, uint32_t stream, const std::vector<xkv_source> & sources, xkv_floats & rows);

    jobs_t select(llama_context * lctx, llama_seq_id seq_id);
    void   adapt(llama_context * lctx, uint32_t stream, const jobs_t & jobs);
    void   commit(uint32_t stream, const jobs_t & jobs);

    // moves the store to the stage that has chunks for the jobs, and gives them free ones; returns whether there are some for all,
    // else jobs are left out, which is for once: those that are stored can be packed then
    bool make_room(llama_context * lctx, uint32_t stream, jobs_t & jobs);
    void enter_stage(llama_context * lctx, uint32_t stream, uint32_t stage, const jobs_t & jobs);

    // whether the stream's bases are those of a saved state
    bool has_bases(uint32_t stream, const xkv_saved_store & saved) const;

    // coefficients of a saved state into chunks of this store, whose stage or bases are others
    void move(llama_context * lctx, uint32_t stream, bool alone, const xkv_saved_store & saved, const std::vector<uint32_t> & chunks);

    // what becomes of the coefficients of a store that has bases of its own or not; sets the bases of a stream that is alone
    xkv_recode turn_from(const xkv_store & image, xkv_store::kind kd, uint32_t ig, uint32_t stream, bool alone, bool own, int n_thread);

    // the calibrated bases in the next stage
    xkv_recodes keep_calibrated(uint32_t stream, const xkv_store::layout & next, uint32_t ig, int n_thread);
};
