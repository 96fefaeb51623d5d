"""The classes of CPU that products are tried on, and how a machine of another class runs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LANE = "STILLGRAPH_LANE"  # the environment variable that names the class a test runs in
X86 = "qemu-x86_64"
ARM = "qemu-aarch64"


@dataclass(frozen=True)
class ArmCpu:
    """What /proc/cpuinfo says of an Arm CPU. ONNX Runtime picks kernels by the part, so it has to be true."""

    part: str
    features: str


@dataclass(frozen=True)
class Lane:
    """One class. title: as in the table. emulator, model: of qemu's user mode.

    kernel: what multiplies integers there. has, lacks: instruction sets, by numpy's names. saturates: whether
    sums of two products are cut off at 16 bits, so that channels of codes over the full range are wrong.
    """

    name: str
    title: str
    emulator: str
    model: str
    kernel: str
    has: frozenset[str]
    lacks: frozenset[str]
    saturates: bool = False
    arm: ArmCpu | None = None

    def command(self, *, prefix: str | None = None) -> list[str]:
        """What comes before the program. prefix: where the program's files are looked up first."""
        return [self.emulator, "-cpu", self.model, *(["-L", prefix] if prefix else [])]

    def is_not(self, features: Iterable[str]) -> str | None:
        """Why a CPU of these instruction sets is not of this class, or None."""
        found = set(features)
        if missing := sorted(self.has - found):
            return f"it lacks {', '.join(missing)}"
        if more := sorted(self.lacks & found):
            return f"it has {', '.join(more)}"
        return None


SMALL_ARM = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
DOT_ARM = f"{SMALL_ARM} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
LANES = {
    lane.name: lane
    for lane in (
        Lane(
            "sse", "SSE4.2", X86, "Nehalem", "pmaddwd, 16 bits",
            has=frozenset({"SSE42"}), lacks=frozenset({"AVX", "AVX2"}),
        ),
        Lane(
            "avx2", "AVX2", X86, "Haswell", "vpmaddubsw, pairs in 16 bits",
            has=frozenset({"AVX2"}), lacks=frozenset({"AVX512F", "AVX512VNNI"}), saturates=True,
        ),
        Lane(
            "arm", "Arm", ARM, "cortex-a57", "umlal, 16 bits",
            has=frozenset({"ASIMD"}), lacks=frozenset({"ASIMDDP", "SSE2"}), arm=ArmCpu("d07", SMALL_ARM),
        ),
        Lane(
            "arm-dot", "Arm, dot products", ARM, "cortex-a76", "udot, sdot",
            has=frozenset({"ASIMDDP"}), lacks=frozenset({"SVE", "SSE2"}), arm=ArmCpu("d0b", DOT_ARM),
        ),
        Lane(
            "arm-i8mm", "Arm, i8mm", ARM, "max", "ummla, smmla",
            has=frozenset({"ASIMDDP", "SVE"}), lacks=frozenset({"SSE2"}),
            arm=ArmCpu("d40", f"{DOT_ARM} i8mm bf16"),
        ),
    )
}  # fmt: skip

# The best of these flags of /proc/cpuinfo that a CPU has is what multiplies integers there.
KERNELS = {
    "amx_int8": "tdpbusd",
    "avx512_vnni": "vpdpbusd",
    "avx_vnni": "vpdpbusd",
    "avx512bw": "vpmaddubsw, pairs in 16 bits",
    "avx2": "vpmaddubsw, pairs in 16 bits",
    "sse4_2": "pmaddwd, 16 bits",
    "i8mm": "ummla, smmla",
    "asimddp": "udot, sdot",
    "asimd": "umlal, 16 bits",
}


def native(cpuinfo: str) -> tuple[str, str]:
    """Name and flags of the CPU of this /proc/cpuinfo, as they are shown, and what multiplies integers."""
    fields = dict(map(str.strip, line.partition(":")[::2]) for line in cpuinfo.splitlines())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found = [flag for flag in KERNELS if flag in flags]
    name = fields.get("model name") or f"Arm part {fields.get('CPU part', 'unknown')}"
    return f"{name}: {', '.join(found[:3])}", KERNELS[found[0]] if found else "unknown"
