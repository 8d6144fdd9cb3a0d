"""Facts about this machine, read without importing anything heavy. Decisions come from these, never from timings."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 1024**3
_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "asimd", "bf16")


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

    @property
    def free_cores(self) -> int:
        """Cores that other work leaves, at least one."""
        return max(1, min(self.cores, (self.all_cores or self.cores) - self.busy))

    @property
    def fast_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16 in hardware; elsewhere float32 is about three times as fast."""
        return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(self.flags))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine() -> Machine:
    """Reads the facts: cores of this process's affinity and cgroup, memory the cgroup and the kernel leave, flags."""
    total, available = _memory()
    return Machine(_cores(), _busy(), total, available, _flags(), _compiler(), os.cpu_count() or 0)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


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


def _memory() -> tuple[int, int]:
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
