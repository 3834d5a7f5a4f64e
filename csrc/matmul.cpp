// The loops around a tier's kernels: strips of columns by chunks of rows are handed out to the threads, and each goes
// through the depth panel by panel.

#include "matmul.h"

#include <algorithm>
#include <memory>

#include "parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kSmallChunk = 48;      // rows that share a panel, at least, while threads have too little to do
constexpr int64_t kFewStrip = 16;        // columns at a time where there are few rows
constexpr int64_t kGrain = 1 << 16;      // values of the right factors for one thread at a time, at least
constexpr int64_t kPanels = 4;           // terms whose panels are in cache together, at most
constexpr int64_t kExtraLanes = 64;      // that further terms may add to a full panel
constexpr int64_t kMostTileRows = 32;

// What a thread works in, kept for its next call.
struct Scratch {
    alignas(64) float panels[kPanels][kLanes * kStrip];
    alignas(64) float sums[kChunk * kStrip];
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

class Product {
  public:
    Product(const MatmulKernels& kernels, const MatmulKernels& out, const Matmul& arguments)
        : k_(kernels),
          out_(out),
          a_(arguments),
          per_lane_(k_.pairs ? 2 : 1),
          size_(a_.type == Type::fp32 ? 4 : 2),
          y_size_(a_.y_type == Type::fp32 ? 4 : 2),
          few_(a_.rows <= k_.few_rows && a_.terms->weight && !a_.terms->gradient && a_.terms->weight->piece > 0) {}

    void run(int threads) const {
        const int64_t strip = few_ ? kFewStrip : kStrip;
        const int64_t strips = parts(a_.width, strip);
        const int64_t wanted = std::min(parts(a_.rows, kSmallChunk), parts(4 * threads, strips));
        const int64_t chunks = std::max(parts(a_.rows, kChunk), few_ ? 1 : wanted);
        const int64_t chunk = parts(parts(a_.rows, chunks), k_.tile_rows) * k_.tile_rows;
        int64_t depth = 0;
        for (int i = 0; i < a_.count; ++i) depth += a_.terms[i].depth();
        const int64_t grain = std::max(kGrain / std::max(strip * depth, int64_t{1}), int64_t{1});
        parallel_for(strips * chunks, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t task = first; task < last; ++task) {
                const int64_t row = task / strips * chunk, column = task % strips * strip;
                part(row, std::min(row + chunk, a_.rows), column, std::min(strip, a_.width - column));
            }
        });
    }

  private:
    // The rows [begin, end) of the columns [column, column + columns).
    void part(int64_t begin, int64_t end, int64_t column, int64_t columns) const {
        Scratch& s = scratch();
        std::fill(s.bias, s.bias + kStrip, 0.0f);
        if (a_.bias) out_.widen(at(a_.bias, column * y_size_), columns, s.bias);
        Piece pieces[kPanels];
        Piece next{a_.terms, 0, 0, 0};
        bool add = false;
        if (few_) {
            k_.dot(*a_.terms->weight, column, columns, a_.terms->x, end, s.sums);
            if (a_.count == 1) return finish(begin, end, column, columns, s.sums, s);
            ++next.term;
            add = true;
        }
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
        if (term.weight) {
            (term.gradient ? k_.expand_gradient : k_.expand_forward)(*term.weight, column, piece.first, piece.last,
                                                                     panel);
            return;
        }
        Dense dense = term.dense;
        (term.gradient ? dense.columns : dense.rows) = column + columns;  // no more than are wanted
        (term.gradient ? k_.dense_gradient : k_.dense_forward)(dense, column, piece.first, piece.last, panel);
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
            out_.finish(sums, s.bias, columns, at(a_.y, (row * a_.y_stride + column) * y_size_));
        }
    }

    static const void* at(const void* x, int64_t bytes) { return static_cast<const char*>(x) + bytes; }
    static void* at(void* y, int64_t bytes) { return static_cast<char*>(y) + bytes; }

    const MatmulKernels &k_, &out_;
    const Matmul& a_;
    const int64_t per_lane_, size_, y_size_;
    const bool few_;
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

void matmul(const MatmulKernels& kernels, const MatmulKernels& out, const Matmul& arguments, int threads) {
    if (arguments.rows > 0) Product(kernels, out, arguments).run(threads);
}

}  // namespace halfbyte
