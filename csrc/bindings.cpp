// The Python module halfbyte._native: takes addresses, sizes and the thread count, and runs a tier's functions over a
// tensor's blocks. Arguments were checked in Python; the interpreter's lock is free meanwhile. Codebooks are copied,
// and turned into search trees, on the way in.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "adamw.h"
#include "attention.h"
#include "contract.h"
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
    table = table8bit(pointer<const void>(code));
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
    // the largest power of two that divides both
    const int64_t piece = (blocksize | columns) & -(blocksize | columns);
    weight.piece = piece >= 32 ? piece : 0;
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
    Sum(int isa, int64_t rows, int64_t width, int type, int y_type, Address bias, Address y, int64_t y_stride) {
        matmul_.type = static_cast<Type>(type);
        matmul_.y_type = static_cast<Type>(y_type);
        matmul_.kernels = tier(isa).matmul(matmul_.type);
        matmul_.y_kernels = tier(isa).matmul(matmul_.y_type);
        matmul_.rows = rows;
        matmul_.width = width;
        matmul_.bias = pointer<const void>(bias);
        matmul_.y = pointer<void>(y);
        matmul_.y_stride = y_stride;
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
                          blocksize % 32 == 0 && columns % 32 == 0});
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
using Lying = std::array<int64_t, 4>;

Heads heads(const Lying& x) { return {pointer<void>(static_cast<Address>(x[0])), x[1], x[2], x[3]}; }

// `sizes`: batches, heads, key/value heads, queries, keys, values of a head.
Attention attention(const std::array<int64_t, 6>& sizes, int type, Address ranges, float scale, float cap,
                    const Lying& q, const Lying& k, const Lying& v, const Lying& out, Address lse) {
    Attention arguments{};
    arguments.batches = sizes[0];
    arguments.heads = sizes[1];
    arguments.kv_heads = sizes[2];
    arguments.queries = sizes[3];
    arguments.keys = sizes[4];
    arguments.size = sizes[5];
    arguments.type = static_cast<Type>(type);
    arguments.ranges = pointer<const int32_t>(ranges);
    arguments.scale = scale;
    arguments.cap = cap;
    arguments.q = heads(q);
    arguments.k = heads(k);
    arguments.v = heads(v);
    arguments.out = heads(out);
    arguments.lse = pointer<float>(lse);
    return arguments;
}

bool attends(int isa) { return tier(isa).matmul && tier(isa).attention; }

void attention_forward_of(int isa, int threads, const std::array<int64_t, 6>& sizes, int type, Address ranges,
                          float scale, float cap, const Lying& q, const Lying& k, const Lying& v, const Lying& out,
                          Address lse) {
    const Attention arguments = attention(sizes, type, ranges, scale, cap, q, k, v, out, lse);
    attention_forward(tier(isa), arguments, threads);
}

void attention_backward_of(int isa, int threads, const std::array<int64_t, 6>& sizes, int type, Address ranges,
                           float scale, float cap, const Lying& q, const Lying& k, const Lying& v, const Lying& out,
                           Address lse, const Lying& dout, const Lying& dq, const Lying& dk, const Lying& dv) {
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
    using unlocked = nb::call_guard<nb::gil_scoped_release>;
    module.def("tiers", tier_names);
    module.def("use_openmp", [](Address parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); });
    module.def("probe", probe, unlocked());
    module.def("probe_lookups", probe_lookups, unlocked());
    module.def("probed_arithmetic", [](int isa) { return std::string(probe_of(tier(isa)).arithmetic); });
    module.def("quantize_4bit", quantize_4bit, unlocked());
    module.def("quantize_8bit", quantize_8bit, unlocked());
    module.def("dequantize_4bit", dequantize_4bit, unlocked());
    module.def("dequantize_8bit", dequantize_8bit, unlocked());
    module.def("adamw_32bit", step_32bit, unlocked());
    module.def("adamw_8bit", step_8bit, unlocked());
    module.def("multiplies", multiplies);
    module.def("matmul_4bit", matmul_4bit, unlocked());
    module.def("rms_norm", rms_norm, unlocked());
    module.def("rms_norm_gradient", rms_norm_gradient, unlocked());
    module.def("rms_norm_weight_gradient", rms_norm_weight_gradient, unlocked());
    module.def("gated", gated, unlocked());
    module.def("gated_gradient", gated_gradient, unlocked());
    module.def("rotary", rotary, unlocked());
    module.def("fold_softmax", fold_softmax, unlocked());
    module.def("exp", elementary<&RowKernels::exp>, unlocked());
    module.def("sigmoid", elementary<&RowKernels::sigmoid>, unlocked());
    module.def("tanh", elementary<&RowKernels::tanh>, unlocked());
    nb::class_<Sum>(module, "Sum")
        .def(nb::init<int, int64_t, int64_t, int, int, Address, Address, int64_t>())
        .def("add_weight", &Sum::add_weight)
        .def("add_bytes", &Sum::add_bytes)
        .def("add_dense", &Sum::add_dense);
    module.def("matmul_sums", matmul_sums, unlocked());
    module.def("attends", attends);
    module.def("attention", attention_forward_of, unlocked());
    module.def("attention_backward", attention_backward_of, unlocked());
}
