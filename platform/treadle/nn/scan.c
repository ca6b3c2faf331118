/* The gated scan on the CPU: plain C ABI, no torch headers. loop.py says in torch what it computes.
 *
 * Letters: S rows, N frames of all rows laid end to end, H hidden, G = H * gates of the form.
 *
 * The state runs in linear space, in double beside double and in float beside all else. Forward keeps it in `last`,
 * backward keeps its gradient in `dh0`: a row's channels stay in the first-level cache from frame to frame.
 *
 * Not to be built with -ffast-math: it would swallow NaN here and turn denormals off in the whole process.
 *
 * The file includes itself once a number format, TYPE: STORED is what frames are kept in, STATE what is computed in.
 */
#ifndef TYPE

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#include "fp32.h"

enum {
    BLOCK = 64,         /* channels that one thread takes together */
    CHUNK = 1024,       /* channels whose former states are converted together */
    AHEAD = 4,          /* frames between a prefetch and the use of what it fetches */
    FEW = 16384,        /* elements of a scan for which waking a thread costs more than it saves */
    HUGE_PAGE = 1 << 21 /* bytes */
};
enum { FP32, BF16, FP64 };
enum { MINGRU, MINLSTM, MINLSTM_RAW };
enum { CANDIDATE_G, CANDIDATE_TANH, CANDIDATE_IDENTITY };

/* The arguments of both directions, as native.py lays them out; NULL where there is no such tensor. */
typedef struct {
    const void *pre, *h0;
    const int64_t *offsets;
    const uint8_t *starts;
    const void *reset, *decay;
    void *h, *last;                                   /* forward writes them, backward reads h */
    const void *grad_h, *grad_last;                   /* backward only, as all below */
    void *dpre, *dh0, *dreset_rows, *dreset, *ddecay; /* dreset_rows: [S, H], what each row adds to dreset */
    int64_t rows, hidden, dtype, form, candidate, reverse, threads;
} Scan;
_Static_assert(sizeof(Scan) == 22 * 8, "native.py passes 22 words of 8 bytes");

typedef float stored_fp32, state_fp32, state_bf16;
typedef uint16_t stored_bf16;
typedef double stored_fp64, state_fp64;

INLINE float load_fp32(float value) { return value; }
INLINE float store_fp32(float value) { return value; }
INLINE double load_fp64(double value) { return value; }
INLINE double store_fp64(double value) { return value; }
INLINE double exp_fp64(double x) { return exp(x); }
INLINE double small_tanh_fp64(double x) { return tanh(x); }
#define exp_bf16 exp_fp32
#define small_tanh_bf16 small_tanh_fp32
#define abs_fp32 fabsf
#define abs_bf16 fabsf
#define abs_fp64 fabs

/* How far exp goes, and up to where tanh is taken from small_tanh. */
static const float limit_fp32 = 87, limit_bf16 = 87, small_fp32 = 0.625f, small_bf16 = 0.625f;
static const double limit_fp64 = 700, small_fp64 = 1;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void prefetch(const void *from, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at);
}

/* Large results are fresh memory on every call, whose pages the system must find: one by one they cost more than
 * the scan (backward of 4 M elements in fp32: 12 against 5 ns an element). */
static void expect_huge_pages(void *from, int64_t bytes)
{
    const uintptr_t page = HUGE_PAGE, low = ((uintptr_t)from + page - 1) / page * page;
    const uintptr_t size = ((uintptr_t)from + (uintptr_t)bytes) / page * page - low;
    if (from == NULL || bytes < 4 * HUGE_PAGE) return;
#ifdef MADV_HUGEPAGE
    madvise((void *)low, size, MADV_HUGEPAGE);
#else
    (void)size;
#endif
}

/* All frames of a row, channels [low, low + width). */
typedef void Pass(const Scan *scan, int64_t row, int64_t low, int64_t width);

static void deal(const Scan *scan, Pass *pass)
{
    const int64_t rows = scan->rows, hidden = scan->hidden, blocks = (hidden + BLOCK - 1) / BLOCK;
    const int64_t elements = (scan->offsets[rows] - scan->offsets[0]) * hidden;
    const int threads = elements < FEW ? 1 : (int)scan->threads;
    /* A frame's channels lie side by side, so they are shared out only where rows alone cannot keep threads busy. */
    const int64_t wanted = threads == 1 ? 1 : least(blocks, (4 * (int64_t)threads + rows - 1) / rows);
    const int64_t span = (blocks + wanted - 1) / wanted * BLOCK, parts = (hidden + span - 1) / span;
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < rows * parts; unit++) {
        const int64_t low = unit % parts * span;
        pass(scan, unit / parts, low, least(span, hidden - low));
    }
}

#define PASTE(name, type) name##_##type
#define EXPAND(name, type) PASTE(name, type)
#define NAME(name) EXPAND(name, TYPE)
#define STORED NAME(stored)
#define STATE NAME(state)
#define LOAD NAME(load)
#define STORE NAME(store)

/* Forward turns `state` into that after the frame and writes h to `out`; backward turns the gradient of the state
 * after the frame into that of the state before, and writes that of pre to `out`. */
#define FRAME_ARGUMENTS                                                                                          \
    const STORED *pre, int64_t hidden, int64_t width, const STATE *before, const STORED *grad_h, STATE *state,   \
        STORED *out
#define FRAME(way, form, candidate)                                                          \
    static void NAME(way##_##form##_##candidate)(FRAME_ARGUMENTS)                            \
    {                                                                                        \
        NAME(way##_frame)(form, candidate, pre, hidden, width, before, grad_h, state, out);  \
    }
#define FRAMES(way, form) \
    FRAME(way, form, CANDIDATE_G) FRAME(way, form, CANDIDATE_TANH) FRAME(way, form, CANDIDATE_IDENTITY)
#define NAMES(way, form) \
    {NAME(way##_##form##_CANDIDATE_G), NAME(way##_##form##_CANDIDATE_TANH), NAME(way##_##form##_CANDIDATE_IDENTITY)}
#define TABLE(way)                                                           \
    FRAMES(way, MINGRU) FRAMES(way, MINLSTM) FRAMES(way, MINLSTM_RAW)        \
    static NAME(Frame) *const NAME(way##_frames)[3][3] = {                   \
        NAMES(way, MINGRU), NAMES(way, MINLSTM), NAMES(way, MINLSTM_RAW)};

#define TYPE fp32
#include "scan.c"
#define TYPE bf16
#include "scan.c"
#define TYPE fp64
#include "scan.c"

static int64_t frame_bytes(const Scan *scan)
{
    return (scan->offsets[scan->rows] - scan->offsets[0]) * scan->hidden * (int64_t[]){4, 2, 8}[scan->dtype];
}

void treadle_scan_forward(const Scan *scan)
{
    Pass *const passes[] = {forward_fp32, forward_bf16, forward_fp64};
    expect_huge_pages(scan->h, frame_bytes(scan));
    deal(scan, passes[scan->dtype]);
}

void treadle_scan_backward(const Scan *scan)
{
    Pass *const passes[] = {backward_fp32, backward_bf16, backward_fp64};
    expect_huge_pages(scan->dpre, frame_bytes(scan) * (scan->form == MINGRU ? 2 : 3));
    expect_huge_pages(scan->ddecay, frame_bytes(scan));
    deal(scan, passes[scan->dtype]);
    if (scan->dreset != NULL) (scan->dtype == FP64 ? sum_rows_fp64 : sum_rows_fp32)(scan);
}

#else

/* ---- one channel of one frame ---- */

/* h' = keep h + take g(x), and the derivatives of what p, q and x govern. */
typedef struct {
    STATE keep, take, g, slope_p, slope_q, slope_g;
} NAME(Gates);

/* Plain comparisons, in the order that lets NaN through. */
INLINE STATE NAME(at_least)(STATE x, STATE low) { return x < low ? low : x; }
INLINE STATE NAME(at_most)(STATE x, STATE high) { return x > high ? high : x; }

/* exp(-k); beyond the limit, sigmoids made of it are 0 or 1 to all the digits there are. */
INLINE STATE NAME(odds)(STATE k) { return NAME(exp)(-NAME(at_most)(NAME(at_least)(k, -NAME(limit)), NAME(limit))); }

/* exp(x) for x <= 0 */
INLINE STATE NAME(exp_down)(STATE x) { return NAME(exp)(NAME(at_least)(x, -NAME(limit))); }

INLINE void NAME(candidate)(int candidate, STATE x, NAME(Gates) *out)
{
    if (candidate == CANDIDATE_G) {
        STATE e = NAME(exp_down)(-NAME(abs)(x)), r = 1 / (1 + e), s = e * r; /* the sigmoid where x < 0 */
        out->g = x >= 0 ? x + (STATE)0.5 : s;
        out->slope_g = x >= 0 ? 1 : s * r;
    } else if (candidate == CANDIDATE_TANH) {
        STATE e = NAME(exp_down)(-2 * NAME(abs)(x)), r = 1 / (1 + e), far = (1 - e) * r;
        out->g = NAME(abs)(x) < NAME(small) ? NAME(small_tanh)(x) : x < 0 ? -far : far;
        out->slope_g = 4 * e * r * r;
    } else {
        out->g = x;
        out->slope_g = 1;
    }
}

INLINE NAME(Gates) NAME(gates)(int form, int candidate, STATE p, STATE q, STATE x)
{
    NAME(Gates) out = {0};
    NAME(candidate)(candidate, x, &out);
    if (form == MINGRU) { /* p is k */
        STATE e = NAME(odds)(p), r = 1 / (1 + e);
        out.take = r;
        out.keep = e * r;
        out.slope_p = e * r * r;
    } else if (form == MINLSTM) {
        /* z = i / (f + i) = (1 + exp(-p)) / (2 + exp(-p) + exp(-q)), above and below times exp(min(p, q, 0)): as it
         * stands it is 0 / 0 where both gates are shut. Of the three terms, one is then 1. */
        STATE high = p < q ? -p : -q, low = p < q ? -q : -p;
        STATE e_high = NAME(exp_down)(-NAME(abs)(high)), e_low = NAME(exp_down)(high > 0 ? low - high : low);
        STATE w_one = high > 0 ? e_high : 1, w_high = high > 0 ? 1 : e_high;
        STATE w_p = p < q ? w_high : e_low, w_q = p < q ? e_low : w_high;
        STATE take = w_one + w_p, keep = w_one + w_q, r = 1 / (take + keep);
        out.take = take * r;
        out.keep = keep * r;
        out.slope_p = -out.keep * (w_p * r); /* -z (1 - z) (1 - f): the divisor of 1 - f cancels against z */
        out.slope_q = out.take * (w_q * r);
    } else {
        STATE ep = NAME(odds)(p), eq = NAME(odds)(q), rp = 1 / (1 + ep), rq = 1 / (1 + eq);
        out.keep = rp;
        out.take = rq;
        out.slope_p = ep * rp * rp;
        out.slope_q = eq * rq * rq;
    }
    return out;
}

/* ---- one frame ---- */

typedef void NAME(Frame)(FRAME_ARGUMENTS);

INLINE void NAME(forward_frame)(int form, int candidate, FRAME_ARGUMENTS)
{
    const STORED *p = pre, *q = pre + hidden, *x = form == MINGRU ? q : q + hidden;
    (void)grad_h;
    #pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        NAME(Gates) at = NAME(gates)(form, candidate, LOAD(p[j]), LOAD(q[j]), LOAD(x[j]));
        STATE was = before[j];
        STATE is = form == MINLSTM_RAW ? at.keep * was + at.take * at.g : was + at.take * (at.g - was);
        state[j] = is;
        out[j] = STORE(is);
    }
}

INLINE void NAME(backward_frame)(int form, int candidate, FRAME_ARGUMENTS)
{
    const STORED *p = pre, *q = pre + hidden, *x = form == MINGRU ? q : q + hidden;
    STORED *dp = out, *dq = out + hidden, *dx = form == MINGRU ? dq : dq + hidden;
    #pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        NAME(Gates) at = NAME(gates)(form, candidate, LOAD(p[j]), LOAD(q[j]), LOAD(x[j]));
        STATE total = LOAD(grad_h[j]) + state[j], lift = form == MINLSTM_RAW ? before[j] : at.g - before[j];
        state[j] = total * at.keep;
        dp[j] = STORE(total * lift * at.slope_p);
        if (form == MINLSTM) dq[j] = STORE(total * lift * at.slope_q);
        if (form == MINLSTM_RAW) dq[j] = STORE(total * at.g * at.slope_q);
        dx[j] = STORE(total * at.take * at.slope_g);
    }
}

TABLE(forward)
TABLE(backward)

/* ---- one row ---- */

static void NAME(forward)(const Scan *scan, int64_t row, int64_t low, int64_t width)
{
    NAME(Frame) *const frame = NAME(forward_frames)[scan->form][scan->candidate];
    const int64_t hidden = scan->hidden, columns = hidden * (scan->form == MINGRU ? 2 : 3);
    const int64_t begin = scan->offsets[row], end = scan->offsets[row + 1], step = scan->reverse ? -1 : 1;
    const STORED *pre = (const STORED *)scan->pre + low;
    STORED *h = (STORED *)scan->h + low;
    STATE *state = (STATE *)scan->last + row * hidden + low;

    memcpy(state, (const STATE *)scan->h0 + row * hidden + low, (size_t)width * sizeof(STATE));
    for (int64_t n = scan->reverse ? end - 1 : begin, left = end - begin; left > 0; n += step, left--) {
        const STATE *before = state;
        if (scan->starts != NULL && scan->starts[n]) {
            if (scan->reset != NULL) before = (const STATE *)scan->reset + low;
            else memset(state, 0, (size_t)width * sizeof(STATE));
        } else if (scan->decay != NULL) {
            const STORED *decay = (const STORED *)scan->decay + n * hidden + low;
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) state[j] *= LOAD(decay[j]);
        }
        if (left > AHEAD) {
            const STORED *later = pre + (n + AHEAD * step) * columns;
            for (int64_t gate = 0; gate < columns; gate += hidden)
                prefetch(later + gate, width * (int64_t)sizeof(STORED));
        }
        frame(pre + n * columns, hidden, width, before, NULL, state, h + n * hidden);
    }
}

/* The state before frame n, decay not applied: where it stands, or `met` filled with it. */
INLINE const STATE *NAME(before)(const Scan *scan, int64_t row, int64_t n, int64_t low, int64_t width, STATE *met)
{
    const int64_t hidden = scan->hidden, step = scan->reverse ? -1 : 1;
    if (scan->starts != NULL && scan->starts[n]) {
        if (scan->reset != NULL) return (const STATE *)scan->reset + low;
        return memset(met, 0, (size_t)width * sizeof(STATE));
    }
    if (n == (scan->reverse ? scan->offsets[row + 1] - 1 : scan->offsets[row]))
        return (const STATE *)scan->h0 + row * hidden + low;
    const STORED *h = (const STORED *)scan->h + (n - step) * hidden + low;
    if (sizeof(STORED) == sizeof(STATE)) return (const void *)h;
    #pragma omp simd
    for (int64_t j = 0; j < width; j++) met[j] = LOAD(h[j]);
    return met;
}

/* The gradient of the state that frame n met goes on to where that state came from. */
INLINE void NAME(pass_on)(const Scan *scan, int64_t row, int64_t n, int64_t low, int64_t width, const STATE *before,
                          STATE *carry)
{
    const int64_t hidden = scan->hidden;
    const STORED *decay = (const STORED *)scan->decay + n * hidden + low;
    STORED *ddecay = (STORED *)scan->ddecay + n * hidden + low;
    if (scan->starts != NULL && scan->starts[n]) {
        STATE *dreset = (STATE *)scan->dreset_rows + row * hidden + low;
        if (scan->dreset != NULL)
            for (int64_t j = 0; j < width; j++) dreset[j] += carry[j];
        if (scan->decay != NULL) memset(ddecay, 0, (size_t)width * sizeof(STORED));
        memset(carry, 0, (size_t)width * sizeof(STATE));
    } else if (scan->decay != NULL) {
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            ddecay[j] = STORE(carry[j] * before[j]);
            carry[j] *= LOAD(decay[j]);
        }
    }
}

/* Frame n on the way back, at most CHUNK channels. */
INLINE void NAME(backward_at)(const Scan *scan, NAME(Frame) *frame, int64_t row, int64_t n, int64_t low,
                              int64_t width)
{
    STATE met[CHUNK], decayed[CHUNK];
    const int64_t hidden = scan->hidden, columns = hidden * (scan->form == MINGRU ? 2 : 3);
    STATE *carry = (STATE *)scan->dh0 + row * hidden + low;
    const STATE *before = NAME(before)(scan, row, n, low, width, met), *entered = before;
    if (scan->decay != NULL && !(scan->starts != NULL && scan->starts[n])) {
        const STORED *decay = (const STORED *)scan->decay + n * hidden + low;
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) decayed[j] = before[j] * LOAD(decay[j]);
        entered = decayed;
    }
    frame((const STORED *)scan->pre + n * columns + low, hidden, width, entered,
          (const STORED *)scan->grad_h + n * hidden + low, carry, (STORED *)scan->dpre + n * columns + low);
    NAME(pass_on)(scan, row, n, low, width, before, carry);
}

static void NAME(backward)(const Scan *scan, int64_t row, int64_t low, int64_t width)
{
    NAME(Frame) *const frame = NAME(backward_frames)[scan->form][scan->candidate];
    const int64_t hidden = scan->hidden, columns = hidden * (scan->form == MINGRU ? 2 : 3);
    const int64_t begin = scan->offsets[row], end = scan->offsets[row + 1], step = scan->reverse ? -1 : 1;
    const int64_t bytes = width * (int64_t)sizeof(STORED), at = row * hidden + low;

    memcpy((STATE *)scan->dh0 + at, (const STATE *)scan->grad_last + at, (size_t)width * sizeof(STATE));
    if (scan->dreset != NULL) memset((STATE *)scan->dreset_rows + at, 0, (size_t)width * sizeof(STATE));
    for (int64_t n = scan->reverse ? begin : end - 1, left = end - begin; left > 0; n -= step, left--) {
        if (left > AHEAD + 1) { /* what is written gains nothing from being fetched */
            const int64_t next = n - AHEAD * step;
            const STORED *pre = (const STORED *)scan->pre + next * columns + low;
            for (int64_t gate = 0; gate < columns; gate += hidden) prefetch(pre + gate, bytes);
            prefetch((const STORED *)scan->grad_h + next * hidden + low, bytes);
            prefetch((const STORED *)scan->h + (next - step) * hidden + low, bytes);
        }
        for (int64_t part = 0; part < width; part += CHUNK)
            NAME(backward_at)(scan, frame, row, n, low + part, least(CHUNK, width - part));
    }
}

/* In the order of the rows, whatever the order in which threads finished them. */
INLINE void NAME(sum_rows)(const Scan *scan)
{
    STATE *total = scan->dreset;
    memset(total, 0, (size_t)scan->hidden * sizeof(STATE));
    for (int64_t row = 0; row < scan->rows; row++) {
        const STATE *part = (const STATE *)scan->dreset_rows + row * scan->hidden;
        for (int64_t j = 0; j < scan->hidden; j++) total[j] += part[j];
    }
}

#undef TYPE
#endif
