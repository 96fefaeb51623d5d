// Bad input: one sentence with the stage, the value and the remedy, as Python's StillgraphError has it.
#pragma once

#include <stdexcept>
#include <string>

namespace stillgraph {

struct Error : std::runtime_error {
    Error(const std::string& stage, const std::string& problem, const std::string& remedy)
        : std::runtime_error(stage + ": " + problem + "; " + remedy + ".") {}
};

// The first line of a library's message: ours are one line.
inline std::string first_line(const std::string& message) {
    return message.substr(0, message.find('\n'));
}

}  // namespace stillgraph
