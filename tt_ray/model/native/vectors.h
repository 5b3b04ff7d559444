// Vectors of the machine's width, and matrix products made of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8;
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif


int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class S>
struct Simd {
    typedef S Vector __attribute__((vector_size(kVectorBytes)));
    static constexpr int lanes = kVectorBytes / sizeof(S);
    static constexpr int panel = 2 * lanes;
    static Vector load(const S *p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(S *p, Vector v) { std::memcpy(p, &v, sizeof v); }
    static Vector broadcast(S x) { return Vector{} + x; }
    static S sum(Vector v) {
        S parts[lanes];
        std::memcpy(parts, &v, sizeof v);
        for (int half = lanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++) parts[i] += parts[i + half];
        return parts[0];
    }
    static S max(Vector v) {
        S best = v[0];
        for (int i = 1; i < lanes; i++) best = v[i] > best ? v[i] : best;
        return best;
    }
};

// exp(x) for x <= 0; exactly 0 for -inf, so that what is hidden weighs nothing.
inline Simd<float>::Vector exponential(Simd<float>::Vector x) {
    using F = Simd<float>;
    typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
    const F::Vector low = F::broadcast(-87.0f), magic = F::broadcast(12582912.0f);  // 1.5 * 2^23 rounds
    const Ints vanishes = x < low;
    x = x < low ? low : x;
    const F::Vector n = (x * 1.44269504f + magic) - magic;
    const F::Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    F::Vector p = F::broadcast(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    F::Vector power;
    std::memcpy(&power, &bits, sizeof power);
    const F::Vector result = p * power;
    return vanishes ? F::Vector{} : result;
}

inline Simd<double>::Vector exponential(Simd<double>::Vector x) {
    for (int i = 0; i < Simd<double>::lanes; i++) x[i] = std::exp(x[i]);
    return x;
}

// erf(z) = z P(z^2) / Q(z^2) on [-4, 4], a minimax fit with relative error 2.5e-8.
inline Simd<float>::Vector error_function(Simd<float>::Vector z) {
    using F = Simd<float>;
    z = z < -4.0f ? F::broadcast(-4.0f) : z;
    z = z > 4.0f ? F::broadcast(4.0f) : z;
    const F::Vector t = z * z;
    F::Vector p = F::broadcast(1.98680584e-06f), q = F::broadcast(3.74201522e-05f);
    for (float c : {0.000284560853f, 0.00388315485f, 0.0531011642f, 0.193540767f, 1.12837914f}) p = p * t + c;
    for (float c : {0.00118552369f, 0.0152068748f, 0.115348211f, 0.504853596f, 1.0f}) q = q * t + c;
    return z * p / q;
}

inline Simd<double>::Vector error_function(Simd<double>::Vector z) {
    for (int i = 0; i < Simd<double>::lanes; i++) z[i] = std::erf(z[i]);
    return z;
}

enum Epilogue { kStore, kAdd, kGelu };

// kTileRows rows times `vectors` vectors of columns; `b` [inputs, ldb]. Sums run over the inputs in order.
template <class S, int vectors>
inline void multiply_tile(const S *a, int64_t lda, const S *b, int64_t ldb, int64_t inputs,
                          typename Simd<S>::Vector (&sum)[kTileRows][vectors]) {
    using F = Simd<S>;
    for (int i = 0; i < kTileRows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = typename F::Vector{};
    for (int64_t k = 0; k < inputs; k++) {
        typename F::Vector column[vectors];
        for (int j = 0; j < vectors; j++) column[j] = F::load(b + k * ldb + j * F::lanes);
        for (int i = 0; i < kTileRows; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] += column[j] * a[i * lda + k];
    }
}

template <class S, int vectors, Epilogue epilogue>
inline void multiply_columns(int64_t rows, const S *a, int64_t lda, const S *b, int64_t ldb, int64_t inputs,
                             const S *bias, S *out, int64_t ldo) {
    using F = Simd<S>;
    for (int64_t row = 0; row < rows; row += kTileRows) {
        typename F::Vector sum[kTileRows][vectors];
        multiply_tile<S, vectors>(a + row * lda, lda, b, ldb, inputs, sum);
        for (int i = 0; i < kTileRows; i++)
            for (int j = 0; j < vectors; j++) {
                S *to = out + (row + i) * ldo + j * F::lanes;
                typename F::Vector value = sum[i][j];
                if (bias != nullptr) value += F::load(bias + j * F::lanes);
                if (epilogue == kAdd) value += F::load(to);
                if (epilogue == kGelu) value = value * (error_function(value * S(0.70710678118654752)) + S(1)) * S(0.5);
                F::store(to, value);
            }
    }
}

// out [rows, outputs] (=, += or GELU of) a [rows, inputs] times a packed matrix, plus bias.
template <class S, Epilogue epilogue>
void multiply(int64_t rows, const S *a, int64_t lda, const S *packed, int64_t inputs, int64_t outputs, const S *bias,
              S *out, int64_t ldo) {
    constexpr int64_t panel = Simd<S>::panel;
    for (int64_t column = 0; column < outputs; column += panel)
        multiply_columns<S, 2, epilogue>(rows, a, lda, packed + column * inputs, panel, inputs,
                                         bias == nullptr ? nullptr : bias + column, out + column, ldo);
}

// out [rows, columns] = a [rows, inputs] times b [inputs, ldb]; columns are whole vectors.
template <class S>
void multiply_plain(int64_t rows, const S *a, int64_t lda, const S *b, int64_t ldb, int64_t inputs, int64_t columns,
                    S *out, int64_t ldo) {
    constexpr int64_t lanes = Simd<S>::lanes;
    int64_t column = 0;
    for (; column + 2 * lanes <= columns; column += 2 * lanes)
        multiply_columns<S, 2, kStore>(rows, a, lda, b + column, ldb, inputs, nullptr, out + column, ldo);
    for (; column < columns; column += lanes)
        multiply_columns<S, 1, kStore>(rows, a, lda, b + column, ldb, inputs, nullptr, out + column, ldo);
}
