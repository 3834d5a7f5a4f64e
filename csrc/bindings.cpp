// The Python module halfbyte._native: takes addresses, sizes and the thread count, and runs a tier's functions over a
// tensor's blocks. Arguments were checked in Python; the interpreter's lock is free meanwhile. Codebooks are copied,
// and turned into search trees, on the way in.
//
// src/halfbyte/_native.pyi is made from the names, types and docstrings given here (docs/update_stub.py).

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <atomic>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "adamw.h"
#include "attention.h"
#include "bus.h"
#include "contract.h"
#include "decode.h"
#include "dispatch.h"
#include "matmul.h"
#include "parallel.h"
#include "probe.h"
#include "rows.h"
#include "tables.h"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using Address = uintptr_t;

constexpr int64_t kGrain = 1 << 16;  // values; less than that is done before another thread has woken up

constexpr int64_t kSoftmaxGrain = 1 << 14;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

const std::vector<const Tier*>& tiers() {
    static const std::vector<const Tier*> available = available_tiers();
    return available;
}

const Tier& tier(int index) { return *tiers()[static_cast<size_t>(index)]; }

template <class Arguments>
void over_blocks(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int threads) {
    const int64_t blocks = (arguments.n + arguments.blocksize - 1) / arguments.blocksize;
    const int64_t grain = (kGrain / arguments.blocksize + 2) / 2 * 2;  // even: see Tier
    parallel_for(blocks, grain, threads, [&](int64_t first, int64_t last) { kernel(arguments, first, last); });
}

void quantize_4bit(int isa, int threads, Address x, int type, int64_t n, int64_t blocksize, Address code,
                   Address packed, Address absmax) {
    const Quantize4bit arguments{
        pointer<const void>(x),   static_cast<Type>(type), n, blocksize, search4(pointer<const void>(code)),
        pointer<uint8_t>(packed), pointer<float>(absmax)};
    over_blocks(tier(isa).quantize_4bit, arguments, threads);
}

void quantize_8bit(int isa, int threads, Address x, int type, int64_t n, int64_t blocksize, Address code, int size,
                   Address codes, Address absmax) {
    const Quantize8bit arguments{
        pointer<const void>(x),  static_cast<Type>(type), n, blocksize, search8(pointer<const void>(code), size),
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

// Whether a table of 256 values has the int8 that each byte is.
bool integers(const float* code, int size) {
    if (size != 256) return false;
    float wanted[256];
    for (int i = 0; i < 256; ++i) wanted[i] = static_cast<int8_t>(i);
    return !std::memcmp(code, wanted, sizeof wanted);
}

void dequantize_8bit(int isa, int threads, Address codes, Address code, int size, Address absmax, int64_t n,
                     int64_t blocksize, Address out, int type) {
    Dequantize8bit arguments{};
    arguments.codes = pointer<const uint8_t>(codes);
    std::memcpy(arguments.code, pointer<const void>(code), static_cast<size_t>(size) * sizeof(float));
    arguments.integers = integers(arguments.code, size);
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
    table = table8bit(pointer<const void>(code));
}

// The constants of a step, in the order of Adamw's members.
using Constants = std::tuple<double, double, double, double, double, double, double, double>;

Adamw adamw(const Constants& constants) {
    return std::apply([](auto... x) { return Adamw{static_cast<float>(x)...}; }, constants);
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
               const Addresses& m_codes, const Addresses& m_absmax, const Addresses& v_codes, const Addresses& v_absmax,
               Address code, Address code_unsigned, int64_t blocksize) {
    std::vector<Stepped8bit> tensors;
    for (size_t i = 0; i < sizes.size(); ++i) {
        tensors.push_back({pointer<void>(params[i]),
                           pointer<const void>(grads[i]),
                           {pointer<uint8_t>(m_codes[i]), pointer<float>(m_absmax[i])},
                           {pointer<uint8_t>(v_codes[i]), pointer<float>(v_absmax[i])},
                           sizes[i],
                           static_cast<Type>(types[i])});
    }
    static thread_local std::optional<Table8bit> m_table, v_table;
    update(m_table, code);
    update(v_table, code_unsigned);
    adamw_8bit(*tier(isa).adamw, adamw(constants), {*m_table, *v_table, blocksize}, tensors, threads);
}

bool multiplies(int isa) { return tier(isa).matmul != nullptr; }

Weight4bit weight_4bit(Address packed, Address code, Address absmax, Address nested_absmax, Address nested_code,
                       int64_t nested_blocksize, float offset, int64_t blocksize, int64_t rows, int64_t columns) {
    Weight4bit weight{};
    weight.codes = pointer<const uint8_t>(packed);
    std::memcpy(weight.code, pointer<const void>(code), sizeof weight.code);
    weight.scales = scales(absmax, nested_absmax, nested_code, nested_blocksize, offset);
    weight.blocksize = Divisor(blocksize);
    weight.nested_blocksize = Divisor(nested_blocksize);
    weight.rows = rows;
    weight.columns = columns;
    weight.piece = piece_of(blocksize, columns);
    return weight;
}

void matmul_4bit(int isa, int threads, bool gradient, Address x, int64_t rows, int type, Address packed, Address code,
                 Address absmax, Address nested_absmax, Address nested_code, int64_t nested_blocksize, float offset,
                 int64_t blocksize, int64_t out_features, int64_t in_features, Address bias, Address y) {
    const Weight4bit weight = weight_4bit(packed, code, absmax, nested_absmax, nested_code, nested_blocksize, offset,
                                          blocksize, out_features, in_features);
    const int64_t depth = gradient ? out_features : in_features, width = gradient ? in_features : out_features;
    Term term{pointer<const void>(x), depth, 1, gradient, &weight, nullptr, {}};
    const Type storage = static_cast<Type>(type);
    const MatmulKernels* const kernels = tier(isa).matmul(storage);
    Matmul product{kernels,          kernels, storage, storage, rows, width, &term, 1, pointer<const void>(bias),
                   pointer<void>(y), width};
    matmul(&product, 1, threads);
}

// A sum of products, as Python gathers its terms.
class Sum {
  public:
    Sum(int isa, int64_t rows, int64_t width, int type, int y_type, Address bias, Address y, int64_t y_stride,
        bool as_many) {
        matmul_.type = static_cast<Type>(type);
        matmul_.y_type = static_cast<Type>(y_type);
        matmul_.kernels = tier(isa).matmul(matmul_.type);
        matmul_.y_kernels = tier(isa).matmul(matmul_.y_type);
        matmul_.rows = rows;
        matmul_.width = width;
        matmul_.bias = pointer<const void>(bias);
        matmul_.y = pointer<void>(y);
        matmul_.y_stride = y_stride;
        matmul_.as_many = as_many;
    }

    void add_weight(Address x, int64_t stride, int64_t step, bool gradient, Address packed, Address code,
                    Address absmax, Address nested_absmax, Address nested_code, int64_t nested_blocksize, float offset,
                    int64_t blocksize, int64_t rows, int64_t columns) {
        weights_.push_back(weight_4bit(packed, code, absmax, nested_absmax, nested_code, nested_blocksize, offset,
                                       blocksize, rows, columns));
        terms_.push_back({pointer<const void>(x), stride, step, gradient, &weights_.back(), nullptr, {}});
    }

    void add_bytes(Address x, int64_t stride, int64_t step, bool gradient, Address codes, Address absmax,
                   int64_t blocksize, int64_t rows, int64_t columns) {
        bytes_.push_back({pointer<const int8_t>(codes), pointer<const float>(absmax), Divisor(blocksize), rows, columns,
                          piece_of(blocksize, columns)});
        terms_.push_back({pointer<const void>(x), stride, step, gradient, nullptr, &bytes_.back(), {}});
    }

    void add_dense(Address x, int64_t stride, int64_t step, bool gradient, Address values, int type, int64_t rows,
                   int64_t columns, int64_t values_stride) {
        const Dense dense{pointer<const void>(values), static_cast<Type>(type), rows, columns, values_stride};
        terms_.push_back({pointer<const void>(x), stride, step, gradient, nullptr, nullptr, dense});
    }

    // Valid until something is added.
    Matmul arguments() {
        matmul_.terms = terms_.data();
        matmul_.count = static_cast<int>(terms_.size());
        return matmul_;
    }

  private:
    Matmul matmul_{};
    std::vector<Term> terms_;
    std::deque<Weight4bit> weights_;  // whose elements stay where they are
    std::deque<Weight8bit> bytes_;
};

void matmul_sums(int threads, const std::vector<Sum*>& sums) {
    std::vector<Matmul> products;
    for (Sum* sum : sums) products.push_back(sum->arguments());
    matmul(products.data(), static_cast<int>(products.size()), threads);
}

// An address, and the strides of batch, head and row in values.
using Lying = std::tuple<Address, int64_t, int64_t, int64_t>;

Heads heads(const Lying& x) {
    const auto [address, batch, head, row] = x;
    return {pointer<void>(address), batch, head, row};
}

// Batches, heads, key/value heads, queries, keys, values of a head.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

Attention attention(const Sizes& sizes, int type, Address ranges, float scale, float cap, const Lying& q,
                    const Lying& k, const Lying& v, const Lying& out, Address lse) {
    Attention a{};
    std::tie(a.batches, a.heads, a.kv_heads, a.queries, a.keys, a.size) = sizes;
    a.type = static_cast<Type>(type);
    a.ranges = pointer<const int32_t>(ranges);
    a.scale = scale;
    a.cap = cap;
    a.q = heads(q);
    a.k = heads(k);
    a.v = heads(v);
    a.out = heads(out);
    a.lse = pointer<float>(lse);
    return a;
}

bool attends(int isa) { return tier(isa).matmul && tier(isa).attention; }

void attention_forward_of(int isa, int threads, const Sizes& sizes, int type, Address ranges, float scale, float cap,
                          const Lying& q, const Lying& k, const Lying& v, const Lying& out, Address lse) {
    const Attention arguments = attention(sizes, type, ranges, scale, cap, q, k, v, out, lse);
    attention_forward(tier(isa), arguments, threads);
}

void attention_backward_of(int isa, int threads, const Sizes& sizes, int type, Address ranges, float scale, float cap,
                           const Lying& q, const Lying& k, const Lying& v, const Lying& out, Address lse,
                           const Lying& dout, const Lying& dq, const Lying& dk, const Lying& dv) {
    Attention arguments = attention(sizes, type, ranges, scale, cap, q, k, v, out, lse);
    arguments.dout = heads(dout);
    arguments.dq = heads(dq);
    arguments.dk = heads(dk);
    arguments.dv = heads(dv);
    attention_backward(tier(isa), arguments, threads);
}

// y = f(x) for n fp32 values.
template <void (*RowKernels::*f)(const float*, int64_t, float*)>
void elementary(int isa, Address x, int64_t n, Address y) {
    (tier(isa).rows->*f)(pointer<const float>(x), n, pointer<float>(y));
}

int64_t grain(int64_t width) { return kGrain / (width + 1) + 1; }

// Run a kernel over `count` rows of `width` values.
template <class Arguments>
void over_rows(const ByType<Arguments>& kernels, int type, const Arguments& arguments, int64_t count, int64_t width,
               int threads) {
    parallel_for(count, grain(width), threads,
                 [&](int64_t first, int64_t last) { kernels[type](arguments, first, last); });
}

// An address and a stride in values; no address: no rows.
using Strided = std::tuple<Address, int64_t>;

Rows rows(const Strided& strided) { return {pointer<const void>(std::get<0>(strided)), std::get<1>(strided)}; }

void rms_norm(int isa, int threads, int type, int64_t count, int64_t width, Strided x, Strided residual, Address weight,
              float eps, float offset, bool rounded, Address h, Address y, Address scale) {
    const RmsNorm arguments{
        rows(x),          rows(residual),   pointer<const void>(weight), width, eps, offset, rounded,
        pointer<void>(h), pointer<void>(y), pointer<float>(scale)};
    over_rows(tier(isa).rows->rms_norm, type, arguments, count, width, threads);
}

void rms_norm_gradient(int isa, int threads, int type, int64_t count, int64_t width, Strided dy, Strided h, Strided dh,
                       Address weight, Address scale, float offset, Address dx) {
    const RmsNormGradient arguments{
        rows(dy), rows(h), rows(dh),         pointer<const void>(weight), pointer<const float>(scale),
        width,    offset,  pointer<void>(dx)};
    over_rows(tier(isa).rows->rms_norm_gradient, type, arguments, count, width, threads);
}

void rms_norm_weight_gradient(int isa, int threads, int type, int64_t count, int64_t width, Strided dy, Strided h,
                              Address scale, Address dweight) {
    const RmsNormWeightGradient arguments{rows(dy), rows(h), pointer<const float>(scale), count,
                                          pointer<float>(dweight)};
    const int64_t columns = (grain(count) + 63) / 64 * 64;  // whole cache lines
    parallel_for(width, columns, threads, [&](int64_t first, int64_t last) {
        tier(isa).rows->rms_norm_weight_gradient[type](arguments, first, last);
    });
}

void gated(int isa, int threads, int type, int64_t count, int64_t width, int activation, Strided gate, Strided up,
           Address y) {
    const Gated arguments{rows(gate), rows(up), width, pointer<void>(y)};
    over_rows(tier(isa).rows->gated[activation], type, arguments, count, width, threads);
}

void gated_gradient(int isa, int threads, int type, int64_t count, int64_t width, int activation, Strided dy,
                    Strided gate, Strided up, Address dgate, Address dup, int64_t stride) {
    const GatedGradient arguments{rows(dy),           rows(gate), rows(up), width, pointer<void>(dgate),
                                  pointer<void>(dup), stride};
    over_rows(tier(isa).rows->gated_gradient[activation], type, arguments, count, width, threads);
}

// `shape` and `strides` are those of x: [samples, length, heads, size].
void rotary(int isa, int threads, int type, bool fp32_angles, bool inverse, std::array<int64_t, 4> shape,
            std::array<int64_t, 4> strides, Address x, Address cos, Address sin, int64_t turned,
            std::array<int64_t, 2> angle_strides, Address y) {
    const auto [samples, length, heads, size] = shape;
    const Rotary arguments{pointer<const void>(x),
                           strides[0],
                           strides[1],
                           strides[2],
                           pointer<const void>(cos),
                           pointer<const void>(sin),
                           angle_strides[0],
                           angle_strides[1],
                           length,
                           heads,
                           size,
                           turned / 2,
                           inverse,
                           pointer<void>(y)};
    over_rows(tier(isa).rows->rotary[fp32_angles], type, arguments, samples * length, heads * size, threads);
}

// `state` holds the addresses of the members of RunningSoftmax, in order.
void fold_softmax(int isa, int threads, Address logits, int type, int64_t rows, int64_t width, Address labels,
                  int64_t first, float scale, float cap, bool gradient, const std::array<Address, 9>& state) {
    FoldSoftmax arguments{};
    arguments.logits = pointer<void>(logits);
    arguments.type = static_cast<Type>(type);
    arguments.width = width;
    arguments.labels = pointer<const int64_t>(labels);
    arguments.first = first;
    arguments.scale = scale;
    arguments.cap = cap;
    arguments.gradient = gradient;
    float** const members[] = {&arguments.maximum, &arguments.sum,   &arguments.weighted, &arguments.squares,
                               &arguments.total,   &arguments.label, &arguments.slope,    &arguments.shrink};
    for (size_t i = 0; i < 8; ++i) *members[i] = pointer<float>(state[i]);
    arguments.top = pointer<int64_t>(state[8]);
    const RowKernels& kernels = *tier(isa).rows;
    parallel_for(rows, kSoftmaxGrain / width + 1, threads,
                 [&](int64_t begin, int64_t end) { kernels.fold_softmax(arguments, begin, end); });
}

// A norm: address of its fp32 weight or 0, eps, whether it rounds before the weight, whether it subtracts the mean.
using NormOf = std::tuple<Address, float, bool, bool>;

DecodeNorm norm(const std::optional<NormOf>& given) {
    if (!given) return {};
    const auto [weight, eps, rounded, centered] = *given;
    return {true, pointer<const float>(weight), eps, rounded, centered};
}

// A decoder, as Python gathers its parts.
class BoundDecoder {
  public:
    // Width, heads, key/value heads, values of a head, vocabulary.
    using Widths = std::array<int64_t, 5>;
    static constexpr int kHead = -1, kRouter = -2;  // in the place of a layer's place

    BoundDecoder(int isa, int type, int cache, const Widths& widths, int activation, float scale, float cap,
                 float embedding_factor, float logit_factor, float logit_cap)
        : decoder_(tier(isa), {static_cast<Type>(type), cache, widths[0], widths[1], widths[2], widths[3], widths[4],
                               activation, scale, cap, embedding_factor, logit_factor, logit_cap}) {}

    void set_embedding(Address values, int type, int64_t rows, int64_t columns) {
        decoder_.embedding = {pointer<const void>(values), static_cast<Type>(type), rows, columns, columns};
    }

    // Norms: before and after attention, before and after the MLP, of queries, of keys.
    void add_layer(const std::array<std::optional<NormOf>, 6>& norms, bool whole_norms, int64_t window,
                   int64_t angles) {
        DecodeLayer& layer = decoder_.layers.emplace_back();
        DecodeNorm* const places[] = {&layer.before_attention, &layer.after_attention, &layer.before_mlp,
                                      &layer.after_mlp,        &layer.q_norm,          &layer.k_norm};
        for (size_t i = 0; i < norms.size(); ++i) *places[i] = norm(norms[i]);
        layer.whole_norms = whole_norms;
        layer.window = window;
        layer.angles = angles;
    }

    // Give the last layer a mixture, and so many experts.
    void set_mixture(int64_t experts, int64_t chosen, bool sigmoid, bool normalized, float factor, Address bias,
                     int64_t groups, int64_t groups_kept, bool shared, bool shared_gate) {
        Mixture& mixture = decoder_.layers.back().mixture;
        mixture.sigmoid = sigmoid;
        mixture.normalized = normalized;
        mixture.factor = factor;
        mixture.bias = pointer<const float>(bias);
        mixture.chosen = chosen;
        mixture.groups = groups;
        mixture.groups_kept = groups_kept;
        mixture.shared = shared;
        mixture.shared_gate = shared_gate;
        mixture.experts.resize(static_cast<size_t>(experts));
    }

    void set_last_norm(const std::optional<NormOf>& given) { decoder_.last_norm = norm(given); }

    void add_weight(int place, Address packed, Address code, Address absmax, Address nested_absmax, Address nested_code,
                    int64_t nested_blocksize, float offset, int64_t blocksize, int64_t rows, int64_t columns) {
        Factor factor{};
        factor.kind = Factor::four_bits;
        factor.weight_4bit = weight_4bit(packed, code, absmax, nested_absmax, nested_code, nested_blocksize, offset,
                                         blocksize, rows, columns);
        add(place, factor);
    }

    void add_bytes(int place, Address codes, Address absmax, int64_t blocksize, int64_t rows, int64_t columns) {
        Factor factor{};
        factor.kind = Factor::bytes;
        factor.weight_8bit = {
            pointer<const int8_t>(codes), pointer<const float>(absmax), Divisor(blocksize), rows, columns,
            piece_of(blocksize, columns)};
        add(place, factor);
    }

    void add_dense(int place, Address values, int64_t rows, int64_t columns) {
        Factor factor{};
        factor.kind = Factor::dense;
        factor.weight_dense = {pointer<const void>(values), decoder_.type(), rows, columns, columns};
        add(place, factor);
    }

    void set_bias(int place, Address bias) { products(place).bias = pointer<const float>(bias); }

    int add_adapter() {
        decoder_.adapters.emplace_back();
        const int number = static_cast<int>(decoder_.adapters.size()) - 1;
        clear_adapter(number);
        return number;
    }

    void clear_adapter(int adapter) {
        DecodeAdapter& cleared = decoder_.adapters[static_cast<size_t>(adapter)];
        cleared.layers.clear();
        for (const DecodeLayer& layer : decoder_.layers) {
            cleared.layers.emplace_back(kPlaces + 2 * layer.mixture.experts.size());
        }
    }

    void set_factor_a(int adapter, int64_t layer, int place, Address a, int64_t rank) {
        LowRanks& low = low_ranks(adapter, layer, place);
        low.a = pointer<const void>(a);
        low.rank = rank;
    }

    void add_factor_b(int adapter, int64_t layer, int place, int64_t first, int64_t width, int64_t rank, Address b,
                      Address rescale, Address bias) {
        low_ranks(adapter, layer, place)
            .parts.push_back({first, width, rank, pointer<const void>(b), pointer<const float>(rescale),
                              pointer<const float>(bias)});
    }

    int64_t page_bytes() const { return decoder_.page_bytes(); }

    void profile(bool on) {
        decoder_.profiles = on;
        if (on) decoder_.times = {};
    }

    Address at() const { return reinterpret_cast<Address>(&decoder_.at); }

    void advise(bool on) { decoder_.advises = on; }

    std::vector<std::vector<int64_t>> chosen() const { return decoder_.chosen; }

    std::vector<std::pair<int64_t, int64_t>> phase_times() const {
        std::vector<std::pair<int64_t, int64_t>> found;
        for (const Decoder::Times& time : decoder_.times) found.emplace_back(time.working, time.waiting);
        return found;
    }

    void step(int threads, const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions,
              const Addresses& pages, const std::vector<int>& adapters,
              const std::vector<std::tuple<Address, Address, int64_t>>& tables, Address logits) {
        std::vector<DecodeRow> rows;
        for (size_t i = 0; i < tokens.size(); ++i) {
            rows.push_back({tokens[i], positions[i], pointer<const void* const>(pages[i]), adapters[i]});
        }
        std::vector<Angles> angles;
        for (const auto& [cos, sin, size] : tables) {
            angles.push_back({pointer<const float>(cos), pointer<const float>(sin), size});
        }
        const nb::gil_scoped_release unlocked;
        decoder_.step(rows, angles, pointer<float>(logits), threads);
    }

  private:
    Products& products(int place) {
        if (place == kHead) return decoder_.head;
        DecodeLayer& layer = decoder_.layers.back();
        if (place == kRouter) return layer.mixture.router;
        if (place >= kPlaces) {
            Expert& expert = layer.mixture.experts[static_cast<size_t>((place - kPlaces) / 2)];
            return place == place_of_expert((place - kPlaces) / 2, of_down) ? expert.down : expert.gate_up;
        }
        Products* const places[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
        return *places[place];
    }

    void add(int place, const Factor& factor) {
        Products& p = products(place);
        p.factors.push_back(factor);
        p.depth = factor.depth();
        p.width += factor.width();
    }

    LowRanks& low_ranks(int adapter, int64_t layer, int place) {
        DecodeAdapter& found = decoder_.adapters[static_cast<size_t>(adapter)];
        return found.layers[static_cast<size_t>(layer)][static_cast<size_t>(place)];
    }

    Decoder decoder_;
};

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

int64_t probe_lookups(int isa, int threads, int64_t rounds) {
    const LookupProbe* const probe = lookup_probe_of(tier(isa));
    if (!probe) return 0;
    std::atomic<int> result;  // used, as above
    parallel_for(rounds, rounds / (8 * threads) + 1, threads,
                 [&](int64_t first, int64_t last) { result = probe->run(last - first); });
    return rounds * probe->values;
}

}  // namespace
}  // namespace halfbyte

NB_MODULE(_native, module) {
    using namespace halfbyte;
    using namespace nb::literals;
    using unlocked = nb::call_guard<nb::gil_scoped_release>;

    nb::set_leak_warnings(false);  // whoever holds a decoder until the program ends is no leak
    module.doc() =
        "The native kernels, built from csrc/. Nothing is checked here: halfbyte.kernels does that.\n\n"
        "`isa` counts in tiers(). Tensors are addresses; 0 is none, where there may be none. A `type` is that\n"
        "of values: 0 fp32, 1 bf16, 2 fp16. `absmax` is fp32, one per block. Sizes, strides and steps are in values.";

    module.def("tiers", tier_names, "Return the instruction-set tiers that this build and this chip have, best first.");
    module.def(
        "use_openmp", [](Address parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); }, "parallel"_a,
        "Share work out by the GOMP_parallel at this address from now on; 0: over threads of the extension's own.");

    module.def(
        "tell_bus_error", [](const std::string& text, int code) { tell_bus_error(text.c_str(), code); }, "text"_a,
        "code"_a,
        "Write this and end the process with this code when a mapped file cannot be read any more, from now on.");
    module.def("probe", probe, unlocked(), "isa"_a, "threads"_a, "rounds"_a,
               "Run the tier's fastest arithmetic in registers; return the additions and multiplications done.");
    module.def("probe_lookups", probe_lookups, unlocked(), "isa"_a, "threads"_a, "rounds"_a,
               "Run the tier's lookups of 4-bit values in registers; return the values found.\n\n"
               "0 where the tier has no such loop.");
    module.def(
        "probed_arithmetic", [](int isa) { return std::string(probe_of(tier(isa)).arithmetic); }, "isa"_a,
        "Return what probe() runs, in words.");

    module.def("quantize_4bit", quantize_4bit, unlocked(), "isa"_a, "threads"_a, "x"_a, "type"_a, "n"_a, "blocksize"_a,
               "code"_a, "packed"_a, "absmax"_a,
               "Quantize n values to the nearest of the sixteen in `code`, two to a byte, the first in the high half.");
    module.def("quantize_8bit", quantize_8bit, unlocked(), "isa"_a, "threads"_a, "x"_a, "type"_a, "n"_a, "blocksize"_a,
               "code"_a, "size"_a, "codes"_a, "absmax"_a,
               "Quantize n values to the nearest of the `size` in `code`, which ascend.");
    module.def("dequantize_4bit", dequantize_4bit, unlocked(), "isa"_a, "threads"_a, "packed"_a, "code"_a, "absmax"_a,
               "nested_absmax"_a, "nested_code"_a, "nested_blocksize"_a, "offset"_a, "n"_a, "blocksize"_a, "out"_a,
               "type"_a,
               "Undo quantize_4bit.\n\n"
               "With `nested_absmax` the scale of a block is nested_code[absmax] nested_absmax + offset, `absmax` "
               "being bytes.");
    module.def("dequantize_8bit", dequantize_8bit, unlocked(), "isa"_a, "threads"_a, "codes"_a, "code"_a, "size"_a,
               "absmax"_a, "n"_a, "blocksize"_a, "out"_a, "type"_a, "Undo quantize_8bit.");

    module.def("multiplies", multiplies, "isa"_a, "Return whether the tier has products.");
    module.def("matmul_4bit", matmul_4bit, unlocked(), "isa"_a, "threads"_a, "gradient"_a, "x"_a, "rows"_a, "type"_a,
               "packed"_a, "code"_a, "absmax"_a, "nested_absmax"_a, "nested_code"_a, "nested_blocksize"_a, "offset"_a,
               "blocksize"_a, "out_features"_a, "in_features"_a, "bias"_a, "y"_a,
               "y[rows, out] = x Wᵀ + bias, or with `gradient` y[rows, in] = x W, for a 4-bit W[out, in].");
    nb::class_<Sum>(module, "Sum",
                    "y[rows, width] = bias + a sum of products, rounded once.\n\n"
                    "A term is x Wᵀ, or with `gradient` x W, for a W[rows, columns]; `stride` and `step` lead to x's "
                    "next row and value.")
        .def(nb::init<int, int64_t, int64_t, int, int, Address, Address, int64_t, bool>(), "isa"_a, "rows"_a, "width"_a,
             "type"_a, "y_type"_a, "bias"_a, "y"_a, "y_stride"_a, "as_many"_a,
             "A sum without terms; `type` is that of every x.")
        .def("add_weight", &Sum::add_weight, "x"_a, "stride"_a, "step"_a, "gradient"_a, "packed"_a, "code"_a,
             "absmax"_a, "nested_absmax"_a, "nested_code"_a, "nested_blocksize"_a, "offset"_a, "blocksize"_a, "rows"_a,
             "columns"_a, "Add a term with a 4-bit weight, given as to dequantize_4bit.")
        .def("add_bytes", &Sum::add_bytes, "x"_a, "stride"_a, "step"_a, "gradient"_a, "codes"_a, "absmax"_a,
             "blocksize"_a, "rows"_a, "columns"_a,
             "Add a term with a weight in signed bytes: codes times absmax / 127 of their block.")
        .def("add_dense", &Sum::add_dense, "x"_a, "stride"_a, "step"_a, "gradient"_a, "values"_a, "type"_a, "rows"_a,
             "columns"_a, "values_stride"_a, "Add a term with a dense matrix.");
    module.def("matmul_sums", matmul_sums, unlocked(), "threads"_a, "sums"_a,
               "Compute all these sums in one parallel region.");

    module.def("attends", attends, "isa"_a, "Return whether the tier has attention.");
    module.def("attention", attention_forward_of, unlocked(), "isa"_a, "threads"_a, "sizes"_a, "type"_a, "ranges"_a,
               "scale"_a, "cap"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a,
               "Softmax attention over the keys [begin, end) of each query: int32 `ranges` [batches, queries, 2].\n\n"
               "`sizes`: batches, heads, key/value heads, queries, keys, values of a head. q, k, v, out: address,\n"
               "and strides of batch, head and row. `cap` 0: none. `lse`: fp32 [batches, heads, queries].");
    module.def("attention_backward", attention_backward_of, unlocked(), "isa"_a, "threads"_a, "sizes"_a, "type"_a,
               "ranges"_a, "scale"_a, "cap"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a, "dq"_a, "dk"_a, "dv"_a,
               "The gradients of attention, written to dq, dk and dv; all else as there.");

    nb::class_<BoundDecoder>(module, "Decoder",
                             "All layers of a decoder, whose next tokens one call computes (csrc/decode.h).\n\n"
                             "Layers are added in order; what is added to a place belongs to the last of them: 0 "
                             "queries, keys and values,\n1 output, 2 gate and up, 3 down, 4 the head.")
        .def(nb::init<int, int, int, const BoundDecoder::Widths&, int, float, float, float, float, float>(), "isa"_a,
             "type"_a, "cache"_a, "widths"_a, "activation"_a, "scale"_a, "cap"_a, "embedding_factor"_a,
             "logit_factor"_a, "logit_cap"_a,
             "`widths`: width, heads, key/value heads, values of a head, inner width, vocabulary. `cache`: a type, or "
             "3 int8.")
        .def("set_embedding", &BoundDecoder::set_embedding, "values"_a, "type"_a, "rows"_a, "columns"_a,
             "The table that tokens are looked up in.")
        .def("add_layer", &BoundDecoder::add_layer, "norms"_a, "whole_norms"_a, "window"_a, "angles"_a,
             "Add a layer. Norms: before and after attention, before and after the MLP, of queries, of keys; each "
             "None or\nfp32 weight, eps, rounded, centered. `window` 0: none; `angles` -1: none.")
        .def("set_mixture", &BoundDecoder::set_mixture, "experts"_a, "chosen"_a, "sigmoid"_a, "normalized"_a,
             "factor"_a, "bias"_a, "groups"_a, "groups_kept"_a, "shared"_a, "shared_gate"_a,
             "Give the last layer a mixture of so many experts, the shared one included.")
        .def("set_last_norm", &BoundDecoder::set_last_norm, "norm"_a.none(), "The norm before the head.")
        .def("add_weight", &BoundDecoder::add_weight, "place"_a, "packed"_a, "code"_a, "absmax"_a, "nested_absmax"_a,
             "nested_code"_a, "nested_blocksize"_a, "offset"_a, "blocksize"_a, "rows"_a, "columns"_a,
             "Add a 4-bit weight, given as to dequantize_4bit.")
        .def("add_bytes", &BoundDecoder::add_bytes, "place"_a, "codes"_a, "absmax"_a, "blocksize"_a, "rows"_a,
             "columns"_a, "Add a weight in signed bytes.")
        .def("add_dense", &BoundDecoder::add_dense, "place"_a, "values"_a, "rows"_a, "columns"_a,
             "Add a dense weight of the decoder's type.")
        .def("set_bias", &BoundDecoder::set_bias, "place"_a, "bias"_a, "The fp32 bias of all weights of a place.")
        .def("add_adapter", &BoundDecoder::add_adapter, "Add an adapter without parts; return its number.")
        .def("clear_adapter", &BoundDecoder::clear_adapter, "adapter"_a, "Take all parts from an adapter.")
        .def("set_factor_a", &BoundDecoder::set_factor_a, "adapter"_a, "layer"_a, "place"_a, "a"_a, "rank"_a,
             "Set all A of a place, one below the other, times their scaling.")
        .def("add_factor_b", &BoundDecoder::add_factor_b, "adapter"_a, "layer"_a, "place"_a, "first"_a, "width"_a,
             "rank"_a, "b"_a, "rescale"_a, "bias"_a,
             "Add Bᵀ [rank, width] for the columns from `first` on; fp32 `rescale` and `bias` may be 0.")
        .def("page_bytes", &BoundDecoder::page_bytes, "Return the size of a page of the cache.")
        .def("profile", &BoundDecoder::profile, "on"_a,
             "Take the processor time of the phases of each step from now on, or no more.")
        .def("at", &BoundDecoder::at, "Return the address of the number of the layer that a step is at, int64.")
        .def("advise", &BoundDecoder::advise, "on"_a,
             "Tell the system of all experts of a layer as soon as they are chosen from now on, or no more.")
        .def("chosen", &BoundDecoder::chosen, "Return of each layer the experts that the last step chose.")
        .def("phase_times", &BoundDecoder::phase_times,
             "Return it for each kind of phase, in nanoseconds: in its items, in waiting for those of other threads.")
        .def("step", &BoundDecoder::step, "threads"_a, "tokens"_a, "positions"_a, "pages"_a, "adapters"_a, "tables"_a,
             "logits"_a,
             "Write the fp32 logits [rows, vocabulary] of the token after each of these.\n\n"
             "`pages`: of each row the address of the addresses of its pages. Rows of one adapter (-1: none) follow "
             "each\nother. `tables`: fp32 cosines and sines [positions, size], and size.");

    module.def("adamw_32bit", step_32bit, unlocked(), "isa"_a, "threads"_a, "constants"_a, "types"_a, "sizes"_a,
               "params"_a, "grads"_a, "ms"_a, "vs"_a,
               "An AdamW step over many tensors with fp32 moments.\n\n"
               "`constants`: 1 - lr decay, beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^step), eps, -lr / (1 - "
               "beta1^step).");
    module.def("adamw_8bit", step_8bit, unlocked(), "isa"_a, "threads"_a, "constants"_a, "types"_a, "sizes"_a,
               "params"_a, "grads"_a, "m_codes"_a, "m_absmax"_a, "v_codes"_a, "v_absmax"_a, "code"_a, "code_unsigned"_a,
               "blocksize"_a,
               "The same with moments in 8 bits: m in the 256 values of `code`, v in those of `code_unsigned`.\n\n"
               "Both ascend.");

    module.def(
        "rms_norm", rms_norm, unlocked(), "isa"_a, "threads"_a, "type"_a, "count"_a, "width"_a, "x"_a, "residual"_a,
        "weight"_a, "eps"_a, "offset"_a, "rounded"_a, "h"_a, "y"_a, "scale"_a,
        "y = (offset + weight) h scale, h = x + residual, scale = 1 / sqrt(mean(h²) + eps) of each row, fp32.\n\n"
        "x and residual: address and stride; without a residual h is not written. `rounded`: h scale is\n"
        "rounded to the type before the weight multiplies it.");
    module.def("rms_norm_gradient", rms_norm_gradient, unlocked(), "isa"_a, "threads"_a, "type"_a, "count"_a, "width"_a,
               "dy"_a, "h"_a, "dh"_a, "weight"_a, "scale"_a, "offset"_a, "dx"_a,
               "The gradient of rms_norm by x, plus `dh`, if there is one, which comes down to h from elsewhere.");
    module.def("rms_norm_weight_gradient", rms_norm_weight_gradient, unlocked(), "isa"_a, "threads"_a, "type"_a,
               "count"_a, "width"_a, "dy"_a, "h"_a, "scale"_a, "dweight"_a,
               "The gradient of rms_norm by the weight, fp32.");
    module.def("gated", gated, unlocked(), "isa"_a, "threads"_a, "type"_a, "count"_a, "width"_a, "activation"_a,
               "gate"_a, "up"_a, "y"_a,
               "y = activation(gate) up, activation 0 SiLU, 1 GELU by tanh. gate and up: address and stride.");
    module.def("gated_gradient", gated_gradient, unlocked(), "isa"_a, "threads"_a, "type"_a, "count"_a, "width"_a,
               "activation"_a, "dy"_a, "gate"_a, "up"_a, "dgate"_a, "dup"_a, "stride"_a,
               "The gradients of gated; `stride` is that of both.");
    module.def(
        "rotary", rotary, unlocked(), "isa"_a, "threads"_a, "type"_a, "fp32_angles"_a, "inverse"_a, "shape"_a,
        "strides"_a, "x"_a, "cos"_a, "sin"_a, "turned"_a, "angle_strides"_a, "y"_a,
        "Turn the first `turned` values of each head of x, [samples, length, heads, size], and copy the rest.\n\n"
        "cos and sin: [samples, length, turned], of the same strides, fp32 or as x. `inverse`: turn back.");
    module.def(
        "fold_softmax", fold_softmax, unlocked(), "isa"_a, "threads"_a, "logits"_a, "type"_a, "rows"_a, "width"_a,
        "labels"_a, "first"_a, "scale"_a, "cap"_a, "gradient"_a, "state"_a,
        "Take the columns [first, first + width) of the logits into the softmax of each row.\n\n"
        "`state`: the members of RunningSoftmax, in order. `labels`: int64, of the whole vocabulary. `cap` 0: none.\n"
        "`gradient`: the logits become exp(z - m) z', as in kernels/reference.py.");
    module.def("exp", elementary<&RowKernels::exp>, unlocked(), "isa"_a, "x"_a, "n"_a, "y"_a,
               "y = exp(x) for n fp32 values.");
    module.def("sigmoid", elementary<&RowKernels::sigmoid>, unlocked(), "isa"_a, "x"_a, "n"_a, "y"_a,
               "y = sigmoid(x) for n fp32 values.");
    module.def("tanh", elementary<&RowKernels::tanh>, unlocked(), "isa"_a, "x"_a, "n"_a, "y"_a,
               "y = tanh(x) for n fp32 values.");
}
