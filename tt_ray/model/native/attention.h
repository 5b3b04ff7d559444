// Attention of a few rows to a node that they share: its keys and values are read once for all of them. A row's
// sums run in the same order however many rows there are.

#pragma once

#include "vectors.h"

// Scores of `count` rows' queries [w] against `columns` vectors of keys [w, ldk].
template <class S, int count, int columns>
inline void score_rows(const S *const *queries, const S *keys, int64_t ldk, int64_t w, S *const *scores) {
    using F = Simd<S>;
    typename F::Vector even[count][columns], odd[count][columns];
    for (int r = 0; r < count; r++)
        for (int c = 0; c < columns; c++) even[r][c] = odd[r][c] = typename F::Vector{};
    for (int64_t i = 0; i < w; i += 2)
        for (int c = 0; c < columns; c++) {
            const auto first = F::load(keys + i * ldk + c * F::lanes);
            const auto second = F::load(keys + (i + 1) * ldk + c * F::lanes);
            for (int r = 0; r < count; r++) {
                even[r][c] += first * queries[r][i];
                odd[r][c] += second * queries[r][i + 1];
            }
        }
    for (int r = 0; r < count; r++)
        for (int c = 0; c < columns; c++) F::store(scores[r] + c * F::lanes, even[r][c] + odd[r][c]);
}

// Add to `count` rows' outputs the weighted sum of `places` values, `columns` vectors of [places, ldv].
template <class S, int count, int columns>
inline void mix_rows(const S *const *weights, const S *values, int64_t ldv, int64_t places, S *const *outputs) {
    using F = Simd<S>;
    typename F::Vector even[count][columns], odd[count][columns];
    for (int r = 0; r < count; r++)
        for (int c = 0; c < columns; c++) {
            even[r][c] = F::load(outputs[r] + c * F::lanes);
            odd[r][c] = typename F::Vector{};
        }
    int64_t k = 0;
    for (; k + 1 < places; k += 2)
        for (int c = 0; c < columns; c++) {
            const auto first = F::load(values + k * ldv + c * F::lanes);
            const auto second = F::load(values + (k + 1) * ldv + c * F::lanes);
            for (int r = 0; r < count; r++) {
                even[r][c] += first * weights[r][k];
                odd[r][c] += second * weights[r][k + 1];
            }
        }
    if (k < places)
        for (int c = 0; c < columns; c++)
            for (int r = 0; r < count; r++) even[r][c] += F::load(values + k * ldv + c * F::lanes) * weights[r][k];
    for (int r = 0; r < count; r++)
        for (int c = 0; c < columns; c++) F::store(outputs[r] + c * F::lanes, even[r][c] + odd[r][c]);
}

// All of `width` (whole vectors), two vectors at a time.
template <class S, int count>
void score_node(const S *const *queries, const S *keys, int64_t width, int64_t w, S *const *scores) {
    constexpr int64_t lanes = Simd<S>::lanes;
    S *out[count];
    for (int64_t at = 0; at < width;) {
        for (int r = 0; r < count; r++) out[r] = scores[r] + at;
        if (at + 2 * lanes <= width) {
            score_rows<S, count, 2>(queries, keys + at, width, w, out);
            at += 2 * lanes;
        } else {
            score_rows<S, count, 1>(queries, keys + at, width, w, out);
            at += lanes;
        }
    }
}

template <class S, int count>
void mix_node(const S *const *weights, const S *values, int64_t w, int64_t ldv, int64_t places, S *const *outputs) {
    constexpr int64_t lanes = Simd<S>::lanes;
    S *out[count];
    for (int64_t at = 0; at < w;) {
        for (int r = 0; r < count; r++) out[r] = outputs[r] + at;
        if (at + 2 * lanes <= w) {
            mix_rows<S, count, 2>(weights, values + at, ldv, places, out);
            at += 2 * lanes;
        } else {
            mix_rows<S, count, 1>(weights, values + at, ldv, places, out);
            at += lanes;
        }
    }
}
