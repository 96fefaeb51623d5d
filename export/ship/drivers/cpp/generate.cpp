// P: tokens of a call of the prefill; V: vocabulary; T: tokens of a picture.
#include "generate.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "error.hpp"

namespace stillgraph {
namespace {

using Ids = std::vector<std::int64_t>;
const std::string STAGE = "read prompt";

double now_ms() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}

// What a library has freed goes back to the system, where the C library keeps it.
void return_memory() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

}  // namespace

Generator::Generator(const Manifest& manifest, int threads, bool one_at_a_time)
    : manifest_(manifest),
      threads_(threads),
      one_at_a_time_(one_at_a_time),
      grows_(manifest.graph("dynamic") != nullptr) {
    const GraphEntry& last = manifest.need(grows_ ? "dynamic" : "decode");
    limit_ = last.ctx.value_or(last.max_len);
    if (last.batch != 1) {
        const std::string rows = std::to_string(last.batch);
        throw Error("load bundle", manifest.bundle.string() + " has graphs of " + rows + " rows and this driver one",
                    "export it with --batch 1");
    }
    if (grows_) {
        use("dynamic");
        return;
    }
    const GraphEntry& prefill = manifest.need("prefill");
    if (prefill.ctx && prefill.ctx != last.ctx) {
        throw Error("load bundle", manifest.bundle.string() + " has a prefill and a decode of different ctx",
                    "export both with one --ctx");
    }
    if (one_at_a_time) return;
    for (const GraphEntry& graph : manifest.graphs) use(graph.role);
}

Answer Generator::generate(const Prompt& prompt, std::size_t max_new_tokens, const Sampling& sampling,
                           const Watch& watch) {
    check(prompt);
    Sampler sampler(sampling);
    Answer answer;
    Ids ids = prompt.ids;
    const double began = now_ms() - load_ms_;
    const float* logits = grows_ ? (length_ = 0, use("dynamic").reset(), grow(ids)) : prefill(prompt);
    while (true) {
        if (watch) watch(answer.tokens.size(), logits);
        const bool room = static_cast<std::int64_t>(ids.size()) < limit_;
        const std::int64_t token = sampler.choose(logits, manifest_.vocab_size, ids);
        ids.push_back(token);
        answer.tokens.push_back(token);
        const double elapsed = now_ms() - load_ms_ - began;
        if (answer.tokens.size() == 1) answer.ttft_ms = elapsed;
        const Ids& stop = manifest_.calling.stop;
        if (std::find(stop.begin(), stop.end(), token) != stop.end()) {
            answer.finish_reason = "stop";
        } else if (answer.tokens.size() >= max_new_tokens) {
            answer.finish_reason = "length";
        } else if (!room) {
            answer.finish_reason = "context";
        }
        if (!answer.finish_reason.empty()) {
            const auto later = static_cast<double>(answer.tokens.size() - 1);
            if (later > 0) answer.tpot_ms = (elapsed - answer.ttft_ms) / later;
            return answer;
        }
        logits = grows_ ? grow({token}) : decode(token);
    }
}

void Generator::check(const Prompt& prompt) const {
    const std::string size = std::to_string(prompt.ids.size());
    if (prompt.ids.empty()) throw Error(STAGE, "the prompt is empty", "give at least one token");
    for (const std::int64_t id : prompt.ids) {
        if (id >= 0 && id < manifest_.vocab_size) continue;
        const std::string vocab = std::to_string(manifest_.vocab_size);
        throw Error(STAGE, "token id " + std::to_string(id) + " is outside the vocabulary of " + vocab,
                    "give ids from 0 to " + std::to_string(manifest_.vocab_size - 1));
    }
    if (static_cast<std::int64_t>(prompt.ids.size()) > limit_) {
        throw Error(STAGE, "the prompt has " + size + " tokens and the cache takes " + std::to_string(limit_),
                    "shorten it, or export with a larger --ctx");
    }
    const Calling& calling = manifest_.calling;
    if (!calling.continues && static_cast<std::int64_t>(prompt.ids.size()) > calling.chunk) {
        throw Error(STAGE, "the prompt has " + size + " tokens and a call takes " + std::to_string(calling.chunk),
                    "shorten it, or export a prefill with --ctx");
    }
    const std::size_t found = images_before(prompt.ids, prompt.ids.size());
    const std::size_t each = manifest_.vision ? manifest_.vision->image_tokens : 1;
    if (manifest_.vision && found == each * prompt.pictures.size()) return;
    if (!manifest_.vision && prompt.pictures.empty()) return;
    throw Error(STAGE,
                "the prompt has " + std::to_string(found) + " image tokens and " +
                    std::to_string(prompt.pictures.size()) + " images are given",
                "give " + std::to_string(each) + " image tokens for each image of a model that sees");
}

// Logits [V] after the prompt, whose keys and values are then in the cache.
const float* Generator::prefill(const Prompt& prompt) {
    const Features features = see(prompt.pictures);
    leave("decode");
    Graph& graph = use("prefill");
    if (manifest_.calling.continues) graph.reset();
    for (std::size_t start = 0, end = 0; start < prompt.ids.size(); start = end) {
        end = end_of_call(prompt.ids, start);
        give(prompt.ids, start, end, features);
        graph.run();
    }
    length_ = static_cast<std::int64_t>(prompt.ids.size());
    from_prefill_ = graph.cache();
    return graph.output(*manifest_.need("prefill").output("logits"));
}

// Logits [V] after all of `ids`, which are added to a cache that grows.
const float* Generator::grow(const Ids& ids) {
    const GraphEntry& entry = manifest_.need("dynamic");
    Graph& graph = use("dynamic");
    const auto count = static_cast<std::int64_t>(ids.size());
    std::copy(ids.begin(), ids.end(), graph.ints(*entry.input("token_ids"), {1, count}));
    graph.run();
    return graph.output(*entry.output("logits"));
}

// Logits [V] after one more token.
const float* Generator::decode(std::int64_t token) {
    const GraphEntry& entry = manifest_.need("decode");
    if (!from_prefill_.empty()) {
        leave("embed");
        leave("prefill");
    }
    Graph& graph = use("decode");
    if (!from_prefill_.empty()) graph.set_cache(from_prefill_);
    from_prefill_.clear();
    *graph.ints(*entry.input("token_ids"), {1, 1}) = token;
    *graph.ints(*entry.input("past_length"), {1}) = length_;
    graph.run();
    ++length_;
    return graph.output(*entry.output("logits"));
}

Generator::Features Generator::see(const std::vector<std::vector<float>>& pictures) {
    Features features;
    if (pictures.empty()) return features;
    for (const char* other : {"decode", "prefill", "embed"}) leave(other);
    const GraphEntry& entry = manifest_.need("vision");
    const Port &input = *entry.input("pixels"), &output = *entry.output("image_features");
    Graph& graph = use("vision");
    for (const std::vector<float>& pixels : pictures) {
        std::copy(pixels.begin(), pixels.end(), graph.floats(input));
        graph.run();
        const float* rows = graph.output(output);
        features.emplace_back(rows, rows + output.shape[1] * output.shape[2]);
    }
    leave("vision");
    return features;
}

// Where a call ends that begins at `start`: as far as it can, but in no picture that has to come whole.
std::size_t Generator::end_of_call(const Ids& ids, std::size_t start) const {
    const std::size_t end = std::min(ids.size(), start + manifest_.calling.chunk);
    if (!manifest_.calling.whole_images || end == ids.size()) return end;
    const std::size_t cut = images_before(ids, end) % manifest_.vision->image_tokens;
    if (cut < end - start) return end - cut;
    throw Error(STAGE, "a picture has more tokens than a call takes", "export with a larger --max-len");
}

// Fill in what the prefill reads for ids[start, end).
void Generator::give(const Ids& ids, std::size_t start, std::size_t end, const Features& features) {
    const GraphEntry& entry = manifest_.need("prefill");
    Graph& graph = use("prefill");
    *graph.ints(*entry.input("valid_length"), {1}) = static_cast<std::int64_t>(end - start);
    if (const Port* past = entry.input("past_length")) {
        *graph.ints(*past, {1}) = static_cast<std::int64_t>(start);
    }
    if (entry.input("picture_numbers") != nullptr) number_pictures(ids, start, end);
    if (entry.embeds) {
        embed(ids, start, end, features);
        return;
    }
    std::int64_t* piece = graph.ints(*entry.input("token_ids"), {1, entry.max_len});
    std::fill_n(piece, entry.max_len, manifest_.calling.pad);
    std::copy(ids.begin() + start, ids.begin() + end, piece);
}

void Generator::embed(const Ids& ids, std::size_t start, std::size_t end, const Features& features) {
    const GraphEntry &entry = manifest_.need("embed"), &prefill = manifest_.need("prefill");
    Graph& graph = use("embed");
    std::int64_t* piece = graph.ints(*entry.input("token_ids"), {1, entry.max_len});
    std::fill_n(piece, entry.max_len, manifest_.calling.pad);
    for (std::size_t at = start; at < end; ++at) {
        if (!is_image(ids[at])) piece[at - start] = ids[at];  // an image token may have no embedding
    }
    graph.run();
    const Port& output = *entry.output("embeddings");
    const std::int64_t hidden = output.shape.back();
    const float* made = graph.output(output);
    float* rows = use("prefill").floats(*prefill.input("embeddings"));
    std::copy(made, made + entry.max_len * hidden, rows);
    std::size_t image = images_before(ids, start);
    for (std::size_t at = start; at < end; ++at) {
        if (!is_image(ids[at])) continue;
        const std::size_t each = manifest_.vision->image_tokens;
        const float* feature = features[image / each].data() + (image % each) * hidden;
        std::copy(feature, feature + hidden, rows + (at - start) * hidden);
        ++image;
    }
}

// k for the tokens of the k-th picture of the call, 0 for text.
void Generator::number_pictures(const Ids& ids, std::size_t start, std::size_t end) {
    const GraphEntry& entry = manifest_.need("prefill");
    std::int64_t* numbers = use("prefill").ints(*entry.input("picture_numbers"), {1, entry.max_len});
    std::fill_n(numbers, entry.max_len, 0);
    const std::size_t each = manifest_.vision->image_tokens, first = images_before(ids, start) / each;
    for (std::size_t at = start, image = images_before(ids, start); at < end; ++at) {
        if (is_image(ids[at])) numbers[at - start] = static_cast<std::int64_t>(image++ / each - first + 1);
    }
}

bool Generator::is_image(std::int64_t id) const { return manifest_.vision && id == manifest_.vision->image_token; }

std::size_t Generator::images_before(const Ids& ids, std::size_t end) const {
    return std::count_if(ids.begin(), ids.begin() + end, [this](std::int64_t id) { return is_image(id); });
}

// The graph of a role, loaded now if it is not yet.
Graph& Generator::use(const std::string& role) {
    std::unique_ptr<Graph>& graph = graphs_[role];
    if (graph == nullptr) {
        const double began = now_ms();
        graph = open_graph(manifest_, manifest_.need(role), {threads_, manifest_.precision, one_at_a_time_});
        return_memory();
        load_ms_ += now_ms() - began;
    }
    return *graph;
}

// Out of memory with a graph, where one at a time may have it.
void Generator::leave(const std::string& role) {
    if (!one_at_a_time_ || graphs_.erase(role) == 0) return;
    const double began = now_ms();
    return_memory();
    load_ms_ += now_ms() - began;
}

}  // namespace stillgraph
