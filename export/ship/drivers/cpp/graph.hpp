// What the loop asks of a runtime: one graph, loaded. openvino.cpp and onnxruntime.cpp are the ones that are here;
// another runtime is another file with an `open_graph` of its own.
#pragma once

#include <map>
#include <memory>

#include "manifest.hpp"

namespace stillgraph {

// The keys or the values of a layer, [B, KV, slots, D]. owner: keeps the memory.
struct CacheTensor {
    Shape shape;
    float* data;
    std::shared_ptr<void> owner;
};

using Cache = std::map<CacheKey, CacheTensor>;

class Graph {
public:
    virtual ~Graph() = default;

    // Memory of an input that is not of the cache, to be filled before `run`. shape: where the port's has ANY.
    virtual std::int64_t* ints(const Port& input, const Shape& shape) = 0;
    virtual float* floats(const Port& input) = 0;
    // An output that is not of the cache, valid until the next run.
    virtual const float* output(const Port& output) = 0;
    // Reads the inputs, writes the outputs, and puts the keys and values where the next run reads them.
    virtual void run() = 0;

    // The keys and values after a run; valid until the next one.
    virtual Cache cache() = 0;
    // Go on from the cache of another graph, which may have fewer slots.
    virtual void set_cache(const Cache& cache) = 0;
    // Keys and values of no token.
    virtual void reset() = 0;
};

// precision: of weights; one_at_a_time: whether a graph leaves memory before the next comes.
struct Opening {
    int threads;
    std::string precision;
    bool one_at_a_time;
};

// Throws Error for a graph that the runtime cannot load.
std::unique_ptr<Graph> open_graph(const Manifest& manifest, const GraphEntry& entry, const Opening& opening);

std::string runtime_name();
std::string runtime_version();

}  // namespace stillgraph
