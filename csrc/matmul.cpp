// The loops around a tier's kernels: strips of columns by chunks of rows are handed out to the threads, and each goes
// through the depth panel by panel.

#include "matmul.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kSmallChunk = 48;  // rows that share a panel, at least, while threads have too little to do
constexpr int64_t kFewStrip = 16;    // columns at a time where there are few rows and no panel
constexpr int64_t kGrain = 1 << 16;  // values of the right factors for one thread at a time, at least
constexpr int64_t kPanels = 4;       // terms whose panels are in cache together, at most
constexpr int64_t kExtraLanes = 64;  // that further terms may add to a full panel
constexpr int64_t kMostTileRows = 32;
constexpr int64_t kTiledRows = 256;   // of packed x, that are multiplied with several panels in turn
constexpr int64_t kStretch = 256;     // of the depth, that several panels are filled with in turn
constexpr int64_t kCached = 1 << 20;  // bytes of packed x that stay in cache while strips are done one by one

// What a thread works in, kept for its next call.
struct Scratch {
    alignas(64) float panels[kPanels][kLanes * kStrip];
    alignas(64) float sums[kPanels * kChunk * kStrip];
    alignas(64) float x[kMostTileRows][kLanes + 16];
    alignas(64) float bias[kStrip + 16];
};

Scratch& scratch() {
    static thread_local const std::unique_ptr<Scratch> mine(new Scratch);  // pages that nobody writes to are not there
    return *mine;
}

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A panel's share of a term: `first` to `last` of its depth.
struct Piece {
    const Term* term;
    int64_t first, last, lanes;
};

int64_t size_of(Type type) { return type == Type::fp32 ? 4 : 2; }

const void* at(const void* x, int64_t bytes) { return static_cast<const char*>(x) + bytes; }
void* at(void* y, int64_t bytes) { return static_cast<char*>(y) + bytes; }

class Product {
  public:
    Product(const Matmul& arguments, int threads)
        : a_(arguments),
          k_(*a_.kernels),
          per_lane_(k_.pairs ? 2 : 1),
          size_(size_of(a_.type)),
          y_size_(size_of(a_.y_type)),
          few_(!a_.as_many && a_.rows <= k_.few->rows && dots(*a_.terms)),
          tiled_(k_.pack && !few_ && a_.width > kStrip && depth() > 0),
          strip_(few_ && a_.count == 1 ? kFewStrip
                 : tiled_              ? kStrip * panels_at_once()
                                       : kStrip),
          strips_(parts(a_.width, strip_)) {
        const int64_t wanted = std::min(parts(a_.rows, kSmallChunk), parts(4 * threads, strips_));
        const int64_t chunks = std::max(parts(a_.rows, kChunk), few_ ? 1 : wanted);
        chunk_ = parts(parts(a_.rows, chunks), k_.tile_rows) * k_.tile_rows;
    }

    int64_t tasks() const { return strips_ * parts(a_.rows, chunk_); }

    // Values of the right factors that a task reads.
    int64_t values() const { return strip_ * depth(); }

    void run(int64_t task) const {
        const int64_t row = task / strips_ * chunk_, column = task % strips_ * strip_;
        const int64_t end = std::min(row + chunk_, a_.rows), columns = std::min(strip_, a_.width - column);
        tiled_ ? tiled_part(row, end, column, columns) : part(row, end, column, columns);
    }

    bool few() const { return few_; }

    // What is to be packed before: so many times up to kTile rows, or the few there are.
    int64_t packings() const { return few_ ? 1 : tiled_ ? parts(a_.rows, kTile) : 0; }
    int64_t packed_bytes() const {
        if (few_) return a_.rows * parts(a_.terms->depth() * k_.few->bytes, kStretchBytes) * kArrangedBytes;
        int64_t bytes = 0;
        for (int i = 0; i < a_.count; ++i) bytes += packings() * packed_row(a_.terms[i]);
        return bytes;
    }
    void pack_to(char* tiles) { tiles_ = tiles; }

    void pack(int64_t packing) const {
        if (few_) {
            const auto arrange = a_.terms->weight ? k_.few->arrange : k_.few->arrange_bytes;
            return arrange(a_.terms->x, a_.rows, a_.terms->depth(), tiles_);
        }
        const int64_t row = packing * kTile, rows = std::min(kTile, a_.rows - row);
        char* tiles = tiles_;
        for (const Term* term = a_.terms; term < a_.terms + a_.count; ++term) {
            const int64_t stride = term->stride * size_;
            k_.pack(at(term->x, row * stride), stride, rows, term->depth(), tiles + packing * packed_row(*term));
            tiles += packings() * packed_row(*term);
        }
    }

  private:
    // Whether `dot` can take this term.
    bool dots(const Term& term) const {
        const bool without_gaps = a_.rows == 1 || term.stride == term.depth();
        const bool in_pieces = term.weight ? term.weight->piece >= 64 : term.bytes && term.bytes->piece;
        return in_pieces && !term.gradient && term.depth() > 0 && without_gaps;
    }

    int64_t depth() const {
        int64_t depth = 0;
        for (int i = 0; i < a_.count; ++i) depth += a_.terms[i].depth();
        return depth;
    }

    // The bytes of kTile rows of x in tiles.
    static int64_t packed_row(const Term& term) { return parts(term.depth(), 2 * kTile) * kTileBytes; }

    // One, or, where x does not stay in the second cache from strip to strip, up to kPanels, so that a tile of it is
    // fetched once for all of them.
    int64_t panels_at_once() const {
        if (std::min(a_.rows, kChunk) * depth() * size_ <= kCached) return 1;
        const int64_t strips = parts(a_.width, kStrip);
        return parts(strips, parts(strips, kPanels));
    }

    // The rows [begin, end), packed, of the columns [column, column + columns), up to kPanels strips.
    void tiled_part(int64_t begin, int64_t end, int64_t column, int64_t columns) const {
        Scratch& s = scratch();
        const Multiplying unit(k_);
        const char* tiles = tiles_;
        bool add = false;
        for (const Term* term = a_.terms; term < a_.terms + a_.count; ++term) {
            const int64_t depth = term->depth(), stride = packed_row(*term);
            for (int64_t first = 0; first < depth; first += 2 * kLanes, add = true) {
                const int64_t last = std::min(first + 2 * kLanes, depth);
                for (int64_t from = first; from < last; from += kStretch) {
                    const Piece piece{term, from, std::min(from + kStretch, last), 0};
                    for (int64_t c = 0; c < columns; c += kStrip) {
                        float* const panel = s.panels[c / kStrip] + (from - first) / 2 * kStrip;
                        fill(piece, column + c, std::min(kStrip, columns - c), panel);
                    }
                }
                for (int64_t row = begin; row < end; row += kTiledRows) {
                    const char* const x = tiles + row / kTile * stride + first / (2 * kTile) * kTileBytes;
                    for (int64_t c = 0; c < columns; c += kStrip) {
                        k_.multiply_packed(x, stride, std::min(kTiledRows, end - row), s.panels[c / kStrip],
                                           parts(last - first, 2), std::min(kStrip, columns - c),
                                           s.sums + c * kChunk + (row - begin) * kStrip, add);
                    }
                }
            }
            tiles += packings() * stride;
        }
        for (int64_t c = 0; c < columns; c += kStrip) {
            const int64_t n = std::min(kStrip, columns - c);
            widen_bias(column + c, n, s);
            finish(begin, end, column + c, n, s.sums + c * kChunk, s);
        }
    }

    // The rows [begin, end) of the columns [column, column + columns).
    void part(int64_t begin, int64_t end, int64_t column, int64_t columns) const {
        Scratch& s = scratch();
        widen_bias(column, columns, s);
        Piece pieces[kPanels];
        Piece next{a_.terms, 0, 0, 0};
        bool add = false;
        if (few_) {
            a_.terms->weight ? k_.few->dot(*a_.terms->weight, column, columns, tiles_, end, s.sums)
                             : k_.few->dot_bytes(*a_.terms->bytes, column, columns, tiles_, end, s.sums);
            if (a_.count == 1) return finish(begin, end, column, columns, s.sums, s);
            ++next.term;
            add = true;
        }
        const Multiplying unit(k_);
        for (;; add = true) {
            const int count = gather(next, pieces);
            const bool whole = !add && done(next);  // all of the depth is in the panels
            for (int i = 0; i < count; ++i) fill(pieces[i], column, columns, s.panels[i]);
            for (int64_t row = begin; row < end; row += k_.tile_rows) {
                const int64_t rows = std::min(k_.tile_rows, end - row);
                float* const sums = whole ? s.sums : s.sums + (row - begin) * kStrip;
                for (int i = 0; i < count; ++i) {
                    multiply(pieces[i], row, rows, s.panels[i], columns, sums, add || i > 0, s);
                }
                if (done(next)) finish(row, row + rows, column, columns, sums, s);
            }
            if (done(next)) return;
        }
    }

    void widen_bias(int64_t column, int64_t columns, Scratch& s) const {
        std::fill(s.bias, s.bias + kStrip, 0.0f);
        if (a_.bias) a_.y_kernels->widen(at(a_.bias, column * y_size_), columns, s.bias);
    }

    bool done(const Piece& next) const { return next.term == a_.terms + a_.count; }

    // Take the next pieces, as many as have their panels in cache together; `next` says where to go on.
    int gather(Piece& next, Piece* pieces) const {
        int count = 0;
        for (int64_t lanes = 0; count < kPanels && !done(next); ++count) {
            const int64_t depth = next.term->depth();
            Piece& piece = pieces[count];
            piece = next;
            piece.last = std::min(piece.first + kLanes * per_lane_, depth);
            piece.lanes = parts(piece.last - piece.first, per_lane_);
            lanes += piece.lanes;
            if (count > 0 && lanes > kLanes + kExtraLanes) break;
            next.first = piece.last;
            if (next.first == depth) next = {next.term + 1, 0, 0, 0};
        }
        return count;
    }

    void fill(const Piece& piece, int64_t column, int64_t columns, float* panel) const {
        const Term& term = *piece.term;
        const int64_t first = piece.first, last = piece.last;
        if (term.weight) {
            (term.gradient ? k_.expand_gradient : k_.expand_forward)(*term.weight, column, first, last, panel);
        } else if (term.bytes) {
            (term.gradient ? k_.bytes_gradient : k_.bytes_forward)(*term.bytes, column, first, last, panel);
        } else {
            Dense dense = term.dense;
            (term.gradient ? dense.columns : dense.rows) = column + columns;  // no more than are wanted
            (term.gradient ? k_.dense_gradient : k_.dense_forward)(dense, column, first, last, panel);
        }
    }

    void multiply(const Piece& piece, int64_t row, int64_t rows, const float* panel, int64_t columns, float* sums,
                  bool add, Scratch& s) const {
        const Term& term = *piece.term;
        const int64_t n = piece.last - piece.first;
        const void* x = at(term.x, (row * term.stride + piece.first) * size_);
        int64_t stride = term.stride * size_;
        // x is read where it lies if its values are a lane's and no end has to be padded
        if (k_.pairs ? n % 2 : a_.type != Type::fp32) {
            copy(x, stride, rows, n, s);
            x = s.x;
            stride = sizeof s.x[0];
        }
        k_.multiply(x, stride, rows, panel, piece.lanes, columns, sums, add);
    }

    // Rows of x as lanes, an odd end padded with zero.
    void copy(const void* x, int64_t stride, int64_t rows, int64_t n, Scratch& s) const {
        for (int64_t r = 0; r < rows; ++r) {
            const void* from = at(x, r * stride);
            if (k_.pairs) {
                uint16_t* to = reinterpret_cast<uint16_t*>(s.x[r]);
                std::memcpy(to, from, static_cast<size_t>(n) * 2);
                to[n] = 0;
            } else {
                k_.widen(from, n, s.x[r]);
            }
        }
    }

    void finish(int64_t begin, int64_t end, int64_t column, int64_t columns, const float* sums, Scratch& s) const {
        for (int64_t row = begin; row < end; ++row, sums += kStrip) {
            a_.y_kernels->finish(sums, s.bias, columns, at(a_.y, (row * a_.y_stride + column) * y_size_));
        }
    }

    const Matmul& a_;
    const MatmulKernels& k_;
    const int64_t per_lane_, size_, y_size_;
    const bool few_, tiled_;
    const int64_t strip_, strips_;
    int64_t chunk_;
    char* tiles_ = nullptr;  // every x, packed; of few rows the first, arranged
};

// Hand out the tasks of all products to the threads.
void share_out(const std::vector<Product>& products, int64_t (Product::*count)() const,
               void (Product::*run)(int64_t) const, int64_t grain, int threads) {
    std::vector<int64_t> ends;  // of each product's tasks; experts are hundreds of products
    int64_t tasks = 0;
    for (const Product& product : products) ends.push_back(tasks += (product.*count)());
    parallel_for(tasks, std::max(grain, int64_t{1}), threads, [&](int64_t first, int64_t last) {
        auto end = std::upper_bound(ends.begin(), ends.end(), first);
        for (int64_t task = first; task < last; ++task) {
            while (task >= *end) ++end;
            const Product& product = products[static_cast<size_t>(end - ends.begin())];
            (product.*run)(task - *end + (product.*count)());
        }
    });
}

// The calling thread's memory for tiles, kept for its next call.
char* tile_memory(int64_t bytes) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset(new char[static_cast<size_t>(bytes) + 64]);
        size = bytes;
    }
    return memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
}

// Copies of left factors, kept for the calling thread's next call.
class Copies {
  public:
    // Replace those left factors whose rows are scattered.
    void take(Matmul* products, int count) {
        int64_t bytes = 0;
        each(products, count, [&](const Matmul& a, Term& term) { bytes += a.rows * stride(term) * size_of(a.type); });
        if (bytes > size_) {
            bytes_.reset(new char[static_cast<size_t>(bytes)]);
            size_ = bytes;
        }
        char* to = bytes_.get();
        each(products, count, [&](const Matmul& a, Term& term) {
            to += size_of(a.type) == 4 ? copy<uint32_t>(a.rows, term, to) : copy<uint16_t>(a.rows, term, to);
        });
    }

  private:
    template <class Body>
    static void each(Matmul* products, int count, const Body& body) {
        for (Matmul* a = products; a < products + count; ++a) {
            for (Term* term = a->terms; term < a->terms + a->count; ++term) {
                if (term->step != 1) body(*a, *term);
            }
        }
    }

    // Between the rows of a copy: no power of two, since such rows drive each other out of the cache.
    static int64_t stride(const Term& term) { return parts(term.depth(), 32) * 32 + 32; }

    // Returns the bytes written.
    template <class T>
    static int64_t copy(int64_t rows, Term& term, char* bytes) {
        T* const to = reinterpret_cast<T*>(bytes);
        const int64_t depth = term.depth(), apart = stride(term);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < depth; ++i) to[r * apart + i] = load<T>(term.x, i * term.step + r * term.stride);
        }
        term.x = to;
        term.stride = apart;
        term.step = 1;
        return rows * apart * static_cast<int64_t>(sizeof(T));
    }

    std::unique_ptr<char[]> bytes_;
    int64_t size_ = 0;
};

}  // namespace

void read_scales(const Weight4bit& w, int64_t first, int64_t step, int64_t count, float* out) {
    const Scales& scales = w.scales;
    const Divisor blocksize = w.blocksize, nested_blocksize = w.nested_blocksize;
    if (!scales.nested) {
        for (int64_t i = 0; i < count; ++i) out[i] = load<float>(scales.absmax, blocksize.quotient(first + i * step));
        return;
    }
    const uint8_t* const absmax = static_cast<const uint8_t*>(scales.absmax);
    const float* const code = scales.nested_code;
    const float offset = scales.offset;
    if (step != blocksize.value()) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t block = blocksize.quotient(first + i * step);
            out[i] = code[absmax[block]] * load<float>(scales.nested_absmax, nested_blocksize.quotient(block)) + offset;
        }
        return;
    }
    int64_t block = blocksize.quotient(first);
    for (float* const end = out + count; out < end;) {
        const int64_t group = nested_blocksize.quotient(block);
        const float factor = load<float>(scales.nested_absmax, group);
        const int64_t run = std::min(end - out, (group + 1) * nested_blocksize.value() - block);
        for (int64_t i = 0; i < run; ++i) out[i] = code[absmax[block + i]] * factor + offset;
        out += run;
        block += run;
    }
}

void read_scales(const Weight8bit& w, int64_t first, int64_t step, int64_t count, float* out) {
    const int64_t size = w.blocksize.value();
    int64_t block = w.blocksize.quotient(first), left = (block + 1) * size - first;  // of the block, in values
    if (size == 2 * step && left == size && count % 2 == 0) {                        // blocks of 64 by pieces of 32
        for (int64_t i = 0; i < count; i += 2, ++block) out[i] = out[i + 1] = load<float>(w.absmax, block) / 127.0f;
        return;
    }
    for (int64_t i = 0; i < count; ++block, left += size) {
        const float scale = load<float>(w.absmax, block) / 127.0f;
        for (; left > 0 && i < count; left -= step) out[i++] = scale;
    }
}

void matmul(Matmul* products, int count, int threads) {
    static thread_local Copies copies;
    copies.take(products, count);
    std::vector<Product> works;
    int64_t tasks = 0, values = 0, packings = 0, bytes = 0;
    for (int i = 0; i < count; ++i) {
        if (products[i].rows == 0 || products[i].width == 0) continue;
        const Product& work = works.emplace_back(products[i], threads);
        tasks += work.tasks();
        values += work.tasks() * work.values();
        packings += work.packings();
        bytes += work.packed_bytes();
    }
    if (packings > 0) {
        char* tiles = tile_memory(bytes);
        for (Product& work : works) {
            work.pack_to(tiles);
            tiles += work.packed_bytes();
        }
        share_out(works, &Product::packings, &Product::pack, 2 * kGrain * packings / std::max(bytes, int64_t{1}),
                  threads);
    }
    int64_t grain = kGrain * tasks / std::max(values, int64_t{1});
    // Few rows: ranges as long as leave each thread some are read from memory in fewer pieces.
    if (!works.empty() && works.front().few()) {
        grain = std::max(grain, std::clamp(tasks / (8 * threads), int64_t{1}, int64_t{4}));
    }
    share_out(works, &Product::tasks, &Product::run, grain, threads);
}

}  // namespace halfbyte
