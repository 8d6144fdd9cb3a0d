"""Times the steps of one process, and follows its memory: the same for every peer."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peers.stacks import Stacks
from peers.workloads import Step, Workload, counts

GIB = 2**30
TOP = 30  # kernels of a profile
PAUSES = 40  # of a profile


class Clock:
    """`begin` where training begins, `tick` after each step. Nothing waits for the GPU but the first step and the two
    ends of the timed window, as nothing does in a run.

    Args:
        started: `time.time()` at which the process was started.
        profile: where to write the kernels of the steps after the window; None: they are not run.
        stacks: what has looked where the start goes, written beside `profile` as `.start.txt` after the first step.
    """

    def __init__(self, started: float, workload: Workload, profile: Path | None, stacks: Stacks | None = None) -> None:
        self.started, self.workload, self.profile, self.stacks = started, workload, profile, stacks
        self.ticks, self.ends, self.found = 0, list[Any](), dict[str, Any]()
        self.phases, self.reached = dict[str, float](), started
        self.profiler: Any = None
        self.ahead = 0  # steps that are begun, each as one micro-batch, when one is told

    @property
    def total(self) -> int:
        """Steps to run."""
        return self.workload.total if self.profile else self.workload.first + self.workload.timed

    def phase(self, name: str) -> None:
        """Ends a phase of the start: its seconds are those since the one before it, or since the process started."""
        if torch.cuda.is_initialized():
            wait()
        self.phases[name], self.reached = time.time() - self.reached, time.time()

    def begin(self) -> None:
        self.found["begin_s"] = time.time() - self.started
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what reading the model left
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_accumulated_memory_stats()

    def tick(self) -> None:
        warm, last = self.workload.first, self.workload.first + self.workload.timed
        self.ticks += 1
        if self.ticks == 1:
            wait()
            self.found["first_step_s"] = time.time() - self.started
            self.phase("first step")
            if self.stacks is not None and self.profile is not None:
                self.stacks.write(self.profile.with_suffix(".start.txt"))
        if self.ticks == warm:
            wait()
            self.found["window_s"] = -time.perf_counter()
        if warm <= self.ticks <= last:
            self.ends.append(end_of_step())
        if self.ticks == last:
            wait()
            self.found["window_s"] += time.perf_counter()
            self.found |= memory()
            self._start_profile()
        if self.ticks == self.total and self.profiler is not None:
            wait()
            self.profiler.stop()

    def row(self, steps: list[Step]) -> dict[str, Any]:
        """What was measured of `steps`, of which the first `total` were run. Rates are of real tokens."""
        first, last = self.workload.first, self.workload.first + self.workload.timed
        window, seconds = self.found.pop("window_s"), durations(self.ends)
        timed = self._worked(steps, first, last)
        whole = counts(timed)
        rates = [counts([step]).tokens / s for step, s in zip(timed, seconds, strict=True)]
        row = {
            "tok_s": whole.tokens / window,
            "median_tok_s": statistics.median(rates),
            "spread": [quantile(rates, 0.1), quantile(rates, 0.9)],
            "samples_s": whole.samples / window,
            "step_s": statistics.median(seconds),
            "seconds": [round(s, 4) for s in seconds],
            "step_tokens": whole.tokens / self.workload.timed,
            **self.found,
            "phases": self.phases,
        }
        if self.profiler is not None and self.profile is not None:
            profiled = self._worked(steps, last, self.total)
            row["profile"] = summary(self.profiler, profiled, row["tok_s"], self.profile)
        return row

    def _worked(self, steps: list[Step], first: int, last: int) -> list[Step]:
        """What the GPU works on between the ends of two steps: what was begun before the one is not, and what is begun
        before the other is. After the last step comes the first."""
        return [*steps, *steps][first + self.ahead : last + self.ahead]

    def _start_profile(self) -> None:
        if self.profile is None:
            return
        kind = torch.profiler.ProfilerActivity
        place = kind.CUDA if torch.cuda.is_available() else kind.CPU
        self.profiler = torch.profiler.profile(activities=[place], acc_events=True)  # without, some versions warn
        self.profiler.start()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def end_of_step() -> Any:
    """A moment in the GPU's own time, or in ours."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def durations(ends: list[Any]) -> list[float]:
    """Seconds between moments."""
    return [b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairwise(ends)]


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def memory() -> dict[str, float]:
    """GiB: the most reserved and allocated since `begin`, and what the device holds with context and libraries. Also
    how often since then torch had to give memory back before it got some, which waits for the GPU."""
    if not torch.cuda.is_available():
        return {"peak_gib": 0.0, "peak_allocated_gib": 0.0, "device_gib": 0.0, "retries": 0}
    free, total = torch.cuda.mem_get_info()
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    found = {"peak_gib": reserved / GIB, "peak_allocated_gib": allocated / GIB, "device_gib": (total - free) / GIB}
    return found | {"retries": retries}


def summary(profiler: Any, steps: list[Step], tok_s: float, path: Path) -> dict[str, Any]:
    """Of a step: kernels, launches by the host, and the share of the time in which the GPU works: its seconds per token
    of the profiled steps at the rate of the timed ones, which no profiler slowed. The kernels are written to `path`."""
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    events = [e for e in profiler.events() if e.device_type.name == device and not e.is_user_annotation]
    launched = [e.name for e in profiler.events() if "Launch" in e.name and e.device_type.name == "CPU"]
    spent, times = Counter[str](), Counter(event.name for event in events)
    for event in events:
        spent[event.name] += event.time_range.end - event.time_range.start
    busy, number = union([(e.time_range.start, e.time_range.end) for e in events]) / 1e6, len(steps)
    found = {
        "kernels": len(events) / number,
        "launches": len(launched) / number,
        "busy_s": busy / number,
        "busy_share": busy / counts(steps).tokens * tok_s,
    }
    lines = [f"{key} {value:.4f}" for key, value in found.items()]
    lines += [f"{ms / number:10.3f} ms {count / number:7.1f} x  {what}" for what, ms, count in pauses(events)]
    lines += [f"{us / 1e3 / number:10.3f} ms {times[name] / number:7.1f} x  {name}" for name, us in spent.most_common()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    top = [[name[:100], us / 1e3 / number, times[name] / number] for name, us in spent.most_common(TOP)]
    return found | {"top": top}


def pauses(events: Sequence[Any]) -> list[tuple[str, float, int]]:
    """Where a device has nothing to do: between which kernels, the milliseconds of all such pauses and their number,
    the longest first. The host is slower than without a profiler, so these are the most that they can be."""
    found, last = defaultdict[str, list[float]](list), None
    for event in sorted(events, key=lambda event: event.time_range.start):
        if last is not None and event.time_range.start > last.time_range.end:
            between = f"pause: {last.name[:60]} -> {event.name[:60]}"
            found[between].append((event.time_range.start - last.time_range.end) / 1e3)
        if last is None or event.time_range.end > last.time_range.end:
            last = event
    told = [(between, sum(lengths), len(lengths)) for between, lengths in found.items()]
    return sorted(told, key=lambda one: -one[1])[:PAUSES]


def union(stretches: list[tuple[float, float]]) -> float:
    """The length of what the stretches cover together: kernels of several streams overlap."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(stretches):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
