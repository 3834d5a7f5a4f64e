// The loops around a tier's kernels. A task of the forward is a chunk of the queries of all heads that share keys; it
// goes through the keys tile by tile with a running softmax. A task of the backward is a span: queries and keys that
// no range connects with others, as the segments of a packed row are; it holds the gradients of its keys and of one
// head's queries in fp32. There, tiles are transposed, keys by queries, so that every left factor lies in rows. Where
// there are few spans, the keys of long ones are cut into pieces, and what each adds to the gradients of queries is
// summed in a second round.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kChunkRows = 384;  // rows of a chunk of the forward, all heads together
constexpr int64_t kPanelLanes = 16;  // panels take whole multiples of so many lanes
constexpr int64_t kMaxRows = 64;     // at least a tier's `tile_rows`
constexpr int64_t kFewSpans = 16;    // below so many, spans are cut
constexpr int64_t kMostPieces = 4;   // into so many at most, since each takes memory for gradients of queries,
constexpr int64_t kPiece = 576;      // and not below so many keys

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t rounded(int64_t n, int64_t size) { return parts(n, size) * size; }

// Memory that is kept for the thread's next task. What it holds does not outlive a growth.
class Buffer {
  public:
    float* floats(int64_t n) {
        if (n > size_) {
            std::free(data_);
            size_ = rounded(n, 1024);
            data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(size_) * sizeof(float)));
        }
        return data_;
    }
    ~Buffer() { std::free(data_); }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

// A range of queries and one of keys.
struct Span {
    int64_t batch, kv_head, first_query, last_query, first_key, last_key;
    float* query_sums;  // of a piece: what it adds to the gradients of queries, [group, queries, strips * kStrip]

    int64_t queries() const { return last_query - first_query; }
    int64_t keys() const { return last_key - first_key; }
    int64_t area() const { return queries() * keys(); }
};

// A span whose keys were cut, and which of the tasks are its pieces.
struct Whole {
    Span span;
    size_t first, last;
};

// What there is to do backward.
struct Plan {
    std::vector<Span> spans, tasks;
    std::vector<Whole> wholes;
    std::vector<size_t> order;  // of the tasks
};

// The keys that some rows have among them; empty: begin > end.
struct Reach {
    int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;

    void add(int64_t first, int64_t last) {
        if (first >= last) return;
        begin = std::min(begin, first);
        end = std::max(end, last);
    }
    bool meets(int64_t first, int64_t last) const { return begin < last && first < end; }
};

// What forward and backward share: sizes, addresses, and how rows become left factors.
class Pass {
  public:
    Pass(const Tier& tier, const Attention& arguments)
        : a_(arguments),
          m_(*tier.matmul(a_.type)),
          of_lanes_(m_.pairs ? m_ : *tier.matmul(Type::fp32)),
          k_(*tier.attention(a_.type, m_.pairs)),
          group_(a_.heads / a_.kv_heads),
          bytes_(a_.type == Type::fp32 ? 4 : 2),
          element_(m_.pairs ? 2 : 4),
          strips_(parts(a_.size, kStrip)),
          lanes_(lanes(a_.size)) {}

  protected:
    int64_t lanes(int64_t depth) const { return m_.pairs ? (depth + 1) / 2 : depth; }
    int64_t panel_floats(int64_t depth) const { return rounded(lanes(depth), kPanelLanes) * kStrip; }
    int64_t strip_columns(int64_t strip) const { return std::min(kStrip, a_.size - strip * kStrip); }

    char* at(const Heads& x, int64_t batch, int64_t head, int64_t row) const {
        return static_cast<char*>(x.values) + (batch * x.batch + head * x.head + row * x.row) * bytes_;
    }

    // One head as a matrix.
    Dense dense(const Heads& x, int64_t batch, int64_t head, int64_t rows) const {
        return {at(x, batch, head, 0), a_.type, rows, a_.size, x.row};
    }

    const int32_t* range(int64_t batch, int64_t query) const { return a_.ranges + (batch * a_.queries + query) * 2; }

    Reach reach(int64_t batch, int64_t first, int64_t last) const {
        Reach all;
        for (int64_t query = first; query < last; ++query) {
            all.add(range(batch, query)[0], range(batch, query)[1]);
        }
        return all;
    }

    int64_t copied_bytes() const { return lanes_ * 4; }  // of a row that was copied as lanes

    // Copy rows as lanes, an odd end padded with zero. Up to 60 bytes more are written. Where rows could be read as
    // they lie, that was no faster.
    void copy(const Heads& x, int64_t batch, int64_t head, int64_t row, int64_t rows, char* to) const {
        for (int64_t r = 0; r < rows; ++r, to += copied_bytes()) {
            const char* from = at(x, batch, head, row + r);
            if (m_.pairs) {
                std::memset(to + copied_bytes() - 4, 0, 4);
                std::memcpy(to, from, static_cast<size_t>(a_.size) * 2);
            } else {
                m_.widen(from, a_.size, reinterpret_cast<float*>(to));
            }
        }
    }

    // Write a row of fp32 sums, whose strips are `apart` floats from each other.
    void finish(const float* sums, int64_t apart, char* out) const {
        alignas(64) static const float zero[kStrip] = {};
        for (int64_t strip = 0; strip < strips_; ++strip) {
            m_.finish(sums + strip * apart, zero, strip_columns(strip), out + strip * kStrip * bytes_);
        }
    }

    const Attention& a_;
    const MatmulKernels& m_;
    const MatmulKernels& of_lanes_;  // as m_, but panels of p and ds keep their values
    const AttentionKernels& k_;
    const int64_t group_, bytes_, element_, strips_, lanes_;
};

class Forward : Pass {
  public:
    using Pass::Pass;

    void run(int threads) const {
        const int64_t chunk = rounded(std::max(kChunkRows / group_, int64_t{1}), m_.tile_rows);
        const int64_t chunks = parts(a_.queries, chunk);
        parallel_for(a_.batches * a_.kv_heads * chunks, 1, threads, [&](int64_t first, int64_t last) {
            const Multiplying unit(m_);
            for (int64_t task = first; task < last; ++task) {
                // the last queries first: they tend to have the most keys
                const int64_t head = task / chunks, query = (chunks - 1 - task % chunks) * chunk;
                part(head / a_.kv_heads, head % a_.kv_heads, query, std::min(query + chunk, a_.queries));
            }
        });
    }

  private:
    // The queries [first, last) of the heads of one key/value head.
    void part(int64_t batch, int64_t kv_head, int64_t first, int64_t last) const {
        static thread_local Buffer panels, sums, copies, statistics;
        const int64_t rows = last - first, head_rows = strips_ * rows;
        const Reach reached = reach(batch, first, last);
        float* const key_panel = panels.floats(panel_floats(a_.size) + strips_ * panel_floats(kStrip));
        float* const value_panel = key_panel + panel_floats(a_.size);
        float* const out = sums.floats(group_ * head_rows * kStrip);
        float* const maximum = statistics.floats(2 * group_ * rows);
        float* const total = maximum + group_ * rows;
        char* const q = reinterpret_cast<char*>(copies.floats(group_ * rows * lanes_ + kPanelLanes));
        for (int64_t h = 0; h < group_; ++h) {
            copy(a_.q, batch, kv_head * group_ + h, first, rows, q + h * rows * copied_bytes());
        }
        std::fill(out, out + group_ * head_rows * kStrip, 0.0f);
        std::fill(maximum, total, -std::numeric_limits<float>::infinity());
        std::fill(total, total + group_ * rows, 0.0f);

        const Dense keys = dense(a_.k, batch, kv_head, a_.keys), values = dense(a_.v, batch, kv_head, a_.keys);
        // Of a window that slides, tiles begin where they would with other queries before: a text that is read in
        // pieces has the sums of one that is read at once.
        const bool slides = range(batch, last - 1)[0] - range(batch, first)[0] == last - first - 1;
        const int64_t begin = slides ? reached.begin / kStrip * kStrip : reached.begin;
        for (int64_t key = begin; key < reached.end; key += kStrip) {
            const int64_t end = std::min(key + kStrip, reached.end);
            bool laid_out = false;
            for (int64_t row = 0; row < rows; row += m_.tile_rows) {
                const int64_t count = std::min(m_.tile_rows, rows - row);
                if (!reach(batch, first + row, first + row + count).meets(key, end)) continue;
                if (!laid_out) {
                    m_.dense_forward(keys, key, 0, a_.size, key_panel);
                    for (int64_t strip = 0; strip < strips_; ++strip) {
                        m_.dense_gradient(values, strip * kStrip, key, end, value_panel + strip * panel_floats(kStrip));
                    }
                    laid_out = true;
                }
                for (int64_t h = 0; h < group_; ++h) {
                    tile(batch, first + row, count, key, end, q + (h * rows + row) * copied_bytes(), key_panel,
                         value_panel, maximum + h * rows + row, total + h * rows + row,
                         out + (h * head_rows + row) * kStrip, rows);
                }
            }
        }
        for (int64_t h = 0; h < group_; ++h) {
            const int64_t head = kv_head * group_ + h;
            for (int64_t row = 0; row < rows; ++row) {
                const float sum = total[h * rows + row];
                float* const at_row = out + (h * head_rows + row) * kStrip;
                if (sum != 0) {
                    for (int64_t strip = 0; strip < strips_; ++strip) {
                        k_.shrink(at_row + strip * rows * kStrip, 1 / sum);
                    }
                }
                finish(at_row, rows * kStrip, at(a_.out, batch, head, first + row));
                a_.lse[(batch * a_.heads + head) * a_.queries + first + row] = maximum[h * rows + row] + std::log(sum);
            }
        }
    }

    // `count` rows x of one head by the keys [key, end).
    void tile(int64_t batch, int64_t query, int64_t count, int64_t key, int64_t end, const void* q,
              const float* key_panel, const float* value_panel, float* maximum, float* total, float* out,
              int64_t out_rows) const {
        alignas(64) float logits[kMaxRows * kStrip];
        alignas(64) float weights[kMaxRows * kStrip];
        m_.multiply(q, copied_bytes(), count, key_panel, lanes_, end - key, logits, false);
        const int64_t weight_bytes = kStrip * element_;
        for (int64_t r = 0; r < count; ++r) {
            const int32_t* bounds = range(batch, query + r);
            const int64_t from = std::max<int64_t>(bounds[0] - key, 0), to = std::min<int64_t>(bounds[1], end) - key;
            char* const p = reinterpret_cast<char*>(weights) + r * weight_bytes;
            if (from >= to) {
                std::memset(p, 0, static_cast<size_t>(weight_bytes));
                continue;
            }
            const float factor = k_.weigh(logits + r * kStrip, from, to, a_.scale, a_.cap, maximum + r, total + r, p);
            if (factor == 1) continue;
            for (int64_t strip = 0; strip < strips_; ++strip) k_.shrink(out + (strip * out_rows + r) * kStrip, factor);
        }
        for (int64_t strip = 0; strip < strips_; ++strip) {
            m_.multiply(weights, weight_bytes, count, value_panel + strip * panel_floats(kStrip), lanes(end - key),
                        strip_columns(strip), out + strip * out_rows * kStrip, true);
        }
    }
};

class Backward : Pass {
  public:
    using Pass::Pass;

    void run(int threads) const {
        Plan plan;
        for (int64_t batch = 0; batch < a_.batches; ++batch) find_spans(batch, plan.spans);
        if (plan.spans.empty()) return;
        const int64_t pieces = std::min(kMostPieces, parts(kFewSpans, static_cast<int64_t>(plan.spans.size())));
        int64_t sums = 0;
        for (const Span& span : plan.spans) sums += cut(span, pieces, plan);
        Buffer query_sums;  // not kept, since it may be large
        float* next = query_sums.floats(sums);
        for (const Whole& whole : plan.wholes) {
            for (size_t i = whole.first; i < whole.last; ++i) {
                plan.tasks[i].query_sums = next;
                next += head_sums(plan.tasks[i]) * group_;
            }
        }
        std::vector<size_t>& order = plan.order;  // the largest first
        for (size_t i = 0; i < plan.tasks.size(); ++i) order.push_back(i);
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return plan.tasks[a].area() > plan.tasks[b].area(); });
        parallel_for(static_cast<int64_t>(order.size()), 1, threads, [&](int64_t first, int64_t last) {
            const Multiplying unit(m_);
            for (int64_t i = first; i < last; ++i) part(plan.tasks[order[static_cast<size_t>(i)]]);
        });
        for (const Whole& whole : plan.wholes) {
            const int64_t blocks = parts(whole.span.queries(), kStrip);
            parallel_for(group_ * blocks, 1, threads, [&](int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) add_pieces(whole, plan.tasks, i / blocks, i % blocks * kStrip);
            });
        }
    }

  private:
    // Cut one batch where no range crosses; together the spans cover all queries and keys.
    void find_spans(int64_t batch, std::vector<Span>& spans) const {
        const size_t first = spans.size();
        for (int64_t query = 0; query < a_.queries; ++query) {
            const int64_t begin = range(batch, query)[0], end = range(batch, query)[1];
            if (begin >= end) continue;
            if (spans.size() == first || begin >= spans.back().last_key) {
                spans.push_back({batch, 0, query, query + 1, begin, end, nullptr});
                continue;
            }
            spans.back().last_query = query + 1;
            spans.back().last_key = std::max(spans.back().last_key, end);
            spans.back().first_key = std::min(spans.back().first_key, begin);
            while (spans.size() - first > 1 && spans.back().first_key < spans[spans.size() - 2].last_key) {
                const Span span = spans.back();
                spans.pop_back();
                spans.back().last_query = span.last_query;
                spans.back().first_key = std::min(spans.back().first_key, span.first_key);
                spans.back().last_key = std::max(spans.back().last_key, span.last_key);
            }
        }
        if (spans.size() == first) spans.push_back({batch, 0, 0, a_.queries, 0, a_.keys, nullptr});
        spans[first].first_query = spans[first].first_key = 0;
        for (size_t i = first; i + 1 < spans.size(); ++i) {
            spans[i].last_query = spans[i + 1].first_query;
            spans[i].last_key = spans[i + 1].first_key;
        }
        spans.back().last_query = a_.queries;
        spans.back().last_key = a_.keys;
        const size_t last = spans.size();
        for (int64_t kv_head = 1; kv_head < a_.kv_heads; ++kv_head) {
            for (size_t i = first; i < last; ++i) {
                spans.push_back(spans[i]);
                spans.back().kv_head = kv_head;
            }
        }
    }

    // Make tasks of a span: itself, or pieces of its keys, each with the queries that reach it.
    // Returns how many floats the pieces' gradients of queries take.
    int64_t cut(const Span& span, int64_t most, Plan& plan) const {
        const int64_t pieces = std::min(most, parts(span.keys(), kPiece));
        if (pieces < 2) {
            plan.tasks.push_back(span);
            return 0;
        }
        const size_t first = plan.tasks.size();
        const int64_t size = rounded(parts(span.keys(), pieces), kKeyTile);
        int64_t floats = 0;
        for (int64_t key = span.first_key; key < span.last_key; key += size) {
            Span piece = span;
            piece.first_key = key;
            piece.last_key = std::min(key + size, span.last_key);
            const auto reaches = [&](int64_t query) {
                const int32_t* bounds = range(span.batch, query);
                return bounds[0] < bounds[1] && bounds[0] < piece.last_key && bounds[1] > piece.first_key;
            };
            while (piece.queries() > 0 && !reaches(piece.first_query)) ++piece.first_query;
            while (piece.queries() > 0 && !reaches(piece.last_query - 1)) --piece.last_query;
            floats += head_sums(piece) * group_;
            plan.tasks.push_back(piece);
        }
        plan.wholes.push_back({span, first, plan.tasks.size()});
        return floats;
    }

    int64_t head_sums(const Span& piece) const { return piece.queries() * strips_ * kStrip; }

    // The gradients of up to kStrip queries of a span from those of its pieces.
    void add_pieces(const Whole& whole, const std::vector<Span>& tasks, int64_t h, int64_t from) const {
        alignas(64) float row[kLanes];
        const int64_t first = whole.span.first_query + from, width = strips_ * kStrip;
        for (int64_t query = first; query < std::min(first + kStrip, whole.span.last_query); ++query) {
            std::fill(row, row + width, 0.0f);
            for (size_t i = whole.first; i < whole.last; ++i) {
                const Span& piece = tasks[i];
                if (query < piece.first_query || query >= piece.last_query) continue;
                const float* sums = piece.query_sums + h * head_sums(piece) + (query - piece.first_query) * width;
                for (int64_t j = 0; j < width; ++j) row[j] += sums[j];
            }
            finish(row, kStrip, at(a_.dq, whole.span.batch, whole.span.kv_head * group_ + h, query));
        }
    }

    // A left factor: rows `stride` bytes apart.
    struct Rows {
        char* values;
        int64_t stride;
        const char* at(int64_t row) const { return values + row * stride; }
    };

    // One head's queries of a span as panels, a strip of queries each: of (d)out and q, either transposed to stand on
    // the right of k and v (forward), or as they lie, to stand on the right of p and ds (gradient).
    struct Panels {
        float *q_forward, *dout_forward, *q_gradient, *dout_gradient;
    };

    // What the rows of a tile need to know of its kStrip queries.
    struct Queries {
        float begin[kStrip], end[kStrip], lse[kStrip], d[kStrip];
        Reach reach;
    };

    void part(const Span& span) const {
        static thread_local Buffer panel_buffer, sums, left, column_buffer;
        const int64_t queries = span.queries(), keys = span.keys();
        const int64_t tiles = parts(queries, kStrip), even_keys = rounded(keys, 2);
        const int64_t forward = panel_floats(a_.size), gradient = strips_ * panel_floats(kStrip);
        const int64_t key_sums = strips_ * keys * kStrip, query_sums = a_.size * kStrip;

        float* const key_gradient = sums.floats(2 * key_sums + tiles * query_sums);
        float* const value_gradient = key_gradient + key_sums;
        float* const query_gradient = value_gradient + key_sums;
        std::fill(key_gradient, query_gradient, 0.0f);

        float* const q_forward = panel_buffer.floats(2 * tiles * (forward + gradient) + strips_ * kStrip);
        float* const dout_forward = q_forward + tiles * forward;
        float* const q_gradient = dout_forward + tiles * forward;
        float* const dout_gradient = q_gradient + tiles * gradient;

        const int64_t copied = keys * lanes_ + kPanelLanes;
        float* const transposed = left.floats(a_.size * even_keys + 2 * copied);
        const Rows k{reinterpret_cast<char*>(transposed + a_.size * even_keys), copied_bytes()};
        const Rows v{k.values + copied * 4, copied_bytes()};
        copy(a_.k, span.batch, span.kv_head, span.first_key, keys, k.values);
        copy(a_.v, span.batch, span.kv_head, span.first_key, keys, v.values);
        if (m_.pairs) {
            transpose<uint16_t>(k, keys, even_keys, transposed);
        } else {
            transpose<uint32_t>(k, keys, even_keys, transposed);
        }
        const Rows k_transposed{reinterpret_cast<char*>(transposed), even_keys * element_};

        Queries* const columns = reinterpret_cast<Queries*>(
            column_buffer.floats(tiles * static_cast<int64_t>(sizeof(Queries) / sizeof(float))));
        for (int64_t h = 0; h < group_; ++h) {
            const int64_t head = span.kv_head * group_ + h;
            std::fill(query_gradient, query_gradient + tiles * query_sums, 0.0f);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = span.first_query + tile * kStrip;
                const int64_t last = std::min(first + kStrip, span.last_query);
                columns[tile] = read(span.batch, head, first, last);
                lay_out(a_.q, span.batch, head, first, last, q_forward + tile * forward, q_gradient + tile * gradient);
                lay_out(a_.dout, span.batch, head, first, last, dout_forward + tile * forward,
                        dout_gradient + tile * gradient);
            }
            for (int64_t key = 0; key < keys; key += kKeyTile) {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const Reach& reached = columns[tile].reach;
                    int64_t first = std::max(reached.begin - span.first_key, key);
                    const int64_t last = std::min({reached.end - span.first_key, key + kKeyTile, keys});
                    if (first >= last) continue;
                    first -= first % 2;  // at a whole lane
                    const Panels panels{q_forward + tile * forward, dout_forward + tile * forward,
                                        q_gradient + tile * gradient, dout_gradient + tile * gradient};
                    const int64_t count = std::min(kStrip, queries - tile * kStrip);
                    multiply_tile(span, first, last, count, k, v, k_transposed, panels, columns[tile], key_gradient,
                                  value_gradient, query_gradient + tile * query_sums, keys);
                }
            }
            for (int64_t tile = 0; tile < tiles; ++tile) {
                write_queries(span, h, tile * kStrip, std::min(kStrip, queries - tile * kStrip),
                              query_gradient + tile * query_sums);
            }
        }
        for (int64_t key = 0; key < keys; ++key) {
            finish(key_gradient + key * kStrip, keys * kStrip,
                   at(a_.dk, span.batch, span.kv_head, span.first_key + key));
            finish(value_gradient + key * kStrip, keys * kStrip,
                   at(a_.dv, span.batch, span.kv_head, span.first_key + key));
        }
    }

    // The keys [first, last) of the span by a tile of `queries` queries.
    void multiply_tile(const Span& span, int64_t first, int64_t last, int64_t queries, const Rows& k, const Rows& v,
                       const Rows& k_transposed, const Panels& panels, const Queries& columns, float* key_gradient,
                       float* value_gradient, float* query_gradient, int64_t keys) const {
        alignas(64) float logits[kMaxRows * kStrip], dp[kMaxRows * kStrip];
        alignas(64) float p[kKeyTile * kStrip], ds[kKeyTile * kStrip];
        alignas(64) float panel[kKeyTile * kStrip];
        const int64_t row_bytes = kStrip * element_;
        for (int64_t key = first; key < last; key += m_.tile_rows) {
            const int64_t count = std::min(m_.tile_rows, last - key);
            m_.multiply(k.at(key), k.stride, count, panels.q_forward, lanes_, queries, logits, false);
            m_.multiply(v.at(key), v.stride, count, panels.dout_forward, lanes_, queries, dp, false);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t row = (key - first + r) * row_bytes;
                k_.differentiate(logits + r * kStrip, dp + r * kStrip, static_cast<float>(span.first_key + key + r),
                                 columns.begin, columns.end, columns.lse, columns.d, a_.scale, a_.cap,
                                 reinterpret_cast<char*>(p) + row, reinterpret_cast<char*>(ds) + row);
            }
            for (int64_t strip = 0; strip < strips_; ++strip) {
                const int64_t row = (strip * keys + key) * kStrip, at_panel = strip * panel_floats(kStrip);
                const int64_t from = (key - first) * row_bytes;
                m_.multiply(reinterpret_cast<char*>(p) + from, row_bytes, count, panels.dout_gradient + at_panel,
                            lanes(queries), strip_columns(strip), value_gradient + row, true);
                m_.multiply(reinterpret_cast<char*>(ds) + from, row_bytes, count, panels.q_gradient + at_panel,
                            lanes(queries), strip_columns(strip), key_gradient + row, true);
            }
        }
        const Dense rows{ds, m_.pairs ? Type::bf16 : Type::fp32, last - first, kStrip, kStrip};
        of_lanes_.dense_gradient(rows, 0, 0, last - first, panel);
        for (int64_t i = 0; i < a_.size; i += m_.tile_rows) {
            m_.multiply(k_transposed.at(i) + first * element_, k_transposed.stride, std::min(m_.tile_rows, a_.size - i),
                        panel, lanes(last - first), queries, query_gradient + i * kStrip, true);
        }
    }

    Queries read(int64_t batch, int64_t head, int64_t first, int64_t last) const {
        Queries columns{};
        columns.reach = reach(batch, first, last);
        for (int64_t query = first; query < last; ++query) {
            const int64_t i = query - first;
            columns.begin[i] = static_cast<float>(range(batch, query)[0]);
            columns.end[i] = static_cast<float>(range(batch, query)[1]);
            columns.lse[i] = a_.lse[(batch * a_.heads + head) * a_.queries + query];
            columns.d[i] = k_.dot(at(a_.dout, batch, head, query), at(a_.out, batch, head, query), a_.size);
        }
        return columns;
    }

    void lay_out(const Heads& x, int64_t batch, int64_t head, int64_t first, int64_t last, float* forward,
                 float* gradient) const {
        const Dense rows = dense(x, batch, head, a_.queries);
        m_.dense_forward(rows, first, 0, a_.size, forward);
        for (int64_t strip = 0; strip < strips_; ++strip) {
            m_.dense_gradient(rows, strip * kStrip, first, last, gradient + strip * panel_floats(kStrip));
        }
    }

    // Rows of a left factor to columns; what pads an odd count is zero.
    template <class Element>
    void transpose(const Rows& x, int64_t rows, int64_t padded, void* out) const {
        Element* const to = static_cast<Element*>(out);
        for (int64_t i = 0; i < a_.size; ++i) to[(i + 1) * padded - 1] = 0;
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < a_.size; ++i) to[i * padded + row] = load<Element>(x.at(row), i);
        }
    }

    // The gradient of some queries of a span lies in columns.
    void write_queries(const Span& span, int64_t h, int64_t from, int64_t count, const float* columns) const {
        alignas(64) float values[kLanes];
        const int64_t width = strips_ * kStrip;
        for (int64_t i = 0; i < count; ++i) {
            float* const row = span.query_sums ? span.query_sums + h * head_sums(span) + (from + i) * width : values;
            for (int64_t j = 0; j < a_.size; ++j) row[j] = columns[j * kStrip + i];
            if (span.query_sums) continue;
            finish(row, kStrip, at(a_.dq, span.batch, span.kv_head * group_ + h, span.first_query + from + i));
        }
    }
};

}  // namespace

void attention_forward(const Tier& tier, const Attention& arguments, int threads) {
    Forward(tier, arguments).run(threads);
}

void attention_backward(const Tier& tier, const Attention& arguments, int threads) {
    Backward(tier, arguments).run(threads);
}

}  // namespace halfbyte
