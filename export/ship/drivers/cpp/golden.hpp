// golden.json: prompts, and what came after them in PyTorch.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "generate.hpp"

namespace stillgraph {

// Logits of a step that are to be told, by the ids of their tokens.
struct Listed {
    std::size_t step;
    std::vector<std::int64_t> ids;
};

struct GoldenCase {
    std::string name;
    Prompt prompt;
    std::size_t max_new_tokens;
    std::vector<Listed> logits;
};

// Every case, or the one named. Throws Error.
std::vector<GoldenCase> read_golden(const std::filesystem::path& path, const std::string& only,
                                    const Manifest& manifest);

}  // namespace stillgraph
