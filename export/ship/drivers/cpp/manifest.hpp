// manifest.json: what is in a bundle, and how its graphs are called. No name of a port is read into: a port
// is found by its role and its layer.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace stillgraph {

constexpr int FORMAT_VERSION = 5;
constexpr std::int64_t ANY = -1;  // a length that every call chooses

using Shape = std::vector<std::int64_t>;
using CacheKey = std::pair<int, std::string>;  // layer, and "key" or "value"

struct File {
    std::string path;  // in the bundle
    std::uintmax_t nbytes;
};

struct Port {
    std::string name;
    std::string role;
    std::string dtype;  // float32 or int64
    std::optional<int> layer;  // of keys and values
    Shape shape;

    CacheKey key() const { return {*layer, role}; }
    bool is_ids() const { return dtype == "int64"; }
};

struct Alias {
    std::string output;
    std::string input;
    bool same_buffer;  // whether the output may lie where the input is
};

struct GraphEntry {
    std::string role;
    std::int64_t batch;
    std::int64_t max_len;
    std::optional<std::int64_t> ctx;
    bool embeds;
    bool int8_activations;
    File file;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::vector<Alias> aliases;
    std::string custom_ops;  // of other domains than ONNX's own, in words; empty for none

    // The port of a role that no layer has its own of; null where there is none.
    const Port* input(const std::string& role) const;
    const Port* output(const std::string& role) const;
};

struct Vision {
    std::int64_t channels, height, width;
    std::int64_t image_tokens;  // of a picture
    std::int64_t image_token;   // their id
};

// (pixel * scale - mean) / std by channel; what is not there leaves a step out.
struct Pixels {
    bool convert_rgb;
    std::optional<double> scale;
    std::optional<std::array<float, 3>> mean, std;
};

struct Calling {
    std::int64_t pad;
    std::vector<std::int64_t> stop;
    std::int64_t chunk = 0;  // most tokens of a call of the prefill
    bool continues = false;  // whether a prompt may take several
    bool whole_images = false;
    std::optional<Pixels> images;
};

struct Manifest {
    std::filesystem::path bundle;
    std::int64_t vocab_size;
    std::string precision;  // of weights
    std::optional<Vision> vision;
    std::vector<GraphEntry> graphs;
    File weights;
    Calling calling;

    // The graph of a role, or null; of two prefills the one whose activations are not rounded to int8.
    const GraphEntry* graph(const std::string& role) const;
    // As `graph`. Throws Error where there is none.
    const GraphEntry& need(const std::string& role) const;
};

// Throws Error for what is no bundle, for another format, and for a file that is missing or of another size.
Manifest read_manifest(const std::filesystem::path& bundle);

}  // namespace stillgraph
