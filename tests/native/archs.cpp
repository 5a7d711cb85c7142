// Writes a tiny model of every architecture that upstream's own test can make, each in a process of its own: some of upstream's
// loaders end it. Prints the names of the files.
//
//     xkv-tiny-archs FOLDER [ARCH ...]

#define main upstream_main
#include "tests/test-llama-archs.cpp"
#undef main

#include "../src/llama-model.h"

#include <algorithm>

#include <sys/wait.h>
#include <unistd.h>

// room for a prompt, and fixtures that upstream's test leaves out
static void complete(gguf_context * gguf, llm_arch arch) {
    gguf_set_val_u32(gguf, (std::string(llm_arch_name(arch)) + ".context_length").c_str(), 4096);
    if (arch == LLM_ARCH_GEMMA4) {
        const bool pattern[] = { true, true, false, true, false };
        gguf_set_arr_data(gguf, "gemma4.attention.sliding_window_pattern", GGUF_TYPE_BOOL, pattern, 5);
        gguf_set_val_u32(gguf, "gemma4.attention.shared_kv_layers", 2);
    }
    if (arch == LLM_ARCH_OPENELM || arch == LLM_ARCH_DECI) { // KV heads by layer
        const uint32_t n_head_kv[] = { 2, 1 };
        gguf_set_arr_data(gguf, (std::string(llm_arch_name(arch)) + ".attention.head_count_kv").c_str(), GGUF_TYPE_UINT32, n_head_kv, 2);
    }
    if (arch == LLM_ARCH_LFM2) {
        gguf_remove_key(gguf, "lfm2.attention.sliding_window"); // the models have none
    }
}

static void write_model(llm_arch arch, bool moe, const std::string & path) {
    const gguf_context_ptr gguf = get_gguf_ctx(arch, moe);
    complete(gguf.get(), arch);
    tensor_data_params data   = { 7, 0.15f };
    llama_model_params params = llama_model_default_params();

    const llama_model_ptr model(llama_model_init_from_user(gguf.get(), set_tensor_data, &data, params));
    if (!model) {
        throw std::runtime_error("is not made");
    }
    // upstream's saver leaves out what some loaders need
    const gguf_context_ptr out(gguf_init_empty());
    gguf_set_kv(out.get(), gguf.get());
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(model.get())) {
        if (gguf_find_tensor(out.get(), name.c_str()) < 0) { // layers can share one
            gguf_add_tensor(out.get(), tensor);
        }
    }
    if (!gguf_write_to_file(out.get(), path.c_str(), false)) {
        throw std::runtime_error("is not written");
    }
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const std::vector<std::string> wanted(argv + std::min(argc, 2), argv + argc);
    for (const llm_arch arch : llm_arch_all()) {
        const std::string name = llm_arch_name(arch);
        if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), name) == wanted.end()) {
            continue;
        }
        for (const bool moe : { false, true }) {
            if (moe ? !moe_implemented(arch) : moe_mandatory(arch)) {
                continue;
            }
            const std::string file = name + (moe ? "-moe" : "") + ".gguf";
            const pid_t       pid  = fork();
            if (pid == 0) {
                try {
                    write_model(arch, moe, std::string(argv[1]) + "/" + file);
                } catch (const std::exception &) {
                    _exit(1);
                }
                _exit(0);
            }
            int status = 0;
            waitpid(pid, &status, 0);
            printf("%s %s\n", status == 0 ? "made" : "not", file.c_str());
            fflush(stdout);
        }
    }
}
