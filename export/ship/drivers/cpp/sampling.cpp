#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "error.hpp"

namespace stillgraph {
namespace {

constexpr float COLDEST = 1e-30F;  // a temperature that still divides any logit without overflow
constexpr double UNIT = 0x1p-53;   // std::uniform_real_distribution is not the same in every library

struct Kept {
    std::int64_t token;
    double score, weight;
};

// As much of `kept`, the highest scores first, as reaches a share `mass` of all weight.
void keep_mass(std::vector<Kept>& kept, double mass) {
    double total = 0, reached = 0;
    for (const Kept& each : kept) total += each.weight;
    std::size_t count = 0;
    while (count < kept.size() && (count == 0 || reached < mass * total)) reached += kept[count++].weight;
    kept.resize(count);
}

void refuse(const std::string& name, double value, const std::string& allowed) {
    std::string written = std::to_string(value);
    throw Error("read sampling options", name + " is " + written, "give a " + name + " of " + allowed);
}

}  // namespace

void Sampling::check() const {
    if (!(temperature >= 0) || std::isinf(temperature)) refuse("temperature", temperature, "0 (greedy) or more");
    if (top_k && *top_k < 1) refuse("top_k", static_cast<double>(*top_k), "1 or more");
    if (top_p && !(*top_p > 0 && *top_p <= 1)) refuse("top_p", *top_p, "over 0 and at most 1");
    if (min_p && !(*min_p >= 0 && *min_p <= 1)) refuse("min_p", *min_p, "between 0 and 1");
    if (repetition_penalty && !(*repetition_penalty >= 1e-6F && *repetition_penalty <= 1e6F)) {
        refuse("repetition_penalty", *repetition_penalty, "1e-6 to 1e6 (1 changes nothing)");
    }
}

Sampler::Sampler(const Sampling& sampling)
    : sampling_(sampling), random_(sampling.seed ? *sampling.seed : std::random_device{}()) {
    sampling.check();
}

std::int64_t Sampler::choose(const float* logits, std::size_t vocab, const std::vector<std::int64_t>& ids) {
    const float* best = std::max_element(logits, logits + vocab);
    // The sum is not finite where one of them is not.
    if (!std::isfinite(std::accumulate(logits, logits + vocab, 0.0))) {
        throw Error("generate", "the graph gave logits that are not finite", "validate the bundle");
    }
    const bool plain = !sampling_.repetition_penalty || *sampling_.repetition_penalty == 1;
    if (plain && sampling_.temperature == 0) return best - logits;
    scores_.assign(logits, logits + vocab);
    if (!plain) penalize(logits, ids);
    if (sampling_.temperature == 0) return std::max_element(scores_.begin(), scores_.end()) - scores_.begin();
    return draw();
}

void Sampler::penalize(const float* logits, const std::vector<std::int64_t>& ids) {
    const float penalty = *sampling_.repetition_penalty;
    for (const std::int64_t id : std::set<std::int64_t>(ids.begin(), ids.end())) {
        scores_[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty;
    }
}

std::int64_t Sampler::draw() {
    const double temperature = std::max(sampling_.temperature, COLDEST);
    const double top = *std::max_element(scores_.begin(), scores_.end());
    std::vector<Kept> kept;
    kept.reserve(scores_.size());
    for (std::size_t token = 0; token < scores_.size(); ++token) {
        const double weight = std::exp((scores_[token] - top) / temperature);
        kept.push_back({static_cast<std::int64_t>(token), scores_[token], weight});
    }
    std::stable_sort(kept.begin(), kept.end(), [](const Kept& a, const Kept& b) { return a.score > b.score; });
    if (sampling_.top_k && *sampling_.top_k < static_cast<std::int64_t>(kept.size())) {
        const double least = kept[*sampling_.top_k - 1].score;  // equal ones stay, as with transformers
        while (kept.back().score < least) kept.pop_back();
    }
    if (sampling_.top_p && *sampling_.top_p < 1) keep_mass(kept, *sampling_.top_p);
    if (sampling_.min_p) {
        while (kept.back().weight < kept.front().weight * *sampling_.min_p) kept.pop_back();
    }
    double total = 0, reached = 0;
    for (const Kept& each : kept) total += each.weight;
    const double drawn = static_cast<double>(random_() >> 11) * UNIT * total;
    for (const Kept& each : kept) {
        reached += each.weight;
        if (drawn < reached) return each.token;
    }
    return kept.back().token;
}

}  // namespace stillgraph
