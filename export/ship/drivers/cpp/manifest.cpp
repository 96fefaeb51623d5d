#include "manifest.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "error.hpp"

namespace stillgraph {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const std::string STAGE = "load bundle";
const std::string AGAIN = "export the bundle again";

template <class T>
std::optional<T> maybe(const json& from, const char* key) {
    const json& value = from.at(key);
    return value.is_null() ? std::nullopt : std::optional<T>(value.get<T>());
}

const Port* of_role(const std::vector<Port>& ports, const std::string& role) {
    for (const Port& port : ports) {
        if (port.role == role) return &port;
    }
    return nullptr;
}

File read_file(const json& from) {
    return {from.at("path").get<std::string>(), from.at("nbytes").get<std::uintmax_t>()};
}

std::vector<Port> read_ports(const json& from) {
    std::vector<Port> ports;
    for (const json& each : from) {
        Shape shape;
        for (const json& size : each.at("shape")) {
            shape.push_back(size.is_string() ? ANY : size.get<std::int64_t>());
        }
        ports.push_back({each.at("name"), each.at("role"), each.at("dtype"), maybe<int>(each, "layer"), shape});
    }
    return ports;
}

std::string read_custom_ops(const json& domains) {
    std::string words;
    for (const auto& [domain, ops] : domains.items()) {
        for (const json& op : ops) words += (words.empty() ? "" : ", ") + domain + "." + op.get<std::string>();
    }
    return words;
}

GraphEntry read_graph(const json& from) {
    const json& shape = from.at("shape");
    GraphEntry graph{
        shape.at("role"),
        shape.at("batch"),
        shape.at("max_len"),
        maybe<std::int64_t>(shape, "ctx"),
        shape.at("embeds"),
        shape.at("int8_activations"),
        read_file(from.at("file")),
        read_ports(from.at("inputs")),
        read_ports(from.at("outputs")),
        {},
        read_custom_ops(from.at("ops").at("custom")),
    };
    for (const json& alias : from.at("aliases")) {
        graph.aliases.push_back({alias.at("output"), alias.at("input"), alias.at("same_buffer")});
    }
    return graph;
}

std::optional<Pixels> read_pixels(const json& from) {
    if (from.is_null()) return std::nullopt;
    using Triple = std::array<float, 3>;
    return Pixels{from.at("convert_rgb"), maybe<double>(from, "scale"), maybe<Triple>(from, "mean"),
                  maybe<Triple>(from, "std")};
}

Calling read_calling(const json& from) {
    Calling calling{};
    calling.pad = from.at("tokens").at("pad");
    calling.stop = from.at("tokens").at("stop").get<std::vector<std::int64_t>>();
    if (const json& prompt = from.at("prompt"); !prompt.is_null()) {
        calling.chunk = prompt.at("chunk");
        calling.continues = prompt.at("continues");
        calling.whole_images = prompt.at("whole_images");
    }
    calling.images = read_pixels(from.at("images"));
    return calling;
}

std::optional<Vision> read_vision(const json& from) {
    if (from.is_null()) return std::nullopt;
    return Vision{from.at("channels"), from.at("height"), from.at("width"), from.at("image_tokens"),
                  from.at("image_token")};
}

json parse(const fs::path& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) {
        const bool folder = fs::is_directory(path.parent_path());
        const std::string what = folder ? "the folder has no manifest.json" : "no such folder";
        throw Error(STAGE, path.parent_path().string() + ": " + what, "name a folder made by 'stillgraph export'");
    }
    try {
        return json::parse(stream);
    } catch (const json::exception& error) {
        throw Error(STAGE, path.string() + " is not JSON (" + first_line(error.what()) + ")", AGAIN);
    }
}

void check_version(const fs::path& path, const json& raw) {
    const json version = raw.is_object() && raw.contains("format_version") ? raw["format_version"] : json();
    if (version == FORMAT_VERSION) return;
    const std::string problem = path.string() + " has format version " + version.dump() +
                                " and this driver understands " + std::to_string(FORMAT_VERSION);
    throw Error(STAGE, problem, "export the bundle again, or build the driver of its version");
}

void check_file(const fs::path& bundle, const File& file) {
    const fs::path relative(file.path), path = bundle / relative;
    bool leaves = relative.empty() || relative.is_absolute();
    for (const fs::path& part : relative) leaves = leaves || part == "..";
    if (leaves) throw Error(STAGE, "path '" + file.path + "' leaves the bundle", AGAIN);
    std::error_code error;
    const std::uintmax_t size = fs::file_size(path, error);
    if (error) throw Error(STAGE, path.string() + " is missing", "copy the whole folder, or export it again");
    if (size != file.nbytes) {
        const std::string problem = path.string() + " has " + std::to_string(size) +
                                    " bytes and the manifest says " + std::to_string(file.nbytes);
        throw Error(STAGE, problem, "copy the whole folder, or export it again");
    }
}

}  // namespace

const Port* GraphEntry::input(const std::string& role) const { return of_role(inputs, role); }
const Port* GraphEntry::output(const std::string& role) const { return of_role(outputs, role); }

const GraphEntry* Manifest::graph(const std::string& role) const {
    const GraphEntry* found = nullptr;
    for (const GraphEntry& graph : graphs) {
        if (graph.role == role && (found == nullptr || !graph.int8_activations)) found = &graph;
    }
    return found;
}

const GraphEntry& Manifest::need(const std::string& role) const {
    if (const GraphEntry* found = graph(role)) return *found;
    const std::string remedy = "add one with 'stillgraph export " + role + "' into the same --out";
    throw Error(STAGE, bundle.string() + " has no " + role + " graph", remedy);
}

Manifest read_manifest(const fs::path& bundle) {
    const fs::path path = bundle / "manifest.json";
    const json raw = parse(path);
    check_version(path, raw);
    try {
        Manifest manifest{bundle,
                          raw.at("model").at("vocab_size"),
                          raw.at("precision"),
                          read_vision(raw.at("model").at("vision")),
                          {},
                          read_file(raw.at("weights").at("file")),
                          read_calling(raw.at("calling"))};
        for (const auto& [name, graph] : raw.at("graphs").items()) manifest.graphs.push_back(read_graph(graph));
        check_file(bundle, manifest.weights);
        for (const GraphEntry& graph : manifest.graphs) check_file(bundle, graph.file);
        return manifest;
    } catch (const json::exception& error) {
        throw Error(STAGE, path.string() + " is no manifest (" + first_line(error.what()) + ")", AGAIN);
    }
}

}  // namespace stillgraph
