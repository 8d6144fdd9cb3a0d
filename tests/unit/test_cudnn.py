"""Who computes attention on a GPU: decided by the machine and the lengths, before anything is computed."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels import cudnn, fused, spare, varlen_backward
from luthier.kernels.cudnn import Machine, _laid_out, _Part, way
from luthier.kernels.ends import Ends
from luthier.kernels.place import noticing, planned_for
from luthier.kernels.sizes import power_of_2
from luthier.kernels.varlen import varlen_attention
from luthier.model.heads import Heads, RowAttention, Segments
from luthier.model.trace import Meter

HOPPER = Machine(9, 91900, True)


@pytest.mark.parametrize(
    ("at", "size", "wanted"),
    [
        (HOPPER, 128, "packed"),
        (HOPPER, 256, "packed"),
        (HOPPER, 264, None),
        (HOPPER, 100, None),
        (Machine(10, 91900, True), 128, "packed"),
        (Machine(10, 91900, True), 256, None),
        (Machine(12, 91900, True), 64, None),
        (Machine(8, 91900, True), 64, None),
        (Machine(9, 91002, True), 64, None),
        (Machine(9, 0, True), 64, None),
        (Machine(9, 91900, False), 64, None),
    ],
    ids=str,
)
def test_packed_rows_are_cudnns_where_it_has_kernels_for_them_and_the_frontend_is_installed(
    at: Machine, size: int, wanted: str | None
) -> None:
    assert way(at, size, tokens=8192, segments=27, longest=669) == wanted


@pytest.mark.parametrize("frontend", [False, True])
def test_rows_that_are_all_as_long_are_a_batch_that_needs_no_frontend(frontend: bool) -> None:
    at = HOPPER._replace(frontend=frontend)
    assert way(at, 128, tokens=8192, segments=4, longest=2048) == "batch"
    assert way(at, 128, tokens=8188, segments=4, longest=2047) == "batch"
    assert way(at, 128, tokens=8184, segments=4, longest=2046) != "batch"
    assert way(at, 128, tokens=8191, segments=4, longest=2048) != "batch"
    assert way(at, 128, tokens=8200, segments=4, longest=2050) != "batch"  # a length that never comes again
    assert way(at._replace(major=8), 128, tokens=8192, segments=4, longest=2048) is None


def test_numbers_and_lengths_of_segments_share_few_plans() -> None:
    assert [power_of_2(n) for n in (1, 2, 3, 27, 32, 33, 2048, 2049)] == [1, 2, 4, 32, 32, 64, 2048, 4096]
    assert len({power_of_2(n) for n in range(1, 8193)}) == 14


def rows(segments: int, longest: int) -> tuple[Tensor, Tensor, Tensor, Ends]:
    """q, k and v side by side, as a block's product leaves them, with room behind each token."""
    y = spare.empty(torch.empty(0), segments * longest, 8 * 16, 24).normal_()
    edges = torch.arange(segments + 1, dtype=torch.int32) * longest
    return *torch.split(y.unflatten(1, (8, 16)), [4, 2, 2], 1), Ends(edges, longest)


def test_a_batch_has_a_plan_of_its_own_and_packed_rows_share_theirs() -> None:
    q, k, v, told = rows(3, 127)
    batch, packed = (cudnn._shape(q, k, v, told, 0.1, 24, packed=packed) for packed in (False, True))
    assert (batch.segments, batch.longest) == (3, 127)
    assert (packed.segments, packed.longest) == (4, 128)
    assert batch.strides == packed.strides == (8 * 16 + 24,) * 3 + (4 * 16 + 24,)


def test_a_batchs_plan_finds_every_segment_where_it_lies() -> None:
    segments, longest = 3, 5
    *read, told = rows(segments, longest)
    shape = cudnn._shape(*read, told, 0.1, 24, packed=False)
    o = spare.empty(read[0], segments * longest, 4 * 16, 24).normal_().unflatten(1, (4, 16))
    for part, x in zip(_Part, (*read, o), strict=False):
        assert torch.equal(x.as_strided(*_laid_out(shape, part)), x.unflatten(0, (segments, longest)).transpose(1, 2))
    wanted = torch.arange(4.0 * segments * longest).view(4, -1)  # of each head, and each token
    sums = torch.empty(wanted.numel())
    sums.as_strided(*_laid_out(shape, _Part.SUMS))[..., 0] = wanted.unflatten(1, (segments, longest)).transpose(0, 1)
    assert torch.equal(cudnn._by_heads(sums.view(segments, 4, longest)), wanted)


def test_packed_rows_are_found_from_where_their_segments_begin() -> None:
    lengths, longest = (2, 5, 3), 5
    *read, _ = rows(2, 5)
    told = Ends(torch.tensor([0, 2, 7, 10], dtype=torch.int32), longest)
    shape = cudnn._shape(*read, told, 0.1, 24, packed=True)
    found, *starts = cudnn._places(told.edges, shape)
    assert found[: shape.segments].tolist() == [*lengths, 0]
    o = spare.empty(read[0], 10, 4 * 16, 24).normal_().unflatten(1, (4, 16))
    tensors = (*read, o, torch.randn(10, 4, 1))
    for part, x, begins in zip(_Part, tensors, starts, strict=False):
        _, strides = _laid_out(shape, part)
        for begin, length, rows_of in zip(begins.tolist(), lengths, x.split(lengths), strict=False):
            dim = (x.shape[1], length, x.shape[2])
            assert torch.equal(x.as_strided(dim, strides[1:], x.storage_offset() + begin), rows_of.transpose(0, 1))


def test_what_cudnn_refuses_is_said_once() -> None:
    """As it has nothing for a CPU."""
    shape = cudnn._shape(*rows(2, 128), 0.1, 0, packed=False)
    with pytest.warns(UserWarning, match="cuDNN has no attention for .*, torch computes it") as told:
        assert [cudnn.plan(shape) for _ in range(2)] == [None, None]
    assert len(told) == 1


def test_a_lack_of_memory_while_cudnn_plans_is_told_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be no plan for the rest of the process, and other bits than a run has that was left alone."""

    class Full:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setitem(sys.modules, "cudnn", Full())
    shape = cudnn._shape(*rows(3, 128), 0.1, 0, packed=False)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="ALLOC_FAILED"):
            cudnn.plan(shape)


def test_elsewhere_than_on_a_gpu_nothing_is_computed() -> None:
    q = torch.empty(8, 2, 64, dtype=torch.bfloat16, device="meta")
    assert cudnn.forward(q, q, q, Ends(torch.tensor([0, 8], dtype=torch.int32), 8), 0.1) is None


@pytest.mark.parametrize(
    ("capability", "heads", "groups", "size", "wanted"),
    [
        ((9, 0), 32, 8, 128, True),
        ((9, 0), 9, 3, 64, True),
        ((9, 0), 32, 32, 80, True),
        ((9, 0), 71, 1, 64, False),  # one program would go through 71 heads
        ((9, 0), 8, 4, 256, False),
        ((8, 9), 32, 8, 128, False),  # whose memory is too small for its blocks
        ((10, 0), 32, 8, 128, False),
    ],
)
def test_the_own_gradient_is_hoppers(
    capability: tuple[int, int], heads: int, groups: int, size: int, wanted: bool
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    y = torch.empty(64, heads + 2 * groups, size, dtype=torch.bfloat16, device="meta")
    parts = torch.split(y, [heads, groups, groups], 1)
    with planned_for(capability):
        assert varlen_backward.takes(*parts, 64) == wanted
        assert not varlen_backward.takes(*parts, 2**30)
        assert not varlen_backward.takes(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts), 64)


def test_where_triton_cannot_start_a_kernel_it_is_said_once_and_flash_attention_is_left() -> None:
    """As on a GPU whose machine has no C compiler."""
    place = torch.device("cpu")
    varlen_backward.starts.cache_clear()
    with pytest.warns(UserWarning, match="flash attention computes the gradients") as told:
        assert [varlen_backward.starts(place) for _ in range(2)] == [False, False]
    assert len(told) == 1


@pytest.mark.parametrize(("tokens", "apart"), [(512, True), (32768, False)])
def test_a_plan_sees_the_own_gradients_memory_and_arithmetic(tokens: int, apart: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    y = torch.empty(tokens, 12, 64, dtype=torch.bfloat16, device="meta")
    ends = Ends(torch.empty(5, dtype=torch.int32, device="meta"), 128)
    with planned_for((9, 0)), Meter().begun() as meter:
        q, k, v = (x.detach().requires_grad_() for x in torch.split(y, [8, 2, 2], 1))
        o = varlen_attention(q, k, v, ends, 0.1)
        meter.phase = "backward"
        gradients = torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert all(x._base is gradients[0]._base for x in gradients)  # side by side, as a merged product wants them
    assert meter.figures["work", "backward", "products", "flops"] == 7 * tokens * 128 * 8 * 64
    assert varlen_backward.how(tokens, 8, 2, 64).apart == apart
    inner, parts, tables = 4 * tokens * 8, apart * 2 * 2 * o.nbytes, 0.01 * y.nbytes
    assert 0 < meter.figures["live", "backward", "backward"] - (y.nbytes + o.nbytes + inner + parts) < tables


def test_blocks_lie_where_segments_do_the_longest_before_the_others() -> None:
    """Whatever the lengths: each block of each segment once, and the rest is empty and comes last."""
    for lengths in ((5, 0, 64, 65, 1, 200, 0, 0), (300,), (1,) * 130, (64, 128, 64)):
        edges = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        for size in (16, 64, 128):
            found = varlen_backward.places(Ends(edges, 0), int(edges[-1]), size).tolist()
            wanted = [(s, n, at) for s, n in zip(edges.tolist(), lengths, strict=False) for at in range(0, n, size)]
            full = [tuple(block) for block in found[: len(wanted)]]
            assert sorted(full) == sorted(wanted)
            left = [n - at for _, n, at in full]
            assert left == sorted(left, reverse=True)
            assert all(at >= n for _, n, at in found[len(wanted) :])


def test_what_segments_are_cut_into_is_found_once_for_all_layers() -> None:
    told = Ends(torch.tensor([0, 400, 512], dtype=torch.int32), 400)
    segments = Segments(*torch.empty(2, 512, 32), (0, 400, 512), 0, told=told)
    last = replace(segments, rows=torch.tensor([3]))  # as the last layer's
    assert varlen_backward.places(segments.ends, 512, 64) is varlen_backward.places(last.ends, 512, 64)
    assert len(varlen_backward.places(segments.ends, 512, 128)) < len(varlen_backward.places(last.ends, 512, 64))


@pytest.mark.parametrize("rows", [None, [3, 200]], ids=["", "chosen"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_whoever_computes_it_leaves_room_behind_the_rows(capability: tuple[int, int], rows: list[int] | None) -> None:
    heads = Heads(queries=8, keys=2, size=64, scale=0.1)
    chosen = None if rows is None else torch.tensor(rows, device="meta")
    segments = Segments(*torch.empty(2, 512, 32, device="meta"), (0, 400, 512), 0, chosen)
    y = torch.empty(512, heads.width, dtype=torch.bfloat16, device="meta")
    attention = RowAttention(heads, fused.parts())
    with planned_for(capability):
        o, saved = attention.forward(y, segments, 16)
        dy = attention.backward(torch.empty_like(o), o, saved, segments, 24)
    assert o.shape == (512 if rows is None else 2, 512)
    assert dy.shape == y.shape
    assert spare.has(o, 16)
    assert spare.has(dy, 24)


@pytest.mark.parametrize(
    ("capability", "pairs", "neighbours", "size", "wanted"),
    [
        ((9, 0), 32, False, 64, 0),  # the gradient's own kernels turn it back
        ((9, 0), 32, True, 64, 1),
        ((9, 0), 16, False, 64, 1),  # a part of the head
        ((9, 0), 40, False, 80, 1),
        ((9, 0), 0, False, 64, 0),
        ((8, 0), 32, False, 64, 1),
    ],
)
def test_gradients_are_turned_back_once(
    capability: tuple[int, int], pairs: int, neighbours: bool, size: int, wanted: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    heads = Heads(queries=8, keys=2, size=size, scale=0.1, neighbours=neighbours)
    segments = Segments(*torch.empty(2, 512, pairs, device="meta"), (0, 400, 512), 0)
    y = torch.empty(512, heads.width, dtype=torch.bfloat16, device="meta")
    attention, launched = RowAttention(heads, fused.parts()), list[str]()
    with planned_for(capability), noticing(lambda kernel, _: launched.append(kernel)):
        o, saved = attention.forward(y, segments)
        assert launched == ["turn"] * (pairs > 0)
        launched.clear()
        attention.backward(torch.empty_like(o), o, saved, segments)
    assert launched == ["turn"] * wanted
