"""The contract of a kernel: forward and gradients of its plain twin in kernels/reference.py, at odd shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from luthier.errors import ModelError
from luthier.kernels import attention, loss, native, pointwise, reference
from luthier.kernels.pointwise import Activation, Pointwise

# bf16 keeps 8 bits: a value rounded once is off by 2⁻⁹ at most, and a few roundings in a row by a few times that. The
# tolerance is relative to the norm of the whole tensor, taken from the twin in fp32 on the same (bf16) inputs.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
PARTS: dict[str, Callable[[], Pointwise]] = {"eager": lambda: pointwise.EAGER, "native": native.parts}


@pytest.fixture(params=list(PARTS))
def parts(request: pytest.FixtureRequest) -> Pointwise:
    if request.param == "native" and native.compiler() is None:
        pytest.skip("no C++ compiler")
    return PARTS[request.param]()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor) -> Tensor:
    """The same values as a leaf in fp32, for the twin."""
    return x.detach().float().clone().requires_grad_()


def close(made: Tensor, wanted: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    assert made.shape == wanted.shape
    error = (made.float() - wanted.float()).norm() / wanted.float().norm()
    assert error <= TOLERANCE[dtype] * slack, error


@pytest.mark.parametrize("shape", [(1, 8), (5, 37), (130, 576)])
def test_rms_norm_and_its_backward(parts: Pointwise, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, update, weight, dy, residual = (random(*shape, dtype=dtype, seed=i) for i in range(5))
    total, y, scale = parts.add_rms_norm(x, update.clone(), weight[0], 1e-5)
    assert torch.equal(total, x + update)
    again = parts.rms_norm(total, weight[0], 1e-5)
    assert torch.equal(y, again[0])
    assert torch.equal(scale, again[1])
    twin_x = exact(total)
    twin = reference.rms_norm(twin_x, weight[0].float(), 1e-5)
    close(y, twin, dtype)
    (twin_dx,) = torch.autograd.grad(twin, twin_x, dy.float())
    dx, n = parts.rms_norm_backward(dy.clone(), total, scale, weight[0], residual)
    close(dx, twin_dx + residual.float(), dtype)
    close(parts.rms_norm_backward(dy.clone(), total, scale, weight[0], None)[0], twin_dx, dtype)
    close(n, twin, dtype)


@pytest.mark.parametrize("shape", [(1, 8), (5, 37), (130, 576)])
def test_layer_norm_and_its_backward(parts: Pointwise, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight, bias, dy, residual = (random(*shape, dtype=dtype, seed=i) for i in range(5))
    x += 3  # a mean that is not taken away would show
    y, moments = parts.layer_norm(x, weight[0], bias[0], 1e-5)
    twin_x = exact(x)
    twin = reference.layer_norm(twin_x, weight[0].float(), bias[0].float(), 1e-5)
    close(y, twin, dtype)
    (twin_dx,) = torch.autograd.grad(twin, twin_x, dy.float())
    dx, n = parts.layer_norm_backward(dy.clone(), x, moments, weight[0], bias[0], residual)
    close(dx, twin_dx + residual.float(), dtype)
    close(n, twin, dtype)


def test_a_norm_s_weight_that_is_finer_than_its_input_is_rounded_once(parts: Pointwise) -> None:
    x, dy = (random(9, 64, dtype=torch.bfloat16, seed=i) for i in range(2))
    weight, bias = (random(64, dtype=torch.float32, seed=i) for i in (2, 3))
    y, scale = parts.rms_norm(x, weight, 1e-5)
    z, moments = parts.layer_norm(x, weight, bias, 1e-5)
    found = (
        (y, parts.rms_norm_backward(dy.clone(), x, scale, weight, x)[1]),
        (z, parts.layer_norm_backward(dy.clone(), x, moments, weight, bias, x)[1]),
    )
    twins = reference.rms_norm(x.float(), weight, 1e-5), reference.layer_norm(x.float(), weight, bias, 1e-5)
    for made, twin in zip(found, twins, strict=True):
        for one in made:
            differ = (one != twin.bfloat16()).float().mean()
            assert one.dtype == torch.bfloat16
            assert differ < 0.01  # but for ties


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("groups", "repeats", "size", "still"), [(1, 1, 2, 0), (2, 3, 10, 3), (3, 3, 64, 64)])
def test_rotation_and_its_backward(
    parts: Pointwise, dtype: torch.dtype, groups: int, repeats: int, size: int, still: int, neighbours: bool
) -> None:
    """Of a head `size` features are turned and `still` are not."""
    turned, size, how = size, size + still, (0.3, neighbours)
    rows = random(7, groups * repeats * size + 5, dtype=dtype)
    x = rows[:, 5:].view(7, groups, repeats, size)  # a part of a wider row, as q is of q|k|v
    angle = random(7, turned // 2, dtype=torch.float32, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    dy = random(groups, 7, repeats, size, dtype=dtype, seed=2)
    twin_x = exact(x)
    twin = reference.rotate(twin_x, cos.float(), sin.float(), *how)
    close(parts.rotate(x, cos, sin, *how), twin, dtype)
    (twin_dx,) = torch.autograd.grad(twin, twin_x, dy.float())
    wide = torch.zeros_like(rows)
    parts.unrotate(dy, cos, sin, wide[:, 5:].view(7, groups, repeats, size), *how)
    close(wide[:, 5:].view(7, groups, repeats, size), twin_dx, dtype)
    assert not wide[:, :5].any()


@pytest.mark.parametrize("shape", [(1, 2), (5, 74), (130, 3072)])
@pytest.mark.parametrize("act", get_args(Activation))
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_their_backward(
    parts: Pointwise, dtype: torch.dtype, shape: tuple[int, int], act: Activation, gated: bool
) -> None:
    x = 3 * random(*shape, dtype=dtype)
    dh = random(shape[0], shape[1] // (2 if gated else 1), dtype=dtype, seed=1)
    twin_x = exact(x)
    twin = reference.activate(twin_x, act, gated)
    close(parts.activate(x, act, gated), twin, dtype)
    (twin_dx,) = torch.autograd.grad(twin, twin_x, dh.float())
    dx, h = parts.activate_backward(dh.clone(), x.clone(), act, gated)
    close(dx, twin_dx, dtype)
    close(h, twin, dtype)
    dinner, dA = random(shape[0], 16, dtype=dtype, seed=2), random(5, dh.shape[1], dtype=dtype)
    assert torch.equal(parts.activate_backward_dA(dh.clone(), x, act, gated, dinner, dA), dx)
    close(dA, dinner[:, :5].float().t() @ twin, dtype)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 9), (128, 300)])
def test_tile_softmax_and_its_backward(parts: Pointwise, dtype: torch.dtype, queries: int, keys: int) -> None:
    scores, dp = random(2, queries, 3, keys, dtype=dtype), random(2, queries, 3, keys, dtype=dtype, seed=1)
    seen = torch.arange(keys - queries + 1, keys + 1)
    twin_x = exact(scores * 4)
    twin = reference.softmax(twin_x, seen)
    p = parts.softmax((scores * 4).clone(), seen)
    close(p, twin, dtype)
    assert not p[:, 0, :, int(seen[0]) :].any()
    (twin_dx,) = torch.autograd.grad(twin, twin_x, dp.float())
    flat = (2, queries * 3, keys)
    delta = (dp.float() * p.float()).sum(-1).view(2, -1)
    made = parts.softmax_backward(dp.clone().view(flat), p.view(flat), delta)
    assert (made.float() - twin_dx.view(flat)).norm() <= TOLERANCE[dtype] * max(1.0, float(dp.float().norm()))


@pytest.mark.parametrize("bounds", [(0, 1), (0, 7, 8, 20), (0, 300), (0, 5, 135, 648, 700)])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
def test_segment_attention(dtype: torch.dtype, bounds: tuple[int, ...], heads: int, groups: int) -> None:
    tokens = bounds[-1]
    given = [random(tokens, n, 16, dtype=dtype, seed=i).requires_grad_() for i, n in enumerate((heads, groups, groups))]
    twins = [exact(x) for x in given]
    do = random(tokens, heads, 16, dtype=dtype, seed=3)
    made, twin = (f.segment_attention(*xs, bounds, 0.3) for f, xs in ((attention, given), (reference, twins)))
    close(made, twin, dtype)
    grads = torch.autograd.grad(made, given, do), torch.autograd.grad(twin, twins, do.float())
    for mine, theirs in zip(*grads, strict=True):
        # The gradient of a score is a difference of numbers of the size of do · v, so that is what rounding is of.
        assert (mine.float() - theirs).norm() <= TOLERANCE[dtype] * max(float(theirs.norm()), float(do.float().norm()))


def test_segment_attention_never_looks_outside_a_segment() -> None:
    q, k, v = (random(20, 2, 8, dtype=torch.float32, seed=i) for i in range(3))
    bounds = (0, 3, 11, 20)
    whole = attention.segment_attention(q, k, v, bounds, 0.3)
    for start, end in pairwise(bounds):
        alone = attention.segment_attention(q[start:end], k[start:end], v[start:end], (0, end - start), 0.3)
        torch.testing.assert_close(whole[start:end], alone, rtol=0, atol=1e-6)


def test_recomputed_probabilities_give_the_gradients_of_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (random(300, 2, 8, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention.segment_attention(q, k, v, (0, 290, 300), 0.3).sin().sum(), (q, k, v))

    kept = gradients()
    monkeypatch.setattr(attention, "KEEP", 0)
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(), strict=True))


def test_tiles_of_chosen_rows_give_those_rows_of_the_whole() -> None:
    bounds, chosen = (0, 7, 8, 300), torch.tensor([0, 6, 7, 9, 150, 151, 299])
    q = random(2, 300, 3, 8, dtype=torch.float32)
    k, v = (random(2, 300, 8, dtype=torch.float32, seed=i) for i in (1, 2))
    whole, _ = attention.attention_forward(q, k, v, attention.causal_tiles(bounds))
    some, _ = attention.attention_forward(q[:, chosen].contiguous(), k, v, attention.chosen_tiles(bounds, chosen))
    torch.testing.assert_close(some, whole[chosen], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "width", "words"), [(1, 8, 3), (5, 12, 1001), (300, 16, 97)])
def test_linear_cross_entropy(parts: Pointwise, dtype: torch.dtype, rows: int, width: int, words: int) -> None:
    hidden, head = random(rows, width, dtype=dtype).requires_grad_(), random(words, width, dtype=dtype, seed=1)
    targets = torch.randint(0, words, (rows,), generator=torch.Generator().manual_seed(2))
    twin_hidden = exact(hidden)
    made = loss.linear_cross_entropy(hidden, loss.Head(head), targets, parts)
    twin = reference.linear_cross_entropy(twin_hidden, loss.Head(head), targets)
    assert made.dtype == torch.float32
    close(made, twin, dtype)
    (mine,), (theirs,) = torch.autograd.grad(made * 3, hidden), torch.autograd.grad(twin * 3, twin_hidden)
    close(mine, theirs, dtype, slack=2)


def test_a_loss_of_no_rows_is_zero() -> None:
    empty = torch.zeros(0, 8, requires_grad=True)
    assert loss.linear_cross_entropy(empty, loss.Head(torch.ones(5, 8)), torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_lost(parts: Pointwise, dtype: torch.dtype, value: float) -> None:
    def spoilt(*shape: int) -> Tensor:
        x = random(*shape, dtype=dtype)
        x.view(-1)[1] = value
        return x

    def finite(*made: Any) -> bool:
        return all(bool(torch.isfinite(x).all()) for x in made)

    ones, scale = torch.ones(8, dtype=dtype), torch.ones(3, 1)
    assert not finite(parts.rms_norm(spoilt(3, 8), ones, 1e-5)[0])
    assert not finite(
        parts.rms_norm_backward(spoilt(3, 8), random(3, 8, dtype=dtype), scale, ones, ones.expand(3, 8).contiguous())[0]
    )
    cos = sin = ones[:4].expand(3, 4).contiguous()
    assert not finite(parts.rotate(spoilt(3, 1, 1, 8), cos, sin, 1.0, False))
    assert not finite(parts.layer_norm(spoilt(3, 8), ones, ones, 1e-5)[0])
    for act in get_args(Activation):
        assert not finite(parts.activate(spoilt(3, 16), act, True))
        assert not finite(parts.activate_backward(spoilt(3, 8), random(3, 16, dtype=dtype), act, True)[0])
    assert not finite(parts.softmax(spoilt(1, 3, 1, 8), torch.tensor([8, 8, 8])))
    assert not finite(
        loss.linear_cross_entropy(spoilt(3, 8), loss.Head(random(5, 8, dtype=dtype)), torch.tensor([0, 1, 2]), parts)
    )


def test_native_parts_use_several_threads_to_the_same_end() -> None:
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    x, threads = random(64, 96, dtype=torch.float32), torch.get_num_threads()
    alone = native.parts().activate(x, "silu", True)
    try:
        torch.set_num_threads(2)
        assert torch.equal(native.parts().activate(x, "silu", True), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
def test_a_driver_for_c_builds_what_loads(tmp_path: Path) -> None:
    """In a process of its own: one that has loaded the C++ library already would hide that it is not linked."""
    environment = {**os.environ, "CXX": "gcc", "LUTHIER_CACHE": str(tmp_path)}
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", "from luthier.kernels import native; native.parts()"], env=environment, check=True
    )
    subprocess.run([sys.executable, "-c", code, *map(str, tmp_path.glob("*.so"))], check=True)


def test_a_compiler_that_fails_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    native._library.cache_clear()
    with pytest.raises(ModelError, match=r"run\.kernels=eager"):
        native.parts()
    assert not list(tmp_path.glob("*.so"))
    native._library.cache_clear()
