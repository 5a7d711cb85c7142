// XKV_ATTN of a device, through its ggml backend, against the reference: the cases that every backend is tested with.
//   xkv-gpu-check [--device NAME] [--only TEXT]... [--json FILE]
// --only: cases whose names have one of the texts in them. Ends with 0 when all are right, 1 when one is not, 2 without the device.

#include "device.h"

#include "ops/xkv_attn/test/cases.h"
#include "ops/xkv_attn/test/reference.h"

// of a card: with more queries, K, V and weights are rounded to f16; the quick exponential is not the reference's
static const double CARD_F16 = 2e-3;
static const double CARD_EXP = 5e-5;

struct outcome {
    std::string name;
    double      error;
    double      limit;
    bool        refused; // the device does not take the op so
    bool        ok;
};

static outcome run(ggml_backend_t backend, const std::string & name, const xkv_case & c, double limit) {
    ggml_context_ptr    host(ggml_init({ (size_t) 512 << 20, nullptr, false }));
    const ggml_tensor * t = xkv_make_case(host.get(), c, 1);

    xkv_device_graph graph;
    const auto       src = graph.sources_like(t);
    ggml_tensor *    out = graph.op_like(t, src);
    if (!ggml_backend_supports_op(backend, out)) {
        return { name, INFINITY, limit, true, false };
    }
    if (!graph.alloc(backend)) {
        return { name, INFINITY, limit, false, false };
    }
    for (size_t i = 0; i < src.size(); ++i) {
        if (src[i]) {
            ggml_backend_tensor_set(src[i], t->src[i]->data, 0, ggml_nbytes(src[i]));
        }
    }
    std::vector<float> found(ggml_nelements(out), NAN); // what is not written is found
    ggml_backend_tensor_set(out, found.data(), 0, ggml_nbytes(out));
    if (ggml_backend_graph_compute(backend, graph.gf) != GGML_STATUS_SUCCESS) {
        return { name, INFINITY, limit, false, false };
    }
    ggml_backend_tensor_get(out, found.data(), 0, ggml_nbytes(out));

    const auto ref  = xkv_ref_attn(t);
    double     norm = 0.0, diff = 0.0;
    for (size_t i = 0; i < ref.size(); ++i) {
        const double d = found[i] - ref[i];
        norm += ref[i] * ref[i];
        diff += std::isfinite(d) ? d * d : INFINITY;
    }
    const double error = sqrt(diff / norm);
    return { name, error, limit, false, error < limit };
}

int main(int argc, char ** argv) {
    std::string              device = "gpu", json;
    std::vector<std::string> only;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string option = argv[i];
        if (option == "--device") {
            device = argv[i + 1];
        } else if (option == "--json") {
            json = argv[i + 1];
        } else if (option == "--only") {
            only.push_back(argv[i + 1]);
        }
    }
    ggml_backend_dev_t dev     = xkv_find_device(device);
    ggml_backend_ptr   backend = xkv_open_device(dev, 1);
    const bool         cpu     = xkv_is_cpu(dev);

    std::vector<outcome> all;
    xkv_each_case([&](const std::string & name, const xkv_case & c, double limit) {
        bool wanted = only.empty();
        for (const auto & text : only) {
            wanted = wanted || name.find(text) != std::string::npos;
        }
        if (!wanted) {
            return;
        }
        all.push_back(run(backend.get(), name, c, cpu ? limit : std::max(limit, c.n_tps > XKV_ATTN_MAX_QUERY ? CARD_F16 : CARD_EXP)));
        const auto & one = all.back();
        if (!one.ok) {
            printf("FAIL %s: %s", one.name.c_str(), one.refused ? "is refused\n" : "");
            if (!one.refused) {
                printf("error %.3g, expected below %.3g\n", one.error, one.limit);
            }
            fflush(stdout);
        }
    });
    int n_fail = 0;
    for (const auto & one : all) {
        n_fail += !one.ok;
    }
    if (FILE * file = json.empty() ? nullptr : fopen(json.c_str(), "w")) {
        fprintf(file, "{\"device\": \"%s\", \"description\": \"%s\", \"cases\": [", ggml_backend_dev_name(dev),
                ggml_backend_dev_description(dev));
        for (size_t i = 0; i < all.size(); ++i) {
            const double error = std::isfinite(all[i].error) ? all[i].error : 1e30;
            fprintf(file, "%s\n {\"name\": \"%s\", \"error\": %.4g, \"limit\": %.3g, \"refused\": %s, \"ok\": %s}", i ? "," : "",
                    all[i].name.c_str(), error, all[i].limit, all[i].refused ? "true" : "false", all[i].ok ? "true" : "false");
        }
        fprintf(file, "]}\n");
        fclose(file);
    }
    printf("XKV_ATTN on %s: %zu cases, %d failed\n", ggml_backend_dev_name(dev), all.size(), n_fail);
    return all.empty() || n_fail > 0;
}
