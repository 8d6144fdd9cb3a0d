"""The block's Triton parts against their eager twins, on a CPU through Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from interpreted import errors_of

from luthier.kernels import fused, pointwise, spare
from luthier.model.heads import Attention, Heads, NormedHeads, RowAttention, Segments, TileAttention
from luthier.model.norm import Norm

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # the interpreter truncates to bfloat16 where a GPU rounds


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_part_equals_its_twin(dtype: str) -> None:
    errors = errors_of("fused_script.py", dtype)
    assert len(errors) == 277
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors  # a NaN is below nothing


def test_parts_that_take_nothing_to_lie_between_rows_refuse_others() -> None:
    x, apart = torch.empty(4, 8, device="meta"), torch.empty(4, 16, device="meta")[:, :8]
    weight, scale = x[0], x[:, :1]
    for rows in ([apart, x], [x, apart]):
        with pytest.raises(AssertionError):
            fused.add_rms_norm(*rows, weight, 1e-6)
        with pytest.raises(AssertionError):
            fused.rms_norm_backward(*rows, scale, weight, None)
        with pytest.raises(AssertionError):
            fused.layer_norm_backward(*rows, x[:, :2], weight, weight, x)
    with pytest.raises(AssertionError):
        fused.rms_norm(apart, weight, 1e-6)
    with pytest.raises(AssertionError):
        fused.layer_norm(apart, weight, weight, 1e-6)
    with pytest.raises(AssertionError):
        fused.activate_backward(apart, x, "silu", gated=False)


@pytest.mark.parametrize("chosen", [None, [2, 4, 10, 19, 36]])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(queries=4, keys=2, size=8, scale=0.3),
        Heads(queries=4, keys=1, size=8, scale=0.3, neighbours=True),
        Heads(queries=3, keys=3, size=16, scale=0.3, grouped=True),
    ],
    ids=["shared", "one key", "grouped"],
)
def test_whole_rows_attend_as_tiles_do(heads: Heads, chosen: list[int] | None) -> None:
    torch.manual_seed(0)
    y = torch.randn(37, heads.width)
    cos, sin = torch.randn(37, 3), torch.randn(37, 3)
    segments = Segments(cos, sin, (0, 5, 20, 37), 0, None if chosen is None else torch.tensor(chosen))
    found = []
    for attention in (kind(heads, pointwise.EAGER) for kind in (TileAttention, RowAttention)):
        o, saved = attention.forward(y.clone(), segments)
        found.append((o, attention.backward(torch.ones_like(o) * o, o, saved, segments)))
    for twin, made in zip(*found, strict=True):
        assert float((made - twin).norm() / twin.norm()) < 2e-6


@pytest.mark.parametrize("chosen", [None, [2, 4, 10, 19, 36]])
@pytest.mark.parametrize("kind", [TileAttention, RowAttention])
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@torch.no_grad()
def test_attention_leaves_room_behind_its_rows_and_changes_no_bit_for_it(
    grouped: bool, normed: bool, kind: Callable[..., Attention], chosen: list[int] | None
) -> None:
    heads = Heads(queries=4, keys=4 if grouped else 2, size=8, scale=0.3, grouped=grouped)
    attention = kind(heads, pointwise.EAGER)
    if normed:
        norms = (Norm(torch.nn.RMSNorm(8), 1e-5, 0, pointwise.EAGER) for _ in range(2))
        attention = NormedHeads(attention, heads, *norms)
    torch.manual_seed(0)
    y, cos, sin = torch.randn(37, heads.width), torch.randn(37, 3), torch.randn(37, 3)
    segments = Segments(cos, sin, (0, 5, 20, 37), 0, None if chosen is None else torch.tensor(chosen))
    found = []
    for room in (0, 24):
        o, saved = attention.forward(spare.empty(y, 37, heads.width, room).copy_(y), segments, room)
        dy = attention.backward(o.cos(), o, saved, segments, room and room + 8)
        assert spare.has(o, room)
        assert spare.has(dy, room and room + 8)
        found.append((o, dy))
    assert all(map(torch.equal, *found))


def test_no_kernel_is_compiled_anew_for_another_number_of_tokens_or_another_layer() -> None:
    """Triton compiles anew for numbers that are 1, or divisible by 16 where they were not, unless it is told not to."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from luthier.kernels import jit, varlen_jit

    kernels = [f for module in (jit, varlen_jit) for f in vars(module).values() if isinstance(f, JITFunction)]
    names = ("sum_head", "module", "tokens", "chunk", "chunks")
    changing = [p for kernel in kernels for p in kernel.params if p.name in names]
    assert len(changing) == 11
    assert all(p.do_not_specialize for p in changing)
