#pragma once

#include "base/xkv-memory.h"

#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// The sidecar file of a model (xkv_gguf/sidecar/FORMAT.md): bases, means and spectra per group of layers. The constructor reads and
// checks the metadata; the tensors are read on demand, from a file that stays open.
//
// Without calibration there is no file: groups alone, with bases, means and spectra of zeros, and scales of 1.
class xkv_sidecar {
public:
    enum kind { K = 0, V = 1 };

    struct group {
        std::vector<uint32_t> layers; // of the model, ascending
        uint32_t              dim[2]; // numbers per token of all layers together; no V where it is the first numbers of K
    };

    // throws xkv_error
    explicit xkv_sidecar(const std::string & path);

    // no calibration: layers of each group, whose dimensions are set by the model later
    xkv_sidecar(const std::vector<std::vector<uint32_t>> & layers, uint32_t frame);

    // without calibration: numbers per token of K and V for each layer; throws xkv_error when the groups don't fit
    void set_embd(std::vector<uint32_t> n_embd_k, std::vector<uint32_t> n_embd_v);

    bool calibrated() const { return file != nullptr; }

    // n_row directions from first on, each dim numbers, [n_row*dim]; zeros beyond those that the file holds; throws xkv_error
    xkv_floats basis(uint32_t g, kind kd, uint32_t n_row, uint32_t first = 0) const;

    // [dim]; throws xkv_error
    xkv_floats mean(uint32_t g, kind kd) const;

    // [dim] variance along each direction, descending; throws xkv_error
    xkv_floats spectrum(uint32_t g, kind kd) const;

    const std::string path;

    uint32_t              frame = 0; // chunk length in tokens
    std::vector<uint32_t> n_embd[2]; // per layer of the model: numbers per token of K and V
    xkv_floats            scale[2];  // per layer: what K and V are multiplied by, so that errors weigh the same
    std::vector<group>    groups;

private:
    // checks the groups' layers, and adds up their dimensions
    void fill_groups(const std::string & what);

    struct tensor {
        int      type;
        uint64_t offset; // from the start of the file
        uint64_t n;      // numbers
    };

    std::vector<tensor> bases[2]; // per group
    std::vector<tensor> means[2];
    std::vector<tensor> spectra[2];

    // what tells that a file was written to
    struct stamp {
        int64_t n_byte;
        int64_t seconds;
        int64_t nanoseconds;

        bool operator==(const stamp & other) const {
            return n_byte == other.n_byte && seconds == other.seconds && nanoseconds == other.nanoseconds;
        }
    };

    std::shared_ptr<FILE> file; // its position belongs to whoever holds the mutex
    stamp                 opened = {};
    mutable std::mutex    file_mutex;

    stamp look() const;

    // n numbers of a tensor from one on; from any thread
    xkv_floats read(const tensor & t, uint64_t n, uint64_t first = 0) const;
};

// count[g] layers for each of n_group groups, as the C API has them
std::vector<std::vector<uint32_t>> xkv_layer_lists(const uint32_t * layers, const uint32_t * count, uint32_t n_group);
