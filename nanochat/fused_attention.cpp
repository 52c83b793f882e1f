// Attention in bfloat16 on CPUs whose matrix units oneDNN drives tile by tile (AMX, AVX512-BF16): forward and backward.
//
// The scores of one tile (BLOCK keys x BLOCK queries) are computed, turned into probabilities and used while they are in the cache, as in
// FlashAttention-2 (Dao, 2307.08691). What is special here:
// * Tiles are held transposed, keys x queries. What belongs to a query (maximum, sum, delta) is then a vector along the contiguous side, so the
//   compiler vectorizes every loop by itself, and the tile is the left operand of the gradients of keys and values as it is.
// * Right operands are in VNNI layout, [rows / 2][columns][2]: two rows' numbers side by side in one word of 32 bits.
// * Exponentials are powers of two: the softmax scale takes in log2(e).
// A task is one head of one row. Nothing is shared between tasks, so the result does not depend on the number of threads.
#include <ATen/native/CPUBlas.h>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 64;
constexpr float LOWEST = -1e30f, HIDDEN = -1e36f;  // hidden scores lie below every maximum, whatever the scale

struct Shape { int64_t batch, heads, length, width, left, right; };  // a negative side of the band has no limit
struct Matrix { uint16_t* data; int64_t batch, head, row; };  // (B, H, T, D) of bfloat16 and its strides; that of D is 1
struct Rows { uint16_t* data; int64_t row; };  // of one head

// Memory of one thread, kept from task to task: `take` gives the same pieces again, in the same order
class Scratch {
    std::vector<void*> pieces;
    size_t next = 0;

public:
    ~Scratch() { for (void* piece : pieces) std::free(piece); }
    void restart() { next = 0; }
    template <typename T> T* take(int64_t n) {
        if (next == pieces.size()) pieces.push_back(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
        return static_cast<T*>(pieces[next++]);
    }
};

// x[n][columns] to y[columns][BLOCK], where columns from n on are 0
template <typename T> void transpose(const T* x, int64_t row, int64_t n, int64_t columns, T* y) {
    if (n < BLOCK) std::fill(y, y + columns * BLOCK, T(0));
    for (int64_t c = 0; c < columns; c++)
        for (int64_t t = 0; t < n; t++) y[c * BLOCK + t] = x[t * row + c];
}

// The same for pairs of numbers, which is the VNNI layout of x transposed
void transpose_pairs(Rows x, int64_t n, int64_t width, uint16_t* y) {
    transpose(reinterpret_cast<const uint32_t*>(x.data), x.row / 2, n, width / 2, reinterpret_cast<uint32_t*>(y));
}

// Pairs as made by `transpose_pairs` to rows: y[width][BLOCK]
void split_pairs(const uint16_t* pairs, int64_t width, uint16_t* y) {
    const uint32_t* x = reinterpret_cast<const uint32_t*>(pairs);
    for (int64_t w = 0; w < width / 2; w++, x += BLOCK, y += 2 * BLOCK)
        for (int64_t t = 0; t < BLOCK; t++) y[t] = x[t], y[BLOCK + t] = x[t] >> 16;
}

// x[n][width] to VNNI layout; rows from n on are 0
void interleave(Rows x, int64_t n, int64_t width, uint16_t* y) {
    uint32_t* words = reinterpret_cast<uint32_t*>(y);
    if (n < BLOCK) std::fill(words, words + BLOCK / 2 * width, 0);
    for (int64_t t = 0; t < n; t += 2, words += width) {
        const uint16_t *even = x.data + t * x.row, *odd = even + x.row;
        for (int64_t d = 0; d < width; d++) words[d] = even[d];
        if (t + 1 < n)
            for (int64_t d = 0; d < width; d++) words[d] |= static_cast<uint32_t>(odd[d]) << 16;
    }
}

// x[n][width] to y[BLOCK][width]; rows from n on are 0
void copy(Rows x, int64_t n, int64_t width, uint16_t* y) {
    for (int64_t t = 0; t < n; t++) std::memcpy(y + t * width, x.data + t * x.row, width * 2);
    std::fill(y + n * width, y + BLOCK * width, 0);
}

// x[n][width] times factor, rounded, to the rows of y
void store(const float* x, int64_t n, int64_t width, float factor, Rows y) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t d = 0; d < width; d++) y.data[t * y.row + d] = rounded(x[t * width + d] * factor) >> 16;
}

// c[m][n] = a[m][k] b[k][n], or added to it; b in VNNI layout, all of them without gaps
void matmul(int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c, bool add) {
    at::native::cpublas::brgemm(m, n, k, k, n, n, add, reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(b), c);
}

// Of a tile whose first key is `ahead` positions behind its first query: is any pair in the band, are all?
struct Seen { bool any, all; };
Seen seen(int64_t ahead, const Shape& s) {
    const int64_t far = BLOCK - 1;
    return {(s.right < 0 || ahead - far <= s.right) && (s.left < 0 || ahead + far >= -s.left),
            (s.right < 0 || ahead + far <= s.right) && (s.left < 0 || ahead - far >= -s.left)};
}

void hide(float* scores, int64_t ahead, const Shape& s) {
    const int32_t most = s.right < 0 ? INT32_MAX : s.right, least = s.left < 0 ? -INT32_MAX : -s.left;
    for (int32_t k = 0; k < BLOCK; k++)
        for (int32_t q = 0; q < BLOCK; q++) {
            const int32_t distance = static_cast<int32_t>(ahead) + k - q;
            scores[k * BLOCK + q] = distance > most || distance < least ? HIDDEN : scores[k * BLOCK + q];
        }
}

// log_sum: natural logarithm of each query's sum of exponentials
void forward(const Shape& s, Rows q, Rows k, Rows v, Rows out, float* log_sum, Scratch& scratch) {
    const int64_t D = s.width, blocks = (s.length + BLOCK - 1) / BLOCK;
    uint16_t *keys = scratch.take<uint16_t>(blocks * BLOCK * D), *values = scratch.take<uint16_t>(blocks * BLOCK * D);
    uint16_t *queries = scratch.take<uint16_t>(BLOCK * D), *probs = scratch.take<uint16_t>(BLOCK * BLOCK);
    float *scores = scratch.take<float>(BLOCK * BLOCK), *mixed = scratch.take<float>(D * BLOCK), *mixed_rows = scratch.take<float>(D * BLOCK);
    float highest[BLOCK], sum[BLOCK], shrink[BLOCK];
    const float scale = LOG2E / std::sqrt(static_cast<float>(D));
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = b * BLOCK, n = std::min(BLOCK, s.length - at);
        copy({k.data + at * k.row, k.row}, n, D, keys + at * D);
        transpose_pairs({v.data + at * v.row, v.row}, n, D, queries);
        split_pairs(queries, D, values + at * D);
    }
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t at = i * BLOCK, n = std::min(BLOCK, s.length - at);
        transpose_pairs({q.data + at * q.row, q.row}, n, D, queries);
        std::fill(highest, highest + BLOCK, LOWEST);
        std::fill(sum, sum + BLOCK, 0.0f);
        std::fill(mixed, mixed + D * BLOCK, 0.0f);
        for (int64_t j = 0; j < blocks; j++) {
            const Seen which = seen((j - i) * BLOCK, s);
            if (!which.any) continue;
            matmul(BLOCK, BLOCK, D, keys + j * BLOCK * D, queries, scores, false);
            if (!which.all) hide(scores, (j - i) * BLOCK, s);
            const int64_t last = s.length - j * BLOCK;  // behind it there are no keys
            if (last < BLOCK) std::fill(scores + last * BLOCK, scores + BLOCK * BLOCK, HIDDEN);
            std::copy(highest, highest + BLOCK, shrink);
            for (int64_t r = 0; r < BLOCK; r++)
                for (int64_t c = 0; c < BLOCK; c++) {
                    const float score = scores[r * BLOCK + c] * scale;
                    highest[c] = score > highest[c] ? score : highest[c];
                }
            for (int64_t c = 0; c < BLOCK; c++) sum[c] *= shrink[c] = power(shrink[c] - highest[c]);
            for (int64_t r = 0; r < BLOCK; r += 2)
                for (int64_t c = 0; c < BLOCK; c++) {
                    const float even = power(scores[r * BLOCK + c] * scale - highest[c]), odd = power(scores[(r + 1) * BLOCK + c] * scale - highest[c]);
                    sum[c] += even + odd;
                    reinterpret_cast<uint32_t*>(probs)[r / 2 * BLOCK + c] = rounded(even) >> 16 | (rounded(odd) & 0xffff0000u);
                }
            for (int64_t d = 0; d < D; d++)
                for (int64_t c = 0; c < BLOCK; c++) mixed[d * BLOCK + c] *= shrink[c];
            matmul(D, BLOCK, BLOCK, values + j * BLOCK * D, probs, mixed, true);
        }
        for (int64_t d = 0; d < D; d++)
            for (int64_t c = 0; c < BLOCK; c++) mixed_rows[c * D + d] = mixed[d * BLOCK + c] / sum[c];
        store(mixed_rows, n, D, 1.0f, {out.data + at * out.row, out.row});
        for (int64_t c = 0; c < n; c++) log_sum[at + c] = (highest[c] + std::log2(sum[c])) / LOG2E;
    }
}

void backward(const Shape& s, Rows grad, Rows q, Rows k, Rows v, Rows out, const float* log_sum, Rows grad_q, Rows grad_k, Rows grad_v, Scratch& scratch) {
    const int64_t D = s.width, blocks = (s.length + BLOCK - 1) / BLOCK, all = blocks * BLOCK * D, tile = BLOCK * BLOCK;
    // of all queries: transposed, as right operands for scores; and as they are, for the gradients of keys and values
    uint16_t *queries_t = scratch.take<uint16_t>(all), *queries = scratch.take<uint16_t>(all);
    uint16_t *grads_t = scratch.take<uint16_t>(all), *grads = scratch.take<uint16_t>(all);
    uint16_t *keys = scratch.take<uint16_t>(BLOCK * D), *keys_t = scratch.take<uint16_t>(BLOCK * D), *values = scratch.take<uint16_t>(BLOCK * D);
    uint16_t *probs = scratch.take<uint16_t>(tile), *slopes = scratch.take<uint16_t>(tile), *slope_pairs = scratch.take<uint16_t>(tile);
    float *scores = scratch.take<float>(tile), *grad_probs = scratch.take<float>(tile);
    float *sum_q = scratch.take<float>(all), *sum_k = scratch.take<float>(BLOCK * D), *sum_v = scratch.take<float>(BLOCK * D);
    float *log2_sum = scratch.take<float>(blocks * BLOCK), *delta = scratch.take<float>(blocks * BLOCK);
    const float natural = 1 / std::sqrt(static_cast<float>(D)), scale = LOG2E * natural;
    std::fill(sum_q, sum_q + all, 0.0f);
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t at = i * BLOCK, n = std::min(BLOCK, s.length - at);
        const Rows q_block{q.data + at * q.row, q.row}, grad_block{grad.data + at * grad.row, grad.row};
        transpose_pairs(q_block, n, D, queries_t + at * D);
        transpose_pairs(grad_block, n, D, grads_t + at * D);
        interleave(q_block, n, D, queries + at * D);
        interleave(grad_block, n, D, grads + at * D);
        for (int64_t t = at; t < at + BLOCK; t++) {
            float sum = 0;
            if (t < at + n)
                for (int64_t d = 0; d < D; d++) sum += widened(grad.data[t * grad.row + d]) * widened(out.data[t * out.row + d]);
            delta[t] = sum;
            log2_sum[t] = t < at + n ? log_sum[t] * LOG2E : -LOWEST;  // no query: probabilities 0
        }
    }
    for (int64_t j = 0; j < blocks; j++) {
        const int64_t at_key = j * BLOCK, n = std::min(BLOCK, s.length - at_key);
        transpose_pairs({k.data + at_key * k.row, k.row}, n, D, keys);
        split_pairs(keys, D, keys_t);
        copy({k.data + at_key * k.row, k.row}, n, D, keys);
        copy({v.data + at_key * v.row, v.row}, n, D, values);
        std::fill(sum_k, sum_k + BLOCK * D, 0.0f);
        std::fill(sum_v, sum_v + BLOCK * D, 0.0f);
        for (int64_t i = 0; i < blocks; i++) {
            const Seen which = seen((j - i) * BLOCK, s);
            if (!which.any) continue;
            const int64_t at = i * BLOCK;
            matmul(BLOCK, BLOCK, D, keys, queries_t + at * D, scores, false);
            matmul(BLOCK, BLOCK, D, values, grads_t + at * D, grad_probs, false);
            if (!which.all) hide(scores, (j - i) * BLOCK, s);
            for (int64_t r = 0; r < BLOCK; r += 2)
                for (int64_t c = 0; c < BLOCK; c++) {
                    const int64_t x = r * BLOCK + c, y = x + BLOCK;
                    const float even = power(scores[x] * scale - log2_sum[at + c]), odd = power(scores[y] * scale - log2_sum[at + c]);
                    const uint32_t a = rounded(even * (grad_probs[x] - delta[at + c])), b = rounded(odd * (grad_probs[y] - delta[at + c]));
                    probs[x] = rounded(even) >> 16, probs[y] = rounded(odd) >> 16;
                    slopes[x] = a >> 16, slopes[y] = b >> 16;
                    reinterpret_cast<uint32_t*>(slope_pairs)[r / 2 * BLOCK + c] = a >> 16 | (b & 0xffff0000u);
                }
            matmul(BLOCK, D, BLOCK, probs, grads + at * D, sum_v, true);
            matmul(BLOCK, D, BLOCK, slopes, queries + at * D, sum_k, true);
            matmul(D, BLOCK, BLOCK, keys_t, slope_pairs, sum_q + at * D, true);
        }
        store(sum_k, n, D, natural, {grad_k.data + at_key * grad_k.row, grad_k.row});
        store(sum_v, n, D, 1.0f, {grad_v.data + at_key * grad_v.row, grad_v.row});
    }
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t at = i * BLOCK;
        for (int64_t d = 0; d < D; d++)
            for (int64_t c = 0; c < BLOCK; c++) sum_k[c * D + d] = sum_q[at * D + d * BLOCK + c];
        store(sum_k, std::min(BLOCK, s.length - at), D, natural, {grad_q.data + at * grad_q.row, grad_q.row});
    }
}

// Calls task(rows, index, scratch) for each head of each row, where rows(matrix) are its own. Returns whether one failed
template <typename Task> int each_head(const Shape& s, int threads, const Task& task) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
#pragma omp for
        for (int64_t i = 0; i < s.batch * s.heads; i++) {
            scratch.restart();
            const auto rows = [&](const Matrix& x) { return Rows{x.data + i / s.heads * x.batch + i % s.heads * x.head, x.row}; };
            try {
                task(rows, i, scratch);
            } catch (...) {
#pragma omp atomic write
                failed = 1;
            }
        }
        if (!failed) at::native::cpublas::brgemm_release();
    }
    return failed;
}

}  // namespace

// log_sum (B, H, T) float32, contiguous. Both return 1 where the CPU has not got the instructions, else 0

extern "C" int attention_forward(const Shape* s, int threads, const Matrix* q, const Matrix* k, const Matrix* v, const Matrix* out, float* log_sum) {
    return each_head(*s, threads, [&](const auto& rows, int64_t i, Scratch& scratch) {
        forward(*s, rows(*q), rows(*k), rows(*v), rows(*out), log_sum + i * s->length, scratch);
    });
}

extern "C" int attention_backward(const Shape* s, int threads, const Matrix* grad, const Matrix* q, const Matrix* k, const Matrix* v, const Matrix* out,
                                  const float* log_sum, const Matrix* grad_q, const Matrix* grad_k, const Matrix* grad_v) {
    return each_head(*s, threads, [&](const auto& rows, int64_t i, Scratch& scratch) {
        backward(*s, rows(*grad), rows(*q), rows(*k), rows(*v), rows(*out), log_sum + i * s->length, rows(*grad_q), rows(*grad_k), rows(*grad_v), scratch);
    });
}
