// Attention, forward and backward: each element within a bound of the formulas of attention.h in double, and bit for
// bit the same for every number of threads. Bounds follow the sums of magnitudes; where the chip multiplies bf16, p and
// ds are rounded to it.

#include "attention.h"
#include "case.h"

namespace halfbyte {
namespace {

// A tensor [batch, row, head, value] with gaps, full of random values or (scale 0) of poison.
struct Tensor {
    Type type;
    int64_t batches, heads, rows, size;
    Heads strides;
    Buffer buffer;

    Tensor(Case& c, Type type, int64_t batches, int64_t heads, int64_t rows, int64_t size, float scale)
        : type(type),
          batches(batches),
          heads(heads),
          rows(rows),
          size(size),
          strides(lay(c, heads, rows, size)),
          buffer((at(batches - 1, heads - 1, rows - 1) + size) * size_of(type), c.shift(), kOurs) {
        for (int64_t i = 0; scale != 0 && i < buffer.size / size_of(type); ++i) {
            put(buffer.data, i, type, c.random.normal() * scale);
        }
    }
    static Heads lay(Case& c, int64_t heads, int64_t rows, int64_t size) {
        const int64_t head = size + c.note("gap", c.gap()), row = heads * head + c.gap();
        return {nullptr, rows * row, head, row};
    }
    int64_t at(int64_t batch, int64_t head, int64_t row) const {
        return batch * strides.batch + head * strides.head + row * strides.row;
    }
    Heads in(const Buffer& memory) const { return {memory.data, strides.batch, strides.head, strides.row}; }
    Heads in_place() const { return in(buffer); }

    // One head, in double.
    std::vector<double> head(const Buffer& memory, int64_t batch, int64_t head) const {
        std::vector<double> values;
        for (int64_t i = 0; i < rows * size; ++i) {
            values.push_back(get(memory.data, at(batch, head, i / size) + i % size, type));
        }
        return values;
    }

    // A head of an output.
    void check(const Case& c, const char* what, const Buffer& memory, int64_t batch, int64_t head,
               const std::vector<double>& expected, const std::vector<double>& bound) const {
        for (int64_t i = 0; i < rows * size; ++i) {
            const int64_t place = at(batch, head, i / size) + i % size;
            const double got = get(memory.data, place, type), value = expected[static_cast<size_t>(i)];
            const double off = bound[static_cast<size_t>(i)] + 1e-36;
            if (!(std::abs(got - value) <= off + 1.01 * rounding(std::abs(value) + off, type))) {
                c.require(false, c.differ(what, place, got, value));
            }
        }
    }
    void check_gaps(const Case& c, const Buffer& memory) const {
        std::vector<bool> ours(static_cast<size_t>(memory.size / size_of(type)));
        for (int64_t i = 0; i < batches * heads * rows; ++i) {
            const int64_t begin = at(i / rows / heads, i / rows % heads, i % rows);
            for (int64_t j = 0; j < size; ++j) ours[static_cast<size_t>(begin + j)] = true;
        }
        for (int64_t i = 0; i < memory.size; ++i) {
            const bool written = !ours[static_cast<size_t>(i / size_of(type))] && memory.data[i] != kOurs;
            c.require(!written, "a gap was written to");
        }
    }
};

// Of each query the keys [begin, end): causal, within a window, of segments, or any; some have none.
std::vector<int32_t> make_ranges(Case& c, int64_t batches, int64_t queries, int64_t keys) {
    std::vector<int32_t> ranges;
    const char* const kind = c.note("ranges", c.random.of({"causal", "window", "segments", "any", "all"}));
    const bool some_empty = c.note("empty", c.random.once_in(4));
    const int64_t window = 1 + c.random.below(keys), segment = 1 + c.random.below(keys);
    for (int64_t batch = 0; batch < batches; ++batch) {
        for (int64_t query = 0; query < queries; ++query) {
            const int64_t own = std::min(keys - 1, query + std::max<int64_t>(keys - queries, 0));
            int64_t begin = 0, end = *kind == 'a' ? keys : own + 1;
            if (*kind == 'w') begin = std::max<int64_t>(0, end - window);
            if (*kind == 's') begin = own / segment * segment;
            if (std::string(kind) == "any") {
                begin = c.random.below(keys);
                end = begin + 1 + c.random.below(keys - begin);
            }
            if (some_empty && c.random.once_in(4)) end = begin;
            ranges.push_back(static_cast<int32_t>(begin));
            ranges.push_back(static_cast<int32_t>(end));
        }
    }
    return ranges;
}

}  // namespace

void attention(Case& c) {
    const Type type = c.type();
    const bool many = c.note("many", c.random.once_in(12));  // enough keys for spans to be cut
    const int64_t batches = c.note("batches", many ? 1 : 1 + c.random.below(2));
    const int64_t kv_heads = c.note("kv_heads", many ? 1 : 1 + c.random.below(3));
    const int64_t group = c.note("group", 1 + c.random.below(3));
    const int64_t keys =
        c.note("keys", many ? 577 + c.random.below(900) : 1 + c.random.below(c.random.of({20, 150, 300})));
    const bool square = !many && c.random.once_in(2);
    const int64_t queries = c.note("queries", square ? keys : 1 + c.random.below(many ? 90 : 200));
    const int64_t heads = kv_heads * group, most = 600000 / (batches * heads * queries * keys) + 1;
    const int64_t size = c.note("size", 1 + c.random.below(std::min(most, c.random.of<int64_t>({20, 80, 80, kLanes}))));
    const float cap = c.note("cap", c.random.of({0.0f, 0.0f, 4.0f}));
    const float scale = c.note("scale", c.random.uniform(0.05f, 0.5f));
    const std::vector<int32_t> ranges = make_ranges(c, batches, queries, keys);
    const Tensor q(c, type, batches, heads, queries, size, 1), k(c, type, batches, kv_heads, keys, size, 1);
    const Tensor v(c, type, batches, kv_heads, keys, size, 1), dout(c, type, batches, heads, queries, size, 1);
    const Tensor out(c, type, batches, heads, queries, size, 0), dq(c, type, batches, heads, queries, size, 0);
    const Tensor dk(c, type, batches, kv_heads, keys, size, 0), dv(c, type, batches, kv_heads, keys, size, 0);

    struct Result {
        Buffer out, lse, dq, dk, dv;
    };
    std::vector<Result> results;
    for (const int threads : {1, 2, 3}) {
        Result& r = results.emplace_back(
            Result{out.buffer, Buffer(4 * batches * heads * queries, 0, kOurs), dq.buffer, dk.buffer, dv.buffer});
        const Attention a{batches,      heads,         kv_heads,       queries,
                          keys,         size,          type,           ranges.data(),
                          scale,        cap,           q.in_place(),   k.in_place(),
                          v.in_place(), out.in(r.out), r.lse.floats(), dout.in_place(),
                          dq.in(r.dq),  dk.in(r.dk),   dv.in(r.dv)};
        attention_forward(c.tier, a, threads);
        attention_backward(c.tier, a, threads);
        c.same(r.out, results[0].out, "bytes of out on more threads");
        c.same(r.lse, results[0].lse, "bytes of lse on more threads");
        c.same(r.dq, results[0].dq, "bytes of dq on more threads");
        c.same(r.dk, results[0].dk, "bytes of dk on more threads");
        c.same(r.dv, results[0].dv, "bytes of dv on more threads");
    }

    const Result& r = results[0];
    out.check_gaps(c, r.out);
    dq.check_gaps(c, r.dq);
    dk.check_gaps(c, r.dk);
    dv.check_gaps(c, r.dv);
    const double rounded = c.tier.matmul(type)->pairs ? 1.1 * 0x1p-8 : 0;  // of p and ds
    const auto row_size = static_cast<size_t>(size);
    for (int64_t head = 0; head < batches * kv_heads; ++head) {
        const int64_t batch = head / kv_heads, kv_head = head % kv_heads;
        const std::vector<double> ks = k.head(k.buffer, batch, kv_head), vs = v.head(v.buffer, batch, kv_head);
        std::vector<double> want_dk(ks.size()), want_dv(ks.size()), off_dk(ks.size()), off_dv(ks.size());
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
            const std::vector<double> qs = q.head(q.buffer, batch, h), douts = dout.head(dout.buffer, batch, h);
            const std::vector<double> outs = out.head(r.out, batch, h);
            std::vector<double> want_out(qs.size()), want_dq(qs.size()), off_out(qs.size()), off_dq(qs.size());
            for (int64_t i = 0; i < queries; ++i) {
                const int32_t* const range = ranges.data() + (batch * queries + i) * 2;
                const size_t from = static_cast<size_t>(i) * row_size;
                std::vector<double> z, slope;
                double maximum = -kInfinity, total = 0, width = 1;
                for (int64_t j = range[0]; j < range[1]; ++j) {
                    double product = 0, magnitude = 0;
                    for (size_t d = 0; d < row_size; ++d) {
                        const double term = scale * qs[from + d] * ks[static_cast<size_t>(j) * row_size + d];
                        product += term;
                        magnitude += std::abs(term);
                    }
                    const double t = cap > 0 ? std::tanh(product / cap) : 0;
                    z.push_back(cap > 0 ? cap * t : product);
                    slope.push_back(1 - t * t);
                    maximum = std::max(maximum, z.back());
                    width = std::max(width, 1 + magnitude);
                }
                for (const double value : z) total += std::exp(value - maximum);
                const double off = 4e-6 * width + static_cast<double>(keys) * 0x1p-24;  // of p, relatively
                const double lse = maximum + std::log(total), got = r.lse.floats()[(batch * heads + h) * queries + i];
                c.require(z.empty() ? got == -kInfinity : std::abs(got - lse) <= off,
                          c.differ("lse", (batch * heads + h) * queries + i, got, lse));
                double delta = 0, size_of_delta = 0;
                for (size_t d = 0; d < row_size; ++d) {
                    delta += douts[from + d] * outs[from + d];
                    size_of_delta += std::abs(douts[from + d] * outs[from + d]);
                }
                for (size_t n = 0; n < z.size(); ++n) {
                    const size_t key = (static_cast<size_t>(range[0]) + n) * row_size;
                    const double p = std::exp(z[n] - lse);
                    double dp = 0, magnitude = size_of_delta;
                    for (size_t d = 0; d < row_size; ++d) {
                        dp += douts[from + d] * vs[key + d];
                        magnitude += std::abs(douts[from + d] * vs[key + d]);
                    }
                    const double ds = scale * slope[n] * p * (dp - delta);
                    const double off_p = p * (off + rounded);
                    const double off_ds = scale * p * magnitude * off + std::abs(ds) * rounded;
                    for (size_t d = 0; d < row_size; ++d) {
                        want_out[from + d] += p * vs[key + d];
                        off_out[from + d] += off_p * std::abs(vs[key + d]);
                        want_dq[from + d] += ds * ks[key + d];
                        off_dq[from + d] += off_ds * std::abs(ks[key + d]);
                        want_dk[key + d] += ds * qs[from + d];
                        off_dk[key + d] += off_ds * std::abs(qs[from + d]);
                        want_dv[key + d] += p * douts[from + d];
                        off_dv[key + d] += off_p * std::abs(douts[from + d]);
                    }
                }
            }
            out.check(c, "out", r.out, batch, h, want_out, off_out);
            dq.check(c, "dq", r.dq, batch, h, want_dq, off_dq);
        }
        dk.check(c, "dk", r.dk, batch, kv_head, want_dk, off_dk);
        dv.check(c, "dv", r.dv, batch, kv_head, want_dv, off_dv);
    }
}

}  // namespace halfbyte
