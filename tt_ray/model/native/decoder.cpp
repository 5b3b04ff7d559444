// The functions that cache.py calls, for float and double: contexts and nodes encoded, transitions expanded and
// observed. A block of rows goes through all tokens of a transition without waiting for another: what it reads
// again and again stays in its core's reach, and threads meet once a transition.

#include "block.h"
#include "sampling.h"

// Which rows of each search take part: `counts` of `numbers` [E, stride]; `positions` [E] is that of the first token.
struct Rows {
    int64_t episodes, stride, threads;
    const int64_t *numbers, *counts, *positions;
};

// How a search goes on with its logits.
struct Choice {
    Filter actions, observations;
    const void *reward_values, *value_values;  // [V] what a bin of the reward and of the value stands for
};

// Call `work(episode, numbers, count, scratch)` for blocks of rows, on all threads.
template <class S, class Work>
void for_blocks(const Network &net, const Cache &cache, const Rows &rows, bool whole, Work work) {
    struct Piece {
        int64_t episode, begin, count;
    };
    std::vector<Piece> pieces;
    for (int64_t e = 0; e < rows.episodes; e++) {
        const int64_t size = whole ? rows.counts[e] : kBlockRows;
        for (int64_t begin = 0; begin < rows.counts[e]; begin += size)
            pieces.push_back({e, begin, std::min(size, rows.counts[e] - begin)});
    }
    const int64_t count = pieces.size();
#pragma omp parallel for schedule(dynamic, 1) num_threads(rows.threads)
    for (int64_t i = 0; i < count; i++) {
        static thread_local Scratch<S> scratch;
        scratch.fit(net, cache);
        const Piece &piece = pieces[i];
        work(piece.episode, rows.numbers + piece.episode * rows.stride + piece.begin, piece.count, scratch);
    }
}

template <class S>
S *pending(const Network &net, const Cache &cache, int64_t episode, int64_t beam) {
    return static_cast<S *>(cache.pending) + (episode * cache.beams + beam) * net.outputs;
}

// Encode contexts: `tokens` [E, P]. Later places see earlier ones, so an episode's blocks go in order.
template <class S>
void encode_prefix(const Network &net, const Cache &cache, const Rows &rows, const int64_t *tokens) {
    for_blocks<S>(net, cache, rows, true, [&](int64_t e, const int64_t *numbers, int64_t count, Scratch<S> &scratch) {
        for (int64_t begin = 0; begin < count; begin += kBlockRows) {
            const int64_t size = std::min<int64_t>(kBlockRows, count - begin);
            Block<S> block(net, cache, kPrefix, e, 0, numbers + begin, size, scratch);
            for (int64_t i = 0; i < size; i++) scratch.tokens[i] = tokens[e * cache.prefix + numbers[begin + i]];
            block.feed(0, 0, cache.observation - 1, 0);
            if (begin + size < count) continue;
            block.predict();
            for (int64_t beam = 0; beam < cache.beams; beam++)
                std::copy_n(block.logits(size - 1), net.outputs, pending<S>(net, cache, e, beam));
        }
    });
}

// Encode again the tokens from place `first` to before `last` of the nodes at a transition; `tokens` [E, B, length]
// are the search's, of which `at` is the first one's index.
template <class S>
void encode_nodes(const Network &net, const Cache &cache, const Rows &rows, int64_t transition, int64_t first,
                  int64_t last, const int64_t *tokens, int64_t length, int64_t at) {
    for_blocks<S>(net, cache, rows, false, [&](int64_t e, const int64_t *numbers, int64_t count, Scratch<S> &scratch) {
        Block<S> block(net, cache, kBeams, e, transition, numbers, count, scratch);
        for (int64_t place = first; place < last; place++) {
            // The value token between the reward and the observation has an index and a position, but no place.
            const int64_t ahead = place - first + (first <= cache.action && place > cache.action);
            for (int64_t i = 0; i < count; i++)
                scratch.tokens[i] = tokens[(e * cache.beams + numbers[i]) * length + at + ahead];
            const int64_t slot = place <= cache.action ? cache.observation + place : place - cache.action - 1;
            block.feed(place, place + 1, slot, rows.positions[e] + ahead);
        }
    });
}

// Draw every candidate's actions, then predict its reward and its value. Fills `tails` [E, B * n, M + 1] with
// tokens, `rewards` and `values` [E, B * n] with means, `value_tokens` with the likeliest.
template <class S>
void expand(const Network &net, const Cache &cache, const Rows &rows, const Choice &choice, int64_t transition,
            const S *uniforms, int64_t uniforms_stride, int64_t *tails, S *rewards, S *values,
            int64_t *value_tokens) {
    const int64_t length = cache.action + 1, candidates = cache.beams * cache.copies;
    for_blocks<S>(net, cache, rows, false, [&](int64_t e, const int64_t *numbers, int64_t count, Scratch<S> &scratch) {
        Block<S> block(net, cache, kCandidates, e, transition, numbers, count, scratch);
        for (int64_t j = 0; j <= length; j++) {
            for (int64_t i = 0; i < count; i++) {
                const int64_t c = numbers[i], at = e * candidates + c;
                const S *logits = j == 0 ? pending<S>(net, cache, e, c / cache.copies) : block.logits(i);
                int64_t token;
                if (j < cache.action) {
                    const S uniform = uniforms[e * uniforms_stride + j * candidates + c];
                    token = draw(choice.actions, net.bins, logits, uniform, scratch.probabilities);
                } else {
                    const void *bin_values = j == cache.action ? choice.reward_values : choice.value_values;
                    (j == cache.action ? rewards : values)[at] =
                        expectation(net.outputs, logits, static_cast<const S *>(bin_values), scratch.probabilities);
                    token = likeliest(net.bins, logits);
                }
                (j < length ? tails[at * length + j] : value_tokens[at]) = token;
                scratch.tokens[i] = token;
            }
            if (j == length) break;
            block.feed(j, 0, cache.observation + j, rows.positions[e] + j);
            block.predict();
        }
    });
}

// Feed every beam its value token and decode the next observation. `tokens` [E, B, length] are the search's, of
// which `at` is the value token's index; `stopped` [E, B] is read and brought up to date.
template <class S>
void observe(const Network &net, const Cache &cache, const Rows &rows, const Choice &choice, int64_t transition,
             const S *uniforms, int64_t uniforms_stride, int64_t *tokens, int64_t length, int64_t at,
             uint8_t *stopped) {
    for_blocks<S>(net, cache, rows, false, [&](int64_t e, const int64_t *numbers, int64_t count, Scratch<S> &scratch) {
        Block<S> block(net, cache, kBeams, e, transition, numbers, count, scratch);
        for (int64_t i = 0; i < count; i++)
            scratch.tokens[i] = tokens[(e * cache.beams + numbers[i]) * length + at];
        for (int64_t j = 0; j <= cache.observation; j++) {
            const int64_t place = cache.action + j, slot = j == 0 ? net.slots - 1 : j - 1;
            block.feed(j == 0 ? -1 : place, place + 1, slot, rows.positions[e] + j);
            block.predict();
            for (int64_t i = 0; i < count; i++) {
                const int64_t b = numbers[i], beam = e * cache.beams + b;
                if (j == cache.observation) {
                    std::copy_n(block.logits(i), net.outputs, pending<S>(net, cache, e, b));
                    continue;
                }
                // Only the first token may be the stop token: an episode ends between transitions.
                const int64_t allowed = j == 0 ? net.outputs : net.bins;
                const S uniform = uniforms == nullptr ? S(0) : uniforms[e * uniforms_stride + j * cache.beams + b];
                int64_t token = uniforms == nullptr
                                    ? likeliest(allowed, block.logits(i))
                                    : draw(choice.observations, allowed, block.logits(i), uniform, scratch.probabilities);
                if (j == 0 && token == net.bins) stopped[beam] = 1;
                if (stopped[beam]) token = net.bins;
                tokens[beam * length + at + 1 + j] = scratch.tokens[i] = token;
            }
        }
    });
}

// Feed every beam one token of a transition, `tokens` [E, B], at place `index` of its node (-1 for the value token, which
// has none), after which `stored` places hold tokens; the logits of the next one are `pending`.
template <class S>
void extend(const Network &net, const Cache &cache, const Rows &rows, int64_t transition, int64_t index, int64_t stored,
            int64_t slot, const int64_t *tokens) {
    for_blocks<S>(net, cache, rows, false, [&](int64_t e, const int64_t *numbers, int64_t count, Scratch<S> &scratch) {
        Block<S> block(net, cache, kBeams, e, transition, numbers, count, scratch);
        for (int64_t i = 0; i < count; i++) scratch.tokens[i] = tokens[e * cache.beams + numbers[i]];
        block.feed(index, stored, slot, rows.positions[e]);
        block.predict();
        for (int64_t i = 0; i < count; i++)
            std::copy_n(block.logits(i), net.outputs, pending<S>(net, cache, e, numbers[i]));
    });
}

// The action and reward tokens of `candidates` [E, B] become the beams' own at `transition`.
template <class S>
void keep_tails(const Network &net, const Cache &cache, const Rows &rows, int64_t transition,
                const int64_t *candidates) {
    const int64_t w = net.head_padded, width = net.heads * w, length = cache.action + 1;
#pragma omp parallel for collapse(3) schedule(static) num_threads(rows.threads)
    for (int64_t layer = 0; layer < net.layers; layer++)
        for (int64_t episode = 0; episode < rows.episodes; episode++)
            for (int64_t beam = 0; beam < cache.beams; beam++) {
                const int64_t search = layer * cache.episodes + episode;
                const int64_t candidate = candidates[episode * cache.beams + beam];
                const S *from = static_cast<const S *>(cache.tails) +
                                (search * cache.beams * cache.copies + candidate) * 2 * length * width;
                const int64_t node = ((search * cache.horizon + transition) * cache.beams + beam) * width;
                S *keys = static_cast<S *>(cache.node_keys) + node * cache.node_padded;
                S *values = static_cast<S *>(cache.node_values) + node * cache.node;
                for (int64_t i = 0; i < width; i++)
                    for (int64_t place = 0; place < length; place++)
                        keys[i * cache.node_padded + place] = from[place * width + i];
                from += length * width;
                for (int64_t head = 0; head < net.heads; head++)
                    for (int64_t place = 0; place < length; place++)
                        std::copy_n(from + place * width + head * w, w, values + (head * cache.node + place) * w);
            }
}

#define TT_RAY_EXPORT(S, suffix)                                                                                      \
    extern "C" void tt_ray_encode_prefix_##suffix(const Network *net, const Cache *cache, const Rows *rows,           \
                                                  const int64_t *tokens) {                                            \
        encode_prefix<S>(*net, *cache, *rows, tokens);                                                                \
    }                                                                                                                 \
    extern "C" void tt_ray_encode_nodes_##suffix(const Network *net, const Cache *cache, const Rows *rows,            \
                                                 int64_t transition, int64_t first, int64_t last,                     \
                                                 const int64_t *tokens, int64_t length, int64_t at) {                 \
        encode_nodes<S>(*net, *cache, *rows, transition, first, last, tokens, length, at);                            \
    }                                                                                                                 \
    extern "C" void tt_ray_expand_##suffix(const Network *net, const Cache *cache, const Rows *rows,                  \
                                           const Choice *choice, int64_t transition, const S *uniforms,               \
                                           int64_t stride, int64_t *tails, S *rewards, S *values,                     \
                                           int64_t *value_tokens) {                                                   \
        expand<S>(*net, *cache, *rows, *choice, transition, uniforms, stride, tails, rewards, values, value_tokens);  \
    }                                                                                                                 \
    extern "C" void tt_ray_observe_##suffix(const Network *net, const Cache *cache, const Rows *rows,                 \
                                            const Choice *choice, int64_t transition, const S *uniforms,              \
                                            int64_t stride, int64_t *tokens, int64_t length, int64_t at,              \
                                            uint8_t *stopped) {                                                       \
        observe<S>(*net, *cache, *rows, *choice, transition, uniforms, stride, tokens, length, at, stopped);          \
    }                                                                                                                 \
    extern "C" void tt_ray_extend_##suffix(const Network *net, const Cache *cache, const Rows *rows,                  \
                                           int64_t transition, int64_t index, int64_t stored, int64_t slot,           \
                                           const int64_t *tokens) {                                                   \
        extend<S>(*net, *cache, *rows, transition, index, stored, slot, tokens);                                      \
    }                                                                                                                 \
    extern "C" void tt_ray_keep_tails_##suffix(const Network *net, const Cache *cache, const Rows *rows,              \
                                               int64_t transition, const int64_t *candidates) {                       \
        keep_tails<S>(*net, *cache, *rows, transition, candidates);                                                   \
    }

TT_RAY_EXPORT(float, float32)
TT_RAY_EXPORT(double, float64)

// What weights.py lays memory out by: bytes of a vector.
extern "C" int64_t tt_ray_vector_bytes() { return kVectorBytes; }
