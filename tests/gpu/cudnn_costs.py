"""What attention costs on this GPU: time, memory, and the first call of a shape, by flash attention and by cuDNN."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from test_cudnn_on_gpu import ends, error, made
from torch import Tensor

from luthier.kernels import cudnn
from luthier.kernels.varlen_backward import Blocks, launched

BLOCKS = (
    (Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 1)),
    (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    (Blocks(64, 32, 4, 3), Blocks(64, 64, 8, 2)),
    (Blocks(128, 32, 8, 3), Blocks(32, 128, 8, 3)),
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
            for determined in (False, True):
                trial = Trial(q, k, v, edges, longest, scale, determined)
                found = tell(f"cuDNN backward packed, determined {determined}", partial(trial, do))
                if found is not None:
                    apart = [round(error(a, b.float()), 5) for a, b in zip(found, free, strict=False)]
                    print(f"    apart from flash's: {apart}")
        if len(set(lengths)) == 1:
            n = longest
            batch = [x.unflatten(0, (-1, n)).transpose(1, 2) for x in (q, k, v, do)]
            r = tell(
                "aten cuDNN batch forward",
                lambda: aten._scaled_dot_product_cudnn_attention(*batch[:3], None, True, 0.0, True, False, scale=scale),
            )
            ends_of = (r[1], r[6], r[7], None, None, None, n, n, 0.0, True)
            tell(
                "aten cuDNN batch backward, any order",
                lambda: aten._scaled_dot_product_cudnn_attention_backward(
                    batch[3], *batch[:3], r[0], *ends_of, scale=scale
                ),
            )
            if cudnn.machine(q.device).frontend:
                for determined in (False, True):
                    for at_once in (4, 1):
                        dense = Dense(q, k, v, r[0].transpose(1, 2), r[1], longest, scale, determined, at_once)
                        tell(f"frontend batch backward, determined {determined}, {at_once} at once", partial(dense, do))
    finally:
        torch.use_deterministic_algorithms(False)


class Trial:
    """cuDNN's own backward pass over packed rows: an experiment."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float, determined: bool
    ) -> None:
        self.inputs, self.edges, self.longest, self.scale, self.determined = (
            (q, k, v),
            edges,
            longest,
            scale,
            determined,
        )
        self.built: Any = None

    def build(self, do: Tensor) -> None:
        import cudnn as fe

        q, k, v = self.inputs
        (tokens, heads, size), groups = q.shape, k.shape[1]
        at = cudnn._Shape(
            q.device, q.dtype, max(cudnn.capacity(len(self.edges) - 1), 2), max(cudnn.capacity(self.longest), 128),
            heads, groups, size, tuple(x.stride(0) for x in (q, k, v)), self.scale,
        )  # fmt: skip
        self.at = at
        graph, _ = cudnn.plan(at)
        o, sums = q.new_empty(tokens, heads, size), q.new_empty(tokens, heads, dtype=torch.float32)
        edges = torch.cat([self.edges, self.edges[-1:].expand(at.segments + 2 - len(self.edges))])
        starts = edges * cudnn._strides(at)
        room = q.new_empty(cudnn.plan(at)[1], dtype=torch.uint8)
        cudnn._run(graph, dict(zip(cudnn._Part, (q, k, v, o, sums, edges.diff(), *starts), strict=True)), room)
        types = fe.data_type
        g = fe.pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=cudnn._handle(q.device),
        )
        self.tensors: dict[Any, Tensor] = {}

        def number(name: str, values: Tensor, count: int, kind: Any) -> Any:
            t = g.tensor(name=name, dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)
            self.tensors[t] = values
            return t

        step = edges.long()
        starts_of = {
            name: number(f"starts_{name}", (step * n).contiguous(), at.segments + 1, types.INT64)
            for name, n in (
                ("q", at.strides[0]), ("o", heads * size), ("sums", heads), ("dk", groups * size)
            )
        }  # fmt: skip
        lengths = number("lengths", edges.diff(), at.segments, types.INT32)

        def rows(name: str, x: Tensor, count: int, stride: int, starts: str) -> Any:
            dim, strides = cudnn._laid_out(at, count, stride)
            t = g.tensor(name=name, dim=dim, stride=strides, data_type=types.BFLOAT16)
            t.set_ragged_offset(starts_of[starts])
            self.tensors[t] = x
            return t

        tq, tk, tv = (rows(n, x, x.shape[1], at.strides[0], "q") for n, x in zip("qkv", self.inputs, strict=True))
        to, tdo = (rows(n, x, heads, heads * size, "o") for n, x in (("o", o), ("do", do)))
        ts = g.tensor(
            name="sums",
            dim=(at.segments, heads, at.longest, 1),
            stride=(at.longest * heads, 1, heads, 1),
            data_type=types.FLOAT,
        )
        ts.set_ragged_offset(starts_of["sums"])
        self.tensors[ts] = sums
        most = -(-tokens // 64) * 64
        outs = g.sdpa_backward(
            name="b", q=tq, k=tk, v=tv, o=to, dO=tdo, stats=ts, attn_scale=self.scale, use_causal_mask=True,
            use_padding_mask=True, seq_len_q=lengths, seq_len_kv=lengths, max_total_seq_len_q=most,
            max_total_seq_len_kv=most, use_deterministic_algorithm=self.determined,
        )  # fmt: skip
        self.grads = [q.new_empty(tokens, n, size) for n in (heads, groups, groups)]
        for t, x, starts in zip(outs, self.grads, ("o", "dk", "dk"), strict=True):
            dim, strides = cudnn._laid_out(at, x.shape[1], x.shape[1] * size)
            t.set_output(True).set_dim(dim).set_stride(strides).set_ragged_offset(starts_of[starts])
            self.tensors[t] = x
        g.build([fe.heur_mode.A, fe.heur_mode.FALLBACK])
        print(
            f"    workspace of packed backward, determined {self.determined}: {g.get_workspace_size() / 2**20:.0f} MiB"
        )
        if g.get_workspace_size() > 8 * 2**30:
            raise MemoryError(f"workspace of {g.get_workspace_size() / 2**30:.0f} GiB")
        self.built = g

    def __call__(self, do: Tensor) -> list[Tensor]:
        if self.built is None:
            self.build(do)
        room = do.new_empty(self.built.get_workspace_size(), dtype=torch.uint8)
        self.built.execute(self.tensors, room, handle=cudnn._handle(do.device))
        return self.grads


class Dense:
    """The frontend's backward pass of a batch, some rows at once: an experiment."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, longest: int, scale: float, determined: bool,
        at_once: int,
    ) -> None:  # fmt: skip
        self.parts = [x.unflatten(0, (-1, longest)) if x.dim() == 3 else x for x in (q, k, v, o)]
        self.sums, self.scale, self.determined, self.at_once = sums, scale, determined, at_once
        self.built: Any = None

    def build(self) -> None:
        import cudnn as fe

        types = fe.data_type
        g = fe.pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=cudnn._handle(self.sums.device),
        )
        q, k, v, o = (x[: self.at_once].transpose(1, 2) for x in self.parts)
        names = [
            g.tensor(name=n, dim=tuple(x.shape), stride=x.stride(), data_type=types.BFLOAT16)
            for n, x in (("q", q), ("k", k), ("v", v), ("o", o), ("do", o))
        ]
        n, h, s, _ = q.shape
        names.append(g.tensor(name="s", dim=(n, h, s, 1), stride=(h * s, s, 1, 1), data_type=types.FLOAT))
        outs = g.sdpa_backward(
            *names, name="b", attn_scale=self.scale, use_causal_mask=True,
            use_deterministic_algorithm=self.determined,
        )  # fmt: skip
        for t, x in zip(outs, (q, k, v), strict=True):
            like = torch.empty(n, s, x.shape[1], x.shape[3], device="meta").transpose(1, 2)
            t.set_output(True).set_dim(tuple(like.shape)).set_stride(like.stride())
        self.names = [*names, *outs]
        g.build([fe.heur_mode.A, fe.heur_mode.FALLBACK])
        self.built = g

    def __call__(self, do: Tensor) -> list[Tensor]:
        if self.built is None:
            self.build()
        room = do.new_empty(self.built.get_workspace_size(), dtype=torch.uint8)
        count, longest = self.parts[0].shape[:2]
        grads = [x.new_empty(count, longest, *x.shape[2:]) for x in self.parts[:3]]
        do = do.view(count, longest, *do.shape[1:])
        for i in range(0, count, self.at_once):
            values = [x[i] for x in (*self.parts, do, self.sums, *grads)]
            self.built.execute(dict(zip(self.names, values, strict=True)), room, handle=cudnn._handle(do.device))
        return grads


if __name__ == "__main__":
    print(torch.__version__, torch.cuda.get_device_name())
    for shape in ((32, 8, 128), (9, 3, 64)):
        for name, lengths in (("chat", CHAT), ("rows", (2047,) * 4)):
            costs(shape, name, lengths)
