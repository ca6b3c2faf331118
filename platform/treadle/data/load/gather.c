/* Rows of many blocks into one padded or packed buffer.
 *
 * A call takes an array of 64-bit words: addresses and numbers, in the order of the structures below. `treadle_locate`
 * turns row numbers into addresses; the others copy what lies there. Rows are counted in items: frames, ids or values.
 *
 * Rows of a batch lie apart, so that the processor's own prefetcher loses a page or two at the start of each. A cursor
 * therefore runs some lines ahead of the copy, over the ends of rows: .70 of memcpy instead of .63.
 */
#include <stdint.h>
#include <string.h>

#define AHEAD 1024
#define LINE 64
#define CHUNK ((int64_t)512) /* copied between two looks ahead */

typedef struct {
    const int64_t *address, *count, *order; /* order: 0 where rows are taken as they stand */
    int64_t num_rows, item_bytes, next, at;
} Cursor;

static inline void run_ahead(Cursor *cursor, int64_t bytes)
{
    while (bytes > 0 && cursor->next < cursor->num_rows) {
        int64_t row = cursor->order ? cursor->order[cursor->next] : cursor->next;
        int64_t left = cursor->count[row] * cursor->item_bytes - cursor->at, take = left < bytes ? left : bytes;
        const char *from = (const char *)cursor->address[row] + cursor->at;
        for (int64_t k = 0; k < take + LINE - 1; k += LINE)
            __builtin_prefetch(from + k, 0, 3);
        cursor->at += take;
        bytes -= take;
        if (take == left)
            cursor->next++, cursor->at = 0;
    }
}

/* ---- where rows lie ---- */

/* What is looked up of a row: one cache line of a table far larger than a cache, which the batch before went through. */
typedef struct {
    int64_t address; /* of its first item, 0 where its block is not open */
    uint32_t count;  /* of items */
    float weight;
    int64_t label;
} Entry;

typedef struct {
    const int64_t *rows;
    int64_t num_rows;
    const Entry *entries; /* of all rows */
    int64_t num_entries, item_bytes;
    const int64_t *starts, *stops; /* items of each asked row; 0: all */
    int64_t *address, *count, *label;
    float *weight;
    int64_t *sums; /* of each batch, the largest count and the total */
    int64_t num_batches;
} Locate;

/* -1, or the place among the asked rows of one that is not open; num_rows and more: of one that does not exist.
   `sizes`: rows of each batch. */
int64_t treadle_locate(const Locate *x, const int64_t *sizes)
{
    for (int64_t i = 0; i < x->num_rows; i++) {
        if (x->rows[i] < 0 || x->rows[i] >= x->num_entries)
            return x->num_rows + i;
        __builtin_prefetch(x->entries + x->rows[i]);
    }
    for (int64_t batch = 0, i = 0; batch < x->num_batches; batch++) {
        int64_t largest = 0, total = 0;
        for (int64_t end = i + sizes[batch]; i < end; i++) {
            const Entry *entry = x->entries + x->rows[i];
            if (!entry->address)
                return i;
            int64_t start = x->starts ? x->starts[i] : 0, stop = x->stops ? x->stops[i] : entry->count;
            if (start < 0 || stop > entry->count || start > stop)
                return x->num_rows + i;
            x->address[i] = entry->address + start * x->item_bytes;
            x->count[i] = stop - start;
            x->label[i] = entry->label;
            x->weight[i] = entry->weight;
            total += stop - start;
            largest = stop - start > largest ? stop - start : largest;
        }
        x->sums[2 * batch] = largest;
        x->sums[2 * batch + 1] = total;
    }
    return -1;
}

/* ---- frames ---- */

#define GROUP 8 /* frames whose means lie end to end: whole vectors for any number of channels */

typedef struct {
    const int64_t *rows, *address, *count; /* of all batches, one batch after the other */
    int64_t num_rows;
    int64_t *place, *room;  /* scratch, one each row: where its frames go, and frames of zeros behind them */
    int64_t *order, *spare; /* scratch, one each row */
    int64_t channels, width; /* stored, and read: as many, or more where there are observed channels or gaps */
    const float *mean, *inverse; /* GROUP times */
    int64_t missing;             /* 0: none; 1: NaN becomes 0; 2: and a channel each says which was observed */
} Frames;

static inline void scale(float *restrict y, const float *restrict x, const float *restrict mean,
                         const float *restrict inverse, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
        y[j] = (x[j] - mean[j]) * inverse[j];
}

/* The same for a number of channels that the compiler knows: it then keeps the means in registers. */
static inline __attribute__((always_inline)) void scale_known(float *restrict y, const float *restrict x,
                                                              const float *restrict mean,
                                                              const float *restrict inverse, int64_t n,
                                                              const int64_t channels)
{
    for (int64_t j = 0; j < n; j += channels)
#pragma omp simd
        for (int64_t d = 0; d < channels; d++)
            y[j + d] = (x[j + d] - mean[d]) * inverse[d];
}

static inline void scale_any(float *y, const float *x, const Frames *f, int64_t n)
{
    if (f->channels == 8)
        scale_known(y, x, f->mean, f->inverse, n, 8);
    else if (f->channels == 16)
        scale_known(y, x, f->mean, f->inverse, n, 16);
    else if (f->channels == 32)
        scale_known(y, x, f->mean, f->inverse, n, 32);
    else
        scale(y, x, f->mean, f->inverse, n);
}

static inline void scale_missing(float *restrict y, const float *restrict x, const float *restrict mean,
                                 const float *restrict inverse, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float v = (x[j] - mean[j]) * inverse[j];
        y[j] = x[j] == x[j] ? v : 0.0f;
    }
}

static inline void observed(float *restrict y, const float *restrict x, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
        y[j] = x[j] == x[j] ? 1.0f : 0.0f;
}

/* Some frames, at most GROUP. */
static inline void put_frames(const Frames *f, float *y, const float *x, int64_t frames)
{
    int64_t channels = f->channels, width = f->width;
    if (width == channels) {
        if (f->missing)
            scale_missing(y, x, f->mean, f->inverse, frames * channels);
        else
            scale_any(y, x, f, frames * channels);
        return;
    }
    for (int64_t t = 0; t < frames; t++, y += width, x += channels) {
        if (f->missing)
            scale_missing(y, x, f->mean, f->inverse, channels);
        else
            scale(y, x, f->mean, f->inverse, channels);
        if (f->missing == 2)
            observed(y + channels, x, channels);
    }
}

/* The places of rows in `order`, by row number: a radix sort, 8 bits at a time, of what rows are above the least. */
static const int64_t *sorted(const Frames *f)
{
    int64_t least = INT64_MAX, most = 0, *order = f->order, *spare = f->spare;
    for (int64_t i = 0; i < f->num_rows; i++) {
        least = f->rows[i] < least ? f->rows[i] : least;
        most = f->rows[i] > most ? f->rows[i] : most;
        order[i] = i;
    }
    for (int shift = 0; shift < 64 && (most - least) >> shift; shift += 8) {
        int64_t start[256] = {0}, sum = 0;
        for (int64_t i = 0; i < f->num_rows; i++)
            start[((f->rows[i] - least) >> shift) & 255]++;
        for (int digit = 0; digit < 256; digit++) {
            int64_t here = start[digit];
            start[digit] = sum;
            sum += here;
        }
        for (int64_t k = 0; k < f->num_rows; k++)
            spare[start[((f->rows[order[k]] - least) >> shift) & 255]++] = order[k];
        int64_t *swap = order;
        order = spare;
        spare = swap;
    }
    return order;
}

/* `batches`: where the rows of each end, where its frames go, and the steps of its rows, 0 where it is packed. */
static void find_places(const Frames *f, const int64_t *batches, int64_t num_batches)
{
    const int64_t *ends = batches, *outs = batches + num_batches, *steps = batches + 2 * num_batches;
    for (int64_t k = 0, i = 0; k < num_batches; k++) {
        float *out = (float *)outs[k];
        for (; i < ends[k]; i++) {
            int64_t frames = steps[k] ? steps[k] : f->count[i];
            f->place[i] = (int64_t)out;
            f->room[i] = frames - f->count[i];
            out += frames * f->width;
        }
    }
}

/* Several batches at once, in the order in which their rows lie: batches that share a zone of lengths take most of the
   rows of its pages between them. */
void treadle_frames(const Frames *f, const int64_t *batches, int64_t num_batches)
{
    int64_t frame_bytes = f->channels * sizeof(float);
    const int64_t *order = sorted(f);
    Cursor cursor = {f->address, f->count, order, f->num_rows, frame_bytes, 0, 0};
    find_places(f, batches, num_batches);
    run_ahead(&cursor, AHEAD);
    for (int64_t k = 0; k < f->num_rows; k++) {
        int64_t i = order[k], count = f->count[i];
        const float *x = (const float *)f->address[i];
        float *y = (float *)f->place[i];
        for (int64_t t = 0; t < count; t += GROUP) {
            int64_t frames = count - t < GROUP ? count - t : GROUP;
            run_ahead(&cursor, frames * frame_bytes);
            put_frames(f, y, x, frames);
            x += frames * f->channels;
            y += frames * f->width;
        }
        memset(y, 0, f->room[i] * f->width * sizeof(float));
    }
}

/* ---- ids ---- */

typedef struct {
    const int64_t *address, *count;
    int64_t num_rows;
    int64_t *out;
    int64_t steps; /* 0 where packed */
    int64_t fill;
    const int64_t *lookup; /* 0: as they are */
    int64_t num_lookup;
} Ids;

static inline int put_ids(const Ids *d, int64_t *restrict out, const int32_t *restrict x, int64_t start, int64_t stop)
{
    if (!d->lookup) {
        for (int64_t t = start; t < stop; t++)
            out[t] = x[t];
        return 1;
    }
    for (int64_t t = start; t < stop; t++) {
        if (x[t] < -1 || x[t] >= d->num_lookup)
            return 0;
        out[t] = x[t] < 0 ? -1 : d->lookup[x[t]];
    }
    return 1;
}

/* -1, or the place of a row with an id that `lookup` does not have. Ids of -1 (none) stay. */
int64_t treadle_ids(const Ids *d)
{
    Cursor cursor = {d->address, d->count, 0, d->num_rows, sizeof(int32_t), 0, 0};
    int64_t *out = d->out;
    run_ahead(&cursor, AHEAD);
    for (int64_t i = 0; i < d->num_rows; i++) {
        const int32_t *x = (const int32_t *)d->address[i];
        int64_t count = d->count[i];
        for (int64_t t = 0; t < count; t += CHUNK / 4) {
            int64_t stop = t + CHUNK / 4 < count ? t + CHUNK / 4 : count;
            run_ahead(&cursor, (stop - t) * sizeof(int32_t));
            if (!put_ids(d, out, x, t, stop))
                return i;
        }
        for (int64_t t = count; t < d->steps; t++)
            out[t] = d->fill;
        out += d->steps ? d->steps : count;
    }
    return -1;
}

/* ---- anything of four bytes, as it is ---- */

typedef struct {
    const int64_t *address, *count;
    int64_t num_rows;
    uint32_t *out;
    int64_t steps; /* 0 where packed */
    int64_t width; /* numbers of an item */
    int64_t fill;  /* the bits of one number */
} Copy;

void treadle_copy(const Copy *c)
{
    int64_t item_bytes = c->width * sizeof(uint32_t);
    Cursor cursor = {c->address, c->count, 0, c->num_rows, item_bytes, 0, 0};
    uint32_t *out = c->out;
    run_ahead(&cursor, AHEAD);
    for (int64_t i = 0; i < c->num_rows; i++) {
        int64_t numbers = c->count[i] * c->width, room = c->steps * c->width;
        const char *from = (const char *)c->address[i];
        for (int64_t k = 0, bytes = numbers * sizeof(uint32_t); k < bytes; k += CHUNK) {
            int64_t size = bytes - k < CHUNK ? bytes - k : CHUNK;
            run_ahead(&cursor, size);
            memcpy((char *)out + k, from + k, size);
        }
        for (int64_t k = numbers; k < room; k++)
            out[k] = (uint32_t)c->fill;
        out += c->steps ? room : numbers;
    }
}
