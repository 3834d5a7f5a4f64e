// Rotary position embedding (arXiv 2104.09864) over the halves a, b of a head, as transformers has it:
//
//     (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b)
//
// and, inverse, the transposed matrix, which is the gradient. Products and sums are rounded on their own, as in fp32
// torch.

template <class T, class Table>
void rotary(const Rotary& r, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
        const int64_t sample = token / r.length, place = token % r.length;
        const int64_t angles = sample * r.cos_sample_stride + place * r.cos_token_stride;
        const int64_t from = sample * r.sample_stride + place * r.token_stride;
        for (int64_t head = 0; head < r.heads; ++head) {
            const int64_t x = from + head * r.head_stride, y = (token * r.heads + head) * r.size;
            for (int64_t i = 0; i < r.half; i += Lanes::kWidth) {
                const int64_t left = r.half - i;
                const Lanes a = read<T>(r.x, x + i, left), b = read<T>(r.x, x + r.half + i, left);
                const Lanes cos_a = read<Table>(r.cos, angles + i, left);
                const Lanes cos_b = read<Table>(r.cos, angles + r.half + i, left);
                const Lanes sin_a = read<Table>(r.sin, angles + i, left);
                const Lanes sin_b = read<Table>(r.sin, angles + r.half + i, left);
                write<T>(r.y, y + i, r.inverse ? a * cos_a + b * sin_b : a * cos_a - b * sin_a, left);
                write<T>(r.y, y + r.half + i, r.inverse ? b * cos_b - a * sin_a : b * cos_b + a * sin_b, left);
            }
            for (int64_t i = 2 * r.half; i < r.size; i += Lanes::kWidth) {
                write<T>(r.y, y + i, read<T>(r.x, x + i, r.size - i), r.size - i);
            }
        }
    }
}
