// The loops around a tier's kernels: strips of columns by chunks of rows are handed out to the threads, and each goes
// through the depth panel by panel.

#include "matmul.h"

#include <algorithm>
#include <memory>

#include "parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kChunk = 176 * kTileRows;     // rows that share a panel, at most
constexpr int64_t kSmallChunk = 8 * kTileRows;  // and at least, while there is too little to do for all threads
constexpr int64_t kFewStrip = 16;               // columns at a time where there are few rows
constexpr int64_t kFewBytes = 1 << 21;          // of x when arranged for few rows, at most
constexpr int64_t kGrain = 1 << 16;             // values of W for one thread at a time, at least

// What a thread works in, kept for its next call.
struct Scratch {
    alignas(64) float panel[kLanes * kStrip];
    alignas(64) float sums[kChunk * kStrip];
    alignas(64) float x[kTileRows][kLanes + 16];
    alignas(64) float bias[kStrip + 16];
};

Scratch& scratch() {
    static thread_local const std::unique_ptr<Scratch> mine(new Scratch());
    return *mine;
}

// What the calling thread arranges few rows of x in, for all.
char* arranged() {
    static thread_local const std::unique_ptr<char[]> mine(new char[kFewBytes + 64]);
    return mine.get() + (-reinterpret_cast<uintptr_t>(mine.get()) & 63);
}

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

class Product {
  public:
    Product(const MatmulKernels& kernels, const Matmul4bit& arguments)
        : k_(kernels),
          a_(arguments),
          depth_(a_.gradient ? a_.weight.rows : a_.weight.columns),
          width_(a_.gradient ? a_.weight.columns : a_.weight.rows),
          size_(a_.type == Type::fp32 ? 4 : 2),
          few_(!a_.gradient && a_.rows <= k_.few.rows && a_.weight.piece >= 64 &&
               a_.rows * parts(depth_ * k_.few.bytes, kStretchBytes) * kArrangedBytes <= kFewBytes),
          // x is read where it lies if its values are a lane's and no end has to be padded
          direct_(k_.pairs ? depth_ % 2 == 0 : a_.type == Type::fp32) {}

    void run(int threads) const {
        if (few_) return run_few(threads);
        const int64_t strips = parts(width_, kStrip);
        const int64_t wanted = std::min(parts(a_.rows, kSmallChunk), parts(4 * threads, strips));
        const int64_t chunks = std::max(parts(a_.rows, kChunk), wanted);
        const int64_t chunk = parts(parts(a_.rows, chunks), kTileRows) * kTileRows;
        const int64_t grain = std::max(kGrain / (kStrip * depth_), int64_t{1});
        parallel_for(strips * chunks, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t task = first; task < last; ++task) {
                const int64_t row = task / strips * chunk, column = task % strips * kStrip;
                part(row, std::min(row + chunk, a_.rows), column, std::min(kStrip, width_ - column));
            }
        });
    }

  private:
    void run_few(int threads) const {
        char* const x = arranged();
        k_.few.arrange(a_.x, a_.rows, depth_, x);
        const int64_t strips = parts(width_, kFewStrip);
        // Ranges as long as leave each thread some are read from memory in fewer pieces.
        const int64_t grain = std::max(kGrain / (kFewStrip * depth_), std::clamp(strips / (8 * threads), int64_t{1}, int64_t{4}));
        parallel_for(strips, grain, threads, [&](int64_t first, int64_t last) {
            Scratch& s = scratch();
            for (int64_t strip = first; strip < last; ++strip) {
                const int64_t column = strip * kFewStrip, columns = std::min(kFewStrip, width_ - column);
                set_bias(column, columns, s);
                k_.few.dot(a_.weight, column, columns, x, a_.rows, s.sums);
                finish(0, a_.rows, column, columns, s.sums, s);
            }
        });
    }

    void set_bias(int64_t column, int64_t columns, Scratch& s) const {
        std::fill(s.bias, s.bias + kStrip, 0.0f);
        if (a_.bias) k_.widen(at(a_.bias, column), columns, s.bias);
    }

    // The rows [begin, end) of the columns [column, column + columns).
    void part(int64_t begin, int64_t end, int64_t column, int64_t columns) const {
        Scratch& s = scratch();
        set_bias(column, columns, s);
        const auto expand = a_.gradient ? k_.expand_gradient : k_.expand_forward;
        const int64_t values = k_.pairs ? 2 * kLanes : kLanes;
        for (int64_t first = 0; first < depth_; first += values) {
            const int64_t last = std::min(first + values, depth_);
            const int64_t lanes = k_.pairs ? (last - first + 1) / 2 : last - first;
            expand(a_.weight, column, first, last, s.panel);
            for (int64_t row = begin; row < end; row += kTileRows) {
                const int64_t rows = std::min(kTileRows, end - row);
                const void* x = direct_ ? at(a_.x, row * depth_ + first) : copied(row, rows, first, last, s);
                const int64_t stride = direct_ ? depth_ * size_ : static_cast<int64_t>(sizeof s.x[0]);
                float* const sums = depth_ > values ? s.sums + (row - begin) * kStrip : s.sums;
                k_.multiply(x, stride, rows, s.panel, lanes, sums, first > 0);
                if (last == depth_) finish(row, row + rows, column, columns, sums, s);
            }
        }
    }

    void finish(int64_t begin, int64_t end, int64_t column, int64_t columns, const float* sums, Scratch& s) const {
        for (int64_t row = begin; row < end; ++row, sums += kStrip) {
            k_.finish(sums, s.bias, columns, at(a_.y, row * width_ + column));
        }
    }

    // A tile of x as lanes, an odd end padded with zero.
    const void* copied(int64_t row, int64_t rows, int64_t first, int64_t last, Scratch& s) const {
        const int64_t n = last - first;
        for (int64_t r = 0; r < rows; ++r) {
            const void* from = at(a_.x, (row + r) * depth_ + first);
            if (k_.pairs) {
                uint16_t* to = reinterpret_cast<uint16_t*>(s.x[r]);
                std::memcpy(to, from, static_cast<size_t>(n) * 2);
                to[n] = 0;
            } else {
                k_.widen(from, n, s.x[r]);
            }
        }
        return s.x;
    }

    const void* at(const void* x, int64_t i) const { return static_cast<const char*>(x) + i * size_; }
    void* at(void* y, int64_t i) const { return static_cast<char*>(y) + i * size_; }

    const MatmulKernels& k_;
    const Matmul4bit& a_;
    const int64_t depth_, width_, size_;
    const bool few_, direct_;
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

void matmul(const MatmulKernels& kernels, const Matmul4bit& arguments, int threads) {
    if (arguments.rows > 0) Product(kernels, arguments).run(threads);
}

}  // namespace halfbyte
