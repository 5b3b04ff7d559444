// A Transformer layer's forward and backward pass for training on CPU: windows are independent, so each goes through
// the whole layer on one core, its activations in that core's cache. Weights' gradients add up over groups of
// windows, then over groups: results do not depend on the number of threads.
//
// Letters: b windows, T tokens, R rows (T in whole tiles), d width, h heads, w width of a head, K keys (R in whole
// vectors).

#include "attention.h"

enum Site : uint64_t { kAttentionSite, kProjSite, kDownSite };

template <class S>
class Pass {
  public:
    Pass(const Layer &layer, const S *const *matrices) : layer(layer), shape(layer), matrices(matrices) {}

    void forward(int64_t window, const S *x, const Kept<S> &kept, S *out, Arena<S> &arena) const {
        const int64_t d = shape.width;
        Scratch scratch(shape, arena);
        HeadScratch<S> heads(shape, arena);
        normalize(x, d, kNorm1, scratch.normed, moments(kept, 0));
        multiply(kQkv, scratch.normed, 3 * d, kept.qkv, shape.ldq);
        for (int64_t head = 0; head < shape.heads; head++) {
            const auto drop = attention_dropout(window, head);
            Head<S>{shape, heads, drop}.forward(kept.qkv + head * shape.head, kept.mixed + head * shape.head,
                                                kept.logs + head * shape.rows);
        }
        multiply(kProj, kept.mixed, d, scratch.branch, shape.ldx);
        add_branch(shape.tokens, d, x, d, scratch.branch, shape.ldx, dropout(kProjSite, window), kept.middle,
                   shape.ldx);
        normalize(kept.middle, shape.ldx, kNorm2, scratch.normed, moments(kept, 1));
        forward_mlp(kept, scratch);
        add_branch(shape.tokens, d, kept.middle, shape.ldx, scratch.branch, shape.ldx, dropout(kDownSite, window),
                   out, d);
    }

    // Gradient of x, and added to `sums` [parameters] those of the weights. What the forward pass kept is copied
    // before use: it lies far away by now, and comes quickly only as one long piece.
    void backward(int64_t window, const S *x, const Kept<S> &kept, const S *gradient, S *out, S *sums,
                  Arena<S> &arena) const {
        S *to[kWeights];
        for (int i = 0; i < kWeights; i++) to[i] = sums, sums += shape.sizes[i];
        Scratch scratch(shape, arena);
        backward_mlp(window, kept, gradient, to, scratch);
        backward_attention(window, x, kept, to, scratch, arena);
        layer_norm_gradient(shape.tokens, shape.width, x, shape.width, moments(kept, 0), weight(kNorm1),
                            scratch.branch, shape.ldx, scratch.middle, shape.ldx, out, shape.width, to[kNorm1],
                            to[kShift1]);
    }

    int64_t scratch_size() const {
        const int64_t head = 6 * shape.keys * shape.ldw + (2 * shape.head_padded + 2 * shape.rows + 1) * shape.ldk;
        const int64_t rows = shape.rows * (3 * shape.ldx + shape.ldq + 1) + 2 * shape.block;
        return head + rows + 32 * 64;  // and the ends of the arena's pieces
    }

    const Layer &layer;
    const Shape<S> shape;

  private:
    struct Scratch {
        S *normed, *branch, *middle, *qkv, *active, *hidden;  // [R, d] thrice, [R, 3 d], [R, 128] twice
        Scratch(const Shape<S> &shape, Arena<S> &arena) {
            for (S **array : {&normed, &branch, &middle}) *array = arena.take(shape.rows * shape.ldx);
            qkv = arena.take(shape.rows * shape.ldq);
            for (S **array : {&active, &hidden}) *array = arena.take(shape.block);
            for (S *array : {normed, branch, middle})  // rows that are no tokens
                std::fill(array + shape.tokens * shape.ldx, array + shape.rows * shape.ldx, S(0));
        }
    };
    static constexpr const S *none = nullptr;
    const S *const *matrices;  // [kWeights] packed, the products' ones

    const S *weight(int which) const { return static_cast<const S *>(layer.weights[which]); }
    Moments<S> *moments(const Kept<S> &kept, int norm) const {
        return reinterpret_cast<Moments<S> *>(kept.moments) + norm * shape.rows;
    }
    uint64_t key(Site site, int64_t index) const {
        return scatter(scatter(static_cast<uint64_t>(layer.seed) + site * kGolden) + index * kGolden);
    }
    Dropout<S> dropout(Site site, int64_t window) const {
        return Dropout<S>(key(site, window), layer.dropped, shape.width / Simd<S>::lanes);
    }
    Dropout<S> attention_dropout(int64_t window, int64_t head) const {
        return Dropout<S>(key(kAttentionSite, window * shape.heads + head), layer.dropped,
                          shape.keys / Simd<S>::lanes);
    }

    void normalize(const S *x, int64_t ldx, Weight norm, S *out, Moments<S> *moments) const {
        layer_norm(shape.tokens, shape.width, layer.epsilon, x, ldx, weight(norm), weight(norm + 1), out, shape.ldx,
                   moments);
    }
    // A product's output, for inputs [R, d].
    void multiply(Weight which, const S *a, int64_t outputs, S *out, int64_t ldo) const {
        const Inputs inputs{0, shape.width, shape.width};
        multiply_packed(shape.rows, a, shape.ldx, matrices[which], inputs, outputs, weight(which + 1), false, out, ldo);
    }
    // The gradient of a product's input [R, d], those of its weights and bias added to theirs.
    void product_gradients(Weight which, const S *gradient, int64_t ldg, int64_t outputs, const S *input,
                           S *const *to, S *out) const {
        const int64_t d = shape.width, ldx = shape.ldx;
        add_rows(shape.rows, gradient, ldg, outputs, to[which + 1]);
        multiply_transposed<S, kAdd>(shape.rows, gradient, ldg, outputs, input, ldx, d, to[which], d);
        multiply_packed(shape.rows, gradient, ldg, matrices[which], {0, outputs, outputs}, d, none, false, out, ldx);
    }

    // The MLP's output into `branch`, from the normed rows.
    void forward_mlp(const Kept<S> &kept, Scratch &scratch) const {
        const int64_t d = shape.width, ldx = shape.ldx, ldh = shape.ldh;
        S *hidden = kept.hidden;
        for (int64_t first = 0; first < shape.hidden; first += kBlockHidden, hidden += shape.block) {
            const int64_t count = std::min(kBlockHidden, shape.hidden - first);
            multiply_packed(shape.rows, scratch.normed, ldx, matrices[kUp] + first * d, {0, d, d}, count,
                            weight(kUpBias) + first, false, hidden, ldh);
            for (int64_t row = 0; row < shape.rows; row++)
                gelu(count, hidden + row * ldh, scratch.active + row * ldh);
            multiply_packed(shape.rows, scratch.active, ldh, matrices[kDown], {first, count, shape.hidden}, d,
                            first == 0 ? weight(kDownBias) : none, first > 0, scratch.branch, ldx);
        }
    }

    // Leaves the gradient of the middle in the scratch.
    void backward_mlp(int64_t window, const Kept<S> &kept, const S *gradient, S *const *to, Scratch &scratch) const {
        const int64_t d = shape.width, ldx = shape.ldx, ldh = shape.ldh, all = shape.hidden;
        S *branch = scratch.branch, *active = scratch.active, *given = scratch.hidden, *hidden = kept.hidden;
        branch_gradient(shape.tokens, d, gradient, d, dropout(kDownSite, window), branch, ldx);
        add_rows(shape.rows, branch, ldx, d, to[kDownBias]);
        normalize(kept.middle, ldx, kNorm2, scratch.normed, moments(kept, 1));
        for (int64_t first = 0; first < all; first += kBlockHidden, hidden += shape.block) {
            const int64_t count = std::min(kBlockHidden, all - first);
            std::copy_n(hidden, shape.block, active);
            multiply_packed(shape.rows, branch, ldx, matrices[kDown] + first * d, {0, d, d}, count, none, false,
                            given, ldh);
            for (int64_t row = 0; row < shape.rows; row++)
                gelu_gradient(count, active + row * ldh, given + row * ldh);
            multiply_transposed<S, kAdd>(shape.rows, branch, ldx, d, active, ldh, count, to[kDown] + first, all);
            add_rows(shape.rows, given, ldh, count, to[kUpBias] + first);
            multiply_transposed<S, kAdd>(shape.rows, given, ldh, count, scratch.normed, ldx, d, to[kUp] + first * d, d);
            multiply_packed(shape.rows, given, ldh, matrices[kUp], {first, count, all}, d, none, first > 0,
                            scratch.middle, ldx);
        }
        layer_norm_gradient(shape.tokens, d, kept.middle, ldx, moments(kept, 1), weight(kNorm2), scratch.middle, ldx,
                            gradient, d, scratch.middle, ldx, to[kNorm2], to[kShift2]);
    }

    // Leaves the gradient of the first norm's output in `branch`.
    void backward_attention(int64_t window, const S *x, const Kept<S> &kept, S *const *to, Scratch &scratch,
                            Arena<S> &arena) const {
        const int64_t d = shape.width, ldx = shape.ldx;
        branch_gradient(shape.tokens, d, scratch.middle, ldx, dropout(kProjSite, window), scratch.branch, ldx);
        std::fill(scratch.branch + shape.tokens * ldx, scratch.branch + shape.rows * ldx, S(0));
        product_gradients(kProj, scratch.branch, ldx, d, kept.mixed, to, scratch.normed);
        std::copy_n(kept.qkv, shape.rows * shape.ldq, scratch.qkv);
        HeadScratch<S> heads(shape, arena);
        for (int64_t head = 0; head < shape.heads; head++) {
            const int64_t at = head * shape.head;
            const auto drop = attention_dropout(window, head);
            Head<S>{shape, heads, drop}.backward(scratch.qkv + at, kept.mixed + at, kept.logs + head * shape.rows,
                                                 scratch.normed + at);
        }
        normalize(x, d, kNorm1, scratch.normed, moments(kept, 0));
        product_gradients(kQkv, scratch.qkv, shape.ldq, 3 * d, scratch.normed, to, scratch.branch);
    }
};

// The four products' matrices in panels, for the forward or for the backward pass.
template <class S>
struct Matrices {
    const S *at[kWeights] = {};
    Matrices(const Layer &layer, bool backward) {
        static thread_local Arena<S> arena;
        const int64_t d = layer.width, hidden = layer.hidden;
        const int64_t sizes[4][3] = {{kQkv, d, 3 * d}, {kProj, d, d}, {kUp, d, hidden}, {kDown, hidden, d}};
        arena.start(4 * d * d + 2 * d * hidden + 4 * 64);
        for (const auto &[which, inputs, outputs] : sizes) {
            S *to = arena.take(inputs * outputs);
            const S *matrix = static_cast<const S *>(layer.weights[which]);
            if (backward)
                pack(matrix, outputs, inputs, inputs, 1, layer.threads, to);
            else
                pack(matrix, inputs, outputs, 1, inputs, layer.threads, to);
            at[which] = to;
        }
    }
};

template <class S>
void forward(const Layer &layer, const S *x, S *kept, S *out) {
    const Matrices<S> matrices(layer, false);
    const Pass<S> pass(layer, matrices.at);
    const int64_t size = layer.tokens * layer.width;
#pragma omp parallel for schedule(dynamic, 1) num_threads(layer.threads)
    for (int64_t window = 0; window < layer.windows; window++) {
        static thread_local Arena<S> arena;
        arena.start(pass.scratch_size());
        const Kept<S> own(pass.shape, kept + window * pass.shape.kept());
        pass.forward(window, x + window * size, own, out + window * size, arena);
    }
}

// `parts` [groups, parameters] is room for the groups' sums; `sums` [parameters] are the weights' gradients, in order.
template <class S>
void backward(const Layer &layer, const S *x, S *kept, const S *gradient, S *out, S *parts, S *sums) {
    const Matrices<S> matrices(layer, true);
    const Pass<S> pass(layer, matrices.at);
    const int64_t size = layer.tokens * layer.width, count = pass.shape.parameters;
    const int64_t groups = (layer.windows + layer.group - 1) / layer.group;
#pragma omp parallel for schedule(dynamic, 1) num_threads(layer.threads)
    for (int64_t group = 0; group < groups; group++) {
        static thread_local Arena<S> arena;
        S *part = parts + group * count;
        std::fill_n(part, count, S(0));
        const int64_t end = std::min((group + 1) * layer.group, layer.windows);
        for (int64_t window = group * layer.group; window < end; window++) {
            arena.start(pass.scratch_size());
            const Kept<S> own(pass.shape, kept + window * pass.shape.kept());
            pass.backward(window, x + window * size, own, gradient + window * size, out + window * size, part, arena);
        }
    }
    constexpr int64_t block = 4096;
#pragma omp parallel for schedule(static) num_threads(layer.threads)
    for (int64_t first = 0; first < count; first += block) {
        const int64_t last = std::min(first + block, count);
        std::copy(parts + first, parts + last, sums + first);
        for (int64_t group = 1; group < groups; group++)
            for (int64_t i = first; i < last; i++) sums[i] += parts[group * count + i];
    }
}

#define TT_RAY_EXPORT(S, suffix)                                                                                      \
    extern "C" int64_t tt_ray_layer_kept_##suffix(const Layer *layer) { return Shape<S>(*layer).kept(); }             \
    extern "C" void tt_ray_layer_forward_##suffix(const Layer *layer, const S *x, S *kept, S *out) {                  \
        forward<S>(*layer, x, kept, out);                                                                             \
    }                                                                                                                 \
    extern "C" void tt_ray_layer_backward_##suffix(const Layer *layer, const S *x, S *kept, const S *gradient,        \
                                                   S *out, S *parts, S *sums) {                                       \
        backward<S>(*layer, x, kept, gradient, out, parts, sums);                                                     \
    }

TT_RAY_EXPORT(float, float32)
TT_RAY_EXPORT(double, float64)

extern "C" int64_t tt_ray_vector_bytes() { return kVectorBytes; }
