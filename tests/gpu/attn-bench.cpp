// How fast XKV_ATTN reads its coefficients on a device, beside what the device copies, and beside f16 flash attention.
//   xkv-gpu-bench --tokens N --k SEGMENTS --v SEGMENTS [--device NAME] [--tolerance X] [--lead N] [--queries N] [--heads N] [--heads-kv N]
//                 [--head-dim N] [--frame N] [--reps N] [--copy-mib N] [--threads N] [--json FILE]
// SEGMENTS: TYPE:DIRECTIONS:TYPE OF THE BASIS, with commas between. Coefficients are random and repeat every few chunks; they
// lie in memory of their own, so that all are read.

#include "device.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <sstream>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// the median of some runs, in seconds
static double time_graph(ggml_backend_t backend, ggml_cgraph * gf, int reps) {
    std::vector<double> runs;
    for (int i = 0; i < reps + 2; ++i) {
        ggml_backend_synchronize(backend);
        const double begin = now();
        if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
            fprintf(stderr, "the device failed\n");
            exit(1);
        }
        ggml_backend_synchronize(backend);
        if (i >= 2) { // the first ones allocate, and make a graph of the device's
            runs.push_back(now() - begin);
        }
    }
    std::sort(runs.begin(), runs.end());
    return runs[runs.size() / 2];
}

static ggml_type find_type(const std::string & name) {
    for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
        if (name == ggml_type_name(xkv_attn_type(i))) {
            return xkv_attn_type(i);
        }
    }
    fprintf(stderr, "type %s is unknown\n", name.c_str());
    exit(2);
}

static void read_segments(const std::string & text, xkv_case & c, int kd) {
    std::istringstream list(text);
    for (std::string item; std::getline(list, item, ',');) {
        const size_t a = item.find(':'), b = item.rfind(':');
        const int    i = xkv_attn_type_index(find_type(item.substr(0, a)));
        c.rank[kd][i]  = atoi(item.substr(a + 1, b - a - 1).c_str());
        c.basis[kd][i] = find_type(item.substr(b + 1));
    }
}

// bytes read and written over time
static double copy_rate(ggml_backend_t backend, int64_t n_mib, int reps) {
    xkv_device_graph graph;
    ggml_tensor *    from = ggml_new_tensor_1d(graph.ctx.get(), GGML_TYPE_F32, n_mib << 18);
    ggml_tensor *    to   = ggml_dup_tensor(graph.ctx.get(), from);
    ggml_build_forward_expand(graph.gf, ggml_cpy(graph.ctx.get(), from, to));
    if (!graph.alloc(backend)) {
        fprintf(stderr, "no memory for two tensors of %lld MiB\n", (long long) n_mib);
        exit(1);
    }
    const std::vector<float> some(1 << 18, 1.25f);
    for (int64_t i = 0; i < n_mib; ++i) {
        ggml_backend_tensor_set(from, some.data(), i << 20, 1 << 20);
    }
    return 2.0 * ggml_nbytes(from) / time_graph(backend, graph.gf, reps);
}

static double time_flash(ggml_backend_t backend, const xkv_case & c, int64_t n_token, int reps) {
    xkv_device_graph graph;
    ggml_context *   ctx = graph.ctx.get();
    ggml_tensor *    q   = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.dim_k, c.n_tps, c.n_head, 1);
    ggml_tensor *    k   = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, c.dim_k, n_token, c.n_head_kv, 1);
    ggml_tensor *    v   = ggml_dup_tensor(ctx, k);
    ggml_tensor *    m   = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_token, c.n_tps, 1, 1);
    ggml_tensor *    out = ggml_flash_attn_ext(ctx, q, k, v, m, 1.0f / sqrtf((float) c.dim_k), 0.0f, 0.0f);
    ggml_build_forward_expand(graph.gf, out);
    if (!ggml_backend_supports_op(backend, out) || !graph.alloc(backend)) {
        return 0.0;
    }
    std::mt19937             rng(2);
    std::vector<ggml_fp16_t> some(c.dim_k * c.n_head_kv * 64);
    for (auto & x : some) {
        x = ggml_fp32_to_fp16((rng() % 2001) * 1e-3f - 1.0f);
    }
    for (ggml_tensor * t : { k, v }) {
        for (size_t at = 0, n; at < ggml_nbytes(t); at += n) {
            n = std::min(some.size() * sizeof(ggml_fp16_t), ggml_nbytes(t) - at);
            ggml_backend_tensor_set(t, some.data(), at, n);
        }
    }
    std::vector<float> query(ggml_nelements(q));
    for (auto & x : query) {
        x = (rng() % 2001) * 1e-3f - 1.0f;
    }
    ggml_backend_tensor_set(q, query.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_memset(m, 0, 0, ggml_nbytes(m));
    return time_graph(backend, graph.gf, reps);
}

int main(int argc, char ** argv) {
    std::map<std::string, std::string> options = {
        { "device", "gpu" },   { "tolerance", "0" }, { "lead", "128" }, { "queries", "1" },     { "heads", "32" },  { "heads-kv", "8" },
        { "head-dim", "128" }, { "frame", "128" },   { "reps", "20" },  { "copy-mib", "1024" }, { "threads", "1" },
    };
    for (int i = 1; i + 1 < argc; i += 2) {
        options[std::string(argv[i]).substr(2)] = argv[i + 1];
    }
    const auto number = [&](const char * name) { return (int64_t) atoll(options[name].c_str()); };

    xkv_case c;
    c.n_head    = number("heads");
    c.n_head_kv = number("heads-kv");
    c.dim_k = c.dim_v = number("head-dim");
    c.n_chunk         = number("frame");
    c.n_tps           = number("queries");
    c.n_exact         = 256 + c.n_tps;
    c.tolerance       = (float) atof(options["tolerance"].c_str());
    c.full            = true;
    c.decay           = 64.0f;
    c.n_stored        = 8 * c.n_chunk; // those that repeat
    read_segments(options["k"], c, XKV_K);
    read_segments(options["v"], c, XKV_V);
    for (int kd = 0; kd < 2; ++kd) {
        c.lead[kd] = number("lead");
    }
    const int     reps    = (int) number("reps");
    const int64_t n_frame = number("tokens") / c.n_chunk;
    const int64_t n_token = n_frame * c.n_chunk + c.n_exact;
    if (n_frame < 1) {
        fprintf(stderr, "--tokens: expected %lld or more\n", (long long) c.n_chunk);
        return 2;
    }
    ggml_backend_dev_t dev     = xkv_find_device(options["device"]);
    ggml_backend_ptr   backend = xkv_open_device(dev, (int) number("threads"));

    ggml_context_ptr    host(ggml_init({ (size_t) 512 << 20, nullptr, false }));
    const ggml_tensor * t = xkv_make_case(host.get(), c, 1);

    // the same with more chunks
    xkv_device_graph graph;
    auto             src = graph.sources_like(t);
    src[4]               = ggml_new_tensor_3d(graph.ctx.get(), GGML_TYPE_I8, t->src[4]->ne[0], n_frame, 1);
    src[6]               = ggml_new_tensor_3d(graph.ctx.get(), GGML_TYPE_F32, t->src[6]->ne[0], 1, n_frame);
    src[7]               = ggml_new_tensor_3d(graph.ctx.get(), GGML_TYPE_I32, n_frame, c.n_tps, 1);
    ggml_tensor * out    = graph.op_like(t, src);
    if (!ggml_backend_supports_op(backend.get(), out)) {
        fprintf(stderr, "%s does not have XKV_ATTN so\n", ggml_backend_dev_name(dev));
        return 1;
    }
    if (!graph.alloc(backend.get())) {
        fprintf(stderr, "no memory for %lld tokens\n", (long long) n_token);
        return 1;
    }
    for (int i : { 0, 1, 2, 3, 5, 8 }) {
        ggml_backend_tensor_set(src[i], t->src[i]->data, 0, ggml_nbytes(src[i]));
    }
    for (int i : { 4, 6 }) {
        const int64_t row = i == 4 ? src[4]->nb[1] : src[6]->nb[2];
        for (int64_t f = 0; f < n_frame; ++f) {
            ggml_backend_tensor_set(src[i], (const char *) t->src[i]->data + f % 8 * row, f * row, row);
        }
    }
    const std::vector<int32_t> fill(n_frame * c.n_tps, (int32_t) c.n_chunk);
    ggml_backend_tensor_set(src[7], fill.data(), 0, ggml_nbytes(src[7]));
    const double seconds = time_graph(backend.get(), graph.gf, reps);

    // what a call has to read: coefficients of all directions, or of the leads alone, which is the least with a tolerance
    const xkv_attn_layer l(t);
    double               of_token = 0.0;
    const bool           lead     = c.tolerance > 0.0f && c.n_tps <= XKV_ATTN_MAX_QUERY;
    for (int kd = 0; kd < 2; ++kd) {
        for (int is = 0; is < l.n_segment[kd]; ++is) {
            const auto &  seg = l.segments[kd][is];
            const int64_t n   = lead ? std::clamp<int64_t>(c.lead[kd] - seg.first, 0, seg.rank) : seg.rank;
            of_token += (double) n * ggml_type_size(seg.type) / ggml_blck_size(seg.type);
        }
    }
    const double bytes = of_token * n_frame * c.n_chunk + ggml_nbytes(src[1]) + ggml_nbytes(src[2]) + (lead ? 0 : ggml_nbytes(src[5]));
    const double copy  = copy_rate(backend.get(), number("copy-mib"), std::max(3, reps / 4));
    const double flash = time_flash(backend.get(), c, n_token, reps);
    const double plain = 2.0 * 2 * n_token * c.dim_k * c.n_head_kv;

    char text[1024];
    snprintf(text, sizeof(text),
             "{\"device\": \"%s\", \"tokens\": %lld, \"queries\": %lld, \"tolerance\": %g, \"seconds\": %.6g, \"bytes\": %.0f, "
             "\"bytes_are\": \"%s\", \"bytes_per_second\": %.4g, \"copy_bytes_per_second\": %.4g, \"share_of_copy\": %.4f, "
             "\"f16_flash_seconds\": %.6g, \"f16_flash_share_of_copy\": %.4f}",
             ggml_backend_dev_description(dev), (long long) n_token, (long long) c.n_tps, c.tolerance, seconds, bytes,
             lead ? "the leads alone, the least that is read" : "all directions", bytes / seconds, copy, bytes / seconds / copy, flash,
             flash > 0.0 ? plain / flash / copy : 0.0);
    printf("%s\n", text);
    if (FILE * file = options["json"].empty() ? nullptr : fopen(options["json"].c_str(), "w")) {
        fprintf(file, "%s\n", text);
        fclose(file);
    }
    return 0;
}
