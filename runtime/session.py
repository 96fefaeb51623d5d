"""One ONNX Runtime session: loaded, bound to arrays once, run, and its memory handed back."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stillgraph.errors import StillgraphError, first_line
from stillgraph.manifest import GraphEntry
from stillgraph.ports import Port
from stillgraph.session_options import CPU, Provider

Array = npt.NDArray[Any]


class Runner(Protocol):
    """A loaded graph. The tests of the loop have one of their own, without ONNX Runtime."""

    def bind(self, arrays: Mapping[str, Array]) -> Callable[[], None]:
        """A call that reads the inputs from, and writes the outputs into, the arrays named in `arrays`."""


class Session:
    """A graph in ONNX Runtime. Its inputs and outputs are in the CPU's memory, whatever the providers."""

    def __init__(
        self,
        path: Path,
        entry: GraphEntry,
        options: ort.SessionOptions,
        providers: Sequence[Provider] = (CPU,),
    ) -> None:
        self.entry = entry
        try:
            self._session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            problem = f"ONNX Runtime cannot load {path} ({first_line(error)})"
            raise StillgraphError(
                "load graph", problem, "check the bundle with 'stillgraph inspect'"
            ) from error
        self._check_ports(path)

    def _check_ports(self, path: Path) -> None:
        """Whether the graph takes and gives what the manifest says. Raises StillgraphError."""
        has = self._session.get_inputs() + self._session.get_outputs()
        shapes = {value.name: tuple(value.shape) for value in has}
        for port in self.entry.inputs + self.entry.outputs:
            found = shapes.get(port.name)
            same = (
                found is not None
                and len(found) == len(port.shape)
                and all(
                    there == said or not isinstance(there, int)
                    for there, said in zip(found, port.shape, strict=True)
                )
            )
            if not same:
                problem = f"{path} has {port.name} as {found} and the manifest says {tuple(port.shape)}"
                raise StillgraphError("load graph", problem, "export the bundle again")

    def bind(self, arrays: Mapping[str, Array]) -> Callable[[], None]:
        """See `Runner`. The arrays are bound in place: nothing is copied before or after a run."""
        return Bound(self._session, self.entry, arrays)

    def call(self, feeds: Mapping[str, ort.OrtValue]) -> list[ort.OrtValue]:
        """The outputs, in the graph's order, in memory that the session allocates; no input is copied."""
        names = [port.name for port in self.entry.outputs]
        values: list[ort.OrtValue] = self._session.run_with_ort_values(names, feeds)
        return values


class Bound:
    """A session with every input and output bound to an array's own memory, which it keeps alive."""

    def __init__(self, session: ort.InferenceSession, entry: GraphEntry, arrays: Mapping[str, Array]) -> None:
        self._session, self._binding = session, session.io_binding()
        ports = entry.inputs + entry.outputs
        self._values = {port.name: ort.OrtValue.ortvalue_from_numpy(arrays[port.name]) for port in ports}
        for port in entry.inputs:
            self._binding.bind_ortvalue_input(port.name, self._values[port.name])
        for port in entry.outputs:
            self._binding.bind_ortvalue_output(port.name, self._values[port.name])

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)


def empty(port: Port) -> Array:
    """A zeroed array for a port; pages that are never touched take no memory."""
    return np.zeros(port.sizes, port.dtype)


def return_memory() -> None:
    """Give freed memory back to the system: collect cycles, then trim the C library's heap where it can."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)
