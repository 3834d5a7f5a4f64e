// Search trees of midpoints, as contract.h describes them.

#include "tables.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

namespace halfbyte {
namespace {

// Fill the tree of 2^depth nodes with the midpoints between `values` (ascending).
void plant(const std::vector<float>& values, int depth, float* tree) {
    tree[0] = 0.0f;
    for (int level = 0; level < depth; ++level) {
        for (int i = 0; i < 1 << level; ++i) {
            const size_t rank = static_cast<size_t>(((2 * i + 1) << (depth - level - 1)) - 1);
            tree[(1 << level) + i] = rank + 1 < values.size() ? (values[rank] + values[rank + 1]) / 2
                                                              : std::numeric_limits<float>::infinity();
        }
    }
}

}  // namespace

Search4 search4(const void* code) {
    std::array<float, 16> table;
    std::memcpy(table.data(), code, sizeof table);
    Search4 search;
    std::iota(search.code, search.code + 16, uint8_t{0});
    std::stable_sort(search.code, search.code + 16, [&](uint8_t a, uint8_t b) { return table[a] < table[b]; });
    std::vector<float> values;
    for (const uint8_t q : search.code) values.push_back(table[q]);
    plant(values, 4, search.midpoint);
    return search;
}

Search8 search8(const void* code, int size) {
    std::vector<float> values(static_cast<size_t>(size));
    std::memcpy(values.data(), code, values.size() * sizeof(float));
    Search8 search;
    search.last = size - 1;
    plant(values, 8, search.midpoint);
    return search;
}

Table8bit table8bit(const void* code) {
    Table8bit table;
    std::memcpy(table.value, code, sizeof table.value);
    table.search = search8(code, 256);
    for (int i = 0; i < 256; ++i) {
        const auto bits = load<uint32_t>(table.value, i);
        table.low[i] = static_cast<uint16_t>(bits);
        table.high[i] = static_cast<uint16_t>(bits >> 16);
    }
    std::vector<float> midpoints;
    for (int i = 0; i < 255; ++i) midpoints.push_back((table.value[i] + table.value[i + 1]) / 2);
    table.lines = fit_lines(midpoints);
    return table;
}

}  // namespace halfbyte
