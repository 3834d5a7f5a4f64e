// Decoding: the products of few rows with a dense matrix, attention over pages, and a whole step (decode.h) of a random
// small decoder against the same formulas in double, one token after the other, whose cache is kept in double too. Rows
// of a step are the same bytes alone, beside others, and for every number of threads.

#include <deque>

#include "case.h"
#include "decode.h"
#include "rows.h"

namespace halfbyte {
namespace {

using Doubles = std::vector<double>;

// Values of a type, and what they are.
struct Values {
    Buffer buffer;
    Doubles exact;

    Values(Case& c, int64_t n, Type type, float scale, float shift = 0) : buffer(n * size_of(type), 0, 0) {
        for (int64_t i = 0; i < n; ++i) {
            put(buffer.data, i, type, shift + c.random.normal() * scale);
            exact.push_back(get(buffer.data, i, type));
        }
    }
    double operator[](int64_t i) const { return exact[static_cast<size_t>(i)]; }
    const float* floats() const { return buffer.floats(); }
};

void dense_dot(Case& c) {
    const Type type = c.type();
    const FewKernels& few = *c.tier.matmul(type)->few;
    const int64_t rows = c.note("rows", 1 + c.random.below(few.rows)), width = c.note("width", 1 + c.random.below(90));
    const int64_t depth = c.note("depth", 32 * (1 + c.random.below(c.random.of({3, 80}))));
    const Values w(c, width * depth, type, 1), x(c, rows * depth, type, 1);
    const int64_t arranged_bytes =
        few.stretched ? rows * ((depth * few.bytes + kStretchBytes - 1) / kStretchBytes) * kArrangedBytes
                      : rows * depth * few.bytes;
    const Buffer arranged(arranged_bytes + 64, 0, 0);
    few.arrange_bytes(x.buffer.data, rows, depth, arranged.data);
    const Dense dense{w.buffer.data, type, width, depth, depth};
    const int64_t column = c.note("column", c.random.below(width)), columns = std::min(kStrip, width - column);
    const Buffer sums(4 * (few.rows * kStrip + 16), 0, kOurs);
    few.dot_dense(dense, column, columns, arranged.data, rows, sums.floats());
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < columns; ++n) {
            double expected = 0, size = 0;
            for (int64_t i = 0; i < depth; ++i) {
                const double term = w[(column + n) * depth + i] * x[r * depth + i];
                expected += term;
                size += std::abs(term);
            }
            const double got = sums.floats()[r * kStrip + n];
            if (!(std::abs(got - expected) <= 1e-6 * size + 1e-30)) c.require(false, c.differ("sum", n, got, expected));
        }
    }
}

// A decoder of random sizes with dense weights, in the kernels and in double.
class Model {
  public:
    explicit Model(Case& c)
        : type_(c.type()),
          cache_(c.note("cache", c.random.once_in(3) ? 3 : static_cast<int>(type_))),
          layers_(c.note("layers", 1 + c.random.below(2))),
          kv_heads_(c.note("kv_heads", 1 + c.random.below(2))),
          heads_(kv_heads_ * c.note("group", 1 + c.random.below(5))),
          size_(c.note("size", c.random.of<int64_t>({64, 32, 80, 128}))),
          width_(64 * c.note("width", 1 + c.random.below(3))),
          inner_(64 * c.note("inner", 1 + c.random.below(4))),
          vocabulary_(c.note("vocabulary", 2 + c.random.below(200))),
          whole_(c.note("whole", c.random.once_in(3))),
          norms_(c.note("norms", static_cast<int>(c.random.below(3)))),
          window_(c.note("window", c.random.once_in(2) ? 1 + c.random.below(100) : 0)),
          cap_(c.note("cap", c.random.once_in(3) ? 3.0f : 0.0f)),
          gelu_(c.note("gelu", c.random.once_in(2))),
          turned_(c.note("turned", c.random.of<int64_t>({size_, size_ / 2, 0}))),
          rank_(c.note("rank", 1 + c.random.below(70))) {
        // whatever the depth, the product has to be a multiple of 64 values
        while (heads_ * size_ % 64) ++heads_, heads_ = (heads_ + kv_heads_ - 1) / kv_heads_ * kv_heads_;
        c.note("heads", heads_);
        const DecoderShape shape{type_, cache_, width_, heads_, kv_heads_, size_, vocabulary_,
                                 gelu_, 0.3f,   cap_,   1.5f,   0.5f,      5.0f};
        decoder_ = std::make_unique<Decoder>(c.tier, shape);
        embedding_ = &values(c, vocabulary_ * width_, type_, 1);
        decoder_->embedding = {embedding_->buffer.data, type_, vocabulary_, width_, width_};
        decoder_->layers.resize(static_cast<size_t>(layers_));
        exact_.resize(static_cast<size_t>(layers_));
        for (int64_t l = 0; l < layers_; ++l) {
            DecodeLayer& layer = decoder_->layers[static_cast<size_t>(l)];
            ExactLayer& exact = exact_[static_cast<size_t>(l)];
            const int64_t of_heads = (heads_ + 2 * kv_heads_) * size_;
            add(c, layer.qkv, exact.qkv, of_heads, width_);
            add(c, layer.o, exact.o, width_, heads_ * size_);
            if (c.note("mixes", c.random.once_in(2))) {
                add_mixture(c, layer.mixture, exact);
            } else {
                exact.experts.resize(1);
                add(c, layer.gate_up, exact.experts[0].gate_up, 2 * inner_, width_);
                add(c, layer.down, exact.experts[0].down, width_, inner_);
            }
            if (norms_ < 2) layer.before_attention = norm(c, width_, exact.before_attention);
            if (norms_ > 0) layer.after_attention = norm(c, width_, exact.after_attention);
            if (norms_ < 2) layer.before_mlp = norm(c, width_, exact.before_mlp);
            if (norms_ > 0) layer.after_mlp = norm(c, width_, exact.after_mlp);
            if (c.random.once_in(2)) {
                layer.q_norm = norm(c, whole_ ? heads_ * size_ : size_, exact.q_norm);
                layer.k_norm = norm(c, whole_ ? kv_heads_ * size_ : size_, exact.k_norm);
            }
            layer.whole_norms = whole_;
            layer.window = window_;
            layer.angles = turned_ ? 0 : -1;
        }
        decoder_->last_norm = norm(c, width_, last_norm_);
        add(c, decoder_->head, head_, vocabulary_, width_);
        cos_ = &values(c, kPositions * std::max(turned_, int64_t{1}), Type::fp32, 0.5f);
        sin_ = &values(c, kPositions * std::max(turned_, int64_t{1}), Type::fp32, 0.5f);
        angles_ = {{cos_->floats(), sin_->floats(), turned_}};
        DecodeAdapter& adapter = decoder_->adapters.emplace_back();
        for (const DecodeLayer& layer : decoder_->layers) {
            adapter.layers.emplace_back(kPlaces + 2 * layer.mixture.experts.size());
        }
        for (int64_t l = 0; l < layers_; ++l) add_low_ranks(c, adapter, l);
    }

    static constexpr int64_t kPositions = 200;

    // A text of its own: pages, and keys and values in double.
    struct Text {
        std::deque<Buffer> memory;
        std::vector<const void*> pages;
        std::vector<std::vector<Doubles>> keys, values;  // by layer and position
        int64_t length = 0;
    };

    Text begin() const {
        Text text;
        text.keys.resize(static_cast<size_t>(layers_));
        text.values.resize(static_cast<size_t>(layers_));
        return text;
    }

    DecodeRow row(Text& text, int64_t token, int adapter) const {
        if (text.length % kPage == 0) {
            text.memory.emplace_back(decoder_->page_bytes(), 0, 0xff);  // NaN
            text.pages.push_back(text.memory.back().data);
        }
        return {token, text.length++, text.pages.data(), adapter};
    }

    std::vector<float> step(const std::vector<DecodeRow>& rows, int threads) {
        std::vector<float> logits(rows.size() * static_cast<size_t>(vocabulary_));
        decoder_->step(rows, angles_, logits.data(), threads);
        return logits;
    }

    // The logits in double, of what is rounded as the kernels round it.
    Doubles expected(Text& text, int64_t token, int64_t position, bool adapted) const {
        Doubles h = slice(embedding_->exact, token * width_, width_);
        for (double& x : h) x *= 1.5;
        for (int64_t l = 0; l < layers_; ++l) {
            const ExactLayer& layer = exact_[static_cast<size_t>(l)];
            Doubles qkv = product(layer.qkv, rounded(normalized(layer.before_attention, h)), adapted);
            Doubles q = slice(qkv, 0, heads_ * size_), k = slice(qkv, heads_ * size_, kv_heads_ * size_);
            const Doubles v = slice(qkv, (heads_ + kv_heads_) * size_, kv_heads_ * size_);
            q = by_heads(layer.q_norm, q);
            k = by_heads(layer.k_norm, k);
            turn(q, position);
            turn(k, position);
            text.keys[static_cast<size_t>(l)].push_back(kept(k));
            text.values[static_cast<size_t>(l)].push_back(kept(v));
            const Doubles attended = attend(text, static_cast<size_t>(l), q, position);
            add_to(h, normalized(layer.after_attention, product(layer.o, rounded(attended), adapted)));
            const Doubles x = rounded(normalized(layer.before_mlp, h));
            const Mixture& mixture = decoder_->layers[static_cast<size_t>(l)].mixture;
            Doubles y(static_cast<size_t>(width_), 0.0);
            for (const auto& [expert, share] : chosen(mixture, layer, x)) {
                const Doubles given = of_mlp(layer.experts[static_cast<size_t>(expert)], x, adapted);
                for (size_t i = 0; i < y.size(); ++i) y[i] += share * given[i];
            }
            add_to(h, normalized(layer.after_mlp, y));
        }
        Doubles logits = product(head_, rounded(normalized(last_norm_, h)), false);
        for (double& z : logits) z = 5 * std::tanh(0.5 * z / 5);
        return logits;
    }

    int64_t vocabulary() const { return vocabulary_; }
    // What rounding may do to logits of up to 5, very roughly: wrong formulas are off by far more.
    double bound() const { return cache_ == 3 ? 0.15 : type_ == Type::fp32 ? 1e-3 : type_ == Type::fp16 ? 0.05 : 0.25; }

  private:
    struct ExactNorm {
        bool there = false, centered = false, round = false;
        Doubles weight;
    };
    struct ExactProduct {
        const Values* weight = nullptr;
        const Values* bias = nullptr;
        int64_t width = 0, depth = 0;
        const Values *a = nullptr, *b = nullptr, *rescale = nullptr;
        int64_t rank = 0, first = 0, part = 0;
    };
    struct ExactMlp {
        ExactProduct gate_up, down;
    };
    struct ExactLayer {
        ExactProduct qkv, o, router;
        std::vector<ExactMlp> experts;  // or the one MLP
        const Values* bias = nullptr;   // of the choice
        ExactNorm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    };

    static Doubles slice(const Doubles& x, int64_t first, int64_t n) {
        return Doubles(x.begin() + first, x.begin() + first + n);
    }
    static void add_to(Doubles& h, const Doubles& y) {
        for (size_t i = 0; i < h.size(); ++i) h[i] += y[i];
    }

    Values& values(Case& c, int64_t n, Type type, float scale, float shift = 0) {
        return values_.emplace_back(c, n, type, scale, shift);
    }

    void add(Case& c, Products& p, ExactProduct& exact, int64_t width, int64_t depth) {
        const Values& w = values(c, width * depth, type_, 1 / std::sqrt(static_cast<float>(depth)));
        Factor factor{};
        factor.kind = Factor::dense;
        factor.weight_dense = {w.buffer.data, type_, width, depth, depth};
        p.factors.push_back(factor);
        p.width = width;
        p.depth = depth;
        exact.weight = &w;
        exact.width = width;
        exact.depth = depth;
        if (c.random.once_in(2)) {
            exact.bias = &values(c, width, Type::fp32, 0.1f);
            p.bias = exact.bias->floats();
        }
    }

    DecodeNorm norm(Case& c, int64_t width, ExactNorm& exact) {
        exact.there = true;
        exact.centered = c.random.once_in(3);
        exact.round = c.random.once_in(2);
        const Values& weight = values(c, width, Type::fp32, 0.2f, 1);
        exact.weight = weight.exact;
        return {true, weight.floats(), 1e-5f, exact.round, exact.centered};
    }

    void add_mixture(Case& c, Mixture& m, ExactLayer& exact) {
        m.groups = c.random.of<int64_t>({1, 1, 2, 3});
        const int64_t routed = c.note("routed", m.groups * (1 + c.random.below(4)));
        m.groups_kept = 1 + c.random.below(m.groups);
        m.chosen = c.note("chosen", 1 + c.random.below(routed / m.groups * m.groups_kept));
        m.sigmoid = c.random.once_in(2);
        m.normalized = c.random.once_in(2);
        m.factor = 1.3f;
        m.shared = c.note("shared", c.random.once_in(2));
        m.shared_gate = m.shared && c.random.once_in(2);
        // Logits that differ: a choice that rounding tips would make another model.
        add(c, m.router, exact.router, routed + m.shared_gate, width_);
        exact.bias = &values(c, routed, Type::fp32, 3.0f);
        m.bias = exact.bias->floats();
        m.experts.resize(static_cast<size_t>(routed + m.shared));
        exact.experts.resize(m.experts.size());
        for (size_t e = 0; e < m.experts.size(); ++e) {
            const int64_t inner = e == static_cast<size_t>(routed) ? inner_ + 64 : inner_;
            add(c, m.experts[e].gate_up, exact.experts[e].gate_up, 2 * inner, width_);
            add(c, m.experts[e].down, exact.experts[e].down, width_, inner);
        }
    }

    // The experts of a row and what each counts; of a layer without any, its MLP.
    std::vector<std::pair<int64_t, double>> chosen(const Mixture& m, const ExactLayer& layer, const Doubles& x) const {
        if (m.experts.empty()) return {{0, 1.0}};
        const Doubles logits = product(layer.router, x, false);
        const int64_t routed = static_cast<int64_t>(m.experts.size()) - m.shared, size = routed / m.groups;
        double total = 0;
        for (int64_t e = 0; e < routed; ++e) total += std::exp(logits[static_cast<size_t>(e)]);
        std::vector<std::pair<double, int64_t>> wanted;
        Doubles score;
        for (int64_t e = 0; e < routed; ++e) {
            const double z = std::exp(logits[static_cast<size_t>(e)]);
            score.push_back(m.sigmoid ? z / (1 + z) : z / total);
            wanted.emplace_back(score.back() + (*layer.bias)[e], e);
        }
        std::vector<std::pair<double, int64_t>> groups;
        for (int64_t g = 0; g < m.groups; ++g) {
            Doubles of;
            for (int64_t e = g * size; e < (g + 1) * size; ++e) of.push_back(wanted[static_cast<size_t>(e)].first);
            std::sort(of.rbegin(), of.rend());
            groups.emplace_back(size > 1 ? of[0] + of[1] : of[0], g);
        }
        std::sort(groups.rbegin(), groups.rend());
        std::vector<std::pair<double, int64_t>> left;
        for (const auto& one : wanted) {
            for (int64_t k = 0; k < m.groups_kept; ++k) {
                if (one.second / size == groups[static_cast<size_t>(k)].second) left.push_back(one);
            }
        }
        std::sort(left.rbegin(), left.rend());
        std::vector<std::pair<int64_t, double>> found;
        double sum = 0;
        for (int64_t k = 0; k < m.chosen; ++k) {
            const int64_t e = left[static_cast<size_t>(k)].second;
            found.emplace_back(e, score[static_cast<size_t>(e)]);
            sum += found.back().second;
        }
        for (auto& one : found) one.second *= static_cast<double>(m.factor) / (m.normalized ? sum : 1);
        if (m.shared) {
            found.emplace_back(routed, m.shared_gate ? 1 / (1 + std::exp(-logits[static_cast<size_t>(routed)])) : 1);
        }
        return found;
    }

    Doubles of_mlp(const ExactMlp& mlp, const Doubles& x, bool adapted) const {
        const Doubles both = product(mlp.gate_up, x, adapted);
        const size_t n = both.size() / 2;
        Doubles inner;
        for (size_t i = 0; i < n; ++i) {
            const double g = both[i], u = both[n + i];
            const double silu = g / (1 + std::exp(-g));
            const double gelu = g / 2 * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
            inner.push_back((gelu_ ? gelu : silu) * u);
        }
        return product(mlp.down, rounded(inner), adapted);
    }

    // Of a random part of the columns of each place.
    void add_low_ranks(Case& c, DecodeAdapter& adapter, int64_t l) {
        ExactLayer& layer = exact_[static_cast<size_t>(l)];
        std::vector<std::pair<int, ExactProduct*>> places = {{of_qkv, &layer.qkv}, {of_o, &layer.o}};
        const bool mixes = !decoder_->layers[static_cast<size_t>(l)].mixture.experts.empty();
        for (size_t e = 0; e < layer.experts.size(); ++e) {
            const int64_t number = static_cast<int64_t>(e);
            places.emplace_back(mixes ? place_of_expert(number, of_gate_up) : of_gate_up, &layer.experts[e].gate_up);
            places.emplace_back(mixes ? place_of_expert(number, of_down) : of_down, &layer.experts[e].down);
        }
        for (const auto& [place, product] : places) {
            if (c.random.once_in(4)) continue;
            ExactProduct& exact = *product;
            exact.first = 64 * c.random.below(exact.width / 64);
            exact.part = exact.width - exact.first;
            exact.rank = rank_;
            exact.a = &values(c, rank_ * exact.depth, type_, 1 / std::sqrt(static_cast<float>(exact.depth)));
            exact.b = &values(c, rank_ * exact.part, type_, 0.3f / std::sqrt(static_cast<float>(rank_)));
            if (c.random.once_in(2)) exact.rescale = &values(c, exact.part, Type::fp32, 0.1f, 1);
            LowRanks& low = adapter.layers[static_cast<size_t>(l)][static_cast<size_t>(place)];
            low.a = exact.a->buffer.data;
            low.rank = rank_;
            low.parts.push_back({exact.first, exact.part, rank_, exact.b->buffer.data,
                                 exact.rescale ? exact.rescale->floats() : nullptr, nullptr});
        }
    }

    Doubles rounded(const Doubles& x) const {
        Doubles y;
        for (const double value : x) {
            char place[4];
            put(place, 0, type_, static_cast<float>(value));
            y.push_back(get(place, 0, type_));
        }
        return y;
    }

    Doubles kept(const Doubles& x) const { return cache_ == 3 ? x : rounded(x); }

    Doubles product(const ExactProduct& p, const Doubles& x, bool adapted) const {
        Doubles y;
        for (int64_t n = 0; n < p.width; ++n) {
            double sum = 0;
            for (int64_t i = 0; i < p.depth; ++i) sum += (*p.weight)[n * p.depth + i] * x[static_cast<size_t>(i)];
            y.push_back(sum);
        }
        if (adapted && p.a) {
            for (int64_t j = 0; j < p.rank; ++j) {
                double u = 0;
                for (int64_t i = 0; i < p.depth; ++i) u += (*p.a)[j * p.depth + i] * x[static_cast<size_t>(i)];
                for (int64_t n = 0; n < p.part; ++n) y[static_cast<size_t>(p.first + n)] += u * (*p.b)[j * p.part + n];
            }
            for (int64_t n = 0; p.rescale && n < p.part; ++n) y[static_cast<size_t>(p.first + n)] *= (*p.rescale)[n];
        }
        for (int64_t n = 0; p.bias && n < p.width; ++n) y[static_cast<size_t>(n)] += (*p.bias)[n];
        return y;
    }

    Doubles normalized(const ExactNorm& norm, const Doubles& x) const {
        if (!norm.there) return x;
        double mean = 0, squares = 0;
        for (const double value : x) mean += value / static_cast<double>(x.size());
        if (!norm.centered) mean = 0;
        for (const double value : x) squares += (value - mean) * (value - mean) / static_cast<double>(x.size());
        Doubles y;
        for (const double value : x) y.push_back((value - mean) / std::sqrt(squares + 1e-5));
        if (norm.round) y = rounded(y);
        for (size_t i = 0; i < y.size(); ++i) y[i] *= norm.weight[i];
        return y;
    }

    Doubles by_heads(const ExactNorm& norm, const Doubles& x) const {
        if (!norm.there || whole_) return normalized(norm, x);
        Doubles y;
        for (int64_t first = 0; first < static_cast<int64_t>(x.size()); first += size_) {
            const Doubles head = normalized(norm, slice(x, first, size_));
            y.insert(y.end(), head.begin(), head.end());
        }
        return y;
    }

    void turn(Doubles& x, int64_t position) const {
        const int64_t half = turned_ / 2;
        for (int64_t first = 0; first < static_cast<int64_t>(x.size()); first += size_) {
            for (int64_t i = 0; i < half; ++i) {
                double &low = x[static_cast<size_t>(first + i)], &high = x[static_cast<size_t>(first + half + i)];
                const int64_t at = position * turned_ + i;
                const double a = low, b = high;
                low = a * (*cos_)[at] - b * (*sin_)[at];
                high = b * (*cos_)[at + half] + a * (*sin_)[at + half];
            }
        }
    }

    Doubles attend(const Text& text, size_t l, const Doubles& q, int64_t position) const {
        const int64_t begin = window_ ? std::max(int64_t{0}, position + 1 - window_) : 0;
        Doubles out;
        for (int64_t h = 0; h < heads_; ++h) {
            const int64_t kv = h / (heads_ / kv_heads_) * size_;
            Doubles p;
            double total = 0;
            for (int64_t t = begin; t <= position; ++t) {
                double z = 0;
                for (int64_t d = 0; d < size_; ++d) {
                    const auto at = static_cast<size_t>(kv + d);
                    z += 0.3f * q[static_cast<size_t>(h * size_ + d)] * text.keys[l][static_cast<size_t>(t)][at];
                }
                p.push_back(std::exp(cap_ != 0 ? cap_ * std::tanh(z / cap_) : z));
                total += p.back();
            }
            for (int64_t d = 0; d < size_; ++d) {
                double sum = 0;
                for (int64_t t = begin; t <= position; ++t) {
                    const double value = text.values[l][static_cast<size_t>(t)][static_cast<size_t>(kv + d)];
                    sum += p[static_cast<size_t>(t - begin)] * value;
                }
                out.push_back(sum / total);
            }
        }
        return out;
    }

    Type type_;
    int cache_;
    int64_t layers_, kv_heads_, heads_, size_, width_, inner_, vocabulary_;
    bool whole_;
    int norms_;
    int64_t window_;
    float cap_;
    bool gelu_;
    int64_t turned_, rank_;
    std::deque<Values> values_;
    std::unique_ptr<Decoder> decoder_;
    std::vector<ExactLayer> exact_;
    ExactNorm last_norm_;
    ExactProduct head_;
    const Values *embedding_ = nullptr, *cos_ = nullptr, *sin_ = nullptr;
    std::vector<Angles> angles_;
};

// Texts of several lengths go on together, some of them with the adapter; each also goes on alone.
void whole_step(Case& c) {
    Model model(c);
    const int64_t count = c.note("rows", 1 + c.random.below(c.random.of({2, 20})));
    const int64_t adapted = c.note("adapted", c.random.below(count + 1));  // the last ones
    const int64_t steps = c.note("steps", c.random.of({2, 2, 70}));
    std::vector<Model::Text> texts, alone;
    for (int64_t i = 0; i < count; ++i) texts.push_back(model.begin()), alone.push_back(model.begin());
    Model::Text exact = model.begin();
    const int64_t watched = c.note("watched", c.random.below(count));
    double off = 0, size = 0;
    for (int64_t s = 0; s < steps; ++s) {
        std::vector<DecodeRow> rows, single;
        int64_t token = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t drawn = c.random.below(model.vocabulary());
            const int adapter = i >= count - adapted ? 0 : -1;
            const auto at = static_cast<size_t>(i);
            rows.push_back(model.row(texts[at], drawn, adapter));
            if (i == watched) single.push_back(model.row(alone[at], drawn, adapter)), token = drawn;
        }
        const std::vector<float> logits = model.step(rows, 1 + static_cast<int>(c.random.below(4)));
        const std::vector<float> one = model.step(single, 1 + static_cast<int>(c.random.below(3)));
        const size_t first = static_cast<size_t>(watched * model.vocabulary());
        const Doubles expected = model.expected(exact, token, s, watched >= count - adapted);
        for (size_t i = 0; i < one.size(); ++i) {
            c.require(bits_of(one[i]) == bits_of(logits[first + i]),
                      "a row depends on its neighbours or on the threads");
            off += (one[i] - expected[i]) * (one[i] - expected[i]);
            size += expected[i] * expected[i];
        }
    }
    const double relative = std::sqrt(off / size);
    if (!(relative <= model.bound())) c.require(false, c.differ("logits, relatively", 0, relative, 0));
}

}  // namespace

void decode(Case& c) { c.random.once_in(2) ? dense_dot(c) : whole_step(c); }

}  // namespace halfbyte
