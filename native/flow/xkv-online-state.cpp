// What bases that follow the prompt know of its tokens, in saved states and in stores of other plans.

#include "flow/xkv-online.h"

#include "base/xkv-lapack.h"
#include "format/xkv-sidecar.h"

#include <algorithm>
#include <numeric>

void xkv_online_bases::save(uint32_t stream, xkv_bytes_out & out) const {
    const auto & st = states[stream];
    out.put(st.n_next);
    out.put(st.n_seen);
    out.put(st.n_in);
    out.put(st.n_past);
    out.put(st.info);
    for (auto kd : { kind::K, kind::V }) {
        out.put_list(st.n_dir[kd]);
        out.put_list(st.n_update[kd]);
    }
}

xkv_online_bases::state xkv_online_bases::read_state(state st, const xkv_store & store, xkv_bytes_in & in) {
    st.n_next = in.get<uint32_t>();
    st.n_seen = in.get<uint32_t>();
    st.n_in   = in.get<uint32_t>();
    st.n_past = in.get<uint32_t>();
    st.info   = in.get<xkv_online_info>();
    for (auto kd : { kind::K, kind::V }) {
        for (auto * list : { &st.n_dir[kd], &st.n_update[kd] }) {
            const auto read = in.get_list<uint32_t>();
            if (read.size() != list->size()) {
                xkv_throw(XKV_STATUS_FORMAT, "a saved state has bases of %zu groups, expected %zu", read.size(), list->size());
            }
            *list = read;
        }
        for (size_t ig = 0; ig < st.n_dir[kd].size(); ++ig) {
            if (st.n_dir[kd][ig] > store.groups()[ig].dim[kd]) {
                xkv_throw(XKV_STATUS_FORMAT, "a saved state has %u directions of group %zu, expected at most %u", st.n_dir[kd][ig], ig,
                          store.groups()[ig].dim[kd]);
            }
        }
    }
    return st;
}

void xkv_online_bases::load(uint32_t stream, xkv_bytes_in & in) {
    auto st = read_state(states[stream], store, in);
    for (auto kd : { kind::K, kind::V }) {
        for (size_t ig = 0; !store.plain() && ig < st.n_dir[kd].size(); ++ig) {
            const auto & gr = store.groups()[ig];
            if (st.n_dir[kd][ig] > std::min(gr.rank[kd], gr.dim[kd])) {
                xkv_throw(XKV_STATUS_FORMAT, "a saved state has %u directions of group %zu, whose stage has %u", st.n_dir[kd][ig], ig,
                          std::min(gr.rank[kd], gr.dim[kd]));
            }
        }
    }
    states[stream] = std::move(st);
}

void xkv_online_bases::load_moved(uint32_t stream, xkv_bytes_in & in, bool own) {
    const auto fresh = states[stream];
    auto       st    = read_state(fresh, store, in);
    for (auto kd : { kind::K, kind::V }) {
        for (size_t ig = 0; ig < st.n_dir[kd].size(); ++ig) {
            // other bases, and those of the stage after a plain one, begin with the calibrated directions
            const auto & gr  = store.groups()[ig];
            const bool   old = own && !store.plain();
            st.n_dir[kd][ig] = old ? std::min({ st.n_dir[kd][ig], gr.rank[kd], gr.dim[kd] }) : fresh.n_dir[kd][ig];
        }
    }
    states[stream] = std::move(st);
}

void xkv_online_bases::adopt(uint32_t stream, const xkv_online_bases & other) {
    states[stream] = other.states[0];
    problem_peak   = std::max(problem_peak, other.problem_peak);
}

void xkv_online_bases::fill_up(uint32_t stream, xkv_store::kind kd, uint32_t ig, xkv_floats & rows) {
    const uint32_t dim   = store.groups()[ig].dim[kd];
    const uint32_t rank  = std::min<uint32_t>(rows.size() / dim, dim);
    auto &         n_dir = states[stream].n_dir[kd][ig];
    if (!setup.sidecar.calibrated() || n_dir >= rank) {
        return;
    }
    // what the old directions leave of the calibrated ones, and how much variance that has
    auto       left     = setup.sidecar.basis(ig, kd, rank);
    const auto spectrum = setup.sidecar.spectrum(ig, kd);
    xkv_floats used(rows.begin(), rows.begin() + (size_t) n_dir * dim);
    xkv_add_mul(xkv_mul_rows(left, used, rank, n_dir, dim, 1), used, rank, n_dir, dim, -1.0f, left, 1);
    std::vector<float> variance(rank);
    for (uint32_t r = 0; r < rank; ++r) {
        const float * x = left.data() + (size_t) r * dim;
        variance[r]     = spectrum[r] * std::inner_product(x, x + dim, x, 0.0f);
    }
    std::vector<uint32_t> order(rank);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return variance[a] > variance[b]; });
    used.reserve((size_t) rank * dim);
    for (uint32_t i = 0; i < rank - n_dir; ++i) {
        used.insert(used.end(), left.begin() + (size_t) order[i] * dim, left.begin() + (size_t) (order[i] + 1) * dim);
    }
    xkv_floats meet;
    if (!xkv_orthonormalize(used, rank, dim, 0, meet)) {
        return; // without them, as few directions as before
    }
    std::copy(used.begin() + (size_t) n_dir * dim, used.end(), rows.begin() + (size_t) n_dir * dim);
    n_dir = rank;
}
