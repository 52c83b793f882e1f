// One pass over a chunk of bfloat16 logits z for cross_entropy.py. With c = cap * tanh(z / cap), in place of z[rows][vocab] comes
// exp(c) * (1 - tanh(z / cap)^2), the numerator of the softmax's gradient, and its denominator, the sum over a row of exp(c), to total[rows].
// The compiler vectorizes the loop by itself; PyTorch's would make two passes of it, with exponentials and divisions twice as exact as bfloat16 can tell.
#include <cstdint>
#include <cstring>

namespace {

constexpr float LOG2E = 1.44269504f;

inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float value(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

// 2^x for -126 <= x < 127, accurate to 4e-6 of it
inline float power(float x) {
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the lowest bits are the integer nearest to x
    const float f = x - (shifted - 12582912.0f);
    const float p = 1.0f + f * (0.69314718f + f * (0.24022650f + f * (0.05550411f + f * (0.00961813f + f * 0.00133336f))));
    return value(bits(p) + (bits(shifted) << 23));
}

}  // namespace

extern "C" void capped_softmax(uint16_t* z, int64_t rows, int64_t vocab, float cap, float* total, int threads) {
    const float slope = 2 * LOG2E / cap, high = cap * LOG2E;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        uint16_t* x = z + row * vocab;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < vocab; i++) {
            float y = value(static_cast<uint32_t>(x[i]) << 16) * slope;
            y = y > 64.0f ? 64.0f : y;  // tanh is 1 long before
            y = y < -64.0f ? -64.0f : y;
            const float r = 1.0f / (power(y) + 1.0f);  // tanh = 1 - 2r, 1 - tanh^2 = 4r (1 - r)
            const float e = power(high - 2 * high * r);
            sum += e;
            const uint32_t gradient = bits(4 * e * r * (1 - r));
            x[i] = (gradient + 0x7fff + ((gradient >> 16) & 1)) >> 16;
        }
        total[row] = sum;
    }
}
