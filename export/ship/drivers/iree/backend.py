"""IREE: keys and values stay arrays of its device, which one call hands to the next."""

import importlib.metadata

import iree.runtime as iree
import numpy as np

DEVICE = "local-task"  # the CPU, with a thread for each core
WEIGHTS = "weights"  # the scope that the graphs read them from


class Backend:
    def __init__(self, folder, manifest, graphs):
        self.versions = {"iree-base-runtime": importlib.metadata.version("iree-base-runtime")}
        self.graphs, self.run_graph, self.cache, self.kept = graphs, {}, {}, []
        config, opened = iree.Config(device=iree.get_device(DEVICE)), {}
        for role, graph in graphs.items():
            path = (folder / graph["file"]["path"]).with_suffix(".vmfb")
            weights = path.with_suffix(".irpa")
            if not weights.is_file():  # the same as the prefill's
                weights = (folder / graphs["prefill"]["file"]["path"]).with_suffix(".irpa")
            if weights not in opened:
                opened[weights] = iree.ParameterIndex()
                opened[weights].load(str(weights))
            provider = opened[weights].create_provider(WEIGHTS)
            modules = iree.load_vm_modules(
                iree.create_io_parameters_module(config.vm_instance, provider),
                iree.create_hal_module(config.vm_instance, config.device),
                iree.VmModule.mmap(config.vm_instance, str(path)),
                config=config,
            )
            self.kept += modules
            self.run_graph[role] = modules[-1].main_graph
        self.device = config.device

    def run(self, role, feeds):
        graph, result = self.graphs[role], None
        given = [feeds.get(port["name"], self.past(port)) for port in graph["inputs"]]
        found = self.run_graph[role](*given)
        found = found if isinstance(found, tuple | list) else [found]
        for port, value in zip(graph["outputs"], found, strict=True):
            if port.get("layer") is None:
                result = np.array(value.to_host())  # its memory is used again
            else:
                self.cache[port["layer"], port["role"]] = value
        return result

    def past(self, port):
        """A key or value as the last call left it, zeros before the first; None for another input."""
        if port.get("layer") is None:
            return None
        place = port["layer"], port["role"]
        if place not in self.cache:
            zeros = np.zeros(port["shape"], np.float32)
            self.cache[place] = iree.asdevicearray(self.device, zeros)
        return self.cache[place]
