"""What attention costs on this GPU, by flash attention, by cuDNN and by our own backward pass: time, memory, and the
first call of a shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from test_cudnn_on_gpu import ends, error, made

from luthier.kernels import cudnn
from luthier.kernels.varlen_backward import Blocks, launched

BLOCKS = (
    (Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 3)),
)
CHAT = (303,) * 5 + (120, 77, 410, 654, 198, 350, 90, 515, 260, 330) * 2 + (669,)


def timed(work: Callable[[], Any], times: int = 20) -> float:
    """Microseconds a call on the GPU."""
    work(), work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / times


def taken(work: Callable[[], Any]) -> float:
    """The most MiB that the work takes beside what was there and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def costs(shape: tuple[int, int, int], name: str, lengths: tuple[int, ...]) -> None:
    q, k, v, do = made(lengths, *shape, torch.bfloat16)
    edges, longest, scale = ends(lengths), max(lengths), shape[2] ** -0.5
    places = (edges, edges, longest, longest, 0.0, True)
    print(f"{name} {shape}: {sum(lengths)} tokens, {len(lengths)} segments, {cudnn.machine(q.device)}")

    def tell(what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            result = work()
            torch.cuda.synchronize()
        except Exception as found:
            print(f"  {what}: {type(found).__name__} {str(found)[:300]}")
            return None
        first = (time.perf_counter() - began) * 1e3
        print(f"  {what}: {timed(work):.0f} us, {taken(work):.0f} MiB, first call {first:.1f} ms")
        return result

    aten = torch.ops.aten
    o, sums, seed, offset, _ = tell(
        "flash forward", lambda: aten._flash_attention_forward(q, k, v, *places, False, scale=scale)
    )

    def flash_backward() -> Any:
        return aten._flash_attention_backward(do, q, k, v, o, sums, *places, seed, offset, scale=scale)

    free = tell("flash backward, any order", flash_backward)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        tell("flash backward, one order", flash_backward)
        for queries, keys in BLOCKS:
            work = partial(launched, do, q, k, v, o, sums, edges, longest, scale, queries, keys)
            found = tell(f"own backward {tuple(queries)} {tuple(keys)}", work)
            if found is not None:
                split = torch.split(found, [shape[0], shape[1], shape[1]], 1)
                apart = [round(error(a, b.float()), 5) for a, b in zip(split, free, strict=False)]
                parts = dict.fromkeys(("queries", "keys_and_values"), 0.0)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                    work()
                    torch.cuda.synchronize()
                for event in seen.key_averages():
                    parts[event.key] = round(event.device_time_total)
                print(f"    apart from flash's: {apart}; {parts}")
        tell("ours forward", lambda: cudnn.forward(q, k, v, edges, longest, scale))
        if cudnn.machine(q.device).frontend:
            tell("ours forward packed", lambda: cudnn._packed(q, k, v, edges, longest, scale))
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    print(torch.__version__, torch.cuda.get_device_name())
    for shape in ((32, 8, 128), (9, 3, 64)):
        for name, lengths in (("chat", CHAT), ("rows", (2047,) * 4)):
            costs(shape, name, lengths)
