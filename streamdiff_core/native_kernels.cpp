// The transformer's operations between matrix products, for CPUs with AVX512-BF16: see native_kernels.py.
//
// Numbers are held in bfloat16 or bytes and computed in float32. Loops over tokens, heads and tiles are shared out by
// OpenMP, so `torch.set_num_threads` holds here too. Each result depends on its own token, head or tile only: neither
// the number of threads nor other rows of a batch change a bit.
//
// Shapes: L queries, N keys, n heads, d head dim (a multiple of 64, at most 256), D width (a multiple of 16).

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;
using Vec = __m512;  // 16 numbers

namespace {

constexpr int LANES = 16;
constexpr int QUERIES = 64, KEYS = 128;  // of a tile of scores: 32 KiB
constexpr float LOWEST = -1e30f;

Vec all(float x) { return _mm512_set1_ps(x); }
Vec load(const float* p) { return _mm512_loadu_ps(p); }
Vec widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
void store(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
void store(uint8_t* p, Vec x) {  // clipped, rounded down
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), all(255));
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x)));
}
Vec dot(Vec sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }  // of pairs

Vec exp2(Vec x) {  // of x <= 126, relative error 4e-6
    x = _mm512_max_ps(x, all(-126));
    const Vec whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    Vec p = all(0.00961812910f);
    for (float c : {0.0555041087f, 0.240226507f, 0.693147181f, 1.0f}) p = _mm512_fmadd_ps(p, rest, all(c));
    return _mm512_scalef_ps(p, whole);
}

struct Heads {  // bfloat16 [tokens, n, d], numbers of a head side by side
    const bf16* data;
    long token, head;  // steps
    const bf16* at(long t, long h) const { return data + t * token + h * head; }
};

struct Tile {
    alignas(64) uint32_t q[128][QUERIES];       // pairs of numbers of a query, queries side by side
    alignas(64) float scores[KEYS][QUERIES];
    alignas(64) uint32_t weights[KEYS / 2][QUERIES];  // of a pair of keys
    alignas(64) float out[QUERIES][256];
    alignas(64) float factor[QUERIES];
};

// Scores of one block of keys, times `scale`; `best` is raised to the largest.
void score(Tile& t, Heads k, int h, int first, int count, int d, Vec scale, Vec best[4]) {
    for (int j = 0; j < count; j += 4) {
        const uint32_t* key[4];
        for (int b = 0; b < 4; b++) key[b] = (const uint32_t*)k.at(first + (j + b < count ? j + b : count - 1), h);
        Vec sum[4][4] = {};
        for (int i = 0; i < d / 2; i++) {
            __m512i q[4];
#pragma GCC unroll 4
            for (int a = 0; a < 4; a++) q[a] = _mm512_load_si512(&t.q[i][LANES * a]);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const __m512i pair = _mm512_set1_epi32(key[b][i]);
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) sum[b][a] = dot(sum[b][a], q[a], pair);
            }
        }
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++)
#pragma GCC unroll 4
            for (int a = 0; a < 4; a++) {
                const Vec s = j + b < count ? _mm512_mul_ps(sum[b][a], scale) : all(LOWEST);
                best[a] = _mm512_max_ps(best[a], s);
                store(&t.scores[j + b][LANES * a], s);
            }
    }
}

// Scores -> weights 2^(score - best) in bfloat16; `total` grows by them.
void weigh(Tile& t, int count, const Vec best[4], Vec total[4]) {
    const __m512i weave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int j = 0; j < count; j += 2)
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            const Vec even = exp2(_mm512_sub_ps(load(&t.scores[j][LANES * a]), best[a]));
            const Vec odd = exp2(_mm512_sub_ps(load(&t.scores[j + 1][LANES * a]), best[a]));
            total[a] = _mm512_add_ps(total[a], _mm512_add_ps(even, odd));
            const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
            _mm512_store_si512(&t.weights[j / 2][LANES * a], _mm512_permutexvar_epi16(weave, pairs));
        }
}

// Weighted values of one block of keys, added to `out`; values as pairs of keys [N / 2, d].
void gather(Tile& t, const uint32_t* values, int count, int queries, int d) {
    for (int c = 0; c < d; c += 4 * LANES)
        for (int j = 0; j < queries; j += 4) {
            Vec sum[4][4];
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++)
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) sum[b][a] = load(&t.out[j + b][c + LANES * a]);
            for (int i = 0; i < count / 2; i++) {
                __m512i v[4];
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) v[a] = _mm512_loadu_si512(values + (long)i * d + c + LANES * a);
#pragma GCC unroll 4
                for (int b = 0; b < 4; b++) {
                    const __m512i pair = _mm512_set1_epi32(t.weights[i][j + b]);
#pragma GCC unroll 4
                    for (int a = 0; a < 4; a++) sum[b][a] = dot(sum[b][a], pair, v[a]);
                }
            }
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++)
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) store(&t.out[j + b][c + LANES * a], sum[b][a]);
        }
}

// One tile of queries against all keys, block by block; what came before is scaled when a larger score turns up.
template <class Out>
void attend_tile(Tile& t, Heads q, Heads k, const uint32_t* values, int h, int from, int queries, int n, int d, Out* out,
                 long out_step, float mul, float add) {
    for (int i = 0; i < d / 2; i++)
        for (int j = 0; j < QUERIES; j++) t.q[i][j] = j < queries ? ((const uint32_t*)q.at(from + j, h))[i] : 0;
    std::memset(t.out, 0, sizeof t.out);
    const Vec scale = all(1.44269504f / std::sqrt((float)d));
    Vec best[4], total[4] = {};
    for (Vec& b : best) b = all(LOWEST);
    for (int first = 0; first < n; first += KEYS) {
        const int count = n - first < KEYS ? n - first : KEYS, even = (count + 3) & ~3;
        const Vec before[4] = {best[0], best[1], best[2], best[3]};
        score(t, k, h, first, count, d, scale, best);
        bool moved = false;
        for (int a = 0; a < 4; a++) {
            const Vec factor = exp2(_mm512_sub_ps(before[a], best[a]));
            moved |= _mm512_cmp_ps_mask(before[a], best[a], _CMP_NEQ_OQ) != 0;
            total[a] = _mm512_mul_ps(total[a], factor);
            store(t.factor + LANES * a, factor);
        }
        if (first && moved)
            for (int j = 0; j < queries; j++)
                for (int c = 0; c < d; c += LANES)
                    store(&t.out[j][c], _mm512_mul_ps(load(&t.out[j][c]), all(t.factor[j])));
        weigh(t, even, best, total);
        gather(t, values + (long)(first / 2) * d, even, queries, d);
    }
    for (int a = 0; a < 4; a++) store(t.factor + LANES * a, total[a]);
    for (int j = 0; j < queries; j++)
        for (int c = 0; c < d; c += LANES)
            store(out + (from + j) * out_step + h * d + c, _mm512_fmadd_ps(load(&t.out[j][c]), all(mul / t.factor[j]), all(add)));
}

template <class Out>
void attend_all(Heads q, Heads k, Heads v, Out* out, int queries, int n, int heads, int d, float mul, float add) {
    const int tiles = (queries + QUERIES - 1) / QUERIES, parts = omp_get_max_threads() > heads ? tiles : 1;
    const int pairs = (n + 3) / 4 * 2;
#pragma omp parallel for schedule(dynamic, 1)
    for (int task = 0; task < heads * parts; task++) {
        static thread_local std::vector<uint32_t> values;
        static thread_local Tile tile;
        const int h = task / parts;
        values.resize((size_t)pairs * d);
        for (int j = 0; j < pairs; j++)
            for (int c = 0; c < d; c++) {
                const uint32_t even = 2 * j < n ? v.at(2 * j, h)[c] : 0, odd = 2 * j + 1 < n ? v.at(2 * j + 1, h)[c] : 0;
                values[(size_t)j * d + c] = even | odd << 16;
            }
        for (int i = task % parts; i < tiles; i += parts) {
            const int from = i * QUERIES, left = queries - from;
            attend_tile(tile, q, k, values.data(), h, from, left < QUERIES ? left : QUERIES, n, d, out, (long)heads * d, mul, add);
        }
    }
}

Vec gelu(Vec x) {  // tanh form: x / (1 + e^(-2y)), y = sqrt(2 / pi) (x + 0.044715 x^3)
    const Vec cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(0.044715f), all(1));
    const Vec power = _mm512_mul_ps(_mm512_mul_ps(x, cubic), all(-2.302208198f));  // -2 sqrt(2 / pi) / ln 2
    return _mm512_div_ps(x, _mm512_add_ps(all(1), exp2(_mm512_min_ps(power, all(126)))));
}

// ROWS tokens times one panel of 64 outputs; a token beyond the last is the last once more, and not stored.
constexpr int ROWS = 6, PANEL = 64;
void multiply_tile(const bf16* x, int rows, const uint32_t* panel, const float* bias, bf16* out, long width, long outputs,
                   bool with_gelu) {
    const uint32_t* token[ROWS];
    for (int b = 0; b < ROWS; b++) token[b] = (const uint32_t*)(x + (b < rows ? b : rows - 1) * width);
    Vec sum[ROWS][4];
    for (int b = 0; b < ROWS; b++)
        for (int a = 0; a < 4; a++) sum[b][a] = load(bias + LANES * a);
    for (long i = 0; i < width / 2; i++) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) w[a] = _mm512_loadu_si512(panel + i * PANEL + LANES * a);
#pragma GCC unroll 6
        for (int b = 0; b < ROWS; b++) {
            const __m512i pair = _mm512_set1_epi32(token[b][i]);
#pragma GCC unroll 4
            for (int a = 0; a < 4; a++) sum[b][a] = dot(sum[b][a], pair, w[a]);
        }
    }
#pragma GCC unroll 6
    for (int b = 0; b < ROWS; b++)
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++)
            if (b < rows) store(out + b * outputs + LANES * a, with_gelu ? gelu(sum[b][a]) : sum[b][a]);
}

template <class Added, class Out>
void add_norm_all(const float* residual, const Added* added, const float* gate, float* sum, const float* shift,
                  const float* scale, Out* out, long tokens, int width, long group, long gate_step, long step, float eps) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float* x = residual + t * width;
        if (added) {
            for (int c = 0; c < width; c += LANES) {
                const Vec a = load(added + t * width + c), g = gate ? load(gate + t / group * gate_step + c) : all(1);
                store(sum + t * width + c, _mm512_fmadd_ps(a, g, load(x + c)));
            }
            x = sum + t * width;
        }
        if (!out) continue;
        Vec mean = all(0), squares = all(0);
        for (int c = 0; c < width; c += LANES) mean = _mm512_add_ps(mean, load(x + c));
        mean = all(_mm512_reduce_add_ps(mean) / width);
        for (int c = 0; c < width; c += LANES) {
            const Vec differs = _mm512_sub_ps(load(x + c), mean);
            squares = _mm512_fmadd_ps(differs, differs, squares);
        }
        const Vec root = all(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
        for (int c = 0; c < width; c += LANES) {
            const Vec normal = _mm512_mul_ps(_mm512_sub_ps(load(x + c), mean), root);
            const long m = t / group * step + c;
            store(out + t * width + c, _mm512_fmadd_ps(normal, load(scale + m), load(shift + m)));
        }
    }
}

// (x[2i], x[2i + 1]) are complex numbers; `by` likewise.
Vec turned(Vec x, Vec by) {
    const Vec swapped = _mm512_mul_ps(_mm512_permute_ps(x, 0xB1), _mm512_movehdup_ps(by));
    return _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(by), swapped);
}

template <class In>
void norm_rotate_all(const In* in, long in_step, const float* weight, const float* by, long period, bf16* out, long tokens,
                     int width, int d, float eps) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const In* x = in + t * in_step;
        Vec squares = all(0);
        for (int c = 0; weight && c < width; c += LANES) squares = _mm512_fmadd_ps(load(x + c), load(x + c), squares);
        const Vec root = all(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
        for (int c = 0; c < width; c += LANES) {
            Vec v = load(x + c);
            if (weight) v = _mm512_mul_ps(_mm512_mul_ps(v, root), load(weight + c));
            if (by) v = turned(v, load(by + t % period * d + c % d));
            store(out + t * width + c, v);
        }
    }
}

}  // namespace

extern "C" {

void attend(const bf16* q, long q_token, long q_head, const bf16* k, long k_token, long k_head, const bf16* v, long v_token,
            long v_head, void* out, int as_bytes, int queries, int n, int heads, int d, float mul, float add) {
    const Heads qs = {q, q_token, q_head}, ks = {k, k_token, k_head}, vs = {v, v_token, v_head};
    if (as_bytes) attend_all(qs, ks, vs, (uint8_t*)out, queries, n, heads, d, mul, add);
    else attend_all(qs, ks, vs, (bf16*)out, queries, n, heads, d, mul, add);
}

void add_norm(const float* residual, const void* added, int is_half, const float* gate, float* sum, const float* shift,
              const float* scale, void* out, int as_bytes, long tokens, int width, long group, long gate_step, long step, float eps) {
    const auto run = [&](auto* in, auto* to) {
        add_norm_all(residual, in, gate, sum, shift, scale, to, tokens, width, group, gate_step, step, eps);
    };
    if (is_half && as_bytes) run((const bf16*)added, (uint8_t*)out);
    else if (is_half) run((const bf16*)added, (bf16*)out);
    else if (as_bytes) run((const float*)added, (uint8_t*)out);
    else run((const float*)added, (bf16*)out);
}

void norm_rotate(const void* in, int is_half, long in_step, const float* weight, const float* by, long period, bf16* out,
                 long tokens, int width, int d, float eps) {
    if (is_half) norm_rotate_all((const bf16*)in, in_step, weight, by, period, out, tokens, width, d, eps);
    else norm_rotate_all((const float*)in, in_step, weight, by, period, out, tokens, width, d, eps);
}

void linear(const bf16* x, const uint32_t* panels, const float* bias, bf16* out, long tokens, long width, long outputs,
            int with_gelu) {
    constexpr long BLOCK = 16 * ROWS;
    const long blocks = (tokens + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 1)
    for (long task = 0; task < outputs / PANEL * blocks; task++) {
        const long p = task / blocks, first = task % blocks * BLOCK, end = first + BLOCK < tokens ? first + BLOCK : tokens;
        for (long t = first; t < end; t += ROWS)
            multiply_tile(x + t * width, end - t < ROWS ? end - t : ROWS, panels + p * PANEL * (width / 2), bias + p * PANEL,
                          out + t * outputs + p * PANEL, width, outputs, with_gelu);
    }
}

void turn(const bf16* raw, long raw_slot, long raw_token, long raw_head, bf16* k, long k_slot, long k_token, long k_head,
          const float* by, int slots, int tokens, int heads, int numbers) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int s = 0; s < slots; s++)
        for (int h = 0; h < heads; h++)
            for (int t = 0; t < tokens; t++)
                for (int c = 0; c < numbers; c += LANES) {
                    const int left = numbers - c;
                    const __mmask16 mask = left >= LANES ? 0xffff : (1 << left) - 1;
                    const Vec x = widen(_mm256_maskz_loadu_epi16(mask, raw + s * raw_slot + t * raw_token + h * raw_head + c));
                    const Vec y = turned(x, _mm512_maskz_loadu_ps(mask, by + (long)s * numbers + c));
                    _mm256_mask_storeu_epi16(k + s * k_slot + t * k_token + h * k_head + c, mask, (__m256i)_mm512_cvtneps_pbh(y));
                }
}
}
