// Causal attention of one head in one window, and its gradient. Value columns are hidden from every query.
//
// With weights P, and M 0 or the dropout's scale, the output is O = (P M) V. In the backward pass the softmax's sum
// over keys is that of gradient * O over the head's width; P comes again from the logarithms of the sums.

#pragma once

#include "elementwise.h"
#include "layer.h"

// A head's arrays, their rows padded to whole vectors.
template <class S>
struct HeadScratch {
    S *query, *key, *value, *given;           // [K, w], queries scaled; `given` is the output's gradient
    S *keys_across, *values_across, *hidden;  // [w, K], [w, K] and [K]: minus infinity at value columns
    S *weights, *scores;                      // [R, K]
    S *first, *second, *inner;                // [K, w] results, and [R] sums of gradient * O

    HeadScratch(const Shape<S> &shape, Arena<S> &arena) {
        for (S **array : {&query, &key, &value, &given, &first, &second}) *array = arena.take(shape.keys * shape.ldw);
        for (S **array : {&keys_across, &values_across}) *array = arena.take(shape.head_padded * shape.ldk);
        for (S **array : {&weights, &scores}) *array = arena.take(shape.rows * shape.ldk);
        hidden = arena.take(shape.ldk);
        inner = arena.take(shape.rows);
        for (S *array : {key, value})  // rows of a last vector that are no tokens
            std::fill(array + shape.rows * shape.ldw, array + shape.keys * shape.ldw, S(0));
        std::fill(hidden, hidden + shape.ldk, S(0));
        for (int64_t u = shape.goal + shape.slots - 1; u < shape.ldk; u += shape.slots)
            hidden[u] = -std::numeric_limits<S>::infinity();
    }
};

// A head's columns of `rows` rows, times a factor.
template <class S>
void load_head(const Shape<S> &shape, const S *from, int64_t ld, S factor, S *to) {
    for (int64_t row = 0; row < shape.rows; row++) {
        for (int64_t i = 0; i < shape.head; i++) to[row * shape.ldw + i] = from[row * ld + i] * factor;
        for (int64_t i = shape.head; i < shape.head_padded; i++) to[row * shape.ldw + i] = S(0);
    }
}

template <class S>
void store_head(const Shape<S> &shape, const S *from, S factor, S *to, int64_t ld) {
    for (int64_t row = 0; row < shape.rows; row++)
        for (int64_t i = 0; i < shape.head; i++) to[row * ld + i] = from[row * shape.ldw + i] * factor;
}

template <class S>
struct Head {
    using F = Simd<S>;
    using Vector = typename F::Vector;
    const Shape<S> &shape;
    const HeadScratch<S> &scratch;
    const Dropout<S> &drop;

    // Scores of a vector of keys with what the query may not see at minus infinity.
    inline Vector visible(const S *scores, int64_t v, int64_t query) const {
        Vector place;
        for (int i = 0; i < F::lanes; i++) place[i] = S(i);
        const Vector score = F::load(scores + v * F::lanes) + F::load(scratch.hidden + v * F::lanes);
        return place > S(query - v * F::lanes) ? F::broadcast(-std::numeric_limits<S>::infinity()) : score;
    }

    // Vectors of keys that a tile of queries reads.
    int64_t vectors_seen(int64_t tile) const {
        return (std::min(tile + kTileRows, shape.rows) + F::lanes - 1) / F::lanes;
    }

    void across(const S *from, S *to) const {
        transpose(shape.keys, shape.head_padded, from, shape.ldw, to, shape.ldk);
    }

    // Output rows into `mixed`, the logarithms of the softmax's sums into `logs` [R].
    void forward(const S *qkv, S *mixed, S *logs) const {
        load_head(shape, qkv, shape.ldq, S(1) / std::sqrt(S(shape.head)), scratch.query);
        load_head(shape, qkv + shape.width, shape.ldq, S(1), scratch.key);
        load_head(shape, qkv + 2 * shape.width, shape.ldq, S(1), scratch.value);
        across(scratch.key, scratch.keys_across);
        S *scores = scratch.scores, *out = scratch.first;
        for (int64_t tile = 0; tile < shape.rows; tile += kTileRows) {
            const int64_t vectors = vectors_seen(tile);
            multiply_plain(kTileRows, scratch.query + tile * shape.ldw, shape.ldw, scratch.keys_across, shape.ldk,
                           shape.head, vectors * F::lanes, scores, shape.ldk);
            S shares[kTileRows];
            for (int r = 0; r < kTileRows; r++)
                shares[r] = soften(scores + r * shape.ldk, vectors, tile + r, logs + tile + r);
            multiply_plain(kTileRows, scores, shape.ldk, scratch.value, shape.ldw, tile + kTileRows,
                           shape.head_padded, out, shape.ldw);
            for (int r = 0; r < kTileRows; r++)
                for (int64_t i = 0; i < shape.head; i++)
                    mixed[(tile + r) * shape.ldx + i] = out[r * shape.ldw + i] * shares[r];
        }
    }

    // Scores to weights times their sum, with dropout; returns 1 / the sum.
    inline S soften(S *scores, int64_t vectors, int64_t query, S *log) const {
        Vector best = F::broadcast(-std::numeric_limits<S>::infinity()), total{};
        for (int64_t v = 0; v < vectors; v++) {
            const Vector score = visible(scores, v, query);
            F::store(scores + v * F::lanes, score);
            best = best > score ? best : score;
        }
        const S most = max_of<S>(best);
        drop.row(query, vectors, [&](int64_t v, Vector factor) {
            const Vector weight = exponential(F::load(scores + v * F::lanes) - most);
            total += weight;
            F::store(scores + v * F::lanes, weight * factor);
        });
        const S sum = sum_of<S>(total);
        *log = most + std::log(sum);
        return S(1) / sum;
    }

    // The head's columns of `qkv` become their gradient, given that of the output, `mixed`.
    void backward(S *qkv, const S *mixed, const S *logs, const S *gradient) const {
        const S scale = S(1) / std::sqrt(S(shape.head));
        load_head(shape, qkv, shape.ldq, scale, scratch.query);
        load_head(shape, qkv + shape.width, shape.ldq, S(1), scratch.key);
        load_head(shape, qkv + 2 * shape.width, shape.ldq, S(1), scratch.value);
        load_head(shape, gradient, shape.ldx, S(1), scratch.given);
        load_head(shape, mixed, shape.ldx, S(1), scratch.first);
        across(scratch.key, scratch.keys_across);
        across(scratch.value, scratch.values_across);
        for (int64_t row = 0; row < shape.rows; row++) {
            Vector sum{};
            for (int64_t i = row * shape.ldw; i < row * shape.ldw + shape.head_padded; i += F::lanes)
                sum += F::load(scratch.given + i) * F::load(scratch.first + i);
            scratch.inner[row] = sum_of<S>(sum);
        }
        for (int64_t tile = 0; tile < shape.rows; tile += kTileRows) query_gradients(tile, logs);
        store_head(shape, scratch.first, scale, qkv, shape.ldq);
        for (int64_t tile = 0; tile < shape.rows; tile += kTileRows) key_gradients(tile);
        store_head(shape, scratch.first, S(1), qkv + shape.width, shape.ldq);
        store_head(shape, scratch.second, S(1), qkv + 2 * shape.width, shape.ldq);
    }

    // A tile's weights with dropout and its scores' gradients, from which its queries' gradients.
    void query_gradients(int64_t tile, const S *logs) const {
        const int64_t vectors = vectors_seen(tile), columns = vectors * F::lanes;
        S *weights = scratch.weights + tile * shape.ldk, *scores = scratch.scores + tile * shape.ldk;
        multiply_plain(kTileRows, scratch.query + tile * shape.ldw, shape.ldw, scratch.keys_across, shape.ldk,
                       shape.head, columns, weights, shape.ldk);
        multiply_plain(kTileRows, scratch.given + tile * shape.ldw, shape.ldw, scratch.values_across, shape.ldk,
                       shape.head, columns, scores, shape.ldk);
        for (int r = 0; r < kTileRows; r++) {
            const S log = logs[tile + r], inner = scratch.inner[tile + r];
            drop.row(tile + r, vectors, [&](int64_t v, Vector factor) {
                S *weight_at = weights + r * shape.ldk + v * F::lanes, *at = scores + r * shape.ldk + v * F::lanes;
                const Vector weight = exponential(visible(weights + r * shape.ldk, v, tile + r) - log);
                F::store(weight_at, weight * factor);
                F::store(at, weight * (F::load(at) * factor - inner));
            });
        }
        multiply_plain(kTileRows, scores, shape.ldk, scratch.key, shape.ldw, tile + kTileRows, shape.head_padded,
                       scratch.first + tile * shape.ldw, shape.ldw);
    }

    // A tile of keys' and values' gradients, from the queries that see them.
    void key_gradients(int64_t tile) const {
        const int64_t queries = shape.rows - tile, at = tile * shape.ldk + tile, row = tile * shape.ldw;
        multiply_transposed<S, kStore>(queries, scratch.scores + at, shape.ldk, kTileRows, scratch.query + row,
                                       shape.ldw, shape.head_padded, scratch.first + row, shape.ldw);
        multiply_transposed<S, kStore>(queries, scratch.weights + at, shape.ldk, kTileRows, scratch.given + row,
                                       shape.ldw, shape.head_padded, scratch.second + row, shape.ldw);
    }
};
