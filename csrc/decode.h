// Decoding: the next token of up to 64 conversations by one call, which goes through all layers of a decoder in one
// parallel region (parallel.h, run_phases).
//
// A layer is that of the families in src/halfbyte/hf/layers/families.py. With h the residual stream, x what a product
// reads, and N a norm where the family has it:
//
//     x = N(h);  q, k, v = x Wᵀ;  q, k = rotary(N(q)), rotary(N(k));  k, v to the cache;  a = attention(q)
//     h = h + N(a Woᵀ);  x = N(h);  g, u = x Wᵀ;  h = h + N((f(g) u) Wdᵀ)
//
// and at the end logits = N(h) Whᵀ. In the place of g, u and f(g) u Wdᵀ a layer may have a mixture of experts, some of
// which a router chooses for each row: their results are summed by what it gives them. Each product but the router's
// may have a low-rank part of its row's own adapter (LoRA, DoRA). Products read the storage type of the model and sum
// in fp32 (matmul.h, few rows); h and all that lies between products is fp32, so that less is rounded than in the
// training forward. Each row's result is bitwise the same whatever the other rows are, and for any number of threads.
//
// The cache is pages of kPage positions that a row has a table of; a page holds all layers and heads, keys with the
// positions of a value next to each other (a score is then a sum of vectors), values with the values of a position.
// In int8 each position of a head has a scale beside them.

#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "decode_rows.h"
#include "matmul.h"

namespace halfbyte {

// A factor of a product.
struct Factor {
    enum Kind { four_bits, bytes, dense } kind;
    Weight4bit weight_4bit;
    Weight8bit weight_8bit;
    Dense weight_dense;

    int64_t width() const {
        return kind == four_bits ? weight_4bit.rows : kind == bytes ? weight_8bit.rows : weight_dense.rows;
    }
    int64_t depth() const {
        return kind == four_bits ? weight_4bit.columns : kind == bytes ? weight_8bit.columns : weight_dense.columns;
    }
};

// Products of one input, whose results follow each other.
struct Products {
    std::vector<Factor> factors;
    const float* bias = nullptr;  // of all of them, or null
    int64_t depth = 0, width = 0;
};

// An adapter's part of Products.
struct LowRankPart {
    int64_t first, width, rank;   // columns of the results; rows of `a` that are its own follow those before
    const void* b;                // rank x width
    const float *rescale, *bias;  // width values, or null
};
struct LowRanks {
    const void* a = nullptr;  // sum of ranks x depth, of the storage type
    int64_t rank = 0;
    std::vector<LowRankPart> parts;
};

// An MLP.
struct Expert {
    Products gate_up, down;
};

// Which experts a row takes, and what they count: the `chosen` with the highest scores, which are the softmax or the
// sigmoid of the router's logits. For choosing, `bias` is added, and only the `groups_kept` of `groups` equal groups
// take part whose two highest sum to the most. Scores may be divided by their sum, and are multiplied by `factor`.
struct Mixture {
    Products router;  // a score for each expert that is chosen, and for the one that is not, `shared_gate`, one more
    bool sigmoid = false, normalized = false;
    float factor = 1.0f;
    const float* bias = nullptr;
    int64_t chosen = 0, groups = 1, groups_kept = 1;
    std::vector<Expert> experts;
    bool shared = false;       // whether the last of the experts is one that all rows take
    bool shared_gate = false;  // for the sigmoid of what the router says of it, not for 1

    int64_t routed() const { return static_cast<int64_t>(experts.size()) - shared; }
    int64_t taken() const { return chosen + shared; }
};

struct DecodeLayer {
    DecodeNorm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    Products qkv, o, gate_up, down;
    Mixture mixture;           // without experts: none
    bool whole_norms = false;  // of queries and keys: over all heads together
    int64_t window = 0;        // 0: none
    int64_t angles = -1;       // which table; -1: no rotary embedding
};

// Of a layer; after them come, for each expert of its mixture, its gate_up and its down.
enum Place : int { of_qkv, of_o, of_gate_up, of_down, kPlaces };
inline int place_of_expert(int64_t expert, Place place) {
    return static_cast<int>(2 * expert) + kPlaces + (place == of_down);
}

struct DecodeAdapter {
    std::vector<std::vector<LowRanks>> layers;  // by place

    const LowRanks& of(int64_t layer, int place) const {
        return layers[static_cast<size_t>(layer)][static_cast<size_t>(place)];
    }
};

// Cosines and sines: `size` fp32 values a position.
struct Angles {
    const float *cos, *sin;
    int64_t size;
};

struct DecoderShape {
    Type type;
    int cache;  // index into CacheKernels
    int64_t width, heads, kv_heads, size, vocabulary;
    int activation;
    float scale, cap;  // of scores
    float embedding_factor, logit_factor, logit_cap;
};

// A row of a step.
struct DecodeRow {
    int64_t token, position;
    const void* const* pages;  // of positions 0 to `position`; addresses
    int adapter;               // -1: none
};

class Decoder {
  public:
    Decoder(const Tier& tier, const DecoderShape& shape);

    std::vector<DecodeLayer> layers;
    std::deque<DecodeAdapter> adapters;
    Dense embedding;
    DecodeNorm last_norm;
    Products head;

    int64_t page_bytes() const;
    Type type() const { return shape_.type; }

    // Of each kind of phase the processor time of all steps, in and between items: the embedding, the kPhases of a
    // layer, the last norm, the head. Taken while `profiles`.
    static constexpr int kPhases = 12;
    struct Times {
        int64_t working = 0, waiting = 0;
    };
    bool profiles = false;

    // Of each layer the experts that any row of the last step was given, in order. Where weights lie in mapped files
    // that do not fit into memory, `advises`: the system is told of all of a layer's at once, as they are chosen.
    std::vector<std::vector<int64_t>> chosen;
    bool advises = false;

    // The layer that a step is at, for whoever reads weights ahead of it; of the head their number.
    std::atomic<int64_t> at{0};

    std::array<Times, kPhases + 3> times{};

    // logits: rows x vocabulary, fp32. `angles`: of each table; positions lie within them. Rows of one adapter follow
    // each other.
    void step(const std::vector<DecodeRow>& rows, const std::vector<Angles>& angles, float* logits, int threads);

  private:
    friend class DecodeStep;
    const Tier& tier_;
    const DecoderShape shape_;
    std::vector<char> memory_;
};

}  // namespace halfbyte
