// The loops around a tier's kernels: strips of columns by chunks of rows are handed out to the threads, and each goes
// through the depth panel by panel.

#include "matmul.h"

#include <algorithm>
#include <memory>

#include "parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kChunk = 88 * kTileRows;     // rows that share a panel, at most
constexpr int64_t kSmallChunk = 8 * kTileRows;  // and at least, while there is too little to do for all threads
constexpr int64_t kFewStrip = 16;               // columns at a time where there are few rows
constexpr int64_t kFewRows = 16;                // the most that `few_rows` may be
constexpr int64_t kGrain = 1 << 16;             // values of W for one thread at a time, at least

// What a thread works in, kept for its next call.
struct Scratch {
    alignas(64) float panel[kLanes * kStrip];
    alignas(64) float sums[kChunk * kStrip];
    alignas(64) float x[kFewRows][kLanes + kVector];
    alignas(64) float bias[kStrip + kVector];
};

Scratch& scratch() {
    static thread_local const std::unique_ptr<Scratch> mine(new Scratch);
    return *mine;
}

class Product {
  public:
    Product(const MatmulKernels& kernels, const Matmul4bit& arguments)
        : k_(kernels),
          a_(arguments),
          depth_(a_.gradient ? a_.weight.rows : a_.weight.columns),
          width_(a_.gradient ? a_.weight.columns : a_.weight.rows),
          size_(a_.type == Type::fp32 ? 4 : 2),
          few_(!a_.gradient && a_.rows <= k_.few_rows),
          block_(k_.pairs ? 2 * kLanes : kLanes),
          // x is read where it lies if its values are a lane's and no end has to be padded
          direct_((k_.pairs || a_.type == Type::fp32) && depth_ % ((k_.pairs ? 2 : 1) * (few_ ? kVector : 1)) == 0) {}

    void run(int threads) const {
        const int64_t strip = few_ ? kFewStrip : kStrip;
        const int64_t strips = (width_ + strip - 1) / strip;
        const int64_t wanted = std::min((a_.rows + kSmallChunk - 1) / kSmallChunk, (4 * threads + strips - 1) / strips);
        const int64_t chunks = std::max((a_.rows + kChunk - 1) / kChunk, few_ ? 1 : wanted);
        const int64_t chunk = ((a_.rows + chunks - 1) / chunks + kTileRows - 1) / kTileRows * kTileRows;
        const int64_t grain = std::max(kGrain / (strip * depth_), int64_t{1});
        parallel_for(strips * chunks, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t task = first; task < last; ++task) {
                const int64_t row = task / strips * chunk, column = task % strips * strip;
                part(row, std::min(row + chunk, a_.rows), column, std::min(strip, width_ - column));
            }
        });
    }

  private:
    // The rows [begin, end) of the columns [column, column + columns).
    void part(int64_t begin, int64_t end, int64_t column, int64_t columns) const {
        Scratch& s = scratch();
        std::fill(s.bias, s.bias + kStrip, 0.0f);
        if (a_.bias) k_.widen(at(a_.bias, column), columns, s.bias);
        const auto expand = a_.gradient ? k_.expand_gradient : k_.expand_forward;
        const int64_t tile = few_ ? kFewRows : kTileRows;
        for (int64_t first = 0; first < depth_; first += block_) {
            const int64_t last = std::min(first + block_, depth_);
            if (!few_) expand(a_.weight, column, first, last, s.panel);
            for (int64_t row = begin; row < end; row += tile) {
                const int64_t rows = std::min(tile, end - row);
                float* sums = s.sums + (row - begin) * kStrip;
                const void* x = direct_ ? at(a_.x, row * depth_ + first) : copied(row, rows, first, last, s);
                const int64_t stride = direct_ ? depth_ * size_ : static_cast<int64_t>(sizeof s.x[0]);
                if (few_) {
                    k_.dot(a_.weight, column, columns, first, last, x, stride, rows, sums, first > 0);
                } else {
                    const int64_t lanes = k_.pairs ? (last - first + 1) / 2 : last - first;
                    k_.multiply(x, stride, rows, s.panel, lanes, sums, first > 0);
                }
                if (last < depth_) continue;
                for (int64_t r = 0; r < rows; ++r) {
                    k_.finish(sums + r * kStrip, s.bias, columns, at(a_.y, (row + r) * width_ + column));
                }
            }
        }
    }

    // A tile of x as lanes, padded with zeros.
    const void* copied(int64_t row, int64_t rows, int64_t first, int64_t last, Scratch& s) const {
        const int64_t n = last - first, width = (k_.pairs ? 2 : 1) * kVector;
        const int64_t padded = (n + width - 1) / width * width;
        for (int64_t r = 0; r < rows; ++r) {
            const void* from = at(a_.x, (row + r) * depth_ + first);
            if (k_.pairs) {
                uint16_t* to = reinterpret_cast<uint16_t*>(s.x[r]);
                std::memcpy(to, from, static_cast<size_t>(n) * 2);
                std::fill(to + n, to + padded, uint16_t{0});
            } else {
                k_.widen(from, n, s.x[r]);
                std::fill(s.x[r] + n, s.x[r] + padded, 0.0f);
            }
        }
        return s.x;
    }

    const void* at(const void* x, int64_t i) const { return static_cast<const char*>(x) + i * size_; }
    void* at(void* y, int64_t i) const { return static_cast<char*>(y) + i * size_; }

    const MatmulKernels& k_;
    const Matmul4bit& a_;
    const int64_t depth_, width_, size_;
    const bool few_;
    const int64_t block_;
    const bool direct_;
};

}  // namespace

void matmul(const MatmulKernels& kernels, const Matmul4bit& arguments, int threads) {
    if (arguments.rows > 0) Product(kernels, arguments).run(threads);
}

}  // namespace halfbyte
