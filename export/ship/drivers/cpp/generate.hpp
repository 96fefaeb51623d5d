// From a prompt's ids to the tokens behind it: chunks of the prefill, then one token a call.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "graph.hpp"
#include "sampling.hpp"

namespace stillgraph {

struct Prompt {
    std::vector<std::int64_t> ids;
    std::vector<std::vector<float>> pictures;  // pixels, in the order of their image tokens
};

struct Answer {
    std::vector<std::int64_t> tokens;
    std::string finish_reason;  // stop, length or context
    double ttft_ms = 0;         // from the request to the first token, less loading of graphs
    double tpot_ms = 0;         // mean of those after it; 0 for one token
};

// (step, logits [V]): what the token of a step is chosen from.
using Watch = std::function<void(std::size_t, const float*)>;

class Generator {
public:
    // one_at_a_time: no graph is in memory beside another, but the embed graph beside the prefill.
    Generator(const Manifest& manifest, int threads, bool one_at_a_time);

    // Throws Error for a prompt that the graphs cannot take.
    Answer generate(const Prompt& prompt, std::size_t max_new_tokens, const Sampling& sampling,
                    const Watch& watch = {});

    double load_ms() const { return load_ms_; }

private:
    using Features = std::vector<std::vector<float>>;  // [T, hidden] of each picture

    void check(const Prompt& prompt) const;
    const float* prefill(const Prompt& prompt);
    const float* grow(const std::vector<std::int64_t>& ids);
    const float* decode(std::int64_t token);
    Features see(const std::vector<std::vector<float>>& pictures);
    std::size_t end_of_call(const std::vector<std::int64_t>& ids, std::size_t start) const;
    void give(const std::vector<std::int64_t>& ids, std::size_t start, std::size_t end, const Features& features);
    void embed(const std::vector<std::int64_t>& ids, std::size_t start, std::size_t end, const Features& features);
    void number_pictures(const std::vector<std::int64_t>& ids, std::size_t start, std::size_t end);
    bool is_image(std::int64_t id) const;
    std::size_t images_before(const std::vector<std::int64_t>& ids, std::size_t end) const;
    Graph& use(const std::string& role);
    void leave(const std::string& role);

    const Manifest& manifest_;
    const int threads_;
    const bool one_at_a_time_;
    const bool grows_;
    std::int64_t limit_;  // tokens that the cache takes
    std::map<std::string, std::unique_ptr<Graph>> graphs_;
    std::int64_t length_ = 0;  // tokens in the cache
    Cache from_prefill_;       // until the decode has it
    double load_ms_ = 0;
};

}  // namespace stillgraph
