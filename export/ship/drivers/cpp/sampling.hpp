// Choosing the next token, in the order and with the meaning of transformers' logits processors.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

namespace stillgraph {

// temperature 0 takes the most likely token: top_k, top_p and min_p then do nothing.
struct Sampling {
    float temperature = 0;
    std::optional<std::int64_t> top_k;
    std::optional<float> top_p, min_p, repetition_penalty;
    std::optional<std::uint64_t> seed;

    // Throws Error for a value out of range.
    void check() const;
};

// The same seed draws the same tokens on every machine; other tokens than Python, whose generator is another.
class Sampler {
public:
    explicit Sampler(const Sampling& sampling);

    // logits: [V], as the graph gave them; ids: the prompt and all tokens so far. Throws Error for logits that
    // are not finite.
    std::int64_t choose(const float* logits, std::size_t vocab, const std::vector<std::int64_t>& ids);

private:
    void penalize(const float* logits, const std::vector<std::int64_t>& ids);
    std::int64_t draw();

    Sampling sampling_;
    std::mt19937_64 random_;
    std::vector<float> scores_;
};

}  // namespace stillgraph
