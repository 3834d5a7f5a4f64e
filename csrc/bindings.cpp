// The Python module halfbyte._native: takes addresses, sizes and the thread count, and runs a tier's functions over a
// tensor's blocks. Arguments were checked in Python; the interpreter's lock is free meanwhile. Codebooks are copied,
// and turned into search trees, on the way in.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "adamw.h"
#include "contract.h"
#include "dispatch.h"
#include "matmul.h"
#include "parallel.h"
#include "probe.h"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using Address = uintptr_t;

constexpr int64_t kGrain = 1 << 16;  // values; less than that is done before another thread has woken up

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

const std::vector<const Tier*>& tiers() {
    static const std::vector<const Tier*> available = available_tiers();
    return available;
}

const Tier& tier(int index) { return *tiers()[static_cast<size_t>(index)]; }

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

Search4 search4(Address code) {
    std::array<float, 16> table;
    std::memcpy(table.data(), pointer<const void>(code), sizeof table);
    Search4 search;
    std::iota(search.code, search.code + 16, uint8_t{0});
    std::stable_sort(search.code, search.code + 16, [&](uint8_t a, uint8_t b) { return table[a] < table[b]; });
    std::vector<float> values;
    for (const uint8_t q : search.code) values.push_back(table[q]);
    plant(values, 4, search.midpoint);
    return search;
}

Search8 search8(Address code, int size) {
    std::vector<float> values(static_cast<size_t>(size));
    std::memcpy(values.data(), pointer<const void>(code), values.size() * sizeof(float));
    Search8 search;
    search.last = size - 1;
    plant(values, 8, search.midpoint);
    return search;
}

template <class Arguments>
void over_blocks(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int threads) {
    const int64_t blocks = (arguments.n + arguments.blocksize - 1) / arguments.blocksize;
    const int64_t grain = (kGrain / arguments.blocksize + 2) / 2 * 2;  // even: see Tier
    parallel_for(blocks, grain, threads, [&](int64_t first, int64_t last) { kernel(arguments, first, last); });
}

void quantize_4bit(int isa, int threads, Address x, int type, int64_t n, int64_t blocksize, Address code,
                   Address packed, Address absmax) {
    const Quantize4bit arguments{pointer<const void>(x),  static_cast<Type>(type), n, blocksize, search4(code),
                                 pointer<uint8_t>(packed), pointer<float>(absmax)};
    over_blocks(tier(isa).quantize_4bit, arguments, threads);
}

void quantize_8bit(int isa, int threads, Address x, int type, int64_t n, int64_t blocksize, Address code, int size,
                   Address codes, Address absmax) {
    const Quantize8bit arguments{pointer<const void>(x), static_cast<Type>(type), n, blocksize, search8(code, size),
                                 pointer<uint8_t>(codes), pointer<float>(absmax)};
    over_blocks(tier(isa).quantize_8bit, arguments, threads);
}

Scales scales(Address absmax, Address nested_absmax, Address nested_code, int64_t nested_blocksize, float offset) {
    Scales scales{};
    scales.absmax = pointer<const void>(absmax);
    scales.nested = nested_absmax != 0;
    if (scales.nested) {
        scales.nested_absmax = pointer<const void>(nested_absmax);
        scales.nested_blocksize = nested_blocksize;
        std::memcpy(scales.nested_code, pointer<const void>(nested_code), sizeof scales.nested_code);
        scales.offset = offset;
    }
    return scales;
}

void dequantize_4bit(int isa, int threads, Address packed, Address code, Address absmax, Address nested_absmax,
                     Address nested_code, int64_t nested_blocksize, float offset, int64_t n, int64_t blocksize,
                     Address out, int type) {
    Dequantize4bit arguments{};
    arguments.codes = pointer<const uint8_t>(packed);
    std::memcpy(arguments.code, pointer<const void>(code), sizeof arguments.code);
    arguments.scales = scales(absmax, nested_absmax, nested_code, nested_blocksize, offset);
    arguments.n = n;
    arguments.blocksize = blocksize;
    arguments.out = pointer<void>(out);
    arguments.type = static_cast<Type>(type);
    over_blocks(tier(isa).dequantize_4bit, arguments, threads);
}

void dequantize_8bit(int isa, int threads, Address codes, Address code, int size, Address absmax, int64_t n,
                     int64_t blocksize, Address out, int type) {
    Dequantize8bit arguments{};
    arguments.codes = pointer<const uint8_t>(codes);
    std::memcpy(arguments.code, pointer<const void>(code), static_cast<size_t>(size) * sizeof(float));
    arguments.scales.absmax = pointer<const void>(absmax);
    arguments.n = n;
    arguments.blocksize = blocksize;
    arguments.out = pointer<void>(out);
    arguments.type = static_cast<Type>(type);
    over_blocks(tier(isa).dequantize_8bit, arguments, threads);
}

// Make a table, unless it is that of these values already.
void update(std::optional<Table8bit>& table, Address code) {
    if (table && !std::memcmp(table->value, pointer<const void>(code), sizeof table->value)) return;
    table.emplace();
    std::memcpy(table->value, pointer<const void>(code), sizeof table->value);
    table->search = search8(code, 256);
    for (int i = 0; i < 256; ++i) {
        const auto bits = load<uint32_t>(table->value, i);
        table->low[i] = static_cast<uint16_t>(bits);
        table->high[i] = static_cast<uint16_t>(bits >> 16);
    }
    std::vector<float> midpoints;
    for (int i = 0; i < 255; ++i) midpoints.push_back((table->value[i] + table->value[i + 1]) / 2);
    table->lines = fit_lines(midpoints);
}

// The constants of a step, in the order of Adamw's members.
using Constants = std::array<double, 8>;

Adamw adamw(const Constants& constants) {
    std::array<float, 8> rounded;
    std::transform(constants.begin(), constants.end(), rounded.begin(), [](double x) { return static_cast<float>(x); });
    const auto [decay, beta1, rest1, beta2, rest2, correction, eps, rate] = rounded;
    return {decay, beta1, rest1, beta2, rest2, correction, eps, rate};
}

using Addresses = std::vector<Address>;

void step_32bit(int isa, int threads, const Constants& constants, const std::vector<int>& types,
                const std::vector<int64_t>& sizes, const Addresses& params, const Addresses& grads, const Addresses& ms,
                const Addresses& vs) {
    std::vector<Stepped32bit> tensors;
    for (size_t i = 0; i < sizes.size(); ++i) {
        tensors.push_back({pointer<void>(params[i]), pointer<const void>(grads[i]), pointer<float>(ms[i]),
                           pointer<float>(vs[i]), sizes[i], static_cast<Type>(types[i])});
    }
    adamw_32bit(*tier(isa).adamw, adamw(constants), tensors, threads);
}

void step_8bit(int isa, int threads, const Constants& constants, const std::vector<int>& types,
               const std::vector<int64_t>& sizes, const Addresses& params, const Addresses& grads,
               const Addresses& m_codes, const Addresses& m_absmax, const Addresses& v_codes,
               const Addresses& v_absmax, Address code, Address code_unsigned, int64_t blocksize) {
    std::vector<Stepped8bit> tensors;
    for (size_t i = 0; i < sizes.size(); ++i) {
        tensors.push_back({pointer<void>(params[i]), pointer<const void>(grads[i]),
                           {pointer<uint8_t>(m_codes[i]), pointer<float>(m_absmax[i])},
                           {pointer<uint8_t>(v_codes[i]), pointer<float>(v_absmax[i])},
                           sizes[i], static_cast<Type>(types[i])});
    }
    static thread_local std::optional<Table8bit> m_table, v_table;
    update(m_table, code);
    update(v_table, code_unsigned);
    adamw_8bit(*tier(isa).adamw, adamw(constants), {*m_table, *v_table, blocksize}, tensors, threads);
}

bool multiplies(int isa) { return tier(isa).matmul != nullptr; }

void matmul_4bit(int isa, int threads, bool gradient, Address x, int64_t rows, int type, Address packed, Address code,
                 Address absmax, Address nested_absmax, Address nested_code, int64_t nested_blocksize, float offset,
                 int64_t blocksize, int64_t out_features, int64_t in_features, Address bias, Address y) {
    Weight4bit weight{};
    weight.codes = pointer<const uint8_t>(packed);
    std::memcpy(weight.code, pointer<const void>(code), sizeof weight.code);
    weight.scales = scales(absmax, nested_absmax, nested_code, nested_blocksize, offset);
    weight.blocksize = Divisor(blocksize);
    weight.nested_blocksize = Divisor(nested_blocksize);
    weight.rows = out_features;
    weight.columns = in_features;
    // the largest power of two that divides both
    const int64_t piece = (blocksize | in_features) & -(blocksize | in_features);
    weight.piece = piece >= 32 ? piece : 0;
    const Matmul4bit arguments{pointer<const void>(x), rows, static_cast<Type>(type), gradient, weight,
                               pointer<const void>(bias), pointer<void>(y)};
    matmul(*tier(isa).matmul(arguments.type), arguments, threads);
}

std::vector<std::string> tier_names() {
    std::vector<std::string> names;
    for (const Tier* tier : tiers()) names.emplace_back(tier->name);
    return names;
}

int64_t probe(int isa, int threads, int64_t rounds) {
    const Probe& probe = probe_of(tier(isa));
    std::atomic<float> result;  // used, so that the compiler keeps the loop
    parallel_for(rounds, rounds / (8 * threads) + 1, threads,
                 [&](int64_t first, int64_t last) { result = probe.run(last - first); });
    return rounds * probe.operations;
}

}  // namespace
}  // namespace halfbyte

NB_MODULE(_native, module) {
    using namespace halfbyte;
    using unlocked = nb::call_guard<nb::gil_scoped_release>;
    module.def("tiers", tier_names);
    module.def("use_openmp", [](Address parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); });
    module.def("probe", probe, unlocked());
    module.def("probed_arithmetic", [](int isa) { return std::string(probe_of(tier(isa)).arithmetic); });
    module.def("quantize_4bit", quantize_4bit, unlocked());
    module.def("quantize_8bit", quantize_8bit, unlocked());
    module.def("dequantize_4bit", dequantize_4bit, unlocked());
    module.def("dequantize_8bit", dequantize_8bit, unlocked());
    module.def("adamw_32bit", step_32bit, unlocked());
    module.def("adamw_8bit", step_8bit, unlocked());
    module.def("multiplies", multiplies);
    module.def("matmul_4bit", matmul_4bit, unlocked());
}
