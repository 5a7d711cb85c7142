#pragma once

#include <cstdint>
#include <map>
#include <vector>

// Layers of a model that an xkv cache holds, and others that attend to what one of them keeps.
struct xkv_layers {
    std::vector<uint32_t>        held;   // ascending
    std::map<uint32_t, uint32_t> shared; // layer to the one whose K and V it attends to
};
