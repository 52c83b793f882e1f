// Numbers as the compiler can vectorize them by itself. Stands before every C++ file that compiler.py compiles.
#include <cstdint>
#include <cstring>

namespace {

constexpr float LOG2E = 1.44269504f;

inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float value(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline uint32_t rounded(float x) { const uint32_t u = bits(x); return u + 0x7fff + ((u >> 16) & 1); }  // the upper half is x as bfloat16
inline float widened(uint16_t x) { return value(static_cast<uint32_t>(x) << 16); }

// 2^x for x < 127, 0 below 2^-126; accurate to 4e-6 of it, bfloat16 to 4e-3
inline float power(float x) {
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the lowest bits are the integer nearest to x
    const float f = x - (shifted - 12582912.0f);
    const float p = 1.0f + f * (0.69314718f + f * (0.24022650f + f * (0.05550411f + f * (0.00961813f + f * 0.00133336f))));
    return x < -126.0f ? 0.0f : value(bits(p) + (bits(shifted) << 23));
}

}  // namespace

