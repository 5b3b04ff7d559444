// Products of a layer's forward and backward pass, on one core, of operands that lie near it.

#pragma once

#include "../../model/native/vectors.h"

// Inputs of which a panel of weights stays in the first cache (32 KiB of float32) while all rows pass by.
constexpr int64_t kBlockInputs = 256;

// Numbers from one row to the next: an odd number of cache lines, so that a column's lines do not share a few sets.
template <class S>
int64_t stride_of(int64_t size) {
    constexpr int64_t line = 64 / sizeof(S);
    return ((size + line - 1) / line | 1) * line;
}

#if defined(__GNUC__) && !defined(__clang__)
#define TT_RAY_SHUFFLES  // __builtin_shuffle, with places in a vector
template <class S>
using Places __attribute__((vector_size(kVectorBytes))) = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
#endif

// to [columns, rows] = a [rows, columns] transposed; both are whole vectors.
template <class S>
void transpose(int64_t rows, int64_t columns, const S *a, int64_t lda, S *to, int64_t ldt) {
#ifdef TT_RAY_SHUFFLES
    using F = Simd<S>;
    constexpr int lanes = F::lanes;
    Places<S> low, high;  // of two vectors, their first and second halves one by one in turn
    for (int i = 0; i < lanes; i++) {
        low[i] = i / 2 + i % 2 * lanes;
        high[i] = low[i] + lanes / 2;
    }
    for (int64_t row = 0; row < rows; row += lanes)
        for (int64_t column = 0; column < columns; column += lanes) {
            typename F::Vector v[lanes], next[lanes];
            for (int i = 0; i < lanes; i++) v[i] = F::load(a + (row + i) * lda + column);
            for (int half = lanes / 2; half > 0; half /= 2) {
                for (int i = 0; i < lanes / 2; i++) {
                    next[2 * i] = __builtin_shuffle(v[i], v[i + lanes / 2], low);
                    next[2 * i + 1] = __builtin_shuffle(v[i], v[i + lanes / 2], high);
                }
                for (int i = 0; i < lanes; i++) v[i] = next[i];
            }
            for (int i = 0; i < lanes; i++) F::store(to + (column + i) * ldt + row, v[i]);
        }
#else
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column++) to[column * ldt + row] = a[row * lda + column];
#endif
}

// A matrix [inputs, outputs] in panels of two vectors of outputs (the last may have one): [panel][inputs][outputs of
// it]. Its element (k, j) is matrix[k * by_input + j * by_output].
template <class S>
void pack(const S *matrix, int64_t inputs, int64_t outputs, int64_t by_input, int64_t by_output, int64_t threads,
          S *packed) {
    constexpr int64_t panel = Simd<S>::panel;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < outputs; column += panel) {
        const int64_t width = std::min(panel, outputs - column);
        S *to = packed + column * inputs;
        if (by_output == 1)
            for (int64_t k = 0; k < inputs; k++) std::copy_n(matrix + k * by_input + column, width, to + k * width);
        else
            for (int64_t block = 0; block < inputs; block += panel)  // whose lines of the matrix are read once
                for (int64_t j = 0; j < width; j++)
                    for (int64_t k = block; k < std::min(block + panel, inputs); k++)
                        to[k * width + j] = matrix[k * by_input + (column + j) * by_output];
    }
}

template <class S, int vectors>
void multiply_panel(int64_t rows, const S *a, int64_t lda, const S *panel, int64_t inputs, const S *bias, bool add,
                    S *out, int64_t ldo) {
    constexpr int64_t width = vectors * Simd<S>::lanes;
    for (int64_t k = 0; k < inputs; k += kBlockInputs) {
        const int64_t count = std::min(kBlockInputs, inputs - k);
        const S *block = panel + k * width, *shift = k == 0 ? bias : nullptr;
        if (k == 0 && !add)
            multiply_columns<S, vectors, kStore>(rows, a, lda, block, width, count, shift, out, ldo);
        else
            multiply_columns<S, vectors, kAdd>(rows, a + k, lda, block, width, count, shift, out, ldo);
    }
}

// Those of a matrix's inputs that a product is over.
struct Inputs {
    int64_t first, count, all;
};

// out [rows, outputs] (+)= a [rows, count] times a packed matrix, plus bias (may be null). Rows are whole tiles.
template <class S>
void multiply_packed(int64_t rows, const S *a, int64_t lda, const S *packed, Inputs inputs, int64_t outputs,
                     const S *bias, bool add, S *out, int64_t ldo) {
    constexpr int64_t panel = Simd<S>::panel;
    for (int64_t column = 0; column < outputs; column += panel) {
        const int64_t width = std::min(panel, outputs - column);
        const S *matrix = packed + column * inputs.all + inputs.first * width;
        const S *shift = bias == nullptr ? nullptr : bias + column;
        if (width == panel)
            multiply_panel<S, 2>(rows, a, lda, matrix, inputs.count, shift, add, out + column, ldo);
        else
            multiply_panel<S, 1>(rows, a, lda, matrix, inputs.count, shift, add, out + column, ldo);
    }
}

// `count` rows of out, `vectors` vectors of columns: (+)= a [rows, count] transposed times b [rows, columns].
template <class S, int count, int vectors, Epilogue epilogue>
inline void transposed_tile(int64_t rows, const S *a, int64_t lda, const S *b, int64_t ldb, S *out, int64_t ldo) {
    using F = Simd<S>;
    typename F::Vector sum[count][vectors];
    for (int i = 0; i < count; i++)
        for (int j = 0; j < vectors; j++) {
            sum[i][j] = typename F::Vector{};
            if (epilogue == kAdd) __builtin_prefetch(out + i * ldo + j * F::lanes, 1);
        }
    for (int64_t k = 0; k < rows; k++) {
        typename F::Vector column[vectors];
        for (int j = 0; j < vectors; j++) column[j] = F::load(b + k * ldb + j * F::lanes);
        for (int i = 0; i < count; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] += column[j] * a[k * lda + i];
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < vectors; j++) {
            S *to = out + i * ldo + j * F::lanes;
            F::store(to, epilogue == kAdd ? F::load(to) + sum[i][j] : sum[i][j]);
        }
}

template <class S, int vectors, Epilogue epilogue>
void transposed_columns(int64_t rows, const S *a, int64_t lda, int64_t outputs, const S *b, int64_t ldb, S *out,
                        int64_t ldo) {
    int64_t i = 0;
    for (; i + kTileRows <= outputs; i += kTileRows)
        transposed_tile<S, kTileRows, vectors, epilogue>(rows, a + i, lda, b, ldb, out + i * ldo, ldo);
    for (; i < outputs; i++) transposed_tile<S, 1, vectors, epilogue>(rows, a + i, lda, b, ldb, out + i * ldo, ldo);
}

// out [outputs, columns] (+)= a [rows, outputs] transposed times b [rows, columns]; columns are whole vectors.
template <class S, Epilogue epilogue>
void multiply_transposed(int64_t rows, const S *a, int64_t lda, int64_t outputs, const S *b, int64_t ldb,
                         int64_t columns, S *out, int64_t ldo) {
    constexpr int64_t lanes = Simd<S>::lanes;
    int64_t column = 0;
    for (; column + 2 * lanes <= columns; column += 2 * lanes)
        transposed_columns<S, 2, epilogue>(rows, a, lda, outputs, b + column, ldb, out + column, ldo);
    for (; column < columns; column += lanes)
        transposed_columns<S, 1, epilogue>(rows, a, lda, outputs, b + column, ldb, out + column, ldo);
}

// to [columns] += the sums over rows of a.
template <class S>
void add_rows(int64_t rows, const S *a, int64_t lda, int64_t columns, S *to) {
    using F = Simd<S>;
    for (int64_t column = 0; column < columns; column += F::lanes) {
        typename F::Vector even{}, odd{};
        int64_t row = 0;
        for (; row + 1 < rows; row += 2) {
            even += F::load(a + row * lda + column);
            odd += F::load(a + (row + 1) * lda + column);
        }
        if (row < rows) even += F::load(a + row * lda + column);
        F::store(to + column, F::load(to + column) + (even + odd));
    }
}
