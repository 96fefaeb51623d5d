"""How ONNX Runtime opens a graph: what this runtime sets, and what a user may choose over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from stillgraph.cpu import EXACT_SUMS, available_cores
from stillgraph.errors import StillgraphError
from stillgraph.manifest import GraphEntry
from stillgraph.sampling import is_count

STAGE = "load bundle"
CPU = "CPUExecutionProvider"
PACKING = "session.disable_prepacking"
OURS = {*EXACT_SUMS, PACKING, "session.model_external_initializers_file_folder_path"}
Provider = str | tuple[str, Mapping[str, Any]]
BACKENDS = "onnxruntime", "openvino"


@dataclass(frozen=True)
class SessionChoice:
    """What a user chose for every graph's session.

    backend: whose sessions they are; all else but threads is ONNX Runtime's. options: config entries, whose
    names have a dot, and attributes of `onnxruntime.SessionOptions`; profile: a folder for traces.
    """

    threads: int
    providers: tuple[Provider, ...]
    options: Mapping[str, Any]
    backend: str = BACKENDS[0]
    profile: Path | None = None

    @classmethod
    def of(
        cls,
        threads: int | None,
        providers: Sequence[Provider] | None,
        options: Mapping[str, Any] | None,
        backend: str = BACKENDS[0],
        profile: Path | None = None,
    ) -> SessionChoice:
        """As a user gave it; None is for all cores, the CPU and nothing. Raises StillgraphError."""
        if threads is not None and not is_count(threads, 1):
            raise StillgraphError(STAGE, f"threads is {threads!r}", "give 1 or more")
        if backend not in BACKENDS:
            raise StillgraphError(STAGE, f"backend is {backend!r}", f"use {' or '.join(BACKENDS)}")
        given = {"providers": providers, "session_options": options or None, "profile": profile}
        if backend != BACKENDS[0] and (named := [name for name, value in given.items() if value is not None]):
            problem = f"{' and '.join(named)} are of ONNX Runtime's sessions, and backend is {backend}"
            raise StillgraphError(STAGE, problem, "leave them out")
        chosen = (CPU,) if providers is None else _checked(providers)
        _check_options(options or {})
        return cls(threads or available_cores(), chosen, options or {}, backend, profile)

    @property
    def on_cpu(self) -> bool:
        """Whether ONNX Runtime's provider for the CPU is the only one."""
        return self.backend == BACKENDS[0] and all(_name(provider) == CPU for provider in self.providers)


def session_options(
    entry: GraphEntry, pack: bool, chosen: SessionChoice, one_at_a_time: bool = False
) -> ort.SessionOptions:
    """The options of a graph's session. Raises StillgraphError for a value that ONNX Runtime does not take.

    pack: whether weights are copied as the kernels want them. Those of fp32 stay mapped from the file, which
    both graphs then share: packing them makes a private copy for each graph and takes seconds at load, to
    gain nothing in decode and a sixth of a prefill. Those of few bits have no other fast kernels. A prefill
    that is to be unloaded gets no arena, which would keep the memory of its activations.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = chosen.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    entries = dict(EXACT_SUMS)
    if not pack:
        entries[PACKING] = "1"
    if entry.shape.role != "decode":
        # Its threads would spin on for a while and take the cores from the first decode steps.
        entries["session.force_spinning_stop"] = "1"
    if entry.shape.role != "decode" and one_at_a_time:
        options.enable_cpu_mem_arena = False
    for name, value in chosen.options.items():
        if "." in name:
            entries[name] = str(int(value)) if isinstance(value, bool) else str(value)
        else:
            _set(options, name, value)
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def _set(options: ort.SessionOptions, name: str, value: object) -> None:
    try:
        setattr(options, name, value)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"{name} of session_options is {value!r}"
        raise StillgraphError(STAGE, problem, "give a value of the type that it has") from error


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises StillgraphError for an option that does not exist, or that is not a user's.

    ONNX Runtime takes any config entry, known or not. Not a user's is what keeps sums exact, and how and from
    where weights are mapped.
    """
    if not isinstance(options, Mapping):
        problem = f"session_options is of type {type(options).__name__}"
        raise StillgraphError(STAGE, problem, "give a dict of names and values")
    known = [name for name, value in vars(ort.SessionOptions).items() if isinstance(value, property)]
    for name in options:
        if name in OURS:
            problem = f"{name} of session_options is what exact sums or mapped weights depend on"
            raise StillgraphError(STAGE, problem, "leave it out")
        if not isinstance(name, str) or ("." not in name and name not in known):
            problem = f"session_options has {name!r}"
            remedy = f"use a config entry of ONNX Runtime, or one of {', '.join(sorted(known))}"
            raise StillgraphError(STAGE, problem, remedy)


def _checked(providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """Raises StillgraphError for none, and for a provider that this ONNX Runtime does not have."""
    there = ort.get_available_providers()
    remedy = f"give a list of {' or '.join(there)}"
    if not isinstance(providers, list | tuple) or not providers:
        raise StillgraphError(STAGE, f"providers is {providers!r}", remedy)
    for provider in providers:
        if not (isinstance(provider, str) or _with_options(provider)):
            problem = f"providers has {provider!r}"
            raise StillgraphError(STAGE, problem, "give a name, or a pair of a name and a dict of options")
        if _name(provider) not in there:
            problem = f"{_name(provider)} is no provider of this onnxruntime {ort.__version__}"
            raise StillgraphError(STAGE, problem, remedy)
    return tuple(providers)


def _with_options(provider: object) -> bool:
    pair = provider if isinstance(provider, list | tuple) else ()
    return len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Mapping)


def _name(provider: Provider) -> str:
    """The name of a provider, which may come with options."""
    return provider if isinstance(provider, str) else str(provider[0])
