// A model and the cache of its searches, as cache.py and weights.py hand them over. Letters as in block.h.

#pragma once

#include "vectors.h"

// Sizes and weights. Matrices are packed in panels of two vectors of outputs: [outputs / panel, inputs, panel].
struct Network {
    int64_t layers, width, heads, head_width, head_padded, hidden, outputs, slots, bins, goal, layer_stride;
    int64_t port;  // whether a layer's attention is added to its normalised input
    double epsilon;
    const void *token_embedding, *position_embedding, *layer_weights, *final_norm, *head_weights;
    const void *head_biases;  // null where there are none
    const int64_t *goal_slots;  // [goal]
};

// The cache of a batch of searches; see cache.py for what its arrays mean.
struct Cache {
    int64_t episodes, beams, copies, horizon, observation, action, prefix, prefix_padded, node, node_padded;
    void *prefix_keys;           // [L, E, h, w, prefix_padded]
    void *prefix_values;         // [L, E, h, prefix_padded, w]
    void *node_keys;             // [L, E, H, B, h, w, node_padded]
    void *node_values;           // [L, E, H, B, h, node, w]
    void *tails;                 // [L, E, B * n, 2, M + 1, h, w]
    void *pending;               // [E, B, V] logits of the action token that comes next
    const int32_t *ancestors;    // [E, H, B] the node of each beam's past at each transition
    const int64_t *start;        // [E] first visible place of the prefix after the goal's
    const int64_t *first_node;   // [E] first visible transition of the suffix
    const uint8_t *first_whole;  // [E] whether its action and reward tokens are seen too
};

enum Kind : int64_t { kPrefix = 0, kCandidates = 1, kBeams = 2 };
