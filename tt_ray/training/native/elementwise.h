// What a layer does to each number or row: dropout, GELU, LayerNorm, with their gradients.

#pragma once

#include "products.h"

// `v`'s numbers put together with `join`, in halves.
template <class S, int half = Simd<S>::lanes / 2, class Join>
inline S fold(typename Simd<S>::Vector v, Join join) {
    constexpr int lanes = Simd<S>::lanes;
#ifdef TT_RAY_SHUFFLES
    Places<S> other;
    for (int i = 0; i < lanes; i++) other[i] = i ^ half;
    v = join(v, __builtin_shuffle(v, other));
#else
    for (int i = 0; i < half; i++) v[i] = join(v[i], v[i + half]);
#endif
    if constexpr (half > 1) return fold<S, half / 2>(v, join);
    else return v[0];
}

template <class S>
inline S sum_of(typename Simd<S>::Vector v) {
    return fold<S>(v, [](auto a, auto b) { return a + b; });
}

template <class S>
inline S max_of(typename Simd<S>::Vector v) {
    return fold<S>(v, [](auto a, auto b) { return a > b ? a : b; });
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

// A bijection that scatters (splitmix64's), of a number or of each in a vector.
template <class T>
inline T scatter(T z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Masks as a function of (key, row, column), so that the backward pass draws them again instead of keeping them.
template <class S>
class Dropout {
    using F = Simd<S>;
    typedef std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t> Word;
    typedef Word Words __attribute__((vector_size(kVectorBytes)));
    typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
    static constexpr int parts = sizeof(S) / 2, longs = kVectorBytes / 8;  // 16 bits a number

  public:
    // `dropped` of 65,536 numbers become 0 in rows of `vectors` vectors at most.
    Dropout(uint64_t key, int64_t dropped, int64_t vectors)
        : key(key), stride((vectors + parts - 1) / parts), threshold(Words{} + static_cast<Word>(dropped)),
          scale(F::broadcast(S(65536) / S(65536 - dropped))), active(dropped > 0) {}

    // each(v, factor) for every vector v of a row: numbers kept have the factor 65,536 / (65,536 - dropped).
    template <class Each>
    inline void row(int64_t row, int64_t vectors, Each each) const {
        if (!active) {
            for (int64_t v = 0; v < vectors; v++) each(v, F::broadcast(S(1)));
            return;
        }
        Longs counter;
        for (int i = 0; i < longs; i++) counter[i] = i * kGolden;
        counter += key + static_cast<uint64_t>(row * stride * longs) * kGolden;
        for (int64_t first = 0; first < vectors; first += parts, counter += longs * kGolden) {
            const Longs random = scatter(counter);
            Words bits;
            std::memcpy(&bits, &random, sizeof bits);
            for (int part = 0; part < parts && first + part < vectors; part++)
                each(first + part, ((bits >> (16 * part)) & 0xffff) >= threshold ? scale : typename F::Vector{});
        }
    }

  private:
    uint64_t key;
    int64_t stride;
    Words threshold;
    typename F::Vector scale;
    bool active;
};

// out [rows, width] = x + dropout(branch)
template <class S>
void add_branch(int64_t rows, int64_t width, const S *x, int64_t ldx, const S *branch, int64_t ldb,
                const Dropout<S> &drop, S *out, int64_t ldo) {
    using F = Simd<S>;
    for (int64_t row = 0; row < rows; row++)
        drop.row(row, width / F::lanes, [&](int64_t v, typename F::Vector factor) {
            const int64_t i = v * F::lanes;
            F::store(out + row * ldo + i, F::load(x + row * ldx + i) + F::load(branch + row * ldb + i) * factor);
        });
}

// branch's gradient [rows, width] of `add_branch`
template <class S>
void branch_gradient(int64_t rows, int64_t width, const S *gradient, int64_t ldg, const Dropout<S> &drop, S *out,
                     int64_t ldo) {
    using F = Simd<S>;
    for (int64_t row = 0; row < rows; row++)
        drop.row(row, width / F::lanes, [&](int64_t v, typename F::Vector factor) {
            const int64_t i = v * F::lanes;
            F::store(out + row * ldo + i, F::load(gradient + row * ldg + i) * factor);
        });
}

template <class S>
void gelu(int64_t count, const S *x, S *out) {
    using F = Simd<S>;
    for (int64_t i = 0; i < count; i += F::lanes) {
        const auto value = F::load(x + i);
        F::store(out + i, value * (error_function(value * S(0.70710678118654752)) + S(1)) * S(0.5));
    }
}

// x becomes gelu(x), and the gradient of that becomes the gradient of x.
template <class S>
void gelu_gradient(int64_t count, S *x, S *gradient) {
    using F = Simd<S>;
    for (int64_t i = 0; i < count; i += F::lanes) {
        const auto value = F::load(x + i);
        const auto share = (error_function(value * S(0.70710678118654752)) + S(1)) * S(0.5);
        const auto density = exponential(value * value * S(-0.5)) * S(0.39894228040143268);
        F::store(x + i, value * share);
        F::store(gradient + i, F::load(gradient + i) * (share + value * density));
    }
}

// A row's mean and the factor that makes its variance 1.
template <class S>
struct Moments {
    S mean, scale;
};

template <class S>
void layer_norm(int64_t rows, int64_t width, double epsilon, const S *x, int64_t ldx, const S *weight, const S *bias,
                S *out, int64_t ldo, Moments<S> *moments) {
    using F = Simd<S>;
    for (int64_t row = 0; row < rows; row++) {
        const S *in = x + row * ldx;
        typename F::Vector total{}, squares{};
        for (int64_t i = 0; i < width; i += F::lanes) total += F::load(in + i);
        const S mean = sum_of<S>(total) / width;
        for (int64_t i = 0; i < width; i += F::lanes) {
            const auto off = F::load(in + i) - mean;
            squares += off * off;
        }
        const S scale = S(1) / std::sqrt(sum_of<S>(squares) / width + S(epsilon));
        for (int64_t i = 0; i < width; i += F::lanes)
            F::store(out + row * ldo + i, (F::load(in + i) - mean) * scale * F::load(weight + i) + F::load(bias + i));
        moments[row] = {mean, scale};
    }
}

// out = base + the gradient of x, given that of the norm's output; adds to the weight's and the bias's gradients.
template <class S>
void layer_norm_gradient(int64_t rows, int64_t width, const S *x, int64_t ldx, const Moments<S> *moments,
                         const S *weight, const S *gradient, int64_t ldg, const S *base, int64_t ldb, S *out,
                         int64_t ldo, S *weight_gradient, S *bias_gradient) {
    using F = Simd<S>;
    for (int64_t row = 0; row < rows; row++) {
        const S *in = x + row * ldx, *from = gradient + row * ldg;
        const S mean = moments[row].mean, scale = moments[row].scale;
        typename F::Vector total{}, along{};
        for (int64_t i = 0; i < width; i += F::lanes) {
            const auto normed = (F::load(in + i) - mean) * scale, given = F::load(from + i);
            F::store(weight_gradient + i, F::load(weight_gradient + i) + given * normed);
            F::store(bias_gradient + i, F::load(bias_gradient + i) + given);
            total += given * F::load(weight + i);
            along += given * F::load(weight + i) * normed;
        }
        const S shift = sum_of<S>(total) / width, slope = sum_of<S>(along) / width;
        for (int64_t i = 0; i < width; i += F::lanes) {
            const auto normed = (F::load(in + i) - mean) * scale;
            const auto own = F::load(from + i) * F::load(weight + i) - shift - normed * slope;
            F::store(out + row * ldo + i, F::load(base + row * ldb + i) + own * scale);
        }
    }
}
