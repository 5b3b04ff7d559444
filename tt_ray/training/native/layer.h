// Sizes of a layer and where its arrays lie.

#pragma once

#include <memory>

#include "products.h"

enum Weight {
    kNorm1,
    kShift1,
    kQkv,
    kQkvBias,
    kProj,
    kProjBias,
    kNorm2,
    kShift2,
    kUp,
    kUpBias,
    kDown,
    kDownBias,
    kWeights
};

// Hidden units of the MLP that are treated at once, so that they stay near the core.
constexpr int64_t kBlockHidden = 128;

// A layer's call; the same fields as in layers.py. Windows are [b, T, d]: `goal` tokens, then transitions of `slots`.
struct Layer {
    int64_t windows, tokens, width, heads, hidden, slots, goal, dropped, group, threads, seed;
    double epsilon;
    const void *weights[kWeights];
};

// Sizes of one window's arrays. R rows are the tokens, in whole tiles; ld* are numbers from row to row.
template <class S>
struct Shape {
    int64_t tokens, rows, keys, width, heads, head, head_padded, hidden, slots, goal, ldx, ldq, ldh, ldk, ldw, blocks, block;
    int64_t sizes[kWeights], parameters = 0;

    explicit Shape(const Layer &layer)
        : tokens(layer.tokens), rows(round_up(layer.tokens, kTileRows)), keys(round_up(rows, Simd<S>::lanes)),
          width(layer.width), heads(layer.heads), head(width / heads), head_padded(round_up(head, Simd<S>::lanes)),
          hidden(layer.hidden), slots(layer.slots), goal(layer.goal),
          ldx(stride_of<S>(width)), ldq(stride_of<S>(3 * width)), ldh(stride_of<S>(std::min(hidden, kBlockHidden))),
          ldk(stride_of<S>(keys)), ldw(stride_of<S>(head_padded)),
          blocks((hidden + kBlockHidden - 1) / kBlockHidden), block(rows * ldh) {
        const int64_t d = width;
        const int64_t all[kWeights] = {d, d, 3 * d * d, 3 * d, d * d, d, d, d, hidden * d, hidden, hidden * d, d};
        for (int i = 0; i < kWeights; i++) parameters += sizes[i] = all[i];
    }

    // Numbers that a window keeps from the forward pass for the backward pass.
    int64_t kept() const {
        return round_up(rows * (ldq + 2 * ldx) + blocks * block + heads * rows + 4 * rows, 64 / sizeof(S));
    }
};

// One window's part of what is kept.
template <class S>
struct Kept {
    S *qkv, *mixed, *middle, *hidden;  // [R, 3 d], [R, d], [R, d], and blocks of [R, 128]
    S *logs, *moments;                 // [h, R] logarithms of the softmax's sums, [2, R, 2] of the norms
    Kept(const Shape<S> &shape, S *at)
        : qkv(at), mixed(qkv + shape.rows * shape.ldq), middle(mixed + shape.rows * shape.ldx),
          hidden(middle + shape.rows * shape.ldx), logs(hidden + shape.blocks * shape.block),
          moments(logs + shape.heads * shape.rows) {}
};

// A thread's memory, handed out in whole cache lines.
template <class S>
class Arena {
  public:
    void start(int64_t size) {
        if (size > capacity) memory.reset(new (std::align_val_t(64)) S[capacity = size]);
        used = 0;
    }
    S *take(int64_t size) {
        S *at = memory.get() + used;
        used += stride_of<S>(size);
        return at;
    }

  private:
    struct Free {
        void operator()(S *p) const { operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<S[], Free> memory;
    int64_t capacity = 0, used = 0;
};
