// generate BUNDLE: a line of JSON for a prompt, as `stillgraph run --json` ends with, less the text.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "error.hpp"
#include "generate.hpp"
#include "golden.hpp"
#include "metrics.hpp"
#include "picture.hpp"

namespace {

using namespace stillgraph;
using nlohmann::json;

const std::string USAGE = R"(generate BUNDLE --token-ids 2,17,5 [--image PICTURE.png] [options]
generate BUNDLE --golden golden.json [--case NAME]

  --max-new-tokens 128      --temperature 0 (greedy)   --top-k N   --top-p P   --min-p P
  --repetition-penalty R    --seed N                   --threads N (default: every core)
  --image                   a PNG of the model's own size; again for the next one
  --golden                  the cases of a file, a line each, with the logits that it lists
UNLOAD_PREFILL_BEFORE_DECODE=1 in the environment holds one graph in memory at a time.
)";

struct Options {
    std::string bundle, token_ids, golden, only;
    std::vector<std::string> images;
    std::size_t max_new_tokens = 128;
    int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    Sampling sampling;
};

[[noreturn]] void refuse(const std::string& problem) {
    throw Error("read options", problem, "see 'generate --help'");
}

template <class T>
T number(const std::string& name, const std::string& text) {
    std::istringstream stream(text);
    T value{};
    // A stream reads -1 into an unsigned number, as a large one.
    const bool negative = !text.empty() && text[0] == '-' && std::is_unsigned_v<T>;
    if (!(stream >> value) || !stream.eof() || negative) refuse(name + " is '" + text + "'");
    return value;
}

std::vector<std::int64_t> numbers(const std::string& text) {
    std::vector<std::int64_t> ids;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) ids.push_back(number<std::int64_t>("--token-ids", part));
    return ids;
}

void set(Options& options, const std::string& name, const std::string& value) {
    Sampling& sampling = options.sampling;
    if (name == "--token-ids") options.token_ids = value;
    else if (name == "--golden") options.golden = value;
    else if (name == "--case") options.only = value;
    else if (name == "--image") options.images.push_back(value);
    else if (name == "--max-new-tokens") options.max_new_tokens = number<std::size_t>(name, value);
    else if (name == "--threads") options.threads = number<int>(name, value);
    else if (name == "--temperature") sampling.temperature = number<float>(name, value);
    else if (name == "--top-k") sampling.top_k = number<std::int64_t>(name, value);
    else if (name == "--top-p") sampling.top_p = number<float>(name, value);
    else if (name == "--min-p") sampling.min_p = number<float>(name, value);
    else if (name == "--repetition-penalty") sampling.repetition_penalty = number<float>(name, value);
    else if (name == "--seed") sampling.seed = number<std::uint64_t>(name, value);
    else refuse("there is no option " + name);
}

Options parse(const std::vector<std::string>& words) {
    Options options;
    for (std::size_t at = 0; at < words.size(); ++at) {
        if (words[at].rfind("--", 0) == 0) {
            if (at + 1 == words.size()) refuse(words[at] + " has no value");
            set(options, words[at], words[at + 1]);
            ++at;
        } else {
            if (!options.bundle.empty()) refuse("'" + words[at] + "' is one bundle too many");
            options.bundle = words[at];
        }
    }
    if (options.bundle.empty()) refuse("no bundle is given");
    if (options.token_ids.empty() == options.golden.empty()) refuse("give one of --token-ids and --golden");
    if (options.golden.empty() ? !options.only.empty() : !options.images.empty()) {
        refuse("--case is for --golden and --image for --token-ids");
    }
    if (options.max_new_tokens < 1) refuse("--max-new-tokens is 0");
    if (options.threads < 1) refuse("--threads is under 1");
    options.sampling.check();
    return options;
}

std::vector<GoldenCase> cases(const Options& options, const Manifest& manifest) {
    if (!options.golden.empty()) return read_golden(options.golden, options.only, manifest);
    Prompt prompt{numbers(options.token_ids), {}};
    for (const std::string& image : options.images) {
        prompt.pictures.push_back(pixel_values(read_bytes(image, "read image"), image, manifest));
    }
    return {{"", prompt, options.max_new_tokens, {}}};
}

double rounded(double value) { return std::round(value * 1e3) / 1e3; }

json answer(Generator& generator, const GoldenCase& one, const Sampling& sampling, PeakPss& peak) {
    json logits = json::array();
    const auto watch = [&](std::size_t step, const float* all) {
        for (const Listed& listed : one.logits) {
            if (listed.step != step) continue;
            json values = json::array();
            for (const std::int64_t id : listed.ids) values.push_back(all[id]);
            logits.push_back({{"step", step}, {"ids", listed.ids}, {"values", values}});
        }
    };
    const Answer given = generator.generate(one.prompt, one.max_new_tokens, sampling, watch);
    peak.sample();
    json line{
        {"prompt_tokens", one.prompt.ids.size()},
        {"tokens", given.tokens},
        {"finish_reason", given.finish_reason},
        {"load_ms", rounded(generator.load_ms())},
        {"ttft_ms", rounded(given.ttft_ms)},
        {"tpot_ms", given.tokens.size() > 1 ? json(rounded(given.tpot_ms)) : json()},
        {"peak_rss_mb", rounded(peak_rss_mb())},
        {"peak_pss_mb", peak.mb() > 0 ? json(rounded(peak.mb())) : json()},
        {"versions", {{runtime_name(), runtime_version()}}},
    };
    if (!one.name.empty()) line.update({{"name", one.name}, {"logits", logits}});
    return line;
}

void run(const Options& options) {
    PeakPss peak;
    peak.sample();
    const Manifest manifest = read_manifest(options.bundle);
    const std::vector<GoldenCase> all = cases(options, manifest);
    const char* unload = std::getenv("UNLOAD_PREFILL_BEFORE_DECODE");
    Generator generator(manifest, options.threads, unload != nullptr && std::string(unload) == "1");
    peak.sample();
    for (const GoldenCase& one : all) {
        const Sampling sampling = options.golden.empty() ? options.sampling : Sampling{};
        std::cout << answer(generator, one, sampling, peak).dump() << std::endl;
    }
}

}  // namespace

int main(int count, char** words) {
    const std::vector<std::string> given(words + 1, words + count);
    if (std::find(given.begin(), given.end(), "--help") != given.end()) {
        std::cout << USAGE;
        return 0;
    }
    try {
        run(parse(given));
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "error: " << first_line(error.what()) << '\n';
        return 2;
    }
}
