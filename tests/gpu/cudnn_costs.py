"""What attention costs on this GPU: a layer's forward and backward pass by flash attention and by ours, each kernel of
a layer, and the kernels of our backward pass by blocks of other sizes. Microseconds; compiling takes half a minute."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from test_cudnn_on_gpu import ends, error, made
from torch import Tensor
from torch.autograd import DeviceType

from luthier.kernels import cudnn, fused, varlen, varlen_backward, varlen_forward
from luthier.kernels.ends import Ends
from luthier.kernels.sizes import power_of_2
from luthier.kernels.varlen_backward import Blocks, How, launched, places
from luthier.model.heads import Heads, RowAttention, Segments

SMOLLM2, LLAMA = (9, 3, 64), (32, 8, 128)  # query heads, key heads, values of a head
CHAT = (303, 120, 77, 410, 654, 198, 350, 290)  # 2,402 tokens
LENGTHS = {"2,402 of chats": CHAT, "8,192 of chats": (*CHAT * 3, 303, 669, 14), "8,188 in rows": (2047,) * 4}
QUERIES = {
    64: ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3)),
    128: ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
}
KEYS = {
    64: ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3)),
    128: ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
}
FORWARD = {
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)),
    128: ((64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2)),
}
TIMES = 7


def kernels(works: Sequence[Callable[[], Any]]) -> list[dict[str, float]]:
    """For each of these, the median time of each kernel that it launches."""
    for work in works:
        work(), work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for work in works:
            for _ in range(TIMES):
                work()
            torch.cuda.synchronize()
            torch.cuda._sleep(1)  # a mark between them
            torch.cuda.synchronize()
    found: list[dict[str, list[float]]] = [defaultdict(list)]
    for event in sorted(seen.events(), key=lambda e: e.time_range.start):
        if event.device_type == DeviceType.CUDA:
            if "spin" in event.name:
                found.append(defaultdict(list))
            else:
                found[-1][event.name].append(event.time_range.elapsed_us())
    return [{name: median(one) * len(one) / TIMES for name, one in part.items()} for part in found[: len(works)]]


def recorded(work: Callable[[], Any], times: int = 20) -> float:
    """Microseconds a call, replayed: what lies between kernels is counted too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still make what is worked on
    with torch.cuda.stream(stream):
        work(), work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            work()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / times


def padded(lengths: Sequence[int]) -> Ends:
    """As recorded steps have them: empty segments, and the longest is a power of two."""
    known = ends(lengths)
    bounds = (*accumulate(lengths, initial=0), *[sum(lengths)] * (power_of_2(len(lengths) + 9) - len(lengths)))
    return Ends(torch.tensor(bounds, dtype=torch.int32, device="cuda"), power_of_2(known.longest))


def layer(shape: tuple[int, int, int], lengths: Sequence[int]) -> None:
    """A layer's attention, and each of its kernels."""
    heads = Heads(*shape, scale=shape[2] ** -0.5)
    tokens = sum(lengths)
    y = torch.randn(tokens, heads.width, device="cuda", dtype=torch.bfloat16)
    cos = torch.ones(tokens, shape[2] // 2, device="cuda", dtype=y.dtype)
    attention, told = RowAttention(heads, fused.parts()), padded(lengths)
    segments = Segments(cos, torch.zeros_like(cos), (0, *accumulate(lengths)), 0, told=told)
    o, saved = attention.forward(y, segments)

    def forward() -> None:
        attention.forward(y, segments)

    def backward() -> None:
        attention.backward(o, o, saved, segments)

    print(f"  a layer: forward {recorded(forward):.1f}, backward {recorded(backward):.1f}")
    for part in kernels([forward, backward]):
        print("   ", {name[:40]: round(cost, 1) for name, cost in part.items()})
    size = varlen_backward.how(tokens, *shape).keys.keys
    (cut,) = kernels([lambda: varlen_backward._cut(told.edges, tokens, size)])
    print(f"    once a pack, the blocks: {len(cut)} kernels, {sum(cut.values()):.1f}")


def flash(parts: tuple[Tensor, ...], told: Ends, scale: float) -> list[Tensor]:
    q, k, v, do = parts
    o, sums = varlen._flash(q, k, v, told, told, scale, None)

    def backward() -> Any:
        return varlen._flash_backward(do, o, sums, q, k, v, told, scale, None)

    torch.use_deterministic_algorithms(True)
    try:
        found = list(backward())
        forward = recorded(lambda: varlen._flash(q, k, v, told, told, scale, None))
        print(f"  flash attention: forward {forward:.1f}, backward {recorded(backward):.1f}")
    finally:
        torch.use_deterministic_algorithms(False)
    return [o, sums, *found]


def forward_candidates(shape: tuple[int, int, int], lengths: Sequence[int]) -> None:
    q, k, v, do = made(lengths, *shape, torch.bfloat16)
    told, scale = padded(lengths), shape[2] ** -0.5
    wanted, _ = varlen._flash(q, k, v, told, told, scale, None)
    if cudnn.forward(q, k, v, told, scale) is not None:
        print(f"    forward by cuDNN                 {recorded(lambda: cudnn.forward(q, k, v, told, scale)):6.1f}")
    o, sums = torch.empty_like(do), torch.empty(shape[0], len(q), device="cuda")
    for sizes in FORWARD[shape[2]]:
        blocks = Blocks(*sizes)
        work = partial(varlen_forward.launched, q, k, v, places(told, len(q), blocks.rows), scale, o, sums, blocks)
        cost = recorded(work)
        print(f"    forward {sizes!s:24} {cost:6.1f}  from flash's {error(o, wanted.float()):.1e}")


def candidates(shape: tuple[int, int, int], lengths: Sequence[int]) -> None:
    _, groups, size = shape
    q, k, v, do = parts = made(lengths, *shape, torch.bfloat16)
    told, scale = padded(lengths), size**-0.5
    o, sums, *wanted = flash(parts, told, scale)
    found = [torch.empty_like(do), *torch.empty(2, len(q), groups, size, dtype=q.dtype, device="cuda")]

    def work(how: How) -> Callable[[], None]:
        tables = [places(told, len(q), blocks) for blocks in (how.queries.rows, how.keys.keys)]
        room = torch.empty_like(sums), torch.empty(2, *q.shape, device="cuda") if how.apart else None
        return lambda: launched(do, o, sums, q, k, v, *tables, told.longest, scale, None, None, *room, *found, how)

    first = How(Blocks(*QUERIES[size][0]), Blocks(*KEYS[size][0]))
    hows = [first._replace(queries=Blocks(*blocks)) for blocks in QUERIES[size]]
    hows += [first._replace(keys=Blocks(*blocks), apart=apart) for blocks in KEYS[size] for apart in (False, True)]
    works = [work(how) for how in hows]
    for number, (how, cost) in enumerate(zip(hows, kernels(works), strict=True)):
        works[number]()
        once = [x.clone() for x in found]
        apart = max(error(one, other.float()) for one, other in zip(found, wanted, strict=True))
        works[number]()
        stable = all(map(torch.equal, once, found))
        told_of = {name: round(cost.get(name, 0.0), 1) for name in ("queries", "keys_and_values", "summed")}
        key_part = sum(told_of.values()) - told_of["queries"]
        which = f"queries {tuple(how.queries)}" if number < len(QUERIES[size]) else f"keys {tuple(how.keys)}"
        which += " apart" if how.apart else ""
        mine = told_of["queries"] if number < len(QUERIES[size]) else key_part
        print(f"    {which:32} {mine:6.1f}  {told_of}, from flash's {apart:.1e}, {'' if stable else 'NOT '}stable")


if __name__ == "__main__":
    began = time.perf_counter()
    print(torch.__version__, torch.cuda.get_device_name(), cudnn.machine(torch.device("cuda", 0)))
    for shape in (SMOLLM2, LLAMA):
        for name, lengths in LENGTHS.items():
            print(f"{shape}, {name}: {sum(lengths)} tokens, {varlen_backward.how(sum(lengths), *shape)}")
            with torch.no_grad():
                forward_candidates(shape, lengths)
                candidates(shape, lengths)
                layer(shape, lengths)
    print(f"{time.perf_counter() - began:.0f} s")
