// A picture that already has the size of the model's input, as the manifest says it is made into numbers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace stillgraph {

using Bytes = std::vector<std::uint8_t>;

// The content of a file. Throws Error, with `stage`, where it cannot be read.
Bytes read_bytes(const std::filesystem::path& path, const std::string& stage);

// Pixels [3, H, W] of a PNG of `vision`'s height and width, 8 bits a channel: (pixel * scale - mean) / std, with
// anything transparent laid over white. name: what the PNG is called in an error. Throws Error.
std::vector<float> pixel_values(const Bytes& png, const std::string& name, const Manifest& manifest);

}  // namespace stillgraph
