// Sidecars with damage: the library's reader refuses them with an error, or all that they hold can be read and makes sense.
// Arguments: a sidecar, the number of inputs, a seed.

#include "limit.h"
#include "mutate.h"

#include "base/xkv-error.h"
#include "format/xkv-sidecar.h"

#include "ggml.h"

#include <cmath>
#include <fstream>
#include <iterator>
#include <new>
#include <set>

#include <sys/mman.h>

static bool makes_sense(const xkv_sidecar & sidecar) {
    std::set<uint32_t> layers;
    for (uint32_t g = 0; g < sidecar.groups.size(); ++g) {
        for (uint32_t il : sidecar.groups[g].layers) {
            if (!layers.insert(il).second || sidecar.n_embd[0].at(il) == 0 || !(sidecar.scale[0].at(il) > 0.0f) ||
                !std::isfinite(sidecar.scale[1].at(il))) {
                return false;
            }
        }
        for (auto kd : { xkv_sidecar::K, xkv_sidecar::V }) {
            const size_t dim = sidecar.groups[g].dim[kd];
            if (sidecar.basis(g, kd, 3, 1).size() != 3 * dim || sidecar.mean(g, kd).size() != dim ||
                sidecar.spectrum(g, kd).size() != dim) {
                return false;
            }
        }
    }
    return !layers.empty() && sidecar.frame % 32 == 0 && sidecar.frame > 0;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s SIDECAR COUNT SEED\n", argv[0]);
        return 1;
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    std::ifstream              file(argv[1], std::ios::binary);
    const std::vector<uint8_t> whole((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const uint64_t             count = strtoull(argv[2], nullptr, 10);
    mutator                    mutate(strtoull(argv[3], nullptr, 10));

    const int         fd   = memfd_create("sidecar", 0);
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    uint64_t          n_ok = 0;
    for (uint64_t i = 0; i < count; ++i) {
        fuzz_begin(i);
        auto data = whole;
        if (i > 0) {
            mutate.change(data, 0, 2048);
        }
        if (ftruncate(fd, 0) != 0 || pwrite(fd, data.data(), data.size(), 0) != (ssize_t) data.size()) {
            return 1;
        }
        try {
            const xkv_sidecar sidecar(path);
            n_ok++;
            if (!makes_sense(sidecar)) {
                fprintf(stderr, "input %llu is taken and should have been refused\n", (unsigned long long) i);
                return 1;
            }
        } catch (const xkv_error &) {
        } catch (const std::bad_alloc &) {
        } catch (const std::length_error &) {
        }
        if (i == 0 && n_ok == 0) {
            fprintf(stderr, "%s itself is refused\n", argv[1]);
            return 1;
        }
    }
    printf("%llu sidecars: %llu taken, the rest refused\n", (unsigned long long) count, (unsigned long long) n_ok);
    return 0;
}
