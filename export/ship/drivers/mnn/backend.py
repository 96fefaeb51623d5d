"""MNN: keys and values stay its own variables, which one call hands to the next."""

import MNN
import numpy as np
from MNN import expr

CONFIG = {"precision": "high", "numThread": 2}
TYPES = {"int32": expr.int, "float32": expr.float}


class Backend:
    def __init__(self, folder, manifest, graphs):
        self.versions, self.graphs, self.modules, self.cache = {"mnn": MNN.version()}, graphs, {}, {}
        for role, graph in graphs.items():
            path = (folder / graph["file"]["path"]).with_suffix(".mnn")
            weights = path.with_suffix(".mnn.weight")
            if not weights.is_file():  # the same as the prefill's
                prefill = folder / graphs["prefill"]["file"]["path"]
                weights = prefill.with_suffix(".mnn.weight")
            runtime = MNN.nn.create_runtime_manager((CONFIG,))
            runtime.set_external(str(weights))
            names = [[port["name"] for port in graph[side]] for side in ("inputs", "outputs")]
            self.modules[role] = MNN.nn.load_module_from_file(str(path), *names, runtime_manager=runtime)

    def run(self, role, feeds):
        graph, result = self.graphs[role], None
        given = [self.past(port) or variable(feeds[port["name"]]) for port in graph["inputs"]]
        found = self.modules[role].forward(given)
        for port, value in zip(graph["outputs"], found, strict=True):
            if port.get("layer") is None:
                result = np.array(value.read())
            else:
                self.cache[port["layer"], port["role"]] = value
        return result

    def past(self, port):
        """A key or value as the last call left it, zeros before the first; None for another input."""
        if port.get("layer") is None:
            return None
        place = port["layer"], port["role"]
        if place not in self.cache:
            self.cache[place] = variable(np.zeros(port["shape"], np.float32))
        return self.cache[place]


def variable(array):
    """MNN has no int64."""
    array = array.astype(np.int32) if array.dtype == np.int64 else array
    return expr.const(array, list(array.shape), expr.NCHW, TYPES[array.dtype.name])
