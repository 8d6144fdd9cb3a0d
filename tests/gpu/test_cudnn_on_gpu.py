"""Attention of packed rows on a GPU: forward by cuDNN, packed and as a batch, or by ours, and back by ours or by flash
attention: as near to fp32 as flash attention itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels import cudnn, fused, reference, spare, varlen, varlen_backward, varlen_forward
from luthier.kernels.ends import Ends
from luthier.kernels.varlen import varlen_attention
from luthier.model.heads import Heads, RowAttention, Segments

pytestmark = pytest.mark.gpu
LENGTHS = {
    "odd": (1, 7, 129, 64, 33, 300, 1),
    "many": (5, 1, 40, 17, 2, 90, 33) * 11,
    "one": (777,),
    "batch": (256, 256, 256),
    "trimmed": (255, 255, 255),
    # Of heads of 128 values, ours goes forward as far as `varlen_forward.SHORT`, and back whatever the length.
    "long": (1100, 7, 300),
    "long batch": (1152, 1152),
}
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def cudnns() -> None:
    at = cudnn.machine(torch.device("cuda", 0))
    if at.version < cudnn.OLDEST or at.major not in cudnn.LARGEST:
        pytest.skip(f"cuDNN's attention is not for {at}")


def made(lengths: Sequence[int], heads: int, groups: int, size: int, dtype: torch.dtype) -> Parts:
    """q, k and v side by side, as our block's product leaves them, and the gradient of what comes out."""
    torch.manual_seed(heads * size)
    y = torch.randn(sum(lengths), (heads + 2 * groups) * size, device="cuda", dtype=dtype)
    q, k, v = torch.split(y.view(len(y), -1, size), [heads, groups, groups], dim=1)
    return q, k, v, torch.randn(sum(lengths), heads, size, device="cuda", dtype=dtype)


def ends(lengths: Sequence[int]) -> Ends:
    return Ends(torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device="cuda"), max(lengths))


def flash(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lengths: Sequence[int], scale: float) -> list[Tensor]:
    edges, longest = ends(lengths).edges, max(lengths)
    places = (edges, edges, longest, longest, 0.0, True)
    o, sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(q, k, v, *places, False, scale=scale)
    found = torch.ops.aten._flash_attention_backward(do, q, k, v, o, sums, *places, seed, offset, scale=scale)
    return [o, *found, sums]


def ours(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lengths: Sequence[int], scale: float) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = varlen_attention(*leaves, ends(lengths), scale)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lengths: Sequence[int], scale: float) -> list[Tensor]:
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    o = reference.segment_attention(*leaves, (0, *accumulate(lengths)), scale)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.float())]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def check_whose(kind: str, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
    """Of long rows with large heads the forward pass must be cuDNN's, or flash attention's, and not ours."""
    if "long" in kind and q.shape[2] == 128:
        assert not varlen_forward.takes(q, k, v, max(lengths))


@pytest.mark.usefixtures("cudnns")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1), (71, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("kind", LENGTHS)
def test_cudnns_attention_is_as_near_to_fp32_as_flash_attention(
    kind: str, heads: tuple[int, int], size: int, dtype: torch.dtype
) -> None:
    lengths, scale = LENGTHS[kind], 0.7 * size**-0.5
    at = cudnn.machine(torch.device("cuda", 0))
    way = cudnn.way(at, size, sum(lengths), len(lengths), max(lengths))
    if way is None:
        pytest.skip("cuDNN does not compute these here")
    parts = made(lengths, *heads, size, dtype)
    check_whose(kind, *parts[:3], lengths)
    wanted, theirs = exact(*parts, lengths, scale), flash(*parts, lengths, scale)
    found = cudnn.forward(*parts[:3], ends(lengths), scale) or pytest.fail("nothing was computed")
    for o, sums in (found, varlen.forward(*parts[:3], ends(lengths), scale)):
        assert torch.allclose(sums, theirs[4], atol=1e-3, rtol=1e-4)
        assert error(o, wanted[0]) <= 1.5 * error(theirs[0], wanted[0])
    for mine, other, right in zip(ours(*parts, lengths, scale), theirs, wanted, strict=False):
        assert error(mine, right) <= 1.5 * error(other, right)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["odd", "batch", "long", "long batch"])
def test_the_same_rows_give_the_same_bits(kind: str, size: int) -> None:
    from luthier.train.reproducible import reproducible

    lengths = [4 * n for n in LENGTHS[kind]]
    parts = made(lengths, 8, 2, size, torch.bfloat16)
    check_whose(kind, *parts[:3], lengths)
    with reproducible("cuda"):
        first, second = (ours(*parts, lengths, 0.1) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("size", [64, 128])
def test_heads_that_share_keys_find_the_same_together_and_apart(size: int) -> None:
    lengths = LENGTHS["odd"]
    q, k, v, do = made(lengths, 8, 2, size, torch.bfloat16)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("its gradient is flash attention's on this GPU")
    assert varlen_backward.takes(q, k, v, max(lengths)), "does Triton start no kernel here?"
    told = ends(lengths)
    o, sums = varlen.forward(q, k, v, told, 0.1)
    how, found = varlen_backward.how(*q.shape[:2], *k.shape[1:]), []
    for parts in (None, torch.empty(2, *q.shape, device="cuda")):
        into = [torch.empty_like(do), *torch.empty(2, *k.shape, dtype=k.dtype, device="cuda")]
        tables = [varlen_backward.places(told, len(q), blocks) for blocks in (how.queries.rows, how.keys.keys)]
        rest = (told.longest, 0.1, None, None, torch.empty_like(sums), parts, *into, how)
        varlen_backward.launched(do, o, sums, q, k, v, *tables, *rest)
        found.append(into)
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        assert error(one, other.float()) < 4e-3  # each is rounded to 8 bits once


@pytest.mark.parametrize("kind", ["odd", "batch", "long", "long batch"])
@torch.no_grad()
def test_room_behind_the_rows_changes_no_bit(kind: str) -> None:
    from luthier.train.reproducible import reproducible

    lengths, heads = LENGTHS[kind], Heads(queries=8, keys=2, size=128, scale=0.1)
    cos = torch.ones(sum(lengths), 0, device="cuda")
    segments, attention = Segments(cos, cos, (0, *accumulate(lengths)), 0), RowAttention(heads, fused.parts())
    y = torch.randn(len(cos), heads.width, device="cuda", dtype=torch.bfloat16)
    check_whose(kind, *heads.split(y), lengths)
    found = []
    with reproducible("cuda"):
        for room in (0, 32):
            o, saved = attention.forward(spare.empty(y, len(y), heads.width, room).copy_(y), segments, room)
            found.append((o, attention.backward(o.cos(), o, saved, segments, 2 * room)))
            assert spare.has(found[-1][0], room)
            assert spare.has(found[-1][1], 2 * room)
    assert all(map(torch.equal, *found))


def test_without_a_compiler_flash_attention_computes_the_gradient(tmp_path: Path) -> None:
    script = """
import torch
from test_cudnn_on_gpu import LENGTHS, made, ours
found = ours(*made(LENGTHS["odd"], 8, 2, 128, torch.bfloat16), LENGTHS["odd"], 0.1)
print(all(bool(x.isfinite().all()) for x in found))
"""
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    modules = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": modules}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert done.stderr.count("flash attention computes the gradients") == hopper


@pytest.mark.usefixtures("cudnns")
@pytest.mark.parametrize("kind", ["odd", "batch"])
def test_a_recorded_pass_reads_new_rows_and_new_lengths(kind: str) -> None:
    lengths = LENGTHS[kind]
    q, k, v, _ = made(lengths, 8, 2, 64, torch.bfloat16)
    edges, longest = ends(lengths).edges, max(lengths)
    if kind == "odd" and not cudnn.machine(q.device).frontend:
        pytest.skip("the frontend is not installed")
    assert cudnn.forward(q, k, v, Ends(edges, longest), 0.1) is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, sums = cudnn.forward(q, k, v, Ends(edges, longest), 0.1) or pytest.fail("nothing was computed")
    others = lengths[::-1]
    q.normal_()
    edges.copy_(ends(others).edges)
    graph.replay()
    wanted, *_, wanted_sums = flash(q, k, v, torch.zeros_like(o), others, 0.1)
    assert error(o, wanted.float()) < 1e-2
    assert torch.allclose(sums, wanted_sums, atol=1e-3, rtol=1e-4)


@pytest.mark.usefixtures("cudnns")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["batch", "trimmed", "long batch"])
def test_a_recorded_batch_writes_its_rows_and_nothing_behind_them(kind: str, size: int) -> None:
    """By a plan of the frontend's where that is installed, and it must be that: torch leaves no room behind rows."""
    lengths = LENGTHS[kind]
    q, k, v, do = parts = made(lengths, 8, 2, size, torch.bfloat16)
    told, room = ends(lengths), 32 if cudnn.machine(q.device).frontend else 0
    assert cudnn.forward(q, k, v, told, 0.1, room) is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, sums = cudnn.forward(q, k, v, told, 0.1, room) or pytest.fail("nothing was computed")
    whole = spare.whole(o.flatten(1), room)
    assert sums.untyped_storage().nbytes() == 4 * 8 * len(q)  # and nothing else is left, as a plan of memory has it
    for x in (whole, sums):
        x.fill_(torch.nan)
    graph.replay()
    assert whole[:, 8 * size :].isnan().all()
    wanted, wanted_sums = cudnn._batch(q, k, v, len(lengths), 0.1)
    assert error(o, wanted.float()) < 5e-3  # each is rounded to 8 bits once
    assert torch.allclose(sums, wanted_sums, atol=1e-3, rtol=1e-4)
    into = [torch.empty_like(x) for x in (q, k, v)]
    varlen.backward(do, o, sums, q, k, v, told, 0.1, into)
    theirs, right = flash(*parts, lengths, 0.1)[1:4], exact(*parts, lengths, 0.1)[1:]
    for mine, other, one in zip(into, theirs, right, strict=True):
        assert error(mine, one) <= 1.5 * error(other, one)


@pytest.mark.usefixtures("cudnns")
def test_a_batch_that_the_frontend_has_no_plan_for_is_torchs(tmp_path: Path) -> None:
    """It is said once, and flash attention is not asked."""
    script = """
import torch
from test_cudnn_on_gpu import LENGTHS, ends, made
from luthier.kernels import cudnn
lengths = LENGTHS["batch"]
q, k, v, _ = made(lengths, 8, 2, 128, torch.bfloat16)
found = [cudnn.forward(q, k, v, ends(lengths), 0.1, 32) for _ in range(2)]
wanted = cudnn._batch(q, k, v, len(lengths), 0.1)
print(cudnn.machine(q.device).frontend, all(torch.equal(*pair) for one in found for pair in zip(one, wanted)))
"""
    (tmp_path / "cudnn.py").write_text("pygraph = None\n")
    modules = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": modules}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True True\n"
    assert done.stderr.count("cuDNN has no attention") == 1


@pytest.mark.usefixtures("cudnns")
@pytest.mark.parametrize(
    ("packed", "segments", "longest"),
    [
        (True, 32, 1024),
        (True, 4, 2048),
        (True, 512, 128),
        (True, 2, 32768),
        (False, 4, 2047),
        (False, 64, 128),
        (False, 1, 32768),
    ],
)
def test_a_plan_needs_next_to_nothing_meanwhile(packed: bool, segments: int, longest: int) -> None:
    place = torch.device("cuda", 0)
    if not cudnn.machine(place).frontend:
        pytest.skip("the frontend is not installed")
    strides = (48 * 128,) * 4
    shape = cudnn._Shape(place, torch.bfloat16, packed, segments, longest, 32, 8, 128, strides, 0.1)
    _, workspace = cudnn.plan(shape) or pytest.fail("there is no plan")
    assert workspace < 2**20


@pytest.mark.usefixtures("cudnns")
def test_what_it_costs_is_printed(capsys: Any) -> None:
    """In a process of its own: `cudnn_costs.py`."""
    script = Path(__file__).with_name("cudnn_costs.py")
    told = subprocess.run([sys.executable, "-u", str(script)], capture_output=True, text=True, timeout=300)
    with capsys.disabled():
        print("\n" + told.stdout + told.stderr[-3000:])
    assert told.returncode == 0
