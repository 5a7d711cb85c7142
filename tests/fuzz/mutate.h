// Bytes changed as damage and malice change them: bits, numbers at the edges, pieces cut out, doubled and moved.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

class mutator {
public:
    explicit mutator(uint64_t seed) : rng(seed) {}

    uint64_t below(uint64_t n) { return n > 0 ? rng() % n : 0; }

    // a few changes from byte `first` on, most of them in the next n_head bytes, where lengths and counts are
    void change(std::vector<uint8_t> & data, size_t first, size_t n_head) {
        for (uint64_t i = 1 + below(4); i > 0 && data.size() > first; --i) {
            const size_t room = data.size() - first;
            const size_t at   = first + below(below(8) > 0 ? std::min(room, n_head) : room);
            switch (below(8)) {
            case 0:
            case 1:
                data[at] ^= 1 << below(8);
                break;
            case 2:
                data[at] = (uint8_t) rng();
                break;
            case 3:
                number<uint32_t>(data, at);
                break;
            case 4:
                number<uint64_t>(data, at);
                break;
            case 5:
                data.erase(data.begin() + at, data.begin() + at + below(std::min<size_t>(data.size() - at, 40)));
                break;
            case 6: {
                const std::vector<uint8_t> piece(data.begin() + at, data.begin() + at + below(std::min<size_t>(data.size() - at, 40)));
                data.insert(data.begin() + first + below(std::min(room, n_head)), piece.begin(), piece.end());
                break;
            }
            default:
                if (below(8) == 0) {
                    data.resize(at);
                }
                break;
            }
        }
    }

private:
    std::mt19937_64 rng;

    // at the edges of its type, of signed ones, of sizes, or near what was there
    template <typename T> void number(std::vector<uint8_t> & data, size_t at) {
        if (at + sizeof(T) > data.size()) {
            return;
        }
        T x;
        memcpy(&x, data.data() + at, sizeof(x));
        const T list[] = { 0,
                           1,
                           (T) -1,
                           (T) ~(T) 0 >> 1,
                           (T) 1 << (8 * sizeof(T) - 1),
                           (T) data.size(),
                           (T) (data.size() / 4),
                           (T) (x + 1),
                           (T) (x - 1),
                           (T) (2 * x),
                           (T) ((T) 1 << below(8 * sizeof(T))),
                           (T) rng() };
        x              = list[below(sizeof(list) / sizeof(list[0]))];
        memcpy(data.data() + at, &x, sizeof(x));
    }
};
