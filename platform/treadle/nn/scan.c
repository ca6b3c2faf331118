/* The gated scan on the CPU: plain C ABI, no torch headers. loop.py says in torch what it computes.
 *
 * Letters: S rows, N frames of all rows laid end to end, H hidden, G = H * gates of the form.
 *
 * The state is kept in linear space, in fp32 beside fp32 and bf16 and in double beside double. Gates are computed
 * from e = exp(-|k|), which lies in [0, 1]: sigmoid, its complement and its slope then follow without overflow and
 * without cancellation, and all divisors lie in [1, 4], so that several share one division.
 *
 * This file must not be built with -ffast-math: it would turn NaN tests off here and denormals off in the process.
 *
 * The file includes itself once per number format: STORED is what frames are kept in, STATE what is computed in.
 */
#ifndef STORED

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define AHEAD 4        /* frames between a software prefetch and the use of what it fetches */
#define BLOCK 64       /* channels that are dealt out to threads together */

enum { MINGRU, MINLSTM, MINLSTM_RAW };
enum { CANDIDATE_G, CANDIDATE_TANH, CANDIDATE_IDENTITY };
enum { FP32, BF16, FP64 };

/* The arguments of both directions: 22 words of 8 bytes, as native.py lays them out; NULL where there is no such tensor. */
typedef struct {
    const void *pre, *h0;
    const int64_t *offsets;
    const uint8_t *starts;
    const void *reset, *decay;
    void *h, *last;                                    /* forward writes them; backward reads h */
    const void *grad_h, *grad_last;                    /* backward only, as all below */
    void *dpre, *dh0, *dreset_rows, *dreset, *ddecay;  /* dreset_rows: [S, H], one partial sum a row */
    int64_t rows, hidden, dtype, form, candidate, reverse, threads;
} Scan;
_Static_assert(sizeof(Scan) == 22 * 8, "native.py passes 22 words of 8 bytes");

INLINE float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

INLINE float load_bf16(uint16_t bits) { return from_bits((uint32_t)bits << 16); }
INLINE uint16_t store_bf16(float value)
{
    uint32_t bits = to_bits(value);
    uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value == value ? even : 0x7fc0u); /* rounding an all-ones NaN up would give -0 */
}

/* exp(x) for -87.3 < x < 87.3; relative error below 2e-7. */
INLINE float exp_fp32(float x)
{
    const float magic = 12582912.0f + 127.0f; /* 1.5 * 2^23: adding it rounds, and leaves n + 127 in the low bits */
    float shifted = x * 1.44269504088896341f + magic;
    float n = shifted - magic;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.381454007e-3f;
    p = p * r + 8.368745108e-3f;
    p = p * r + 4.166839079e-2f;
    p = p * r + 1.666652040e-1f;
    p = p * r + 4.999999343e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits(to_bits(shifted) << 23);
}

INLINE float tanh_near_zero_fp32(float x) /* |x| < 0.625 */
{
    float square = x * x;
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return p * square * x + x;
}

INLINE double exp_fp64(double x) { return exp(x); }
INLINE double tanh_near_zero_fp64(double x) { return tanh(x); }

/* One direction of the scan, a row's channels [low, low + width) from the first frame to the last. */
typedef void Pass(const Scan *scan, int64_t row, int64_t low, int64_t width);

static void deal(const Scan *scan, Pass *pass)
{
    int64_t rows = scan->rows, hidden = scan->hidden;
    int threads = (int)scan->threads;
    /* Whole rows are the longest streams, so channels are split only where rows alone cannot keep threads busy. */
    int64_t blocks = (hidden + BLOCK - 1) / BLOCK, parts = 1;
    if (threads > 1 && rows < 4 * (int64_t)threads) {
        parts = (4 * (int64_t)threads + rows - 1) / rows;
        if (parts > blocks) parts = blocks;
    }
    int64_t span = (blocks + parts - 1) / parts * BLOCK;
    parts = (hidden + span - 1) / span;
    if ((scan->offsets[rows] - scan->offsets[0]) * hidden < 16384) threads = 1; /* waking a thread costs more */
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < rows * parts; unit++) {
        int64_t low = unit % parts * span;
        pass(scan, unit / parts, low, low + span < hidden ? span : hidden - low);
    }
}

#define STORED float
#define STATE float
#define NAME(name) name##_fp32
#define LOAD(value) (value)
#define STORE(value) (value)
#define EXP exp_fp32
#define TANH_NEAR_ZERO tanh_near_zero_fp32
#define NEAR_ZERO 0.625f
#define FABS fabsf
#define LIMIT 87.0f
#include "scan.c"

#define STORED uint16_t
#define STATE float
#define NAME(name) name##_bf16
#define LOAD(value) load_bf16(value)
#define STORE(value) store_bf16(value)
#define EXP exp_fp32
#define TANH_NEAR_ZERO tanh_near_zero_fp32
#define NEAR_ZERO 0.625f
#define FABS fabsf
#define LIMIT 87.0f
#define WIDENED
#include "scan.c"

#define STORED double
#define STATE double
#define NAME(name) name##_fp64
#define LOAD(value) (value)
#define STORE(value) (value)
#define EXP exp_fp64
#define TANH_NEAR_ZERO tanh_near_zero_fp64
#define NEAR_ZERO 1.0
#define FABS fabs
#define LIMIT 700.0
#include "scan.c"

/* Both return 0, or 1 for a format they do not know. */
int treadle_scan_forward(const Scan *scan)
{
    if (scan->dtype < FP32 || scan->dtype > FP64) return 1;
    Pass *const passes[] = {forward_fp32, forward_bf16, forward_fp64};
    deal(scan, passes[scan->dtype]);
    return 0;
}

int treadle_scan_backward(const Scan *scan)
{
    if (scan->dtype < FP32 || scan->dtype > FP64) return 1;
    Pass *const passes[] = {backward_fp32, backward_bf16, backward_fp64};
    deal(scan, passes[scan->dtype]);
    if (scan->dreset == NULL) return 0;
    if (scan->dtype == FP64) sum_rows_fp64(scan); else sum_rows_fp32(scan);
    return 0;
}

#else /* ---- one number format ---- */

/* A frame's gates at one channel: h = keep * before + take * g. `rest` = 1 - z where keep = 1 - z. */
typedef struct { STATE keep, take, g, slope_p, slope_q, slope_g; } NAME(Gates);

/* Plain comparisons, in the order that keeps NaN in x. */
INLINE STATE NAME(at_least)(STATE x, STATE low) { return x < low ? low : x; }
INLINE STATE NAME(at_most)(STATE x, STATE high) { return x > high ? high : x; }

/* exp(-k), kept within what can be divided by. */
INLINE STATE NAME(odds)(STATE k) { return EXP(-NAME(at_most)(NAME(at_least)(k, -LIMIT), LIMIT)); }

/* exp(x) for x <= 0 */
INLINE STATE NAME(decline)(STATE x) { return EXP(NAME(at_least)(x, -LIMIT)); }

/* Candidate: the exponential it needs, in [0, 1] and finite even for NaN, so that it may share a division. */
INLINE STATE NAME(candidate_exp)(int candidate, STATE x)
{
    STATE y = candidate == CANDIDATE_G ? x : -2 * FABS(x);
    y = y < 0 ? y : 0;
    return EXP(y > -LIMIT ? y : -LIMIT);
}

INLINE NAME(Gates) NAME(gates)(int form, int candidate, STATE p, STATE q, STATE x)
{
    NAME(Gates) out = {0};
    const int plain = candidate == CANDIDATE_IDENTITY;
    STATE ex = plain ? 0 : NAME(candidate_exp)(candidate, x), dx = 1 + ex, rx; /* rx = 1 / dx */
    if (form == MINGRU) {
        STATE e = NAME(odds)(p), d = 1 + e, both = 1 / (d * dx), r = both * dx;
        rx = both * d;
        out.take = r;
        out.keep = e * r;
        out.slope_p = out.keep * r;
    } else if (form == MINLSTM) {
        /* z = (1 + exp(b)) / (2 + exp(a) + exp(b)), a = -p_i, b = -p_f, scaled by exp(-max(a, b, 0)): i / (f + i)
         * itself is 0 / 0 where both gates are shut. */
        STATE high = p < q ? -p : -q, low = p < q ? -q : -p;
        STATE e_high = NAME(decline)(-FABS(high)), e_low = NAME(decline)(high > 0 ? low - high : low);
        STATE w_zero = high > 0 ? e_high : 1, w_high = high > 0 ? 1 : e_high;
        STATE w_b = p < q ? w_high : e_low, w_a = p < q ? e_low : w_high;
        STATE with_a = w_zero + w_a, with_b = w_zero + w_b;
        STATE d = with_a + with_b, both = 1 / (d * dx), r = both * dx;
        rx = both * d;
        out.take = with_b * r;
        out.keep = with_a * r;
        out.slope_p = -out.keep * (w_b * r); /* of z */
        out.slope_q = out.take * (w_a * r);
    } else {
        STATE ep = NAME(odds)(p), eq = NAME(odds)(q), d = 1 + eq, both = 1 / (d * dx), r = both * dx;
        STATE rp = 1 / (1 + ep); /* its own division: NaN in p must not reach the gradient of q */
        rx = both * d;
        out.keep = rp;
        out.take = r;
        out.slope_p = ep * rp * rp;
        out.slope_q = eq * r * r;
    }
    if (candidate == CANDIDATE_G) {
        STATE s = ex * rx;
        out.g = x < 0 ? s : x + (STATE)0.5;
        out.slope_g = x < 0 ? s * rx : x >= 0 ? 1 : x; /* the last for NaN */
    } else if (candidate == CANDIDATE_TANH) {
        STATE size = FABS(x), far = (1 - ex) * rx;
        far = x < 0 ? -far : far;
        out.g = size < NEAR_ZERO ? TANH_NEAR_ZERO(x) : x == x ? far : x;
        out.slope_g = x == x ? 4 * ex * rx * rx : x;
    } else {
        out.g = x;
        out.slope_g = 1;
    }
    return out;
}

/* ---- one frame ---- */

typedef void NAME(Forward)(const STORED *pre, int64_t hidden, int64_t width, STATE *state, STORED *h);
typedef void NAME(Backward)(const STORED *pre, int64_t hidden, int64_t width, const STATE *before,
                            const STORED *grad_h, STATE *carry, STORED *dpre);

INLINE void NAME(forward_frame)(int form, int candidate, const STORED *pre, int64_t hidden, int64_t width,
                                STATE *state, STORED *h)
{
    const int num_gates = form == MINGRU ? 2 : 3;
    #pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        NAME(Gates) at = NAME(gates)(form, candidate, LOAD(pre[j]), LOAD(pre[hidden + j]),
                                     LOAD(pre[(num_gates - 1) * hidden + j]));
        STATE before = state[j];
        STATE after = form == MINLSTM_RAW ? at.keep * before + at.take * at.g : before + at.take * (at.g - before);
        state[j] = after;
        h[j] = STORE(after);
    }
}

INLINE void NAME(backward_frame)(int form, int candidate, const STORED *pre, int64_t hidden, int64_t width,
                                 const STATE *before, const STORED *grad_h, STATE *carry, STORED *dpre)
{
    const int num_gates = form == MINGRU ? 2 : 3;
    #pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        NAME(Gates) at = NAME(gates)(form, candidate, LOAD(pre[j]), LOAD(pre[hidden + j]),
                                     LOAD(pre[(num_gates - 1) * hidden + j]));
        STATE total = LOAD(grad_h[j]) + carry[j];
        carry[j] = total * at.keep;
        dpre[(num_gates - 1) * hidden + j] = STORE(total * at.take * at.slope_g);
        if (form == MINLSTM_RAW) {
            dpre[j] = STORE(total * before[j] * at.slope_p);
            dpre[hidden + j] = STORE(total * at.g * at.slope_q);
        } else {
            STATE lift = total * (at.g - before[j]);
            dpre[j] = STORE(lift * at.slope_p);
            if (form == MINLSTM) dpre[hidden + j] = STORE(lift * at.slope_q);
        }
    }
}

#define FRAME(form, candidate)                                                                                  \
    static void NAME(forward_##form##_##candidate)(const STORED *pre, int64_t hidden, int64_t width,            \
                                                   STATE *state, STORED *h)                                     \
    { NAME(forward_frame)(form, candidate, pre, hidden, width, state, h); }                                     \
    static void NAME(backward_##form##_##candidate)(const STORED *pre, int64_t hidden, int64_t width,           \
                                                    const STATE *before, const STORED *grad_h, STATE *carry,    \
                                                    STORED *dpre)                                               \
    { NAME(backward_frame)(form, candidate, pre, hidden, width, before, grad_h, carry, dpre); }
#define FRAMES(form) FRAME(form, CANDIDATE_G) FRAME(form, CANDIDATE_TANH) FRAME(form, CANDIDATE_IDENTITY)
FRAMES(MINGRU)
FRAMES(MINLSTM)
FRAMES(MINLSTM_RAW)
#define TABLE(way, form) \
    {NAME(way##_##form##_CANDIDATE_G), NAME(way##_##form##_CANDIDATE_TANH), NAME(way##_##form##_CANDIDATE_IDENTITY)}

/* ---- one row ---- */

static void NAME(forward)(const Scan *scan, int64_t row, int64_t low, int64_t width)
{
    NAME(Forward) *const table[3][3] = {TABLE(forward, MINGRU), TABLE(forward, MINLSTM), TABLE(forward, MINLSTM_RAW)};
    NAME(Forward) *const frame = table[scan->form][scan->candidate];
    const int64_t hidden = scan->hidden, columns = hidden * (scan->form == MINGRU ? 2 : 3);
    const int64_t begin = scan->offsets[row], end = scan->offsets[row + 1];
    const int64_t step = scan->reverse ? -1 : 1;
    const STATE *reset = scan->reset;
    STATE *state = (STATE *)scan->last + row * hidden + low;

    memcpy(state, (const STATE *)scan->h0 + row * hidden + low, (size_t)width * sizeof(STATE));
    for (int64_t count = end - begin, n = scan->reverse ? end - 1 : begin; count > 0; count--, n += step) {
        if (scan->starts != NULL && scan->starts[n]) {
            for (int64_t j = 0; j < width; j++) state[j] = reset != NULL ? reset[low + j] : 0;
        } else if (scan->decay != NULL) {
            const STORED *decay = (const STORED *)scan->decay + n * hidden + low;
            for (int64_t j = 0; j < width; j++) state[j] *= LOAD(decay[j]);
        }
        frame((const STORED *)scan->pre + n * columns + low, hidden, width, state,
              (STORED *)scan->h + n * hidden + low);
    }
}

static void NAME(backward)(const Scan *scan, int64_t row, int64_t low, int64_t width)
{
    NAME(Backward) *const table[3][3] = {TABLE(backward, MINGRU), TABLE(backward, MINLSTM),
                                         TABLE(backward, MINLSTM_RAW)};
    NAME(Backward) *const frame = table[scan->form][scan->candidate];
    const int64_t hidden = scan->hidden, columns = hidden * (scan->form == MINGRU ? 2 : 3);
    const int64_t begin = scan->offsets[row], end = scan->offsets[row + 1];
    const int64_t first = scan->reverse ? end - 1 : begin, step = scan->reverse ? -1 : 1;
    const STATE *h0 = (const STATE *)scan->h0 + row * hidden + low, *reset = scan->reset;
    STATE *carry = (STATE *)scan->dh0 + row * hidden + low;
    STATE *dreset = scan->dreset == NULL ? NULL : (STATE *)scan->dreset_rows + row * hidden + low;
    STATE met[BLOCK * 16];

    memcpy(carry, (const STATE *)scan->grad_last + row * hidden + low, (size_t)width * sizeof(STATE));
    if (dreset != NULL) memset(dreset, 0, (size_t)width * sizeof(STATE));
    for (int64_t count = end - begin, n = first + step * (count - 1); count > 0; count--, n -= step) {
        const int start = scan->starts != NULL && scan->starts[n];
        for (int64_t part = 0; part < width; part += BLOCK * 16) {
            const int64_t size = width - part < BLOCK * 16 ? width - part : BLOCK * 16, at = n * hidden + low + part;
            const STORED *decay = scan->decay == NULL ? NULL : (const STORED *)scan->decay + at;
            STORED *ddecay = scan->decay == NULL ? NULL : (STORED *)scan->ddecay + at;
            for (int64_t j = 0; j < size; j++) {
                STATE before;
                if (start) before = reset != NULL ? reset[low + part + j] : 0;
                else if (n == first) before = h0[part + j];
                else before = LOAD(((const STORED *)scan->h)[at - step * hidden + j]);
                if (decay != NULL && !start) before *= LOAD(decay[j]);
                met[j] = before;
            }
            STATE *c = carry + part;
            frame((const STORED *)scan->pre + n * columns + low + part, hidden, size, met,
                  (const STORED *)scan->grad_h + at, c, (STORED *)scan->dpre + n * columns + low + part);
            if (start) {
                for (int64_t j = 0; j < size; j++) {
                    if (dreset != NULL) dreset[part + j] += c[j];
                    if (ddecay != NULL) ddecay[j] = STORE(0);
                    c[j] = 0;
                }
            } else if (decay != NULL) {
                for (int64_t j = 0; j < size; j++) {
                    STATE before = n == first ? h0[part + j] : LOAD(((const STORED *)scan->h)[at - step * hidden + j]);
                    ddecay[j] = STORE(c[j] * before);
                    c[j] *= LOAD(decay[j]);
                }
            }
        }
    }
}

#ifndef WIDENED
static void NAME(sum_rows)(const Scan *scan)
{
    /* In the order of the rows, whatever the order in which threads finished them. */
    STATE *total = scan->dreset;
    memset(total, 0, (size_t)scan->hidden * sizeof(STATE));
    for (int64_t row = 0; row < scan->rows; row++)
        for (int64_t j = 0; j < scan->hidden; j++) total[j] += ((const STATE *)scan->dreset_rows)[row * scan->hidden + j];
}
#endif

#undef STORED
#undef STATE
#undef NAME
#undef LOAD
#undef STORE
#undef EXP
#undef TANH_NEAR_ZERO
#undef NEAR_ZERO
#undef FABS
#undef LIMIT
#undef WIDENED
#undef FRAME
#undef FRAMES
#undef TABLE
#endif
