"""Facts about this machine, read without importing anything heavy. Decisions come from these, never from timings."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import UsageError
from luthier.registry import nearest

GIB = 1024**3
_FLAGS = (
    *("amx_bf16", "amx_fp16", "amx_tile", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512f", "avx2"),
    *("asimd", "asimdhp", "bf16"),
)
# The instructions by which torch's products in 16 bits (oneDNN's, and Arm's library in it) are fast.
_PRODUCTS = {
    "bfloat16": {"amx_bf16", "avx512_bf16", "bf16"},
    "float16": {"amx_fp16", "avx512_fp16", "asimdhp"},
}


class _Known(NamedTuple):
    memory: int  # MiB, as the driver counts it
    tflops: float  # dense matrix products of bf16 (fp16 where there is no bf16), accumulated in fp32
    bandwidth: float  # of its memory, GB/s
    capability: tuple[int, int]


# From NVIDIA's data sheets and architecture white papers (Turing, Ampere GA102, Ada, Hopper, Blackwell); rates without
# sparsity. Consumer cards do half their fp16 rate where they accumulate in fp32, as training does.
GPUS = {
    "RTX 3060": _Known(12288, 25.6, 360, (8, 6)),
    "RTX 3080": _Known(10240, 59.5, 760, (8, 6)),
    "RTX 3090": _Known(24576, 71.0, 936, (8, 6)),
    "RTX 4060 Ti": _Known(16380, 44.0, 288, (8, 9)),
    "RTX 4070": _Known(12282, 58.3, 504, (8, 9)),
    "RTX 4080": _Known(16376, 97.5, 717, (8, 9)),
    "RTX 4090": _Known(24564, 165.2, 1008, (8, 9)),
    "RTX 5080": _Known(16303, 112.6, 960, (12, 0)),
    "RTX 5090": _Known(32607, 209.5, 1792, (12, 0)),
    "RTX A6000": _Known(49140, 154.8, 768, (8, 6)),
    "T4": _Known(15360, 65.0, 320, (7, 5)),
    "V100": _Known(16384, 125.0, 900, (7, 0)),
    "L4": _Known(23034, 121.0, 300, (8, 9)),
    "L40S": _Known(46068, 362.0, 864, (8, 9)),
    "A10": _Known(23028, 125.0, 600, (8, 6)),
    "A10G": _Known(23028, 70.0, 600, (8, 6)),
    "A100 40GB": _Known(40960, 312.0, 1555, (8, 0)),
    "A100 80GB": _Known(81920, 312.0, 2039, (8, 0)),
    "H100": _Known(81559, 989.4, 3350, (9, 0)),
    "H200": _Known(143771, 989.4, 4800, (9, 0)),
    "B200": _Known(183359, 2250.0, 8000, (10, 0)),
}
_UNKNOWN = _Known(0, 100.0, 600, (8, 0))


@dataclass(frozen=True)
class Gpu:
    """A GPU. Memory in bytes; `free` is what no process holds."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]

    @property
    def known(self) -> _Known:
        """Rates of its kind; where the kind is not in the table, a guess."""
        words = set(_words(self.name))
        kinds = [kind for kind in GPUS if words.issuperset(_words(kind))]
        return GPUS[max(kinds, key=len)] if kinds else _UNKNOWN

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 in hardware: Ampere and later."""
        return self.capability >= (8, 0)

    @property
    def float16(self) -> bool:
        """Whether its tensor cores multiply float16 and add up in float32: Volta and later. Before, most do it at a
        small part of their rate in float32."""
        return self.capability >= (7, 0)


@dataclass(frozen=True)
class Machine:
    """What a run can use. Memory in bytes; `busy` counts tasks of others that were running, on `all_cores` cores of
    which this process may use `cores`."""

    cores: int
    busy: int
    memory: int
    available: int
    flags: tuple[str, ...]
    compiler: str | None
    all_cores: int = 0
    gpus: tuple[Gpu, ...] = ()
    here: bool = True
    """Whether it is the one at hand; of another one that a plan is made for, only the GPU is known."""

    @property
    def free_cores(self) -> int:
        """Cores that other work leaves, at least one."""
        return max(1, min(self.cores, (self.all_cores or self.cores) - self.busy))

    def multiplies(self, dtype: str) -> bool:
        """Whether the processor multiplies matrices of `dtype` in hardware; where not, float32 is three to eight times
        as fast (docs/log.md)."""
        return dtype not in _PRODUCTS or not _PRODUCTS[dtype].isdisjoint(self.flags)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine() -> Machine:
    """Reads the facts: cores of this process's affinity and cgroup, memory the cgroup and the kernel leave, flags."""
    total, available = memory()
    return Machine(cores(), _busy(), total, available, _flags(), _compiler(), os.cpu_count() or 0, _gpus())


def named_gpu(name: str) -> Gpu:
    """An empty GPU of a kind in `GPUS`. Raises UsageError with the kinds that begin so, else the nearest names."""
    wanted = _words(name)
    if not wanted:
        raise UsageError("--gpu is given no name", fix="write one, such as 'RTX 4090', or give --vram")
    found = [kind for kind in GPUS if _words(kind) == wanted]
    if not found:
        begun = [f"'{kind}'" for kind in GPUS if " ".join(_words(kind)).startswith(" ".join(wanted))]
        hint = f"did you mean {' or '.join(begun)}?" if begun else nearest(name.strip(), list(GPUS))
        raise UsageError(f"no GPU called '{name}' is known; {hint}", fix="or give --vram")
    memory = GPUS[found[0]].memory << 20
    return Gpu(found[0], memory, memory, GPUS[found[0]].capability)


def _words(name: str) -> list[str]:
    """Of a GPU's name, however it is written: `a100-80GB` is `A100 80`, and the maker is not in it."""
    words = name.lower().replace("-", " ").replace("gb", " ").split()
    return [word for word in words if word not in ("nvidia", "geforce", "tesla")]


def unnamed_gpu(memory: int) -> Gpu:
    """An empty GPU of no particular kind with `memory` bytes."""
    return Gpu("a GPU", memory, memory, _UNKNOWN.capability)


_QUERY = ["--query-gpu=uuid,name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]


def _gpus() -> tuple[Gpu, ...]:
    """What the driver's tool tells, without torch; nothing where there is no such tool or it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        told = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return read_gpus(told, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_gpus(told: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs in the driver's table, of which `visible` (numbers or identities, as in CUDA_VISIBLE_DEVICES) may be
    used, in that order. Lines without figures (a GPU that is split) are left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.count(",") == 4]
    if visible is not None:
        wanted = [word.strip() for word in visible.split(",") if word.strip()]
        rows = [row for word in wanted for i, row in enumerate(rows) if word == str(i) or row[0].startswith(word)]
    return tuple(
        Gpu(name, int(total) << 20, int(free) << 20, (int(major), int(minor or 0)))
        for _, name, total, free, capability in rows
        for major, _, minor in [capability.partition(".")]
        if total.isdigit() and free.isdigit() and major.isdigit()
    )


def cores() -> int:
    """Cores of this process: its affinity, and what its cgroup may use."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        ours = min(ours, max(1, int(quota[0]) // int(quota[1])))
    return ours


def _busy() -> int:
    """Runnable tasks besides this one: the least of a few looks, since a moment's bustle is no load.

    The load average would not do: it remembers for minutes what the machine did before, such as an installation.
    """
    looks = []
    for _ in range(5):
        running = _read(Path("/proc/loadavg")).split()[3:4] or ["1/1"]
        looks.append(int(running[0].split("/")[0]) - 1)
        time.sleep(0.02)
    return max(0, min(looks))


def memory() -> tuple[int, int]:
    """Total and available bytes, the smaller of the machine's and the cgroup's."""
    lines = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    if not lines:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 2
    total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit, used = (_read(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        total, available = min(total, int(limit)), min(available, int(limit) - int(used))
    return total, max(available, 0)


_KILLS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def memory_kills(counts: Sequence[Path] = _KILLS) -> int | None:
    """How many processes the kernel has killed for want of memory: in this container, else on this machine. The count
    rises before the process dies. None where no file of `counts` says it, as elsewhere than on Linux."""
    told = (line.split() for path in counts for line in _read(path).splitlines())
    return next((int(words[1]) for words in told if words[0] == "oom_kill"), None)


def cache_folder() -> Path:
    """Where luthier keeps what it can make again: $LUTHIER_CACHE, else luthier/ in the user's cache folder."""
    if own := os.environ.get("LUTHIER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"


def _flags() -> tuple[str, ...]:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return tuple(flag for flag in _FLAGS if flag in present)
    return ()


def _compiler() -> str | None:
    return next((path for path in map(shutil.which, (os.environ.get("CXX") or "g++", "clang++")) if path), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
