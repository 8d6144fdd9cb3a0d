// The parts of a decoder block between its matrix products, each in one pass over memory, for fp32 and bf16 tensors.
// Built on first use by native.py, which also checks shapes; no torch header is needed, so a build takes seconds.
// Every function has a plain twin: see pointwise.py, attention.py and loss.py. Arithmetic is fp32 throughout.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using bf16 = uint16_t;

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) { return __builtin_bit_cast(float, uint32_t(*p) << 16); }

inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could turn a NaN into zero
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = bf16(nan ? 0x7fc0 : nearest);
}

// exp(x) as 2^n · p(f), to 2 units in the last place; written out so that it becomes vector instructions anywhere.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
}

// y = x · rsqrt(mean(x²) + eps) · weight; with `update`, x + update comes first and is kept in `total`.
template <class S>
void rms_norm(const S* x, const S* update, const S* weight, S* total, S* y, float* scale, int64_t rows, int64_t width,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S* in = x + t * width;
        if (update) {
            const S* change = update + t * width;
            S* sum = total + t * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(sum + i, load(in + i) + load(change + i));
            in = sum;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += load(in + i) * load(in + i);
        float r = 1.0f / std::sqrt(squares / width + eps);
        scale[t] = r;
        S* out = y + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(out + i, load(in + i) * r * load(weight + i));
    }
}

// With g = dy · weight and n = x · scale: dx = scale · (g - n · mean(g · n)) + residual; and y again.
template <class S>
void rms_norm_backward(const S* dy, const S* x, const float* scale, const S* weight, const S* residual, S* dx, S* y,
                       int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S *d = dy + t * width, *in = x + t * width, *rest = residual + t * width;
        S *out = dx + t * width, *normed = y + t * width;
        float r = scale[t], inner = 0;
#pragma omp simd reduction(+ : inner)
        for (int64_t i = 0; i < width; i++) inner += load(d + i) * load(weight + i) * load(in + i);
        float mean = inner * r / width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float n = load(in + i) * r, w = load(weight + i);
            store(out + i, r * (load(d + i) * w - n * mean) + load(rest + i));
            store(normed + i, n * w);
        }
    }
}

// Rotary embedding, half-split: (a, b) -> (a·cos - b·sin, b·cos + a·sin), from one layout of heads to another.
template <class S>
void rotate(const S* x, const int64_t* in, const S* cos, const S* sin, S* y, const int64_t* out, int64_t tokens,
            int64_t groups, int64_t repeats, int64_t half, float sign, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const S *c = cos + t * half, *s = sin + t * half;
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t r = 0; r < repeats; r++) {
                const S* a = x + t * in[0] + g * in[1] + r * in[2];
                S* o = y + t * out[0] + g * out[1] + r * out[2];
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    float p = load(a + i), q = load(a + half + i), co = load(c + i), si = load(s + i) * sign;
                    store(o + i, p * co - q * si);
                    store(o + half + i, q * co + p * si);
                }
            }
        }
    }
}

// h = silu(gate) · up, for rows of gate|up.
template <class S>
void swiglu(const S* gate_up, S* h, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S *gate = gate_up + 2 * t * width, *up = gate + width;
        S* out = h + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = load(gate + i);
            store(out + i, g / (1.0f + exponential(-g)) * load(up + i));
        }
    }
}

// Overwrites gate|up with its gradient and makes h again.
template <class S>
void swiglu_backward(const S* dh, S* gate_up, S* h, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S* d = dh + t * width;
        S *gate = gate_up + 2 * t * width, *up = gate + width, *out = h + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = load(gate + i), u = load(up + i), dv = load(d + i);
            float s = 1.0f / (1.0f + exponential(-g)), act = g * s;
            store(out + i, act * u);
            store(up + i, dv * act);
            store(gate + i, dv * u * s * (1.0f + g * (1.0f - s)));
        }
    }
}

// Softmax of scores [groups, queries, repeats, keys] in place; row q sees its first seen[q] keys, the others get 0.
// A row is widened to whole blocks of lanes: with the short rows of attention, remainders would take most of the time.
template <class S>
void softmax(S* scores, const int64_t* seen, int64_t groups, int64_t queries, int64_t repeats, int64_t keys,
             int threads) {
    constexpr int64_t lanes = 16;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> row((keys + lanes - 1) / lanes * lanes);
        float* x = row.data();
#pragma omp for
        for (int64_t r = 0; r < groups * queries * repeats; r++) {
            int64_t n = seen[r / repeats % queries], blocks = (n + lanes - 1) / lanes;
            S* p = scores + r * keys;
            float highest[lanes], sums[lanes] = {};
            for (int64_t i = 0; i < n; i++) x[i] = load(p + i);
            for (int64_t i = n; i < blocks * lanes; i++) x[i] = -INFINITY;
            for (int64_t j = 0; j < lanes; j++) highest[j] = -INFINITY;
            for (int64_t b = 0; b < blocks; b++) {
#pragma omp simd
                for (int64_t j = 0; j < lanes; j++) {
                    float value = x[b * lanes + j];
                    highest[j] = value > highest[j] ? value : highest[j];
                }
            }
            float largest = highest[0], mass = 0;
            for (int64_t j = 1; j < lanes; j++) largest = highest[j] > largest ? highest[j] : largest;
            for (int64_t b = 0; b < blocks; b++) {
#pragma omp simd
                for (int64_t j = 0; j < lanes; j++) {
                    float e = exponential(x[b * lanes + j] - largest);  // about 1e-38 past the end
                    x[b * lanes + j] = e;
                    sums[j] += e;
                }
            }
            for (int64_t j = 0; j < lanes; j++) mass += sums[j];
            float share = 1.0f / mass;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) store(p + i, x[i] * share);
            for (int64_t i = n; i < keys; i++) store(p + i, 0.0f);
        }
    }
}

// d scores = p · (dp - delta), over dp [rows, keys].
template <class S>
void softmax_backward(S* dp, const S* p, const float* delta, int64_t rows, int64_t keys, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        S* d = dp + row * keys;
        const S* share = p + row * keys;
        float sum = delta[row];
#pragma omp simd
        for (int64_t i = 0; i < keys; i++) store(d + i, load(share + i) * (load(d + i) - sum));
    }
}

// exp(x - max) of rows of logits in place, with each row's maximum and sum.
template <class S>
void exponentials(S* logits, float* largest, float* mass, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        S* x = logits + row * width;
        float most = load(x), sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; i++) most = load(x + i) > most ? load(x + i) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) {
            float e = exponential(load(x + i) - most);
            store(x + i, e);
            sum += e;
        }
        largest[row] = most;
        mass[row] = sum;
    }
}

}  // namespace

#define EXPORT(NAME, S)                                                                                                \
    extern "C" void rms_norm_##NAME(const S* x, const S* u, const S* w, S* t, S* y, float* s, int64_t n, int64_t k,    \
                                    float eps, int j) { rms_norm(x, u, w, t, y, s, n, k, eps, j); }                    \
    extern "C" void rms_norm_backward_##NAME(const S* d, const S* x, const float* s, const S* w, const S* r, S* dx,    \
                                             S* y, int64_t n, int64_t k, int j) {                                      \
        rms_norm_backward(d, x, s, w, r, dx, y, n, k, j);                                                              \
    }                                                                                                                  \
    extern "C" void rotate_##NAME(const S* x, const int64_t* in, const S* c, const S* s, S* y, const int64_t* out,     \
                                  int64_t t, int64_t g, int64_t r, int64_t h, float sign, int j) {                     \
        rotate(x, in, c, s, y, out, t, g, r, h, sign, j);                                                              \
    }                                                                                                                  \
    extern "C" void swiglu_##NAME(const S* x, S* h, int64_t n, int64_t k, int j) { swiglu(x, h, n, k, j); }            \
    extern "C" void swiglu_backward_##NAME(const S* d, S* x, S* h, int64_t n, int64_t k, int j) {                      \
        swiglu_backward(d, x, h, n, k, j);                                                                             \
    }                                                                                                                  \
    extern "C" void softmax_##NAME(S* x, const int64_t* seen, int64_t g, int64_t q, int64_t r, int64_t k, int j) {     \
        softmax(x, seen, g, q, r, k, j);                                                                               \
    }                                                                                                                  \
    extern "C" void softmax_backward_##NAME(S* d, const S* p, const float* s, int64_t n, int64_t k, int j) {           \
        softmax_backward(d, p, s, n, k, j);                                                                            \
    }                                                                                                                  \
    extern "C" void exponentials_##NAME(S* x, float* most, float* sum, int64_t n, int64_t k, int j) {                  \
        exponentials(x, most, sum, n, k, j);                                                                           \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bf16)
