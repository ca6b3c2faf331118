/* Products with int8 weights, and the recurrences over them: plain C ABI, no torch headers. int8.py says in torch what
 * this computes.
 *
 * Letters: N frames of all rows laid end to end, S rows, K inputs, G outputs, H hidden.
 *
 * A frame is rounded to int8 by its own largest value, so what comes of it depends on no other frame: a row alone,
 * in company, in pieces or step by step gives the same bits. Sums of products are whole numbers and exact in any order.
 *
 * Not to be built with -ffast-math: NaN must come out.
 */
#include "fp32.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define QUAD 4          /* inputs whose products are summed in one step */
#define LANES 8         /* outputs of a panel */
#define PANELS 4        /* panels taken together */
#define SIDE_BY_SIDE 32 /* frames taken together, at most */
#define CACHE 32768     /* bytes of the first cache */

enum { RNN_TANH, RNN_RELU, LSTM, GRU };

/* y = x w' + bias. Nine words of 8 bytes, as int8.py lays them out. */
typedef struct {
    const float *x;
    const int8_t *weight;          /* [G, K] in panels */
    const float *scale, *bias;     /* [G]; bias may be NULL */
    float *y;
    int64_t frames, inputs, outputs, threads;
} Linear;
_Static_assert(sizeof(Linear) == 9 * 8, "int8.py passes 9 words of 8 bytes");

/* A recurrent layer in one direction. Twenty-one words of 8 bytes. */
typedef struct {
    const float *pre;              /* [N, G], the input's part with its biases */
    const int8_t *weight;          /* [G, H] in panels */
    const float *scale, *bias;     /* [G]; bias NULL but for the GRU */
    const float *h0, *c0;          /* [S, H]; c only for the LSTM */
    const int64_t *offsets;        /* [S + 1] */
    const uint8_t *starts;         /* [N] or NULL */
    const float *reset_h, *reset_c;
    const float *decay;            /* [N, H] or NULL */
    float *h, *last_h, *last_c;
    const int64_t *order;          /* [S], the longest row first */
    int64_t rows, hidden, outputs, kind, reverse, threads;
} Recurrence;
_Static_assert(sizeof(Recurrence) == 21 * 8, "int8.py passes 21 words of 8 bytes");

INLINE int64_t quads(int64_t inputs) { return (inputs + QUAD - 1) / QUAD; }

/* ---- rounding a frame ---- */

/* q = round(x * 127 / max |x|) and |q|, zeros up to a whole quad; the factor that undoes it. NaN where a value is not
 * finite. */
static float rounded(const float *restrict x, int64_t inputs, int8_t *restrict q, uint8_t *restrict size)
{
    const int64_t width = quads(inputs) * QUAD;
    uint32_t top = 0; /* of the bits of |x|: NaN and infinity stand above all finite numbers */
    #pragma omp simd reduction(max: top)
    for (int64_t k = 0; k < inputs; k++) {
        uint32_t bits = to_bits(x[k]) & 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    float most = from_bits(top), factor = 127.0f / most;
    for (int64_t k = inputs; k < width; k++) q[k] = 0;
    if (top >= 0x7f800000u || factor > 3e38f) { /* not finite, or so small that 127 / most is not */
        for (int64_t k = 0; k < width; k++) q[k] = 0, size[k] = 0;
        return top >= 0x7f800000u ? NAN : 0.0f;
    }
    #pragma omp simd
    for (int64_t k = 0; k < inputs; k++) q[k] = (int8_t)(int32_t)rintf(x[k] * factor);
    #pragma omp simd
    for (int64_t k = 0; k < width; k++) size[k] = (uint8_t)(q[k] < 0 ? -q[k] : q[k]);
    return most / 127.0f;
}

/* ---- sums of products ---- */

/* Weights lie in panels of LANES outputs: for each quad of inputs, the four weights of each output. */

#ifdef __AVX2__

typedef __m256i Sums; /* one for each output of a panel */

INLINE Sums no_sums(void) { return _mm256_setzero_si256(); }

/* |a| times w with a's sign: two products of at most 127 * 127 fit in 16 bits, where unsigned by signed bytes as they
 * stand would be cut off. */
INLINE Sums plus(Sums sums, const int8_t *q, const uint8_t *size, const int8_t *weights)
{
    int32_t q4, size4;
    memcpy(&q4, q, QUAD);
    memcpy(&size4, size, QUAD);
    __m256i w = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)weights), _mm256_set1_epi32(q4));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, _mm256_set1_epi32(size4), w);
#else
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(size4), w);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

INLINE void finish(Sums sums, float undo, const float *scale, const float *bias, float *y)
{
    __m256 factor = _mm256_mul_ps(_mm256_set1_ps(undo), _mm256_loadu_ps(scale));
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), factor);
    _mm256_storeu_ps(y, bias == NULL ? value : _mm256_add_ps(value, _mm256_loadu_ps(bias)));
}

#else

typedef struct { int32_t lane[LANES]; } Sums;

INLINE Sums no_sums(void) { return (Sums){{0}}; }

INLINE Sums plus(Sums sums, const int8_t *q, const uint8_t *size, const int8_t *weights)
{
    (void)size;
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < QUAD; i++) sums.lane[j] += (int32_t)q[i] * (int32_t)weights[j * QUAD + i];
    return sums;
}

INLINE void finish(Sums sums, float undo, const float *scale, const float *bias, float *y)
{
    for (int j = 0; j < LANES; j++) {
        float value = (float)sums.lane[j] * (undo * scale[j]);
        y[j] = bias == NULL ? value : value + bias[j];
    }
}

#endif

/* Rounded frames: q and |q|, one frame after the other. */
typedef struct {
    int8_t *q;
    uint8_t *size;
    float undo[SIDE_BY_SIDE];
    int64_t count;
} Rounded;

/* y[n][g] for `count` frames and `panels` panels of outputs. */
INLINE void block(int count, int panels, const Rounded *x, int64_t n, const int8_t *weight, const float *scale,
                  const float *bias, int64_t inputs, int64_t outputs, int64_t g, float *y)
{
    const int64_t steps = quads(inputs), width = steps * QUAD, span = width * LANES;
    const int8_t *q = x->q + n * width, *w = weight + g * width;
    const uint8_t *size = x->size + n * width;
    Sums sums[2][PANELS];
    #pragma GCC unroll 8
    for (int i = 0; i < count * panels; i++) sums[i / panels][i % panels] = no_sums();
    for (int64_t k = 0; k < width; k += QUAD, w += LANES * QUAD) {
        #pragma GCC unroll 8
        for (int j = 0; j < panels; j++) {
            #pragma GCC unroll 8
            for (int i = 0; i < count; i++)
                sums[i][j] = plus(sums[i][j], q + i * width + k, size + i * width + k, w + j * span);
        }
    }
    #pragma GCC unroll 8
    for (int j = 0; j < panels; j++) {
        #pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            const int64_t at = g + j * LANES, rest = outputs - at;
            float *to = y + (n + i) * outputs + at;
            if (rest >= LANES) {
                finish(sums[i][j], x->undo[n + i], scale + at, bias == NULL ? NULL : bias + at, to);
            } else { /* a last panel that is not full */
                float full[3][LANES] = {{0}};
                memcpy(full[0], scale + at, (size_t)rest * sizeof(float));
                if (bias != NULL) memcpy(full[1], bias + at, (size_t)rest * sizeof(float));
                finish(sums[i][j], x->undo[n + i], full[0], full[1], full[2]);
                memcpy(to, full[2], (size_t)rest * sizeof(float));
            }
        }
    }
}

/* Functions of their own: inlined into one caller, gcc folds them into each other and keeps sums in memory. */
#define BLOCK(count, panels)                                                                                         \
    static __attribute__((noinline)) void block_##count##_##panels(                                                  \
        const Rounded *x, int64_t n, const int8_t *weight, const float *scale, const float *bias, int64_t inputs,    \
        int64_t outputs, int64_t g, float *y)                                                                        \
    { block(count, panels, x, n, weight, scale, bias, inputs, outputs, g, y); }
BLOCK(2, 4)
BLOCK(1, 4)
BLOCK(1, 1)

/* y[n][g] = (sum of q[n] w[g]) * undo[n] * scale[g] + bias[g]. */
static void product(const Rounded *x, const int8_t *weight, const float *scale, const float *bias, int64_t inputs,
                    int64_t outputs, float *y)
{
    int64_t g = 0;
    for (; g + (PANELS - 1) * LANES < outputs; g += PANELS * LANES) {
        int64_t n = 0;
        for (; n + 1 < x->count; n += 2) block_2_4(x, n, weight, scale, bias, inputs, outputs, g, y);
        if (n < x->count) block_1_4(x, n, weight, scale, bias, inputs, outputs, g, y);
    }
    for (; g < outputs; g += LANES)
        for (int64_t n = 0; n < x->count; n++) block_1_1(x, n, weight, scale, bias, inputs, outputs, g, y);
}

/* Frames that, with four panels of weights, stay in the first cache while all weights pass by. */
static int64_t together(int64_t width)
{
    const int64_t count = CACHE / 2 / (2 * width);
    return count < 2 ? 2 : count > SIDE_BY_SIDE ? SIDE_BY_SIDE : count;
}

/* Room for SIDE_BY_SIDE frames; NULL pointers where memory is short. One allocation, so that one free gives it back. */
static Rounded room(int64_t inputs)
{
    Rounded x = {0};
    const int64_t width = quads(inputs) * QUAD;
    x.q = malloc((size_t)(2 * SIDE_BY_SIDE * width));
    x.size = (uint8_t *)x.q + SIDE_BY_SIDE * width;
    return x;
}

/* Returns 0, or 1 where memory is short. */
int treadle_int8_linear(const Linear *linear)
{
    const int64_t frames = linear->frames, inputs = linear->inputs, outputs = linear->outputs;
    const int64_t width = quads(inputs) * QUAD, side = together(width), blocks = (frames + side - 1) / side;
    int threads = (int)linear->threads, failed = 0;
    if (frames * inputs * outputs < 1 << 20) threads = 1; /* waking a thread costs more */
    if (threads > blocks) threads = (int)blocks;
    #pragma omp parallel num_threads(threads) if (threads > 1) reduction(|: failed)
    {
        Rounded x = room(inputs);
        failed = x.q == NULL;
        #pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < blocks; part++) {
            if (x.q == NULL) continue;
            const int64_t begin = part * side;
            x.count = frames - begin < side ? frames - begin : side;
            for (int64_t n = 0; n < x.count; n++)
                x.undo[n] = rounded(linear->x + (begin + n) * inputs, inputs, x.q + n * width, x.size + n * width);
            product(&x, linear->weight, linear->scale, linear->bias, inputs, outputs, linear->y + begin * outputs);
        }
        free(x.q);
    }
    return failed;
}

/* ---- gates ---- */

/* Plain comparisons, in the order that keeps NaN. */
INLINE float sigmoid_of(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    return 1.0f / (1.0f + exp_fp32(-x));
}

INLINE float tanh_of(float x) { return 2.0f * sigmoid_of(2.0f * x) - 1.0f; } /* absolute error below 2e-7 */

/* One frame of one row: `from_h` [G] is the state's part of the pre-activations, h and c are the state. */
static void gates(int64_t kind, int64_t hidden, const float *restrict pre, const float *restrict from_h,
                  float *restrict h, float *restrict c)
{
    const float *pre1 = pre + hidden, *pre2 = pre + 2 * hidden, *pre3 = pre + 3 * hidden;
    const float *from1 = from_h + hidden, *from2 = from_h + 2 * hidden, *from3 = from_h + 3 * hidden;
    if (kind == LSTM) {
        #pragma omp simd
        for (int64_t j = 0; j < hidden; j++) {
            float in = sigmoid_of(pre[j] + from_h[j]), keep = sigmoid_of(pre1[j] + from1[j]);
            c[j] = keep * c[j] + in * tanh_of(pre2[j] + from2[j]);
            h[j] = sigmoid_of(pre3[j] + from3[j]) * tanh_of(c[j]);
        }
    } else if (kind == GRU) {
        #pragma omp simd
        for (int64_t j = 0; j < hidden; j++) {
            float reset = sigmoid_of(pre[j] + from_h[j]), keep = sigmoid_of(pre1[j] + from1[j]);
            float candidate = tanh_of(pre2[j] + reset * from2[j]);
            h[j] = candidate + keep * (h[j] - candidate);
        }
    } else if (kind == RNN_TANH) {
        #pragma omp simd
        for (int64_t j = 0; j < hidden; j++) h[j] = tanh_of(pre[j] + from_h[j]);
    } else {
        #pragma omp simd
        for (int64_t j = 0; j < hidden; j++) {
            float sum = pre[j] + from_h[j];
            h[j] = sum < 0.0f ? 0.0f : sum;
        }
    }
}

/* ---- rows ---- */

/* The state that frame n meets. */
static void meet(const Recurrence *job, int64_t n, float *h, float *c)
{
    const int64_t hidden = job->hidden;
    const size_t bytes = (size_t)hidden * sizeof(float);
    if (job->starts != NULL && job->starts[n]) {
        if (job->reset_h != NULL) memcpy(h, job->reset_h, bytes); else memset(h, 0, bytes);
        if (c != NULL && job->reset_c != NULL) memcpy(c, job->reset_c, bytes); else if (c != NULL) memset(c, 0, bytes);
    } else if (job->decay != NULL) {
        const float *decay = job->decay + n * hidden;
        for (int64_t j = 0; j < hidden; j++) h[j] *= decay[j];
        if (c != NULL) for (int64_t j = 0; j < hidden; j++) c[j] *= decay[j];
    }
}

/* Rows begin, begin + step, ... of the order, side by side, so that weights pass by once a time step for all. */
static void run_rows(const Recurrence *job, int64_t begin, int64_t step, Rounded *x, float *from_h)
{
    const int64_t hidden = job->hidden, outputs = job->outputs, width = quads(hidden) * QUAD;
    const int64_t *offsets = job->offsets;
    int64_t row[SIDE_BY_SIDE], length[SIDE_BY_SIDE], frame[SIDE_BY_SIDE];
    x->count = 0;
    for (int64_t place = begin; place < job->rows && x->count < SIDE_BY_SIDE; place += step, x->count++) {
        row[x->count] = job->order[place];
        length[x->count] = offsets[row[x->count] + 1] - offsets[row[x->count]];
    }
    for (int64_t t = 0; t < length[0]; t++) {
        while (length[x->count - 1] <= t) x->count--;
        for (int64_t i = 0; i < x->count; i++) {
            float *h = job->last_h + row[i] * hidden, *c = job->kind == LSTM ? job->last_c + row[i] * hidden : NULL;
            frame[i] = job->reverse ? offsets[row[i] + 1] - 1 - t : offsets[row[i]] + t;
            meet(job, frame[i], h, c);
            x->undo[i] = rounded(h, hidden, x->q + i * width, x->size + i * width);
        }
        product(x, job->weight, job->scale, job->bias, hidden, outputs, from_h);
        for (int64_t i = 0; i < x->count; i++) {
            float *h = job->last_h + row[i] * hidden, *c = job->kind == LSTM ? job->last_c + row[i] * hidden : NULL;
            gates(job->kind, hidden, job->pre + frame[i] * outputs, from_h + i * outputs, h, c);
            memcpy(job->h + frame[i] * hidden, h, (size_t)hidden * sizeof(float));
        }
    }
}

/* Returns 0, or 1 where memory is short. */
int treadle_int8_recurrence(const Recurrence *job)
{
    const int64_t rows = job->rows, hidden = job->hidden;
    const size_t state_bytes = (size_t)(rows * hidden) * sizeof(float);
    int threads = (int)job->threads, failed = 0;
    if (threads > rows) threads = (int)rows;
    memcpy(job->last_h, job->h0, state_bytes);
    if (job->kind == LSTM) memcpy(job->last_c, job->c0, state_bytes);
    /* A part takes every parts-th row of the order, so that parts are of like length and hold rows of many lengths. */
    int64_t parts = (rows + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
    if (parts < threads) parts = threads;
    #pragma omp parallel num_threads(threads) if (threads > 1) reduction(|: failed)
    {
        Rounded x = room(hidden);
        float *from_h = malloc((size_t)(SIDE_BY_SIDE * job->outputs) * sizeof(float));
        failed = x.q == NULL || from_h == NULL;
        #pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; part++)
            if (x.q != NULL && from_h != NULL) run_rows(job, part, parts, &x, from_h);
        free(x.q);
        free(from_h);
    }
    return failed;
}
