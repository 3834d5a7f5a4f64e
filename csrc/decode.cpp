// The phases of a step of decode.h, and who does what in each.

#include "decode.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "parallel.h"
#include "rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace halfbyte {
namespace {

constexpr int64_t kItemBytes = 1 << 15;  // of a factor that one item reads, at least, while there is enough to share

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t size_of(Type type) { return type == Type::fp32 ? 4 : 2; }

// Rows that are arranged together: those of one product with few rows.
struct Group {
    int64_t first, count;
};
using Groups = std::vector<Group>;

// Rows that take one expert, with one adapter or none (-1).
struct Slot {
    int64_t expert;
    int adapter;
    Groups rows;       // one group
    int64_t up, down;  // items before those of this slot
};

Groups groups_of(int64_t first, int64_t end, int64_t most) {
    Groups groups;
    for (; first < end; first += most) groups.push_back({first, std::min(most, end - first)});
    return groups;
}

// What rows of x look like to the products of few rows: row by row, as it comes.
class Arrangement {
  public:
    Arrangement(const FewKernels& few, bool codes) : few_(few), codes_(codes) {}

    int64_t bytes(int64_t rows, int64_t depth) const {
        return few_.stretched ? rows * parts(depth * few_.bytes, kStretchBytes) * kArrangedBytes
                              : rows * depth * few_.bytes;
    }

    // Put the values [begin, end) of row `row` of `rows`; `begin` at a multiple of stretch().
    void put(const void* x, int64_t size, int64_t begin, int64_t end, int64_t depth, int64_t row, int64_t rows,
             char* out) const {
        const auto arrange = codes_ ? few_.arrange : few_.arrange_bytes;
        const char* from = static_cast<const char*>(x);
        if (!few_.stretched) {
            return arrange(from + begin * size, 1, end - begin, out + (row * depth + begin) * few_.bytes);
        }
        for (int64_t i = begin; i < end; i += stretch()) {
            char* const to = out + (i / stretch() * rows + row) * kArrangedBytes;
            arrange(from + i * size, 1, std::min(stretch(), end - i), to);
        }
    }

    int64_t stretch() const { return kStretchBytes / few_.bytes; }

  private:
    const FewKernels& few_;
    bool codes_;
};

// A piece of memory.
struct Piece {
    uintptr_t begin, bytes;
};

// Where a weight and its constants lie.
void add_pieces(const Factor& factor, std::vector<Piece>& pieces) {
    const int64_t values = factor.width() * factor.depth();
    const auto add = [&](const void* begin, int64_t bytes) {
        pieces.push_back({reinterpret_cast<uintptr_t>(begin), static_cast<uintptr_t>(bytes)});
    };
    if (factor.kind == Factor::four_bits) {
        const Weight4bit& w = factor.weight_4bit;
        const int64_t blocks = w.blocksize.quotient(values - 1) + 1;
        add(w.codes, values / 2);
        add(w.scales.absmax, blocks * (w.scales.nested ? 1 : 4));
        if (w.scales.nested) add(w.scales.nested_absmax, (w.nested_blocksize.quotient(blocks - 1) + 1) * 4);
    } else if (factor.kind == Factor::bytes) {
        const Weight8bit& w = factor.weight_8bit;
        add(w.codes, values);
        add(w.absmax, (w.blocksize.quotient(values - 1) + 1) * 4);
    }
}

// Have the system read what lies in mapped files, all at once and nothing beside: told piece by piece before the first
// is waited for, it reads no more than them.
void bring(const std::vector<Piece>& pieces) {
#if defined(__linux__)
    constexpr uintptr_t page = 4096, most = 1 << 17;
    constexpr int populate_read = 22;  // MADV_POPULATE_READ, of Linux 5.14
    for (const Piece& piece : pieces) {
        for (uintptr_t at = piece.begin & ~(page - 1); at < piece.begin + piece.bytes; at += most) {
            madvise(reinterpret_cast<void*>(at), std::min(most, piece.begin + piece.bytes - at), MADV_WILLNEED);
        }
    }
    for (const Piece& piece : pieces) {
        const uintptr_t first = piece.begin & ~(page - 1);
        madvise(reinterpret_cast<void*>(first), piece.begin + piece.bytes - first, populate_read);
    }
#else
    static_cast<void>(pieces);
#endif
}

}  // namespace

class DecodeStep : public Phases {
  public:
    DecodeStep(Decoder& decoder, const std::vector<DecodeRow>& rows, const std::vector<Angles>& angles, float* logits,
               int threads)
        : d_(decoder),
          s_(decoder.shape_),
          rows_(rows),
          angles_(angles),
          logits_(logits),
          threads_(threads),
          count_(static_cast<int64_t>(rows.size())),
          few_(*d_.tier_.matmul(s_.type)->few),
          kernels_(d_.tier_.rows->decode[static_cast<int>(s_.type)]),
          cache_(d_.tier_.rows->cache[s_.cache]),
          size_(size_of(s_.type)) {
        groups_ = groups_of(0, count_, few_.rows);
        for (int64_t first = 0, end; first < count_; first = end) {
            const int adapter = row(first).adapter;
            for (end = first + 1; end < count_ && row(end).adapter == adapter;) ++end;
            if (adapter < 0) continue;
            for (const Group& group : groups_of(first, end, few_.rows)) adapted_.push_back({adapter, group});
        }
        for (const DecodeLayer& layer : d_.layers) most_taken_ = std::max(most_taken_, layer.mixture.taken());
        for (const DecodeRow& one : rows_) chunks_ = std::max(chunks_, parts(one.position + 1, kChunkOfPages));
        d_.chosen.resize(d_.layers.size());
        lay_out();
        count_items();
    }

  protected:
    const std::vector<int64_t>& items() const override { return items_; }

    void work(int64_t phase, int64_t item) override {
        const int64_t layers = static_cast<int64_t>(d_.layers.size());
        if (phase == 0) return embed(item);
        --phase;
        const int64_t l = phase / kPhases;
        if (item == 0 && phase % kPhases == 0) d_.at.store(l, std::memory_order_relaxed);
        if (l == layers) return phase % kPhases ? logits(item) : last(item);
        const DecodeLayer& layer = d_.layers[static_cast<size_t>(l)];
        switch (phase % kPhases) {
            case 0: return products(layer.qkv, l, of_qkv, item);
            case 1: return heads(layer, l, item);
            case 2: return attend(layer, l, item);
            case 3: return gather(layer, item);
            case 4: return products(layer.o, l, of_o, item);
            case 5: return after_attention(layer, l, item);
            case 6: return strips_of_item(layer.mixture.router, groups_, item, sums_, widest_);
            case 7: return choose(layer.mixture, l);
            case 8:
                return mixes(layer) ? expert(layer, l, of_gate_up, item) : products(layer.gate_up, l, of_gate_up, item);
            case 9: return mixes(layer) ? activate_expert(layer, l, item) : activate(layer, l, item);
            case 10: return mixes(layer) ? expert(layer, l, of_down, item) : products(layer.down, l, of_down, item);
            default: return after_mlp(layer, l, item);
        }
    }

  private:
    static constexpr int64_t kPhases = Decoder::kPhases;

    const DecodeRow& row(int64_t i) const { return rows_[static_cast<size_t>(i)]; }

    // Memory of the step.
    void lay_out() {
        int64_t deepest = d_.head.depth, widest = 0, most_rank = 1;
        const auto holds = [&](const Products& p) {
            deepest = std::max(deepest, p.depth);
            widest = std::max(widest, p.width);
        };
        for (const DecodeLayer& layer : d_.layers) {
            for (const Products* p : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) holds(*p);
            holds(layer.mixture.router);
            for (const Expert& one : layer.mixture.experts) {
                holds(one.gate_up);
                holds(one.down);
            }
        }
        for (const DecodeAdapter& adapter : d_.adapters) {
            for (const auto& places : adapter.layers) {
                for (const LowRanks& place : places) most_rank = std::max(most_rank, place.rank);
            }
        }
        deepest_ = deepest;
        widest_ = widest;
        most_rank_ = most_rank;
        const Arrangement any(few_, false);
        const int64_t arranged = any.bytes(1, deepest) + 64;
        const int64_t partial = chunks_ * s_.heads * (s_.size + 2);
        const int64_t taken = count_ * most_taken_;
        const int64_t bytes[] = {
            count_ * s_.width * 4,            // h
            taken * widest * 4,               // sums
            taken * widest * 4,               // finished
            taken * deepest * size_,          // x
            taken * arranged,                 // x for 4-bit factors
            taken * arranged,                 // x for other factors
            taken * arranged,                 // x for adapters
            taken * most_rank * 4,            // u
            count_ * s_.heads * s_.size * 4,  // q
            count_ * partial * 4,             // attention
        };
        int64_t total = 64;
        for (const int64_t b : bytes) total += parts(b, 64) * 64;
        if (static_cast<int64_t>(d_.memory_.size()) < total) d_.memory_.assign(static_cast<size_t>(total), 0);
        char* at = d_.memory_.data() + (-reinterpret_cast<uintptr_t>(d_.memory_.data()) & 63);
        char* places[10];
        for (int i = 0; i < 10; ++i) {
            places[i] = at;
            at += parts(bytes[i], 64) * 64;
        }
        h_ = reinterpret_cast<float*>(places[0]);
        sums_ = reinterpret_cast<float*>(places[1]);
        finished_ = reinterpret_cast<float*>(places[2]);
        x_ = places[3];
        codes_ = places[4];
        bytes_ = places[5];
        adapters_ = places[6];
        u_ = reinterpret_cast<float*>(places[7]);
        q_ = reinterpret_cast<float*>(places[8]);
        partial_ = reinterpret_cast<float*>(places[9]);
    }

    void count_items() {
        items_.push_back(count_);
        for (const DecodeLayer& layer : d_.layers) {
            const int64_t l = &layer - d_.layers.data();
            const bool whole = whole_norms(layer);
            items_.push_back(product_items(layer.qkv, l, of_qkv));
            items_.push_back(whole ? count_ : count_ * (s_.heads + 2 * s_.kv_heads));
            items_.push_back(count_ * s_.kv_heads * chunks_);
            items_.push_back(count_);
            items_.push_back(product_items(layer.o, l, of_o));
            items_.push_back(count_);
            if (mixes(layer)) {
                items_.push_back(factor_items(layer.mixture.router));
                items_.push_back(1);
                items_.push_back(0);  // known when the experts are chosen
                items_.push_back(count_ * layer.mixture.taken() * most_stretches(layer.mixture));
                items_.push_back(0);
            } else {
                items_.push_back(0);
                items_.push_back(0);
                items_.push_back(product_items(layer.gate_up, l, of_gate_up));
                items_.push_back(count_ * stretches(layer.down.depth));
                items_.push_back(product_items(layer.down, l, of_down));
            }
            items_.push_back(count_);
        }
        items_.push_back(count_);
        items_.push_back(factor_items(d_.head));
    }

    static bool mixes(const DecodeLayer& layer) { return !layer.mixture.experts.empty(); }

    // --- products -------------------------------------------------------------------------------------------------

    // Strips that an item of these products does.
    int64_t strips_of_item(const Products& p) const {
        int64_t strips = 0, bytes = 0;
        for (const Factor& factor : p.factors) {
            strips += parts(factor.width(), kStrip);
            const int64_t values = factor.width() * factor.depth();
            bytes += factor.kind == Factor::four_bits ? values / 2
                     : factor.kind == Factor::bytes   ? values
                                                      : values * size_;
        }
        const int64_t enough = parts(kItemBytes * strips, std::max(bytes, int64_t{1}));
        return std::max(int64_t{1}, std::min(enough, strips / (4 * threads_)));
    }

    static int64_t all_strips(const Products& p) {
        int64_t strips = 0;
        for (const Factor& factor : p.factors) strips += parts(factor.width(), kStrip);
        return strips;
    }

    int64_t factor_items(const Products& p) const { return parts(all_strips(p), strips_of_item(p)); }

    int64_t product_items(const Products& p, int64_t layer, int place) const {
        int64_t items = factor_items(p);
        for (const auto& [adapter, group] : adapted_) items += parts(low_ranks(adapter, layer, place).rank, kStrip);
        return items;
    }

    const LowRanks& low_ranks(int adapter, int64_t layer, int place) const {
        return d_.adapters[static_cast<size_t>(adapter)].of(layer, place);
    }

    void products(const Products& p, int64_t layer, Place place, int64_t item) const {
        const int64_t items = factor_items(p);
        if (item < items) return strips_of_item(p, groups_, item, sums_, widest_);
        item -= items;
        for (const auto& [adapter, group] : adapted_) {
            const LowRanks& low = low_ranks(adapter, layer, place);
            const int64_t n = parts(low.rank, kStrip);
            if (item < n) return low_rank(p, low, group, item * kStrip);
            item -= n;
        }
    }

    // The strips of an item, of all factors one after the other, for all rows.
    void strips_of_item(const Products& p, const Groups& rows, int64_t item, float* out, int64_t stride) const {
        const int64_t each = strips_of_item(p), first = item * each, last = std::min(all_strips(p), first + each);
        int64_t begin = 0, column = 0;  // of this factor
        for (const Factor& factor : p.factors) {
            const int64_t strips = parts(factor.width(), kStrip);
            for (int64_t s = std::max(first - begin, int64_t{0}); s < std::min(last - begin, strips); ++s) {
                strip(factor, rows, s * kStrip, column, p.depth, out, stride);
            }
            begin += strips;
            column += factor.width();
        }
    }

    void strip(const Factor& factor, const Groups& rows, int64_t from, int64_t column, int64_t depth, float* out,
               int64_t stride) const {
        alignas(64) float sums[16 * kStrip + 16];
        const int64_t columns = std::min(kStrip, factor.width() - from);
        for (const Group& group : rows) {
            const char* const x = (factor.kind == Factor::four_bits ? codes_ : bytes_) + place_of(group.first, depth);
            switch (factor.kind) {
                case Factor::four_bits: few_.dot(factor.weight_4bit, from, columns, x, group.count, sums); break;
                case Factor::bytes: few_.dot_bytes(factor.weight_8bit, from, columns, x, group.count, sums); break;
                default: few_.dot_dense(factor.weight_dense, from, columns, x, group.count, sums); break;
            }
            for (int64_t r = 0; r < group.count; ++r) {
                float* const to = out + (group.first + r) * stride + column + from;
                std::memcpy(to, sums + r * kStrip, static_cast<size_t>(columns) * sizeof(float));
            }
        }
    }

    void low_rank(const Products& p, const LowRanks& low, const Group& group, int64_t from) const {
        alignas(64) float sums[16 * kStrip + 16];
        const int64_t columns = std::min(kStrip, low.rank - from);
        const Dense a{low.a, s_.type, low.rank, p.depth, p.depth};
        few_.dot_dense(a, from, columns, adapters_ + place_of(group.first, p.depth), group.count, sums);
        for (int64_t r = 0; r < group.count; ++r) {
            float* const to = u_ + (group.first + r) * most_rank_ + from;
            std::memcpy(to, sums + r * kStrip, static_cast<size_t>(columns) * sizeof(float));
        }
    }

    // Where the arranged rows from `first` on begin, of whatever depth.
    int64_t place_of(int64_t first, int64_t depth) const { return Arrangement(few_, false).bytes(first, depth); }

    // Bring the values [begin, end) of row i of x into the orders that the products of `p` read.
    void arrange(const Products& p, int64_t i, int64_t begin, int64_t end) const {
        const char* const x = x_ + i * deepest_ * size_;
        put(p, x, begin, end, i, groups_[static_cast<size_t>(i / few_.rows)]);
        if (row(i).adapter < 0 || &p == &d_.head) return;
        for (const auto& [adapter, mine] : adapted_) {
            if (i >= mine.first && i < mine.first + mine.count) put_for_adapter(p, x, begin, end, i, mine);
        }
    }

    // The same of row i of those that take experts, out of x.
    void arrange_taken(const Products& p, const char* x, int64_t i, int64_t begin, int64_t end) const {
        const Slot& slot = slot_of(i);
        put(p, x, begin, end, i, slot.rows[0]);
        if (slot.adapter >= 0) put_for_adapter(p, x, begin, end, i, slot.rows[0]);
    }

    void put(const Products& p, const char* x, int64_t begin, int64_t end, int64_t i, const Group& group) const {
        bool codes = false, bytes = false;
        for (const Factor& factor : p.factors) (factor.kind == Factor::four_bits ? codes : bytes) = true;
        if (codes) put(true, p.depth, x, begin, end, i, group, codes_);
        if (bytes) put(false, p.depth, x, begin, end, i, group, bytes_);
    }

    void put_for_adapter(const Products& p, const char* x, int64_t begin, int64_t end, int64_t i,
                         const Group& group) const {
        put(false, p.depth, x, begin, end, i, group, adapters_);
    }

    void put(bool as_codes, int64_t depth, const char* x, int64_t begin, int64_t end, int64_t i, const Group& group,
             char* out) const {
        const Arrangement order(few_, as_codes);
        order.put(x, size_, begin, end, depth, i - group.first, group.count, out + place_of(group.first, depth));
    }

    // The columns [first, last) of row i, with what its adapter adds and the bias; to `finished_`.
    float* finish(const Products& p, int adapter, int64_t layer, int place, int64_t i, int64_t first,
                  int64_t last) const {
        const float* const sums = sums_ + i * widest_;
        float* const out = finished_ + i * widest_;
        if (adapter < 0) {
            finish_part(p, nullptr, nullptr, 0, p.width, sums, out, first, last);
            return out;
        }
        const LowRanks& low = low_ranks(adapter, layer, place);
        const float* u = u_ + i * most_rank_;
        int64_t done = first;
        for (const LowRankPart& part : low.parts) {
            const int64_t begin = std::max(part.first, first), end = std::min(part.first + part.width, last);
            if (begin < end) {
                if (done < begin) finish_part(p, nullptr, nullptr, 0, p.width, sums, out, done, begin);
                finish_part(p, &part, u, part.first, part.width, sums, out, begin, end);
                done = end;
            }
            u += part.rank;
        }
        if (done < last) finish_part(p, nullptr, nullptr, 0, p.width, sums, out, done, last);
        return out;
    }

    float* finish(const Products& p, int64_t layer, Place place, int64_t i, int64_t first, int64_t last) const {
        return finish(p, row(i).adapter, layer, place, i, first, last);
    }

    // [first, last) of the columns that begin at `from`.
    void finish_part(const Products& p, const LowRankPart* part, const float* u, int64_t from, int64_t width,
                     const float* sums, float* out, int64_t first, int64_t last) const {
        FinishProduct f{};
        f.sums = sums + from;
        f.out = out + from;
        f.bias = p.bias ? p.bias + from : nullptr;
        f.width = width;
        if (part) {
            f.u = u;
            f.b = part->b;
            f.rank = part->rank;
            f.rescale = part->rescale;
            f.extra_bias = part->bias;
        }
        kernels_.finish(f, first - from, last - from);
    }

    // --- between products -----------------------------------------------------------------------------------------

    void embed(int64_t i) const {
        float* const h = h_ + i * s_.width;
        const char* const table = static_cast<const char*>(d_.embedding.values);
        const int64_t size = size_of(d_.embedding.type);
        const auto widen = d_.tier_.rows->decode[static_cast<int>(d_.embedding.type)].widen;
        widen(table + row(i).token * d_.embedding.stride * size, s_.width, s_.embedding_factor, h);
        enter(d_.layers.front(), i);
    }

    // x = N(h), or h where the norm comes after.
    void normalize(const DecodeNorm& norm, int64_t i) const {
        const float* const h = h_ + i * s_.width;
        char* const x = x_ + i * deepest_ * size_;
        norm.there ? kernels_.norm(norm, h, s_.width, x) : kernels_.round(h, s_.width, x);
    }

    void enter(const DecodeLayer& layer, int64_t i) const {
        normalize(layer.before_attention, i);
        arrange(layer.qkv, i, 0, layer.qkv.depth);
    }

    static bool whole_norms(const DecodeLayer& layer) { return layer.whole_norms; }

    void heads(const DecodeLayer& layer, int64_t l, int64_t item) const {
        const int64_t all = s_.heads + 2 * s_.kv_heads;
        if (!whole_norms(layer)) {
            const int64_t i = item / all, head = item % all;
            finish(layer.qkv, l, of_qkv, i, head * s_.size, (head + 1) * s_.size);
            return put_head(layer, l, i, head, true);
        }
        float* const y = finish(layer.qkv, l, of_qkv, item, 0, layer.qkv.width);
        if (layer.q_norm.there) kernels_.norm_in_place(layer.q_norm, y, s_.heads * s_.size);
        if (layer.k_norm.there) kernels_.norm_in_place(layer.k_norm, y + s_.heads * s_.size, s_.kv_heads * s_.size);
        for (int64_t head = 0; head < all; ++head) put_head(layer, l, item, head, false);
    }

    void put_head(const DecodeLayer& layer, int64_t l, int64_t i, int64_t head, bool normalizes) const {
        float* const y = finished_ + i * widest_ + head * s_.size;
        const bool query = head < s_.heads, key = !query && head < s_.heads + s_.kv_heads;
        const DecodeNorm& norm = query ? layer.q_norm : layer.k_norm;
        if (normalizes && (query || key) && norm.there) kernels_.norm_in_place(norm, y, s_.size);
        const int64_t position = row(i).position;
        if (query || key) {
            static constexpr float none = 0.0f;
            const bool turns = layer.angles >= 0;
            const Angles angles = turns ? angles_[static_cast<size_t>(layer.angles)] : Angles{&none, &none, 0};
            const float *const cos = angles.cos + position * angles.size, *const sin =
                                                                              angles.sin + position * angles.size;
            kernels_.turn(y, cos, sin, angles.size / 2, s_.size, query ? s_.scale : 1.0f);
        }
        if (query) {
            float* const q = q_ + (i * s_.heads + head) * s_.size;
            std::memcpy(q, y, static_cast<size_t>(s_.size) * sizeof(float));
            return;
        }
        const int64_t kv = head - s_.heads - (key ? 0 : s_.kv_heads), place = position % kPage;
        char* const page = static_cast<char*>(const_cast<void*>(row(i).pages[position / kPage]));
        const int64_t base = (l * s_.kv_heads + kv) * head_bytes(), values = s_.size * kPage * cache_.bytes;
        float* const scales = reinterpret_cast<float*>(page + base + 2 * values);
        if (key) {
            cache_.store(y, s_.size, kPage, page + base + place * cache_.bytes, scales + place);
        } else {
            cache_.store(y, s_.size, 1, page + base + values + place * s_.size * cache_.bytes, scales + kPage + place);
        }
    }

    int64_t head_bytes() const { return 2 * s_.size * kPage * cache_.bytes + (cache_.bytes == 1 ? 2 * kPage * 4 : 0); }

    // Of a row the positions that layer attends to.
    int64_t begin_of(const DecodeLayer& layer, int64_t i) const {
        return layer.window ? std::max(int64_t{0}, row(i).position + 1 - layer.window) : 0;
    }

    // Of one row, head and chunk: maxima and totals of the query heads, then their sums.
    float* partial(int64_t i, int64_t kv, int64_t chunk) const {
        return partial_ + ((i * s_.kv_heads + kv) * chunks_ + chunk) * (s_.heads / s_.kv_heads) * (s_.size + 2);
    }

    void attend(const DecodeLayer& layer, int64_t l, int64_t item) const {
        const int64_t chunk = item % chunks_, kv = item / chunks_ % s_.kv_heads, i = item / chunks_ / s_.kv_heads;
        const int64_t begin = std::max(begin_of(layer, i), chunk * kChunkOfPages);
        const int64_t end = std::min(row(i).position + 1, (chunk + 1) * kChunkOfPages);
        if (begin >= end) return;
        const int64_t heads = s_.heads / s_.kv_heads, base = (l * s_.kv_heads + kv) * head_bytes();
        const int64_t values = s_.size * kPage * cache_.bytes;
        float* const to = partial(i, kv, chunk);
        AttendPages a{};
        a.q = q_ + (i * s_.heads + kv * heads) * s_.size;
        a.heads = heads;
        a.size = s_.size;
        a.pages = row(i).pages;
        a.keys = base;
        a.values = base + values;
        a.key_scales = base + 2 * values;
        a.value_scales = a.key_scales + kPage * 4;
        a.begin = begin;
        a.end = end;
        a.scaled = cache_.bytes == 1;
        a.cap = s_.cap;
        a.maximum = to;
        a.total = to + heads;
        a.out = to + 2 * heads;
        cache_.attend(a);
    }

    // The chunks of each head, summed in their order.
    void gather(const DecodeLayer& layer, int64_t i) const {
        const int64_t heads = s_.heads / s_.kv_heads, first = begin_of(layer, i) / kChunkOfPages;
        const int64_t last = row(i).position / kChunkOfPages;
        float* const out = finished_ + i * widest_;
        for (int64_t kv = 0; kv < s_.kv_heads; ++kv) {
            for (int64_t g = 0; g < heads; ++g) {
                float maximum = -INFINITY, total = 0.0f;
                for (int64_t c = first; c <= last; ++c) maximum = std::max(maximum, partial(i, kv, c)[g]);
                for (int64_t c = first; c <= last; ++c) {
                    const float* const from = partial(i, kv, c);
                    total += from[heads + g] * std::exp(from[g] - maximum);
                }
                float* const y = out + (kv * heads + g) * s_.size;
                for (int64_t c = first; c <= last; ++c) {
                    const float* const from = partial(i, kv, c);
                    const float factor = std::exp(from[g] - maximum) / total;
                    const float* const sums = from + 2 * heads + g * s_.size;
                    for (int64_t d = 0; d < s_.size; ++d) y[d] = (c > first ? y[d] : 0.0f) + factor * sums[d];
                }
            }
        }
        kernels_.round(out, layer.o.depth, x_ + i * deepest_ * size_);
        arrange(layer.o, i, 0, layer.o.depth);
    }

    // h += N(y)
    void add(const Products& p, const DecodeNorm& norm, int64_t l, Place place, int64_t i) const {
        float* const y = finish(p, l, place, i, 0, p.width);
        if (norm.there) kernels_.norm_in_place(norm, y, s_.width);
        kernels_.add(h_ + i * s_.width, y, s_.width);
    }

    void after_attention(const DecodeLayer& layer, int64_t l, int64_t i) const {
        add(layer.o, layer.after_attention, l, of_o, i);
        normalize(layer.before_mlp, i);
        const Products& next = mixes(layer) ? layer.mixture.router : layer.gate_up;
        arrange(next, i, 0, next.depth);
    }

    void after_mlp(const DecodeLayer& layer, int64_t l, int64_t i) const {
        mixes(layer) ? add_experts(layer, l, i) : add(layer.down, layer.after_mlp, l, of_down, i);
        if (&layer != &d_.layers.back()) enter(*(&layer + 1), i);
    }

    int64_t stretches(int64_t depth) const { return parts(depth, Arrangement(few_, false).stretch()); }

    // A stretch of the inner values of a row.
    void activate(const DecodeLayer& layer, int64_t l, int64_t item) const {
        const int64_t inner = layer.down.depth, i = item / stretches(inner), at = item % stretches(inner);
        const auto [begin, end] = activated(layer.gate_up, row(i).adapter, l, of_gate_up, i, inner, at);
        arrange(layer.down, i, begin, end);
    }

    // Put f(g) u of a stretch of row i into x; return which values these are.
    std::pair<int64_t, int64_t> activated(const Products& p, int adapter, int64_t l, int place, int64_t i,
                                          int64_t inner, int64_t stretch_number) const {
        const int64_t stretch = Arrangement(few_, false).stretch();
        const int64_t begin = stretch_number * stretch, end = std::min(begin + stretch, inner);
        finish(p, adapter, l, place, i, begin, end);
        const float* const y = finish(p, adapter, l, place, i, inner + begin, inner + end);
        char* const x = x_ + (i * deepest_ + begin) * size_;
        kernels_.gated[s_.activation](y + begin, y + inner + begin, end - begin, x);
        return {begin, end};
    }

    // --- experts --------------------------------------------------------------------------------------------------

    const Slot& slot_of(int64_t taken) const { return slots_[slot_of_taken_[static_cast<size_t>(taken)]]; }

    int64_t most_stretches(const Mixture& mixture) const {
        int64_t most = 0;
        for (const Expert& one : mixture.experts) most = std::max(most, stretches(one.down.depth));
        return most;
    }

    // The experts of every row, in the order of the experts, and the rows' x for them.
    void choose(const Mixture& m, int64_t l) {
        const int64_t taken = m.taken();
        takes_.clear();
        shares_.resize(static_cast<size_t>(count_ * taken));
        for (int64_t i = 0; i < count_; ++i) {
            const float* const logits = finish(m.router, -1, l, 0, i, 0, m.router.width);
            float* const shares = shares_.data() + i * taken;
            choose_of(m, logits, i, shares);
            if (!m.shared) continue;
            takes_.push_back({m.routed(), row(i).adapter, i, m.chosen});
            shares[m.chosen] = m.shared_gate ? 1.0f / (1.0f + std::exp(-logits[m.routed()])) : 1.0f;
        }
        std::sort(takes_.begin(), takes_.end(), [](const Take& a, const Take& b) {
            return std::tie(a.expert, a.adapter, a.row) < std::tie(b.expert, b.adapter, b.row);
        });
        taken_at_.resize(takes_.size());
        slot_of_taken_.resize(takes_.size());
        slots_.clear();
        int64_t up = 0, down = 0;
        const int64_t n = static_cast<int64_t>(takes_.size());
        for (int64_t first = 0, end; first < n; first = end) {
            const Take& begun = takes_[static_cast<size_t>(first)];
            const auto same = [&](const Take& t) { return t.expert == begun.expert && t.adapter == begun.adapter; };
            for (end = first + 1; end < n && end - first < few_.rows && same(takes_[static_cast<size_t>(end)]);) ++end;
            const Expert& one = m.experts[static_cast<size_t>(begun.expert)];
            slots_.push_back({begun.expert, begun.adapter, {{first, end - first}}, up, down});
            up += expert_items(one.gate_up, l, begun, of_gate_up);
            down += expert_items(one.down, l, begun, of_down);
            for (int64_t s = first; s < end; ++s) {
                const Take& take = takes_[static_cast<size_t>(s)];
                taken_at_[static_cast<size_t>(take.row * taken + take.place)] = s;
                slot_of_taken_[static_cast<size_t>(s)] = slots_.size() - 1;
                arrange_taken(one.gate_up, x_ + take.row * deepest_ * size_, s, 0, one.gate_up.depth);
            }
        }
        note_chosen(m, l);
        items_[static_cast<size_t>(l * kPhases + 9)] = up;
        items_[static_cast<size_t>(l * kPhases + 11)] = down;
    }

    void choose_of(const Mixture& m, const float* logits, int64_t i, float* shares) {
        const int64_t n = m.routed();
        scores_.resize(static_cast<size_t>(n));
        wanted_.resize(static_cast<size_t>(n));
        gone_.assign(static_cast<size_t>(n), false);
        const float highest = *std::max_element(logits, logits + n);
        float total = 0.0f;
        for (int64_t e = 0; e < n; ++e) {
            const size_t at = static_cast<size_t>(e);
            scores_[at] = m.sigmoid ? 1.0f / (1.0f + std::exp(-logits[e])) : std::exp(logits[e] - highest);
            total += scores_[at];
        }
        for (size_t e = 0; e < scores_.size(); ++e) {
            if (!m.sigmoid) scores_[e] /= total;
            wanted_[e] = scores_[e] + (m.bias ? m.bias[e] : 0.0f);
        }
        if (m.groups > 1) keep_groups(m);
        float sum = 0.0f;
        for (int64_t k = 0; k < m.chosen; ++k) {
            size_t best = 0;
            while (gone_[best]) ++best;
            for (size_t e = best + 1; e < wanted_.size(); ++e) {
                if (!gone_[e] && wanted_[e] > wanted_[best]) best = e;
            }
            gone_[best] = true;
            shares[k] = scores_[best];
            sum += scores_[best];
            takes_.push_back({static_cast<int64_t>(best), row(i).adapter, i, k});
        }
        for (int64_t k = 0; k < m.chosen; ++k) shares[k] *= m.factor / (m.normalized ? sum : 1.0f);
    }

    // Let go of all groups but those whose two highest sum to the most.
    void keep_groups(const Mixture& m) {
        const size_t groups = static_cast<size_t>(m.groups), size = wanted_.size() / groups;
        std::vector<std::pair<float, size_t>> sums;
        for (size_t g = 0; g < groups; ++g) {
            float highest = -INFINITY, second = size > 1 ? -INFINITY : 0.0f;
            for (size_t e = g * size; e < (g + 1) * size; ++e) {
                second = size > 1 ? std::max(second, std::min(highest, wanted_[e])) : second;
                highest = std::max(highest, wanted_[e]);
            }
            sums.emplace_back(highest + second, g);
        }
        std::stable_sort(sums.begin(), sums.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
        for (size_t k = static_cast<size_t>(m.groups_kept); k < groups; ++k) {
            std::fill_n(gone_.begin() + static_cast<int64_t>(sums[k].second * size), size, true);
        }
    }

    void note_chosen(const Mixture& m, int64_t l) {
        std::vector<int64_t>& chosen = d_.chosen[static_cast<size_t>(l)];
        chosen.clear();
        std::vector<Piece> pieces;
        for (const Slot& slot : slots_) {
            if (slot.expert == m.routed() || (!chosen.empty() && chosen.back() == slot.expert)) continue;
            chosen.push_back(slot.expert);
            if (!d_.advises) continue;
            const Expert& one = m.experts[static_cast<size_t>(slot.expert)];
            for (const Products* p : {&one.gate_up, &one.down}) {
                for (const Factor& factor : p->factors) add_pieces(factor, pieces);
            }
        }
        bring(pieces);
    }

    struct Take {
        int64_t expert;
        int adapter;
        int64_t row, place;  // among the row's experts
    };

    int64_t expert_items(const Products& p, int64_t l, const Take& take, Place place) const {
        if (take.adapter < 0) return factor_items(p);
        const LowRanks& low = low_ranks(take.adapter, l, place_of_expert(take.expert, place));
        return factor_items(p) + parts(low.rank, kStrip);
    }

    void expert(const DecodeLayer& layer, int64_t l, Place place, int64_t item) const {
        const auto first = [&](const Slot& slot) { return place == of_down ? slot.down : slot.up; };
        const auto after = std::upper_bound(slots_.begin(), slots_.end(), item,
                                            [&](int64_t value, const Slot& slot) { return value < first(slot); });
        const Slot& slot = *(after - 1);
        const Expert& one = layer.mixture.experts[static_cast<size_t>(slot.expert)];
        const Products& p = place == of_down ? one.down : one.gate_up;
        item -= first(slot);
        const int64_t items = factor_items(p);
        if (item < items) return strips_of_item(p, slot.rows, item, sums_, widest_);
        const LowRanks& low = low_ranks(slot.adapter, l, place_of_expert(slot.expert, place));
        low_rank(p, low, slot.rows[0], (item - items) * kStrip);
    }

    void activate_expert(const DecodeLayer& layer, int64_t l, int64_t item) const {
        const int64_t most = most_stretches(layer.mixture), s = item / most, stretch = item % most;
        const Slot& slot = slot_of(s);
        const Expert& one = layer.mixture.experts[static_cast<size_t>(slot.expert)];
        if (stretch >= stretches(one.down.depth)) return;
        const int place = place_of_expert(slot.expert, of_gate_up);
        const auto [begin, end] = activated(one.gate_up, slot.adapter, l, place, s, one.down.depth, stretch);
        arrange_taken(one.down, x_ + s * deepest_ * size_, s, begin, end);
    }

    // h += N(the sum of what the row's experts give, each by its share)
    void add_experts(const DecodeLayer& layer, int64_t l, int64_t i) const {
        const int64_t taken = layer.mixture.taken();
        float* sum = nullptr;
        for (int64_t k = 0; k < taken; ++k) {
            const int64_t s = taken_at_[static_cast<size_t>(i * taken + k)];
            const Slot& slot = slot_of(s);
            const Products& down = layer.mixture.experts[static_cast<size_t>(slot.expert)].down;
            const int place = place_of_expert(slot.expert, of_down);
            float* const y = finish(down, slot.adapter, l, place, s, 0, s_.width);
            const float share = shares_[static_cast<size_t>(i * taken + k)];
            for (int64_t c = 0; c < s_.width; ++c) y[c] = share * y[c] + (sum ? sum[c] : 0.0f);
            sum = y;
        }
        if (layer.after_mlp.there) kernels_.norm_in_place(layer.after_mlp, sum, s_.width);
        kernels_.add(h_ + i * s_.width, sum, s_.width);
    }

    void last(int64_t i) const {
        normalize(d_.last_norm, i);
        arrange(d_.head, i, 0, d_.head.depth);
    }

    void logits(int64_t item) const {
        const int64_t strips = all_strips(d_.head), each = strips_of_item(d_.head), first = item * each;
        const int64_t end = std::min(strips, first + each);
        strips_of_item(d_.head, groups_, item, logits_, s_.vocabulary);
        const int64_t begin = first * kStrip, columns = std::min(end * kStrip, s_.vocabulary) - begin;
        for (int64_t i = 0; i < count_; ++i) {
            float* const z = logits_ + i * s_.vocabulary + begin;
            if (d_.head.bias) kernels_.add(z, d_.head.bias + begin, columns);
            if (s_.logit_factor == 1.0f && s_.logit_cap == 0.0f) continue;
            for (int64_t c = 0; c < columns; ++c) z[c] *= s_.logit_factor;
            if (s_.logit_cap == 0.0f) continue;
            for (int64_t c = 0; c < columns; ++c) z[c] /= s_.logit_cap;
            d_.tier_.rows->tanh(z, columns, z);
            for (int64_t c = 0; c < columns; ++c) z[c] *= s_.logit_cap;
        }
    }

    Decoder& d_;
    const DecoderShape& s_;
    const std::vector<DecodeRow>& rows_;
    const std::vector<Angles>& angles_;
    float* const logits_;
    const int64_t threads_, count_;
    const FewKernels& few_;
    const DecodeKernels& kernels_;
    const CacheKernels& cache_;
    const int64_t size_;
    Groups groups_;
    std::vector<std::pair<int, Group>> adapted_;
    std::vector<int64_t> items_;
    int64_t chunks_ = 1, deepest_ = 0, widest_ = 0, most_rank_ = 1, most_taken_ = 1;

    // Of the mixture at hand: all pairs of row and expert in the order of the experts, what each counts by row, where
    // each is, and the groups of them.
    std::vector<Take> takes_;
    std::vector<float> shares_, scores_, wanted_;
    std::vector<bool> gone_;
    std::vector<int64_t> taken_at_;
    std::vector<size_t> slot_of_taken_;
    std::vector<Slot> slots_;

    float *h_, *sums_, *finished_, *u_, *q_, *partial_;
    char *x_, *codes_, *bytes_, *adapters_;
};

Decoder::Decoder(const Tier& tier, const DecoderShape& shape) : tier_(tier), shape_(shape) {}

int64_t Decoder::page_bytes() const {
    const int64_t bytes = tier_.rows->cache[shape_.cache].bytes, head = 2 * shape_.size * kPage * bytes;
    return static_cast<int64_t>(layers.size()) * shape_.kv_heads * (head + (bytes == 1 ? 2 * kPage * 4 : 0));
}

void Decoder::step(const std::vector<DecodeRow>& rows, const std::vector<Angles>& angles, float* logits, int threads) {
    DecodeStep step(*this, rows, angles, logits, threads);
    if (!profiles) return step.run(threads);
    const size_t of_layers = layers.size() * kPhases, phases = of_layers + 3;
    const std::unique_ptr<PhaseTime[]> taken(new PhaseTime[phases]);
    step.run(threads, taken.get());
    for (size_t i = 0; i < phases; ++i) {
        const size_t kind = i == 0 ? 0 : i <= of_layers ? 1 + (i - 1) % kPhases : i - of_layers + kPhases;
        times[kind].working += taken[i].working;
        times[kind].waiting += taken[i].waiting;
    }
}

}  // namespace halfbyte
