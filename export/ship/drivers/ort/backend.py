"""ONNX Runtime: the cache in arrays, bound to the graphs' inputs and outputs."""

import numpy as np
import onnxruntime as ort

EXACT = {"mlas.disable_kleidiai": "1"}  # on Arm, whose kernels round sums of few bits


class Backend:
    def __init__(self, folder, manifest, graphs):
        self.versions, self.graphs, self.sessions = {"onnxruntime": ort.__version__}, graphs, {}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for name, value in EXACT.items():
            options.add_session_config_entry(name, value)
        for role, graph in graphs.items():
            path = str(folder / graph["file"]["path"])
            self.sessions[role] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        decode = graphs["decode"]["inputs"]
        ports = {(port["layer"], port["role"]): port for port in decode if port.get("layer") is not None}
        alone = all(
            alias["same_buffer"] for role in ("prefill", "decode") for alias in graphs[role]["aliases"]
        )
        self.sets = [
            {
                key: ort.OrtValue.ortvalue_from_numpy(np.zeros(port["shape"], port["dtype"]))
                for key, port in ports.items()
            }
            for _ in range(1 if alone else 2)
        ]

    def run(self, role, feeds):
        graph, session = self.graphs[role], self.sessions[role]
        if not graph["aliases"]:
            return session.run(None, feeds)[0]
        binding, read = session.io_binding(), self.sets[0]
        in_place = all(alias["same_buffer"] for alias in graph["aliases"])
        write = read if in_place else self.sets[1]
        for port in graph["inputs"]:
            if port.get("layer") is None:
                binding.bind_cpu_input(port["name"], feeds[port["name"]])
            else:
                binding.bind_ortvalue_input(port["name"], read[port["layer"], port["role"]])
        for port in graph["outputs"]:
            if port.get("layer") is None:
                binding.bind_output(port["name"])
            else:
                binding.bind_ortvalue_output(port["name"], write[port["layer"], port["role"]])
        session.run_with_iobinding(binding)
        if not in_place:
            self.sets.reverse()
        logits = next(index for index, port in enumerate(graph["outputs"]) if port["role"] == "logits")
        return binding.get_outputs()[logits].numpy()
