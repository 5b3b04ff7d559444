// One decoding step of the Trajectory Transformer on CPU, for many searches at once.
//
// Rows (the tokens fed at a step) are independent: a block of rows goes through all layers on one core, its
// activations in that core's cache, without waiting for any other. Every row's arithmetic is the same whatever
// block it is in, so results do not depend on the number of threads or on who else is being planned for.
//
// Letters: R rows, d width, h heads, w width of a head (padded to whole vectors), V outputs, B beams,
// n copies of a beam, M action, N observation, D slots, P prefix places, the first of them the goal's. Value columns
// are hidden from every query, so prefix and nodes have no place for them.

#pragma once

#include "attention.h"
#include "network.h"

// Rows of a block. Few, so that all the keys and values that they read, token after token, stay near the core: with
// 48 they do not, which costs more than reading the weights six times as often (a quarter of the time in all).
constexpr int kBlockRows = kTileRows;

// What one thread needs for one block of rows.
template <class S>
struct Scratch {
    std::vector<S> x, normed, qkv, mixed, hidden, scores, bias, probabilities;
    int64_t tokens[kBlockRows];  // what each row is fed next
    void fit(const Network &net, const Cache &cache) {
        const int64_t panel = Simd<S>::panel, heads = net.heads * net.head_padded;
        const int64_t keys = cache.prefix_padded + cache.horizon * cache.node_padded +
                             round_up(cache.action + 1, Simd<S>::lanes);
        const auto grow = [](std::vector<S> &array, int64_t size) {
            if (static_cast<int64_t>(array.size()) < size) array.resize(size);
        };
        grow(x, kBlockRows * round_up(net.width, panel));
        grow(normed, kBlockRows * net.width);
        grow(qkv, kBlockRows * round_up(3 * heads, panel));
        grow(mixed, kBlockRows * heads);
        grow(hidden, kBlockRows * std::max(round_up(net.hidden, panel), round_up(net.outputs, panel)));
        grow(scores, kBlockRows * keys);
        grow(bias, keys);
    }
};

template <class S>
void layer_norm(const Network &net, int64_t rows, const S *x, int64_t ldx, const S *weights, S *out) {
    using F = Simd<S>;
    const int64_t d = net.width, stride = round_up(d, F::panel);
    for (int64_t row = 0; row < rows; row++) {
        const S *in = x + row * ldx;
        typename F::Vector total{}, squares{};
        for (int64_t i = 0; i < d; i += F::lanes) total += F::load(in + i);
        const S mean = F::sum(total) / d;
        for (int64_t i = 0; i < d; i += F::lanes) {
            const typename F::Vector off = F::load(in + i) - mean;
            squares += off * off;
        }
        const S scale = S(1) / std::sqrt(F::sum(squares) / d + S(net.epsilon));
        for (int64_t i = 0; i < d; i += F::lanes)
            F::store(out + row * d + i,
                     (F::load(in + i) - mean) * scale * F::load(weights + i) + F::load(weights + stride + i));
    }
}

// A block of rows of one episode, on its way through the layers, a token at a time. Its rows are the prefix's
// places, the candidates or the beams of `numbers`.
template <class S>
class Block {
    using F = Simd<S>;
    using Vector = typename F::Vector;

  public:
    Block(const Network &net, const Cache &cache, Kind kind, int64_t episode, int64_t transition,
          const int64_t *numbers, int64_t rows, Scratch<S> &scratch)
        : net(net), cache(cache), kind(kind), episode(episode), transition(transition), numbers(numbers), rows(rows),
          scratch(scratch) {
        tiled = round_up(rows, kTileRows);
        heads_width = net.heads * net.head_padded;
        ldx = round_up(net.width, F::panel);
        ldq = round_up(3 * heads_width, F::panel);
        ldh = round_up(net.hidden, F::panel);
        ldl = round_up(net.outputs, F::panel);
    }

    // Feed every row its token in the scratch. `token_index`: its place in the tail or node, -1 for a value token,
    // which has none. `places_stored`: how many places of the last node hold tokens by then.
    void feed(int64_t token_index, int64_t places_stored, int64_t token_slot, int64_t token_position) {
        index = token_index, stored = places_stored, slot = token_slot, position = token_position;
        place_keys();
        embed();
        const S *weights = static_cast<const S *>(net.layer_weights);
        for (int64_t layer = 0; layer < net.layers; layer++) run_layer(layer, weights + layer * net.layer_stride);
    }

    // Every row's logits over the token after the one just fed; they stay until the next `feed`.
    void predict() {
        const S *head = static_cast<const S *>(net.head_weights) + slot * net.width * ldl;
        const S *bias = net.head_biases ? static_cast<const S *>(net.head_biases) + slot * ldl : nullptr;
        layer_norm(net, rows, scratch.x.data(), ldx, static_cast<const S *>(net.final_norm), scratch.normed.data());
        multiply<S, kStore>(tiled, scratch.normed.data(), net.width, head, net.width, ldl, bias, scratch.hidden.data(),
                            ldl);
    }
    const S *logits(int64_t row) const { return scratch.hidden.data() + row * ldl; }

  private:
    const Network &net;
    const Cache &cache;
    const Kind kind;
    const int64_t episode, transition;
    const int64_t *numbers;
    int64_t rows, tiled, heads_width, ldx, ldq, ldh, ldl, index, stored, slot, position;
    int64_t nodes_from, nodes_to, tail_at, keys;  // visible transitions of the suffix; scores' columns
    Scratch<S> &scratch;

    int64_t beam_of(int64_t number) const { return kind == kCandidates ? number / cache.copies : number; }

    // A prefix place's slot and position; value columns have positions but no places.
    int64_t slot_of(int64_t number) const {
        if (kind != kPrefix) return slot;
        return number < net.goal ? net.goal_slots[number] : (number - net.goal) % cache.node;
    }
    int64_t position_of(int64_t number) const {
        if (kind != kPrefix) return position;
        if (number < net.goal) return number;
        const int64_t from = cache.start[episode] - net.goal, at = number - net.goal;
        return net.goal + (at / cache.node - from / cache.node) * net.slots + at % cache.node - from % cache.node;
    }

    // Which columns of the scores are which keys, and which of them nobody in this block may see.
    void place_keys() {
        nodes_from = cache.first_node[episode];
        nodes_to = kind == kPrefix ? nodes_from : transition + (kind == kBeams);
        nodes_from = std::min(nodes_from, nodes_to);
        tail_at = cache.prefix_padded + (nodes_to - nodes_from) * cache.node_padded;
        keys = tail_at + (kind == kCandidates ? round_up(index + 1, F::lanes) : 0);
        S *bias = scratch.bias.data();
        std::fill(bias, bias + keys, -std::numeric_limits<S>::infinity());
        std::fill(bias, bias + net.goal, S(0));
        std::fill(bias + std::min(cache.start[episode], cache.prefix), bias + cache.prefix, S(0));
        for (int64_t t = nodes_from; t < nodes_to; t++) {
            S *node = bias + cache.prefix_padded + (t - nodes_from) * cache.node_padded;
            const bool partly = t == cache.first_node[episode] && !cache.first_whole[episode];
            const bool last = kind == kBeams && t + 1 == nodes_to;
            std::fill(node + (partly ? cache.action + 1 : 0), node + (last ? stored : cache.node), S(0));
        }
        if (kind == kCandidates) std::fill(bias + tail_at, bias + tail_at + index + 1, S(0));
    }

    void embed() {
        const S *table = static_cast<const S *>(net.token_embedding);
        const S *places = static_cast<const S *>(net.position_embedding);
        std::fill_n(scratch.x.begin(), tiled * ldx, S(0));
        for (int64_t row = 0; row < rows; row++) {
            const int64_t number = numbers[row], token = scratch.tokens[row];
            // All slots share the stop token and, after it, the hidden token.
            const int64_t entry = token + (token < net.bins ? slot_of(number) : net.slots - 1) * net.bins;
            const S *from = table + entry * net.width, *at = places + position_of(number) * net.width;
            for (int64_t i = 0; i < net.width; i++) scratch.x[row * ldx + i] = from[i] + at[i];
        }
        std::fill_n(scratch.normed.begin() + rows * net.width, (tiled - rows) * net.width, S(0));
        std::fill_n(scratch.scores.begin() + rows * keys, (tiled - rows) * keys, S(0));
    }

    void run_layer(int64_t layer, const S *weights) {
        const int64_t d = net.width, hidden = net.hidden;
        S *x = scratch.x.data(), *normed = scratch.normed.data();
        auto take = [&weights](int64_t size) { return (weights += size) - size; };
        layer_norm(net, rows, x, ldx, take(2 * ldx), normed);
        if (net.port)
            for (int64_t row = 0; row < rows; row++) std::copy_n(normed + row * d, d, x + row * ldx);
        const S *matrix = take(d * ldq), *bias = take(ldq);
        multiply<S, kStore>(tiled, normed, d, matrix, d, ldq, bias, scratch.qkv.data(), ldq);
        remember(layer);
        attend(layer);
        matrix = take(heads_width * ldx), bias = take(ldx);
        multiply<S, kAdd>(tiled, scratch.mixed.data(), heads_width, matrix, heads_width, ldx, bias, x, ldx);
        layer_norm(net, rows, x, ldx, take(2 * ldx), normed);
        matrix = take(d * ldh), bias = take(ldh);
        multiply<S, kGelu>(tiled, normed, d, matrix, d, ldh, bias, scratch.hidden.data(), ldh);
        matrix = take(hidden * ldx), bias = take(ldx);
        multiply<S, kAdd>(tiled, scratch.hidden.data(), ldh, matrix, hidden, ldx, bias, x, ldx);
    }

    S *prefix_keys(int64_t layer, int64_t head) const {
        const int64_t at = (layer * cache.episodes + episode) * net.heads + head;
        return static_cast<S *>(cache.prefix_keys) + at * net.head_padded * cache.prefix_padded;
    }
    S *prefix_values(int64_t layer, int64_t head) const {
        const int64_t at = (layer * cache.episodes + episode) * net.heads + head;
        return static_cast<S *>(cache.prefix_values) + at * net.head_padded * cache.prefix_padded;
    }
    int64_t node_at(int64_t layer, int64_t transition, int64_t beam) const {
        const int64_t ancestor = cache.ancestors[(episode * cache.horizon + transition) * cache.beams + beam];
        const int64_t search = layer * cache.episodes + episode;
        return ((search * cache.horizon + transition) * cache.beams + ancestor) * heads_width;
    }
    S *node_keys(int64_t layer, int64_t head, int64_t transition, int64_t beam) const {
        const int64_t at = node_at(layer, transition, beam) + head * net.head_padded;
        return static_cast<S *>(cache.node_keys) + at * cache.node_padded;
    }
    S *node_values(int64_t layer, int64_t head, int64_t transition, int64_t beam) const {
        const int64_t at = node_at(layer, transition, beam) + head * net.head_padded;
        return static_cast<S *>(cache.node_values) + at * cache.node;
    }
    S *tail(int64_t layer, int64_t candidate) const {
        const int64_t at = (layer * cache.episodes + episode) * cache.beams * cache.copies + candidate;
        return static_cast<S *>(cache.tails) + at * 2 * (cache.action + 1) * heads_width;
    }

    // Keep the rows' keys and values where later rows, or these themselves, will look for them.
    void remember(int64_t layer) {
        const int64_t w = net.head_padded;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t number = numbers[row];
            const S *key = scratch.qkv.data() + row * ldq + heads_width, *value = key + heads_width;
            if (kind == kCandidates) {
                S *to = tail(layer, number) + index * heads_width;
                std::copy_n(key, heads_width, to);
                std::copy_n(value, heads_width, to + (cache.action + 1) * heads_width);
            } else if (kind == kPrefix) {
                for (int64_t head = 0; head < net.heads; head++)
                    put(key + head * w, value + head * w, number, cache.prefix_padded, prefix_keys(layer, head),
                        prefix_values(layer, head));
            } else if (index >= 0) {  // a value token, which nobody sees, has none
                for (int64_t head = 0; head < net.heads; head++)
                    put(key + head * w, value + head * w, index, cache.node_padded,
                        node_keys(layer, head, transition, number),
                        node_values(layer, head, transition, number));
            }
        }
    }

    void put(const S *key, const S *value, int64_t place, int64_t places, S *keys, S *values) const {
        for (int64_t i = 0; i < net.head_padded; i++) keys[i * places + place] = key[i];
        std::copy_n(value, net.head_padded, values + place * net.head_padded);
    }

    void attend(int64_t layer) {
        const int64_t w = net.head_padded;
        const S scale = S(1) / std::sqrt(S(net.head_width));
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < heads_width; i++) scratch.qkv[row * ldq + i] *= scale;
        for (int64_t head = 0; head < net.heads; head++) {
            S *query = scratch.qkv.data() + head * w, *scores = scratch.scores.data();
            S *mixed = scratch.mixed.data() + head * w;
            multiply_plain(tiled, query, ldq, prefix_keys(layer, head), cache.prefix_padded, w, cache.prefix_padded,
                           scores, keys);
            for_nodes(layer, head, &Block::node_keys, [&](auto count, int64_t row, int64_t t, const S *node) {
                const S *queries[count];
                S *out[count];
                for (int r = 0; r < count; r++) {
                    queries[r] = query + (row + r) * ldq;
                    out[r] = node_scores(row + r, t);
                }
                score_node<S, count>(queries, node, cache.node_padded, w, out);
            });
            if (kind == kCandidates)
                for (int64_t row = 0; row < rows; row++) score_tail(layer, head, row, query + row * ldq);
            S shares[kBlockRows];
            for (int64_t row = 0; row < rows; row++) shares[row] = soften(row);
            multiply_plain(tiled, scores, keys, prefix_values(layer, head), w, cache.prefix_padded, w, mixed,
                           heads_width);
            for_nodes(layer, head, &Block::node_values, [&](auto count, int64_t row, int64_t t, const S *node) {
                const S *weights[count];
                S *out[count];
                for (int r = 0; r < count; r++) {
                    weights[r] = node_scores(row + r, t);
                    out[r] = mixed + (row + r) * heads_width;
                }
                const bool last = kind == kBeams && t + 1 == nodes_to;
                mix_node<S, count>(weights, node, w, w, last ? stored : cache.node, out);
            });
            if (kind == kCandidates)
                for (int64_t row = 0; row < rows; row++) mix_tail(layer, head, row, mixed + row * heads_width);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < w; i++) mixed[row * heads_width + i] *= shares[row];
        }
    }

    S *node_scores(int64_t row, int64_t t) const {
        return scratch.scores.data() + row * keys + cache.prefix_padded + (t - nodes_from) * cache.node_padded;
    }

    // Call `work(count, row, transition, node)` for every visible node and the neighbouring rows that share it, up
    // to four at once; `count` is known when this is compiled.
    template <class Work>
    void for_nodes(int64_t layer, int64_t head, S *(Block::*find)(int64_t, int64_t, int64_t, int64_t) const,
                   Work work) const {
        for (int64_t t = nodes_from; t < nodes_to; t++)
            for (int64_t row = 0; row < rows;) {
                const S *node = (this->*find)(layer, head, t, beam_of(numbers[row]));
                int64_t end = row + 1;
                while (end < rows && (this->*find)(layer, head, t, beam_of(numbers[end])) == node) end++;
                for (; end - row >= 4; row += 4) work(std::integral_constant<int, 4>{}, row, t, node);
                if (end - row >= 2) work(std::integral_constant<int, 2>{}, row, t, node), row += 2;
                if (end - row == 1) work(std::integral_constant<int, 1>{}, row, t, node), row += 1;
            }
    }

    void score_tail(int64_t layer, int64_t head, int64_t row, const S *query) {
        const S *key = tail(layer, numbers[row]) + head * net.head_padded;
        S *scores = scratch.scores.data() + row * keys + tail_at;
        for (int64_t place = 0; place <= index; place++) {
            Vector sum{};
            for (int64_t i = 0; i < net.head_padded; i += F::lanes)
                sum += F::load(key + place * heads_width + i) * F::load(query + i);
            scores[place] = F::sum(sum);
        }
    }

    void mix_tail(int64_t layer, int64_t head, int64_t row, S *mixed) const {
        const S *value = tail(layer, numbers[row]) + (cache.action + 1) * heads_width + head * net.head_padded;
        const S *weights = scratch.scores.data() + row * keys + tail_at;
        mix_node<S, 1>(&weights, value, net.head_padded, heads_width, index + 1, &mixed);
    }

    // Scores to weights, with what is hidden at 0; returns the factor that makes them sum to 1.
    S soften(int64_t row) {
        S *scores = scratch.scores.data() + row * keys, *bias = scratch.bias.data();
        if (kind == kPrefix) {  // causal: a row sees no place after its own
            const S hidden = -std::numeric_limits<S>::infinity();
            std::fill(scores + numbers[row] + 1, scores + cache.prefix_padded, hidden);
        }
        if (kind == kCandidates) std::fill(scores + tail_at + index + 1, scores + keys, S(0));
        Vector best = F::broadcast(-std::numeric_limits<S>::infinity());
        for (int64_t i = 0; i < keys; i += F::lanes) {
            const Vector score = F::load(scores + i) + F::load(bias + i);
            F::store(scores + i, score);
            best = best > score ? best : score;
        }
        const S most = F::max(best);
        Vector total{};
        for (int64_t i = 0; i < keys; i += F::lanes) {
            const Vector weight = exponential(F::load(scores + i) - most);
            F::store(scores + i, weight);
            total += weight;
        }
        return S(1) / F::sum(total);
    }
};
