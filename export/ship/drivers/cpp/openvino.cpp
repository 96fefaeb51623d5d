// OpenVINO on a CPU. What the manifest's aliases name becomes state of the graph, which OpenVINO keeps in place:
// with keys and values as inputs and outputs a step copies all of them.
#include <openvino/openvino.hpp>
#include <openvino/pass/make_stateful.hpp>

#include "error.hpp"
#include "graph.hpp"

namespace stillgraph {
namespace {

const std::string STAGE = "load graph";

ov::Core& core() {
    static ov::Core one;
    return one;
}

ov::Shape sizes(const Shape& shape) { return {shape.begin(), shape.end()}; }

Shape shape_of(const ov::Tensor& tensor) {
    const ov::Shape sizes = tensor.get_shape();
    return {sizes.begin(), sizes.end()};
}

ov::AnyMap properties(int threads) {
    return {
        ov::inference_num_threads(threads),
        ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
        // Else bfloat16 on CPUs that multiply it, keys and values of 8 bits, and activations of 8 bits where
        // weights have few: none of it is what was proven.
        ov::hint::inference_precision(ov::element::f32),
        ov::hint::kv_cache_precision(ov::element::f32),
        ov::hint::dynamic_quantization_group_size(0),
    };
}

std::string named(const std::vector<Port>& ports, const CacheKey& key) {
    for (const Port& port : ports) {
        if (port.layer && port.key() == key) return port.name;
    }
    throw Error(STAGE, "the manifest has no " + key.second + " of layer " + std::to_string(key.first),
                "export the bundle again");
}

class OpenVinoGraph : public Graph {
public:
    OpenVinoGraph(const Manifest& manifest, const GraphEntry& entry, int threads) : entry_(entry) {
        std::shared_ptr<ov::Model> model = core().read_model(manifest.bundle / entry.file.path);
        for (const Alias& alias : entry.aliases) keep_inside(*model, alias);
        model->validate_nodes_and_infer_types();
        request_ = core().compile_model(model, "CPU", properties(threads)).create_infer_request();
        for (ov::VariableState& state : request_.query_state()) states_.emplace(state.get_name(), state);
    }

    std::int64_t* ints(const Port& input, const Shape& shape) override {
        ov::Tensor tensor = request_.get_tensor(input.name);
        tensor.set_shape(sizes(shape));
        return tensor.data<std::int64_t>();
    }

    float* floats(const Port& input) override { return request_.get_tensor(input.name).data<float>(); }

    const float* output(const Port& output) override { return request_.get_tensor(output.name).data<float>(); }

    void run() override { request_.infer(); }

    Cache cache() override {
        Cache cache;
        for (const Port& port : entry_.outputs) {
            if (!port.layer) continue;
            auto tensor = std::make_shared<ov::Tensor>(held(port));
            cache.emplace(port.key(), CacheTensor{shape_of(*tensor), tensor->data<float>(), tensor});
        }
        return cache;
    }

    void set_cache(const Cache& cache) override {
        for (const Port& port : entry_.inputs) {
            if (!port.layer) continue;
            const CacheTensor& given = cache.at(port.key());
            ov::Tensor tensor(ov::element::f32, sizes(given.shape), given.data);
            state(port).set_state(given.shape == port.shape ? tensor : in_front(tensor, sizes(port.shape)));
        }
    }

    void reset() override { request_.reset_state(); }

private:
    // An output and an input of the model as one variable, whose name OpenVINO chooses.
    void keep_inside(ov::Model& model, const Alias& alias) {
        const auto parameter = model.input(alias.input).get_node_shared_ptr();
        const auto result = model.output(alias.output).get_node_shared_ptr();
        const ov::pass::MakeStateful::ParamResPairs pair{
            {ov::as_type_ptr<ov::op::v0::Parameter>(parameter), ov::as_type_ptr<ov::op::v0::Result>(result)}};
        ov::pass::MakeStateful(pair).run_on_model(model.shared_from_this());
        variables_[alias.input] = model.get_variables().back()->get_info().variable_id;
    }

    ov::VariableState& state(const Port& input) { return states_.at(variables_.at(input.name)); }

    // What an output of the cache holds: a state, or a tensor of a graph that starts from nothing.
    ov::Tensor held(const Port& output) {
        if (variables_.empty()) return request_.get_tensor(output.name);
        return states_.at(variables_.at(named(entry_.inputs, output.key()))).get_state();
    }

    static ov::Tensor in_front(const ov::Tensor& slots, const ov::Shape& all) {
        ov::Tensor tensor(ov::element::f32, all);
        std::fill_n(tensor.data<float>(), tensor.get_size(), 0.0F);
        slots.copy_to(ov::Tensor(tensor, ov::Coordinate(4, 0), slots.get_shape()));
        return tensor;
    }

    const GraphEntry& entry_;
    ov::InferRequest request_;
    std::map<std::string, std::string> variables_;  // by input
    std::map<std::string, ov::VariableState> states_;
};

}  // namespace

std::unique_ptr<Graph> open_graph(const Manifest& manifest, const GraphEntry& entry, const Opening& opening) {
    const std::string path = (manifest.bundle / entry.file.path).string();
    if (!entry.custom_ops.empty()) {
        throw Error(STAGE, path + " needs " + entry.custom_ops + ", which OpenVINO does not have",
                    "export the bundle with --target portable");
    }
    try {
        return std::make_unique<OpenVinoGraph>(manifest, entry, opening.threads);
    } catch (const ov::Exception& error) {
        throw Error(STAGE, "OpenVINO cannot load " + path + " (" + first_line(error.what()) + ")",
                    "check the bundle with 'stillgraph inspect'");
    }
}

std::string runtime_name() { return "openvino"; }
std::string runtime_version() { return ov::get_openvino_version().buildNumber; }

}  // namespace stillgraph
