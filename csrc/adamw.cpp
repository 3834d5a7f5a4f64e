// AdamW steps: the tensors' blocks are handed out to the threads as one row, and the lines of a table are drawn.

#include "adamw.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values for one thread at a time
constexpr int64_t kPart = 1 << 12;   // values of a 32-bit tensor that stay together

// Call step(tensor, first, last) for ranges that cover the blocks of all tensors.
template <class Tensor, class Step>
void over_blocks(const std::vector<Tensor>& tensors, int64_t blocksize, int threads, const Step& step) {
    std::vector<int64_t> ends;  // the number of blocks up to the end of each tensor
    int64_t blocks = 0;
    for (const Tensor& t : tensors) ends.push_back(blocks += (t.n + blocksize - 1) / blocksize);
    parallel_for(blocks, std::max(kGrain / blocksize, int64_t{1}), threads, [&](int64_t first, int64_t last) {
        auto i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin());
        for (; first < last; ++i) {
            const int64_t start = i ? ends[i - 1] : 0, end = std::min(last, ends[i]);
            step(tensors[i], first - start, end - start);
            first = end;
        }
    });
}

double height(const Lines& lines, int i, double x) { return double{lines.slope[i]} * x + lines.intercept[i]; }

int lowest(const Lines& lines, int count, double x) {
    int best = 0;
    for (int i = 1; i < count; ++i) {
        if (height(lines, i, x) < height(lines, best, x)) best = i;
    }
    return best;
}

// Draw lines through the points (x[k], k + 1/2): one through each run of even steps, one through each two points that
// are left over, and a level one above all. Returns how many there are.
int draw(const std::vector<float>& x, Lines& lines) {
    const auto distance = [&](size_t k, size_t end) { return double{x[end]} - x[k]; };
    int count = 0;
    for (size_t k = 0; k + 1 < x.size() && count < kLines - 1; ++count) {
        size_t end = k + 1;
        while (end + 1 < x.size() && std::abs(distance(end, end + 1) / distance(k, k + 1) - 1) < 1e-3) ++end;
        lines.slope[count] = static_cast<float>(static_cast<double>(end - k) / distance(k, end));
        lines.intercept[count] = static_cast<float>(static_cast<double>(k) + 0.5 - double{lines.slope[count]} * x[k]);
        k = end + 1;
    }
    lines.slope[count] = 0.0f;
    lines.intercept[count] = static_cast<float>(x.size());
    return count + 1;
}

// Whether the lowest line tells the rank among x everywhere, and falls ever less steeply to the left. Half of kDoubt is
// for what fp32 rounds off: under 2^-16 below 256.
bool fits(const Lines& lines, int count, const std::vector<float>& x) {
    if (x.empty() || !(x[0] > 2 * kTiny) || !(height(lines, lowest(lines, count, 0), 0) > -0.5)) return false;
    for (int i = 1; i < count; ++i) {
        if (!(lines.slope[i] < lines.slope[i - 1])) return false;
    }
    for (size_t k = 0; k < x.size(); ++k) {
        const double found = height(lines, lowest(lines, count, x[k]), x[k]);
        if (!(std::abs(found - (static_cast<double>(k) + 0.5)) < kDoubt / 2)) return false;
    }
    return true;
}

}  // namespace

Lines fit_lines(const std::vector<float>& midpoints) {
    Lines lines;
    const auto positive = std::upper_bound(midpoints.begin(), midpoints.end() - 1, 0.0f);
    const std::vector<float> x(positive, midpoints.end() - 1);
    const bool mirrored = std::equal(midpoints.begin(), positive, x.rbegin(), x.rend(),
                                     [](float below, float above) { return below == -above; });
    lines.zero = static_cast<float>(positive - midpoints.begin());
    lines.last = midpoints.back();
    const int count = lines.count = draw(x, lines);
    bool usable = lines.last < 1 && (positive == midpoints.begin() || mirrored) && fits(lines, count, x);
    for (int i = count; i < kLines + 2; ++i) {
        lines.slope[i] = lines.slope[count - 1];
        lines.intercept[i] = lines.intercept[count - 1];
    }
    for (int binade = 0; binade < 32; ++binade) {
        const double begin = std::ldexp(kTiny, binade);
        lines.first[binade] = lowest(lines, count, begin);
        usable &= lowest(lines, count, std::min(2 * begin, 1.0)) <= lines.first[binade] + 2;
    }
    if (!usable) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        std::fill(lines.slope, lines.slope + kLines + 2, nan);
        std::fill(lines.intercept, lines.intercept + kLines + 2, nan);
    }
    return lines;
}

void adamw_32bit(const AdamwKernels& kernels, const Adamw& a, const std::vector<Stepped32bit>& tensors, int threads) {
    over_blocks(tensors, kPart, threads, [&](const Stepped32bit& t, int64_t first, int64_t last) {
        kernels.step_32bit(a, t, first * kPart, std::min(last * kPart, t.n));
    });
}

void adamw_8bit(const AdamwKernels& kernels, const Adamw& a, const Tables8bit& tables,
                const std::vector<Stepped8bit>& tensors, int threads) {
    over_blocks(tensors, tables.blocksize, threads, [&](const Stepped8bit& t, int64_t first, int64_t last) {
        kernels.step_8bit(a, tables, t, first, last);
    });
}

}  // namespace halfbyte
