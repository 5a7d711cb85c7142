#include "flow/xkv-online.h"

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

void xkv_online_bases::load(uint32_t stream, xkv_bytes_in & in) {
    state st  = states[stream];
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
    states[stream] = st;
}
