/* Functions of one fp32 or bf16 number, without branches or tables, so that compilers make vectors of them.
 *
 * Not for -ffast-math: NaN must pass.
 */
#ifndef TREADLE_FP32_H
#define TREADLE_FP32_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

typedef union {
    float value;
    uint32_t bits;
} Word;

INLINE float from_bits(uint32_t bits) { return ((Word){.bits = bits}).value; }
INLINE uint32_t to_bits(float value) { return ((Word){.value = value}).bits; }

INLINE float load_bf16(uint16_t bits) { return from_bits((uint32_t)bits << 16); }

INLINE uint16_t store_bf16(float value)
{
    uint32_t bits = to_bits(value), nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value == value ? nearest_even : 0x7fc0u); /* rounding up a NaN of all ones would give -0 */
}

/* exp(x) for |x| <= 87, NaN for NaN; the polynomial errs by 3e-9, the whole by less than 2e-7. */
INLINE float exp_fp32(float x)
{
    const float magic = 12582912.0f + 127.0f; /* 1.5 * 2^23: adding it rounds, and leaves n + 127 in the low bits */
    float shifted = x * 1.44269504f + magic, n = shifted - magic;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f, square = r * r;
    float p = 1.381454007e-3f * square + (8.368745108e-3f * r + 4.166839079e-2f);
    p = p * square + (1.666652040e-1f * r + 4.999999343e-1f);
    p = p * square + (r + 1.0f);
    return p * from_bits(to_bits(shifted) << 23);
}

/* tanh(x) for |x| < 0.625, where 1 - exp(-2 |x|) cancels; the polynomial is that of Cephes' tanhf. */
INLINE float small_tanh_fp32(float x)
{
    float square = x * x, p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return p * square * x + x;
}

#endif
