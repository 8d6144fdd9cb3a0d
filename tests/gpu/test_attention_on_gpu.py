"""Packed attention on a GPU, held to its plain twin in fp32: forward and gradients, odd lengths, shared keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels import fused, reference, varlen_backward
from luthier.kernels.ends import Ends
from luthier.kernels.pointwise import EAGER
from luthier.kernels.varlen import takes, varlen_attention
from luthier.model.heads import Heads, RowAttention, Segments, TileAttention

pytestmark = pytest.mark.gpu
# Of the whole tensor's norm. Probabilities and products are rounded once each, to 8 bits (bf16) or 11 (fp16).
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = (1, 7, 129, 64, 33, 300)


def tensors(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * size)
    shapes = [(sum(LENGTHS), n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def ends(bounds: Sequence[int]) -> Ends:
    edges = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    return Ends(edges, max(b - a for a, b in pairwise(bounds)))


def error(one: Tensor, other: Tensor) -> float:
    return float((one.detach().float() - other.detach().float()).norm() / other.detach().float().norm())


def windowed(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float, window: int) -> Tensor:
    pieces = []
    for start, end in pairwise(bounds):
        places = torch.arange(end - start, device=q.device)
        behind = places[:, None] - places
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        seen = (behind >= 0) & (behind < window)
        out = torch.nn.functional.scaled_dot_product_attention(*parts, seen, scale=scale, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 16])
def test_packed_attention_is_its_twin(
    heads: tuple[int, int], size: int, dtype: torch.dtype, window: int | None
) -> None:
    q, k, v, upstream = tensors(*heads, size, dtype)
    bounds, scale = (0, *accumulate(LENGTHS)), 0.7 * size**-0.5
    mine, exact = ([x.detach().to(kind).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float32))
    assert takes(*mine)
    made = varlen_attention(*mine, ends(bounds), scale, window)
    twin: Any = (
        reference.segment_attention(*exact, bounds, scale)
        if window is None
        else windowed(*exact, bounds, scale, window)
    )
    assert error(made, twin) <= TOLERANCE[dtype]
    found = torch.autograd.grad(made, mine, upstream)
    wanted = torch.autograd.grad(twin, exact, upstream.float())
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) <= TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_queries_are_the_last_of_more_keys(heads: tuple[int, int]) -> None:
    q, k, v, _ = tensors(*heads, 64, torch.bfloat16)
    counts = (1, 3, 100, 64, 1, 17)  # queries of each segment
    bounds, key_bounds = (0, *accumulate(counts)), (0, *accumulate(LENGTHS))
    q = q[: bounds[-1]]
    made = varlen_attention(q, k, v, ends(bounds), 0.1, keys=ends(key_bounds))
    for (a, b), (c, d) in zip(pairwise(bounds), pairwise(key_bounds), strict=True):
        parts = (x.float().transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        seen = torch.ones(b - a, d - c, dtype=torch.bool, device="cuda").tril(d - c - (b - a))
        wanted = torch.nn.functional.scaled_dot_product_attention(*parts, seen, scale=0.1, enable_gqa=True)
        assert error(made[a:b], wanted[0].transpose(0, 1)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(queries=6, keys=2, size=64, scale=0.1),
        Heads(queries=8, keys=2, size=128, scale=0.1),
        Heads(queries=4, keys=4, size=16, scale=0.2),
        Heads(queries=4, keys=1, size=80, scale=0.1),
        Heads(queries=6, keys=2, size=64, scale=0.1, neighbours=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_layer_s_heads_are_turned_and_attend_as_on_a_cpu(
    heads: Heads, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for few in ("FEW", "FEW_64"):
        monkeypatch.setattr(varlen_backward, few, 1 << 30 if apart else 0)
    generator, bounds = torch.Generator().manual_seed(heads.size), (0, *accumulate(LENGTHS))
    y, do, angles = (
        torch.randn(bounds[-1], n, generator=generator)
        for n in (heads.width, heads.queries * heads.size, heads.size // 2)
    )
    y, do, cos, sin = (x.bfloat16() for x in (y, do, angles.cos(), angles.sin()))
    twin, segments = TileAttention(heads, EAGER), Segments(cos.float(), sin.float(), bounds, 0)
    wanted, saved = twin.forward(y.float(), segments)
    wanted_dy = twin.backward(do.float(), wanted, saved, segments)
    mine, segments = RowAttention(heads, fused.parts()), Segments(cos.cuda(), sin.cuda(), bounds, 0)
    made, saved = mine.forward(y.cuda(), segments)
    assert error(made, wanted.cuda()) <= TOLERANCE[y.dtype]
    for one, other in zip(
        heads.split(mine.backward(do.cuda(), made, saved, segments)), heads.split(wanted_dy), strict=True
    ):
        assert error(one, other.cuda()) <= 2 * TOLERANCE[y.dtype]  # turned heads are rounded, too


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "phi", "qwen2_moe", "falcon", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_family_on_a_gpu_is_as_near_to_fp32_on_the_processor_as_its_dtype_allows(
    name: str, dtype: torch.dtype
) -> None:
    import toys
    from luthier.data.stream import Micro
    from luthier.model import attention
    from luthier.model.causal import CausalModel

    bounds = (0, *accumulate((9, 30, 4)))
    ids = torch.randint(8, toys.VOCAB, (bounds[-1],), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    rows = (positions > 2).nonzero()[:, 0]
    batch = Micro(ids, positions, bounds, rows - 1, ids[rows], torch.arange(3), step=0)
    exact, made = (
        CausalModel(toys.model(name, attention.NAME if name != "falcon" else "sdpa").to(place, kind), None)
        for place, kind in (("cpu", torch.float32), ("cuda", dtype))
    )
    with torch.no_grad():
        right = exact.head.logits(exact.hidden(batch))
        assert error(made.head.logits(made.hidden(batch)).cpu(), right) <= {torch.float32: 1e-3}.get(dtype, 0.1)


def test_what_flash_attention_does_not_take_keeps_no_probabilities_either() -> None:
    """In fp32, as before Ampere: those of 8 heads and 4,096 tokens would be 512 MiB."""
    heads = Heads(queries=8, keys=2, size=64, scale=0.125)
    y, cos = torch.randn(4096, heads.width, device="cuda"), torch.ones(4096, 32, device="cuda")
    attention, segments = RowAttention(heads, fused.parts()), Segments(cos, cos, (0, 4096), 0)
    assert not takes(*heads.split(y))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, saved = attention.forward(y, segments)
    attention.backward(o, o, saved, segments)
    assert torch.cuda.max_memory_allocated() - before < 256 << 20
