"""OpenVINO: the cache is a state of each graph, which is copied when the other graph goes on."""

import openvino
from openvino._offline_transformations import apply_make_stateful_transformation

# Products in fp32, and of activations that are not rounded, whatever the CPU is faster in.
HINTS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
HINTS["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0


class Backend:
    def __init__(self, folder, manifest, graphs):
        self.versions, self.graphs = {"openvino": openvino.__version__.partition("-")[0]}, graphs
        core, self.requests, self.last = openvino.Core(), {}, None
        for role, graph in graphs.items():
            model = core.read_model(folder / graph["file"]["path"])
            pairs = {alias["input"]: alias["output"] for alias in graph["aliases"]}
            if pairs:
                apply_make_stateful_transformation(model, pairs)
            self.requests[role] = core.compile_model(model, "CPU", HINTS).create_infer_request()

    def run(self, role, feeds):
        request, graph = self.requests[role], self.graphs[role]
        if graph["aliases"]:
            if self.last not in (None, role):
                held = {state.name: state for state in self.requests[self.last].query_state()}
                for state in request.query_state():
                    state.state = held[state.name].state
            self.last = role
        request.infer(feeds, share_inputs=True)
        if not graph["aliases"]:
            return request.get_output_tensor(0).data
        logits = next(port["name"] for port in graph["outputs"] if port["role"] == "logits")
        return request.get_tensor(logits).data
