// ONNX Runtime on a CPU. Every input and output lies in memory of this file's, and a decode goes on in the cache
// that the prefill wrote: what the manifest's aliases allow is one buffer, the rest are two that change places.
#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <numeric>
#include <utility>

#include "error.hpp"
#include "graph.hpp"

namespace stillgraph {
namespace {

const std::string STAGE = "load graph";

Ort::Env& environment() {
    static Ort::Env one(ORT_LOGGING_LEVEL_ERROR, "stillgraph");
    return one;
}

std::size_t count_of(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies<>());
}

// Zeros whose pages take no memory before they are written.
std::shared_ptr<void> zeros(std::size_t bytes) { return {std::calloc(std::max<std::size_t>(bytes, 1), 1), std::free}; }

Ort::SessionOptions session_options(const GraphEntry& entry, const Opening& opening) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(opening.threads);
    options.SetInterOpNumThreads(1);
    options.AddConfigEntry("mlas.disable_kleidiai", "1");  // on Arm, whose kernels round sums of few bits
    // Weights of fp32 stay mapped from the file, which all graphs share; those of few bits have no other fast kernels.
    if (opening.precision == "fp32") options.AddConfigEntry("session.disable_prepacking", "1");
    if (entry.role != "decode") {
        // Its threads would spin on for a while and take the cores from the first decode steps.
        options.AddConfigEntry("session.force_spinning_stop", "1");
        if (opening.one_at_a_time) options.DisableCpuMemArena();
    }
    return options;
}

class OnnxRuntimeGraph : public Graph {
public:
    OnnxRuntimeGraph(const std::string& path, const GraphEntry& entry, const Opening& opening)
        : entry_(entry), session_(environment(), path.c_str(), session_options(entry, opening)) {
        for (const Port& port : entry.inputs) inputs_.push_back(port.name.c_str());
        for (const Port& port : entry.outputs) outputs_.push_back(port.name.c_str());
        grows_ = entry.role == "dynamic";
        for (const Alias& alias : entry.aliases) in_place_ = in_place_ && alias.same_buffer;
        for (const auto* ports : {&entry.inputs, &entry.outputs}) {
            for (const Port& port : *ports) {
                if (port.layer || (grows_ && ports == &entry.inputs)) continue;
                small_[port.name] = allocate(port.shape, size_of(port));
            }
        }
        if (!grows_) allocate_cache();
    }

    std::int64_t* ints(const Port& input, const Shape& shape) override {
        CacheTensor& tensor = small_[input.name];
        if (tensor.shape != shape) tensor = allocate(shape, sizeof(std::int64_t));
        return reinterpret_cast<std::int64_t*>(tensor.data);
    }

    float* floats(const Port& input) override { return small_.at(input.name).data; }
    const float* output(const Port& output) override { return small_.at(output.name).data; }

    void run() override {
        std::vector<Ort::Value> given, made;
        for (const Port& port : entry_.inputs) given.push_back(value(port, port.layer ? past_ : small_));
        for (const Port& port : entry_.outputs) {
            if (grows_ && port.layer) made.emplace_back(nullptr);
            else made.push_back(value(port, port.layer ? written() : small_));
        }
        session_.Run({}, inputs_.data(), given.data(), given.size(), outputs_.data(), made.data(), made.size());
        if (grows_) keep(made);
        else if (!past_.empty() && !in_place_) std::swap(past_, present_);
    }

    Cache cache() override {
        Cache cache;
        for (const Port& port : entry_.outputs) {
            if (port.layer) cache.emplace(port.key(), (past_.empty() ? present_ : past_).at(id(port)));
        }
        return cache;
    }

    void set_cache(const Cache& cache) override {
        for (const Port& port : entry_.inputs) {
            if (!port.layer) continue;
            const CacheTensor& given = cache.at(port.key());
            if (given.shape == port.shape) past_[id(port)] = given;  // the same memory: nothing is copied
            else copy_in_front(given, past_.at(id(port)));
        }
    }

    void reset() override {
        if (!grows_) return;  // a static graph reads no slot that was not written since
        for (const Port& port : entry_.inputs) {
            if (!port.layer) continue;
            Shape none = port.shape;
            std::replace(none.begin(), none.end(), ANY, std::int64_t{0});
            past_[id(port)] = allocate(none, sizeof(float));
        }
    }

private:
    using Tensors = std::map<std::string, CacheTensor>;  // by port, or by layer and role

    static std::string id(const Port& port) { return std::to_string(*port.layer) + port.role; }
    static std::size_t size_of(const Port& port) { return port.is_ids() ? sizeof(std::int64_t) : sizeof(float); }

    static CacheTensor allocate(const Shape& shape, std::size_t size) {
        const std::shared_ptr<void> memory = zeros(count_of(shape) * size);
        return {shape, static_cast<float*>(memory.get()), memory};
    }

    void allocate_cache() {
        for (const Port& port : entry_.inputs) {
            if (port.layer) past_[id(port)] = allocate(port.shape, sizeof(float));
        }
        if (!past_.empty() && in_place_) return;
        for (const Port& port : entry_.outputs) {
            if (port.layer) present_[id(port)] = allocate(port.shape, sizeof(float));
        }
    }

    Tensors& written() { return past_.empty() || !in_place_ ? present_ : past_; }

    Ort::Value value(const Port& port, Tensors& tensors) {
        CacheTensor& tensor = tensors.at(port.layer ? id(port) : port.name);
        const auto type = port.is_ids() ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        const std::size_t bytes = count_of(tensor.shape) * size_of(port);
        return Ort::Value::CreateTensor(memory_, static_cast<void*>(tensor.data), bytes, tensor.shape.data(),
                                        tensor.shape.size(), type);
    }

    // What a growing graph has made is what its next run reads.
    void keep(std::vector<Ort::Value>& made) {
        for (std::size_t at = 0; at < made.size(); ++at) {
            const Port& port = entry_.outputs[at];
            if (!port.layer) continue;
            auto owner = std::make_shared<Ort::Value>(std::move(made[at]));
            const Shape shape = owner->GetTensorTypeAndShapeInfo().GetShape();
            past_[id(port)] = {shape, owner->GetTensorMutableData<float>(), owner};
        }
    }

    // Slots into the first of more: [B, KV, slots, D].
    static void copy_in_front(const CacheTensor& from, CacheTensor& to) {
        const std::size_t heads = count_of({from.shape[0], from.shape[1]});
        const std::size_t piece = count_of({from.shape[2], from.shape[3]}), each = count_of({to.shape[2], to.shape[3]});
        for (std::size_t head = 0; head < heads; ++head) {
            std::copy_n(from.data + head * piece, piece, to.data + head * each);
        }
    }

    const GraphEntry& entry_;
    Ort::Session session_;
    Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
    std::vector<const char*> inputs_, outputs_;
    bool grows_ = false, in_place_ = true;
    Tensors small_, past_, present_;
};

}  // namespace

std::unique_ptr<Graph> open_graph(const Manifest& manifest, const GraphEntry& entry, const Opening& opening) {
    const std::string path = (manifest.bundle / entry.file.path).string();
    try {
        return std::make_unique<OnnxRuntimeGraph>(path, entry, opening);
    } catch (const Ort::Exception& error) {
        throw Error(STAGE, "ONNX Runtime cannot load " + path + " (" + first_line(error.what()) + ")",
                    "check the bundle with 'stillgraph inspect'");
    }
}

std::string runtime_name() { return "onnxruntime"; }
std::string runtime_version() { return Ort::GetVersionString(); }

}  // namespace stillgraph
