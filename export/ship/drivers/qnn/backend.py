"""QNN: on a device both graphs are read from one binary; elsewhere they are compiled, and emulated."""

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_qnn

NAME = "QNN"
DEVICES = ("aarch64", "arm64", "ARM64")


class Backend:
    def __init__(self, folder, manifest, graphs):
        self.versions = {"qnn": onnxruntime_qnn.__version__}
        self.graphs, self.sessions, self.cache = graphs, {}, {}
        onnxruntime.register_execution_provider_library(NAME, onnxruntime_qnn.get_library_path())
        self.device = next(one for one in onnxruntime.get_ep_devices() if one.ep_name == NAME)
        chip = json.loads((folder / "chip.json").read_text())
        self.options = {name: chip[name] for name in ("soc_model", "htp_arch")}
        self.options |= {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "enable_htp_weight_sharing": "1"}
        contexts = folder / "context"
        for place, role in enumerate(graphs):
            name = graphs[role]["file"]["path"]
            if platform.machine() in DEVICES:
                self.sessions[role] = self.session(contexts / name, {})
            else:
                if not place:
                    written = self.place_to_write(contexts)
                entries = {"ep.context_enable": "1", "ep.context_embed_mode": "0"}
                entries["ep.context_file_path"] = str(written / name)
                entries["ep.stop_share_ep_contexts"] = str(int(place == len(graphs) - 1))
                self.sessions[role] = self.session(folder / name, entries)

    def place_to_write(self, contexts):
        """The folder of contexts where it is not there yet; else one that is thrown away."""
        if contexts.is_dir():
            self.thrown_away = tempfile.TemporaryDirectory()
            return Path(self.thrown_away.name)
        contexts.mkdir()
        return contexts

    def session(self, path, entries):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for name, value in {"ep.share_ep_contexts": "1", **entries}.items():
            options.add_session_config_entry(name, value)
        # Weights of few bits become numbers while a graph is compiled.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # All of a graph on the NPU, or an error.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self.device], self.options)
        return onnxruntime.InferenceSession(str(path), options)

    def run(self, role, feeds):
        graph, result = self.graphs[role], None
        for port in graph["inputs"]:
            if port.get("layer") is not None:
                place = port["layer"], port["role"]
                if place not in self.cache:
                    self.cache[place] = np.zeros(port["shape"], np.float32)
                feeds[port["name"]] = self.cache[place]
        names = [port["name"] for port in graph["outputs"]]
        for port, value in zip(graph["outputs"], self.sessions[role].run(names, feeds), strict=True):
            if port.get("layer") is None:
                result = value
            else:
                self.cache[port["layer"], port["role"]] = value
        return result
