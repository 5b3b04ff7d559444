// Choosing tokens from logits: the same filters as tt_ray/planning/sampling.py, one pass a row.

#pragma once

#include "vectors.h"

// Which tokens may be drawn.
struct Filter {
    int64_t top_k;  // only so many of the likeliest; 0: all, 1: no draw at all
    double cdf;     // not the least likely that hold less than this mass; < 0: all
};

template <class S>
int64_t likeliest(int64_t count, const S *logits) {
    return std::max_element(logits, logits + count) - logits;
}

// softmax(logits) but for its factor; returns the sum. Padded with zeros to whole vectors.
template <class S>
S exponentials(int64_t count, const S *logits, std::vector<S> &p) {
    using F = Simd<S>;
    p.assign(round_up(count, F::lanes), -std::numeric_limits<S>::infinity());
    std::copy_n(logits, count, p.data());
    typename F::Vector best = F::load(p.data()), total{};
    for (size_t i = 0; i < p.size(); i += F::lanes) {
        const typename F::Vector x = F::load(p.data() + i);
        best = x > best ? x : best;
    }
    const S most = F::max(best);
    for (size_t i = 0; i < p.size(); i += F::lanes) {
        const typename F::Vector x = exponential(F::load(p.data() + i) - most);
        F::store(p.data() + i, x);
        total += x;
    }
    return F::sum(total);
}

// Mean of `values` under softmax(logits).
template <class S>
S expectation(int64_t count, const S *logits, const S *values, std::vector<S> &p) {
    const S total = exponentials(count, logits, p);
    S mean = 0;
    for (int64_t i = 0; i < count; i++) mean += p[i] * values[i];
    return mean / total;
}

template <class S>
void keep_from(std::vector<S> &p, S smallest) {
    using F = Simd<S>;
    for (size_t i = 0; i < p.size(); i += F::lanes) {
        const typename F::Vector x = F::load(p.data() + i);
        F::store(p.data() + i, x < smallest ? typename F::Vector{} : x);
    }
}

// The smallest probability that stays when the least likely ones, together less than `share` of the mass, go.
// Bisection: what stays is above `low` and at most `high`, and `high` is always one of the probabilities.
template <class S>
S mass_threshold(const S *p, int64_t padded, S share) {
    using F = Simd<S>;
    typename F::Vector total{}, most{};
    for (int64_t i = 0; i < padded; i += F::lanes) {
        const typename F::Vector x = F::load(p + i);
        total += x;
        most = x > most ? x : most;
    }
    const S wanted = share * F::sum(total);
    S low = 0, high = F::max(most);
    while (wanted > 0) {
        const S middle = low + (high - low) / 2;
        if (middle >= high) return high;  // neighbouring numbers: nothing lies between
        typename F::Vector mass{}, below{}, above = F::broadcast(high);
        for (int64_t i = 0; i < padded; i += F::lanes) {
            const typename F::Vector x = F::load(p + i);
            const auto under = x <= middle;
            const typename F::Vector lower = under ? x : typename F::Vector{}, upper = under ? above : x;
            mass += lower;
            below = lower > below ? lower : below;
            above = upper < above ? upper : above;
        }
        if (F::sum(mass) >= wanted) {
            high = F::max(below);
        } else {
            if (-F::max(-above) >= high) return high;
            low = middle;
        }
    }
    return 0;  // a share of nothing drops nothing
}

// Inverse-CDF sampling from softmax(logits) after the filters; `p` is the thread's room for the probabilities.
template <class S>
int64_t draw(const Filter &filter, int64_t count, const S *logits, S uniform, std::vector<S> &p) {
    using F = Simd<S>;
    if (filter.top_k == 1) return likeliest(count, logits);
    exponentials(count, logits, p);
    if (filter.top_k > 0 && filter.top_k < count) {
        static thread_local std::vector<S> sorted;
        sorted.assign(p.begin(), p.begin() + count);
        std::nth_element(sorted.begin(), sorted.begin() + filter.top_k - 1, sorted.end(), std::greater<S>());
        keep_from(p, sorted[filter.top_k - 1]);
    }
    if (filter.cdf >= 0) keep_from(p, mass_threshold(p.data(), p.size(), S(filter.cdf)));
    typename F::Vector mass{};
    for (size_t i = 0; i < p.size(); i += F::lanes) mass += F::load(p.data() + i);
    const S threshold = uniform * F::sum(mass);
    S running = 0;
    int64_t last = 0;  // rounding may leave the running sum below the threshold: then the last that was kept
    for (int64_t i = 0; i < count; i++) {
        running += p[i];
        if (p[i] > 0) last = i;
        if (running > threshold) return i;
    }
    return last;
}
