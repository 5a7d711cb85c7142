#pragma once

#include "base/xkv-bytes.h"
#include "flow/xkv-flush.h"
#include "store/xkv-carry.h"
#include "store/xkv-config.h"
#include "store/xkv-store.h"
#include "window/xkv-chunks.h"

#include "xkv.h"

#include <cstdint>
#include <functional>
#include <vector>

static const size_t XKV_ONLINE_NODES_PER_LAYER = 16;

// rows of the calibration, or tokens, that are looked at together
static const uint32_t XKV_ONLINE_BLOCK = 128;

// Tokens at hand, as exact as the window has them: all of a group and kind's are in memory while its basis is looked for.
using xkv_halves = std::vector<ggml_fp16_t, xkv_page_allocator<ggml_fp16_t>>;

// numbers of tokens at hand that are read together
static const size_t XKV_ONLINE_READ = 256 * 1024;

// Bases that follow the prompt: from the calibrated covariance, the stored coefficients and the tokens that are about to leave
// the window, onto which stored coefficients are projected. They are looked for at the end of each stage, and in the last one
// when the number of a stream's stored tokens has doubled, or as many as there are have come in place of others, where the bases lose more than calibration made expect: on tokens of
// all of a plain stage, which were rounded to its type only, else on those about to leave. Between stages with bases they are taken
// only if that takes away more than rounding once more costs; without calibration always.
//
// The new bases are looked for in the space of the old ones and of the main directions that the tokens add to it
// (Rayleigh-Ritz): products with many rows run on the backend, the small eigenproblems in LAPACK.
class xkv_online_bases {
public:
    xkv_online_bases(const xkv_setup & setup, xkv_store & store, const std::vector<xkv_chunk_table> & tables, const xkv_flush & flush);

    // the jobs' tokens are stored
    void count(uint32_t stream, const std::vector<xkv_flush::job> & jobs);

    // before the jobs' tokens are compressed; throws xkv_error
    void observe(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs);

    // makes the bases of the store's next stage, group by group, and tells what becomes of stored coefficients; throws xkv_error
    void        begin_stage(uint32_t stream, const std::vector<xkv_flush::job> & jobs);
    xkv_recodes enter_stage(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const xkv_store::layout & next,
                            uint32_t ig);

    // the stream has no tokens any more
    void reset(uint32_t stream);

    // stream dst holds a copy of stream src
    void copy(uint32_t src, uint32_t dst) { states[dst] = states[src]; }

    // what is known of a stream's tokens, for saved states; throws xkv_error
    void save(uint32_t stream, xkv_bytes_out & out) const;
    void load(uint32_t stream, xkv_bytes_in & in);
    void load_moved(uint32_t stream, xkv_bytes_in & in, bool own); // into a basis of other ranks, made from the stream's own or not

    // takes what another one, of the same groups, knows of its only stream
    void adopt(uint32_t stream, const xkv_online_bases & other);

    // Rows [rank, dim] of a stream that came from a basis of fewer: the rest become directions of the calibration that these leave
    // out, those with the most variance.
    void fill_up(uint32_t stream, xkv_store::kind kd, uint32_t ig, xkv_floats & rows);

    // most bytes of its graphs and problems
    size_t peak() const { return graph.peak() + problem_peak; }

    xkv_online_info info(uint32_t stream) const { return states[stream].info; }

private:
    using kind = xkv_store::kind;

    struct state {
        uint32_t        n_next = 0; // tokens at which the next check is due
        uint32_t        n_seen = 0; // tokens at the last check
        uint32_t        n_in   = 0; // tokens that were stored so far, of which some may be gone
        uint32_t        n_past = 0; // the same after the last check's tokens
        xkv_online_info info   = {};

        // per kind and group: directions in use; fewer than the rank only when there was no calibration
        std::vector<uint32_t> n_dir[2];

        std::vector<uint32_t> n_update[2]; // per kind and group: n_past of the last update
    };

    // one kind of one group
    struct problem {
        kind     kd;
        uint32_t ig;
    };

    // What an update works with: directions of the old basis, then new ones. A wide basis takes part with its main directions and
    // its last ones, for whose places the new ones compete. Those between keep their places: they are orthogonal to all others, so
    // that nothing changes for them, and they can get no worse, since the best of the others are taken.
    struct space {
        uint32_t n_dir  = 0; // directions of the old basis
        uint32_t n_main = 0;
        uint32_t i_last = 0; // place of the first of the last
        uint32_t n_old  = 0; // main and last ones
        uint32_t n      = 0;
        uint32_t n_best = 0; // that the new basis has places for

        // of a direction of the old basis, and of one of the new one
        uint32_t place(uint32_t i) const { return i < n_main ? i : i_last + (i - n_main); }

        bool unit     = false; // all numbers of a plain store, without rows
        int  n_thread = 1;

        xkv_halves tokens; // [n_token, dim] at hand
        xkv_floats rows;   // [n, dim] orthonormal; until new ones are found, the old directions [n_dir, dim]
        xkv_floats meet;   // [n, n_old] rows times old directions; not of a plain store
        xkv_floats cov;    // [n, n] the expected covariance of future tokens
        xkv_floats combos; // [n_best, n] the new directions in terms of rows

        xkv_floats variance; // [n] along the rows
        xkv_floats values;   // [n_best] along the new ones, descending
    };

    const xkv_setup                      setup;
    xkv_store &                          store;
    const std::vector<xkv_chunk_table> & tables; // per stream
    const xkv_flush &                    flush;

    static state read_state(state st, const xkv_store & store, xkv_bytes_in & in);

    xkv_graph graph;

    size_t problem_peak = 0;

    // of the check that goes on
    xkv_floats residual;
    xkv_floats wanted;

    std::vector<state>   states;   // per stream
    std::vector<problem> problems; // all kinds and groups

    // share of the variance that the calibrated bases lose on the calibration data
    float expect(const std::vector<xkv_store::group> & groups, const problem & pr) const;

    // share of the tokens' variance that is lost when directions have the types of groups
    float measure(uint32_t stream, const problem & pr, const xkv_halves & tokens, const std::vector<xkv_store::group> & groups,
                  int n_thread) const;

    // the tokens of the jobs [n_token, dim]
    xkv_halves read_tokens(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr);

    using use_t = std::function<void(const xkv_floats & x, uint32_t n)>; // of tokens [n, dim]

    // some at a time
    static void each_block(const xkv_halves & tokens, uint32_t dim, const use_t & use);

    // the tokens that are known as they are, some at a time: those at hand, and of a plain store those in up to n_chunk of the
    // chunks
    void each_exact(uint32_t stream, const problem & pr, const xkv_halves & tokens, size_t n_chunk, int n_thread, const use_t & use) const;

    // whether its basis loses more than expected in the next stage, or in the present one
    bool is_due(uint32_t stream, const problem & pr, const xkv_halves & tokens, const xkv_store::layout * next, int n_thread);

    // solves those of the problems that are due and returns those whose new bases were written; turns are of the next stage, for the
    // caller to carry out
    std::vector<problem> renew(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs,
                               const std::vector<problem> & list, const xkv_store::layout * next, xkv_recodes * turns);

    // what an update to bases of a rank needs at most, about
    size_t space_bytes(const problem & pr, uint32_t rank, uint32_t n_token) const;

    // an update's steps: the space, an orthonormal basis of it, the covariance there
    void build_rows(uint32_t stream, const problem & pr, uint32_t rank, space & sp) const;
    bool orthonormalize(const problem & pr, space & sp) const;

    // directions that span what the tokens have outside the old basis (randomized range finder) [n_new, dim]
    xkv_floats sketch(uint32_t stream, const problem & pr, uint32_t n_new, const space & sp) const;

    // of the tokens in n chunks [tokens, rank]
    xkv_floats stored_coef(uint32_t stream, const problem & pr, const std::vector<uint32_t> & chunks, size_t first, size_t n,
                           int n_thread) const;
    void       build_cov(uint32_t stream, const problem & pr, space & sp) const;
    // adds the covariance of the calibration, and of the tokens in the store
    void add_prior(const problem & pr, space & sp) const;
    void add_stored(uint32_t stream, const problem & pr, space & sp) const;

    static bool solve(space & sp);

    // whether the solution takes away more error than there is in rounding stored coefficients once more
    bool pays(uint32_t stream, const problem & pr, const space & sp, const xkv_store::layout & next) const;

    // the old basis as it is, in the next stage
    xkv_recode carry_over(uint32_t stream, const problem & pr, const xkv_store::layout & next, int n_thread);

    // writes the new basis to the next stage, or to the present one
    xkv_recode apply(uint32_t stream, const problem & pr, space & sp, const xkv_store::layout * next);

    // the directions in use; of a plain store the calibrated ones
    xkv_floats rows_of(uint32_t stream, const problem & pr, uint32_t n_row, int n_thread) const;

    uint32_t rank_of(const problem & pr, const xkv_store::layout * next) const;

    // tokens at which the first check is due: few say little beside the calibration, and an early update costs as much as a later one
    uint32_t n_first() const { return setup.sidecar.calibrated() ? setup.config.n_prior / 2 : 0; }

    // tokens stored and about to be
    uint32_t n_tokens(uint32_t stream, const std::vector<xkv_flush::job> & jobs) const;

    // weight 1 - noise of every direction's type [rank]
    static xkv_floats kept(const std::vector<xkv_store::group> & groups, const problem & pr);

    // the tokens of the jobs as inputs of the graph
    ggml_tensor * input_tokens(uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr);
};
