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

// Rows lie side by side, but where a number of values `apart` is told for a tensor.

// y = x · rsqrt(mean(x²) + eps) · weight; with `update`, x + update comes first and is kept in `total`. Weights and
// biases of norms are fp32, whatever S is.
template <class S>
void rms_norm(const S* x, const S* update, const float* weight, S* total, S* y, int64_t y_apart, float* scale,
              int64_t rows, int64_t width, float eps, int threads) {
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
        S* out = y + t * y_apart;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(out + i, load(in + i) * r * weight[i]);
    }
}

// With g = dy · weight and n = x · scale: dx = scale · (g - n · mean(g · n)), + residual if there is one; and y again.
template <class S>
void rms_norm_backward(const S* dy, const S* x, const float* scale, const float* weight, const S* residual,
                       int64_t residual_apart, S* dx, int64_t dx_apart, S* y, int64_t rows, int64_t width,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S *d = dy + t * width, *in = x + t * width, *rest = residual + t * residual_apart;
        S *out = dx + t * dx_apart, *normed = y + t * width;
        float r = scale[t], inner = 0;
#pragma omp simd reduction(+ : inner)
        for (int64_t i = 0; i < width; i++) inner += load(d + i) * weight[i] * load(in + i);
        float mean = inner * r / width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float n = load(in + i) * r, w = weight[i];
            float change = r * (load(d + i) * w - n * mean);
            store(out + i, residual ? change + load(rest + i) : change);
            store(normed + i, n * w);
        }
    }
}

// y = (x - mean(x)) / std(x) · weight + bias; `moments` are 1 / std and the mean of each row.
template <class S>
void layer_norm(const S* x, const float* weight, const float* bias, S* y, int64_t y_apart, float* moments, int64_t rows,
                int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S* in = x + t * width;
        S* out = y + t * y_apart;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += load(in + i);
        float mean = sum / width;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += (load(in + i) - mean) * (load(in + i) - mean);
        float r = 1.0f / std::sqrt(squares / width + eps);
        moments[2 * t] = r;
        moments[2 * t + 1] = mean;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(out + i, (load(in + i) - mean) * r * weight[i] + bias[i]);
    }
}

// With g = dy · weight and n = (x - mean) · scale: dx = scale · (g - mean(g) - n · mean(g · n)) + residual; and y again.
template <class S>
void layer_norm_backward(const S* dy, const S* x, const float* moments, const float* weight, const float* bias,
                         const S* residual, int64_t residual_apart, S* dx, int64_t dx_apart, S* y, int64_t rows,
                         int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S *d = dy + t * width, *in = x + t * width, *rest = residual + t * residual_apart;
        S *out = dx + t * dx_apart, *normed = y + t * width;
        float r = moments[2 * t], mean = moments[2 * t + 1], sum = 0, inner = 0;
#pragma omp simd reduction(+ : sum, inner)
        for (int64_t i = 0; i < width; i++) {
            float g = load(d + i) * weight[i];
            sum += g;
            inner += g * (load(in + i) - mean) * r;
        }
        float level = sum / width, slope = inner / width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float n = (load(in + i) - mean) * r, w = weight[i];
            store(out + i, r * (load(d + i) * w - level - n * slope) + load(rest + i));
            store(normed + i, n * w + bias[i]);
        }
    }
}

// scale · rotary embedding: (a, b) -> (a·cos - b·sin, b·cos + a·sin) for `turned` pairs of features that lie `apart` and
// follow each other by `step`; the features past them are scaled. From one layout of heads to another.
template <class S>
void rotate(const S* x, const int64_t* in, const S* cos, const S* sin, S* y, const int64_t* out, int64_t tokens,
            int64_t groups, int64_t repeats, int64_t size, int64_t turned, int64_t step, int64_t apart, float scale,
            float sign, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const S *c = cos + t * turned, *s = sin + t * turned;
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t r = 0; r < repeats; r++) {
                const S* a = x + t * in[0] + g * in[1] + r * in[2];
                S* o = y + t * out[0] + g * out[1] + r * out[2];
#pragma omp simd
                for (int64_t i = 0; i < turned; i++) {
                    int64_t j = i * step, k = j + apart;
                    float p = load(a + j), q = load(a + k), co = load(c + i) * scale, si = load(s + i) * sign * scale;
                    store(o + j, p * co - q * si);
                    store(o + k, q * co + p * si);
                }
#pragma omp simd
                for (int64_t i = 2 * turned; i < size; i++) store(o + i, load(a + i) * scale);
            }
        }
    }
}

// An activation at x: its slope, and the share of x that it lets through.
struct Act {
    float share, slope;
};

struct Silu {
    static Act at(float x) {
        float s = 1.0f / (1.0f + exponential(-x));
        return {s, s * (1.0f + x * (1.0f - s))};
    }
};

// The share is Φ(x), by Abramowitz and Stegun 7.1.26, which is off by 1.5e-7 at most.
struct Gelu {
    static Act at(float x) {
        float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
        float density = exponential(-z * z);
        float poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
        float tail = 0.5f * poly * density, share = x < 0 ? tail : 1.0f - tail;
        return {share, share + x * 0.39894228f * density};
    }
};

// Φ(x) as (1 + tanh(u / 2)) / 2, which is the logistic function of u.
struct GeluTanh {
    static Act at(float x) {
        float s = 1.0f / (1.0f + exponential(-1.5957691f * (x + 0.044715f * x * x * x)));
        return {s, s + x * s * (1.0f - s) * 1.5957691f * (1.0f + 0.134145f * x * x)};
    }
};

// h = act(x), or act(gate) · up for rows of gate|up.
template <class A, class S>
void activate(const S* x, int64_t x_apart, S* h, int64_t h_apart, int64_t rows, int64_t width, bool gated,
              int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S *gate = x + t * x_apart, *up = gate + width;
        S* out = h + t * h_apart;
        if (gated) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float g = load(gate + i);
                store(out + i, g * A::at(g).share * load(up + i));
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float g = load(gate + i);
                store(out + i, g * A::at(g).share);
            }
        }
    }
}

// Overwrites x with its gradient and makes h again.
template <class A, class S>
void activate_backward(const S* dh, S* x, int64_t x_apart, S* h, int64_t rows, int64_t width, bool gated,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const S* d = dh + t * width;
        S *gate = x + t * x_apart, *up = gate + width, *out = h + t * width;
        if (gated) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float g = load(gate + i), u = load(up + i), dv = load(d + i);
                Act act = A::at(g);
                store(out + i, g * act.share * u);
                store(up + i, dv * g * act.share);
                store(gate + i, dv * u * act.slope);
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float g = load(gate + i), dv = load(d + i);
                Act act = A::at(g);
                store(out + i, g * act.share);
                store(gate + i, dv * act.slope);
            }
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

#define EXPORT_ACT(NAME, S, ACT, A)                                                                                    \
    extern "C" void activate_##ACT##_##NAME(const S* x, int64_t xa, S* h, int64_t ha, int64_t n, int64_t k,            \
                                            int64_t gated, int j) {                                                    \
        activate<A>(x, xa, h, ha, n, k, gated != 0, j);                                                                \
    }                                                                                                                  \
    extern "C" void activate_backward_##ACT##_##NAME(const S* d, S* x, int64_t xa, S* h, int64_t n, int64_t k,         \
                                                     int64_t gated, int j) {                                           \
        activate_backward<A>(d, x, xa, h, n, k, gated != 0, j);                                                        \
    }

#define EXPORT(NAME, S)                                                                                                \
    extern "C" void rms_norm_##NAME(const S* x, const S* u, const float* w, S* t, S* y, int64_t ya, float* s,          \
                                    int64_t n, int64_t k, float eps, int j) {                                          \
        rms_norm(x, u, w, t, y, ya, s, n, k, eps, j);                                                                  \
    }                                                                                                                  \
    extern "C" void rms_norm_backward_##NAME(const S* d, const S* x, const float* s, const float* w, const S* r,       \
                                             int64_t ra, S* dx, int64_t da, S* y, int64_t n, int64_t k, int j) {       \
        rms_norm_backward(d, x, s, w, r, ra, dx, da, y, n, k, j);                                                      \
    }                                                                                                                  \
    extern "C" void layer_norm_##NAME(const S* x, const float* w, const float* b, S* y, int64_t ya, float* m,          \
                                      int64_t n, int64_t k, float eps, int j) {                                        \
        layer_norm(x, w, b, y, ya, m, n, k, eps, j);                                                                   \
    }                                                                                                                  \
    extern "C" void layer_norm_backward_##NAME(const S* d, const S* x, const float* m, const float* w, const float* b, \
                                               const S* r, int64_t ra, S* dx, int64_t da, S* y, int64_t n, int64_t k,  \
                                               int j) {                                                                \
        layer_norm_backward(d, x, m, w, b, r, ra, dx, da, y, n, k, j);                                                 \
    }                                                                                                                  \
    extern "C" void rotate_##NAME(const S* x, const int64_t* in, const S* c, const S* s, S* y, const int64_t* out,     \
                                  int64_t t, int64_t g, int64_t r, int64_t size, int64_t turned, int64_t step,         \
                                  int64_t apart, float scale, float sign, int j) {                                     \
        rotate(x, in, c, s, y, out, t, g, r, size, turned, step, apart, scale, sign, j);                               \
    }                                                                                                                  \
    EXPORT_ACT(NAME, S, silu, Silu)                                                                                    \
    EXPORT_ACT(NAME, S, gelu, Gelu)                                                                                    \
    EXPORT_ACT(NAME, S, gelu_tanh, GeluTanh)                                                                           \
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
