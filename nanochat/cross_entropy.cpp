// One pass over a chunk of bfloat16 logits z for cross_entropy.py. With c = cap * tanh(z / cap), in place of z[rows][vocab] comes
// exp(c) * (1 - tanh(z / cap)^2), the numerator of the softmax's gradient, and its denominator, the sum over a row of exp(c), to total[rows].
// The compiler vectorizes the loop by itself; PyTorch's would make two passes of it, with exponentials and divisions twice as exact as bfloat16 can tell.

extern "C" void capped_softmax(uint16_t* z, int64_t rows, int64_t vocab, float cap, float* total, int threads) {
    const float slope = 2 * LOG2E / cap, high = cap * LOG2E;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        uint16_t* x = z + row * vocab;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < vocab; i++) {
            float y = widened(x[i]) * slope;
            y = y > 64.0f ? 64.0f : y;  // tanh is 1 long before
            y = y < -64.0f ? -64.0f : y;
            const float r = 1.0f / (power(y) + 1.0f);  // tanh = 1 - 2r, 1 - tanh^2 = 4r (1 - r)
            const float e = power(high - 2 * high * r);
            sum += e;
            x[i] = rounded(4 * e * r * (1 - r)) >> 16;
        }
        total[row] = sum;
    }
}
