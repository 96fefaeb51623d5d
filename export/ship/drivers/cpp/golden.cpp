#include "golden.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "error.hpp"
#include "picture.hpp"

namespace stillgraph {
namespace {

using nlohmann::json;
constexpr int GOLDEN_VERSION = 1;
const std::string STAGE = "read golden";

Bytes from_base64(const std::string& text) {
    static const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    Bytes bytes;
    std::uint32_t bits = 0;
    int count = 0;
    for (const char each : text) {
        const std::size_t digit = digits.find(each);
        if (digit == std::string::npos) break;  // the padding
        bits = bits << 6 | static_cast<std::uint32_t>(digit);
        count += 6;
        if (count < 8) continue;
        count -= 8;
        bytes.push_back(static_cast<std::uint8_t>(bits >> count));
    }
    return bytes;
}

GoldenCase read_case(const json& from, const Manifest& manifest) {
    GoldenCase one{from.at("name"), {from.at("prompt"), {}}, from.at("max_new_tokens"), {}};
    if (const json& png = from.at("picture_png"); !png.is_null()) {
        one.prompt.pictures.push_back(pixel_values(from_base64(png), "the picture of " + one.name, manifest));
    }
    for (const json& each : from.at("logits")) one.logits.push_back({each.at("step"), each.at("ids")});
    for (const Listed& listed : one.logits) {
        for (const std::int64_t id : listed.ids) {
            if (id >= 0 && id < manifest.vocab_size) continue;
            throw Error(STAGE, one.name + " lists logits of token " + std::to_string(id) + ", which is none",
                        "take the golden.json of this bundle");
        }
    }
    return one;
}

}  // namespace

std::vector<GoldenCase> read_golden(const std::filesystem::path& path, const std::string& only,
                                    const Manifest& manifest) {
    const Bytes bytes = read_bytes(path, STAGE);
    const std::string remedy = "make it anew with 'stillgraph validate'";
    try {
        const json raw = json::parse(bytes.begin(), bytes.end());
        if (raw.at("format_version") != GOLDEN_VERSION) {
            const std::string has = path.string() + " has format version " + raw.at("format_version").dump();
            throw Error(STAGE, has + " and this driver understands " + std::to_string(GOLDEN_VERSION), remedy);
        }
        std::vector<GoldenCase> cases;
        for (const json& each : raw.at("cases")) {
            if (only.empty() || each.at("name") == only) cases.push_back(read_case(each, manifest));
        }
        if (cases.empty()) {
            const std::string what = only.empty() ? " has no cases" : " has no case " + only;
            throw Error(STAGE, path.string() + what, "name one that it has, or leave --case out");
        }
        return cases;
    } catch (const json::exception& error) {
        throw Error(STAGE, path.string() + " is no golden.json (" + first_line(error.what()) + ")", remedy);
    }
}

}  // namespace stillgraph
