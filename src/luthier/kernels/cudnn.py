"""Attention's forward pass by cuDNN, which has kernels of its own for Hopper and Blackwell; FlashAttention 2 has none.

The backward pass is not cuDNN's, but takes its sums: on Hopper cuDNN's would add up in any order (before 9.25 there is
no other way for packed rows), and a resumed run would not be the run that was stopped. The forward pass has one order.

Segments that are all as long are a batch, which torch can compute by cuDNN. Others go through NVIDIA's frontend
(nvidia-cudnn-frontend), where it is installed; a batch does then too, since torch cannot be told where to write. A plan
is made for each number and length of segments, which takes longer than a small model's step: where they are not a
batch, both are rounded up to powers of two, so that few plans come again and again.
"""

from __future__ import annotations

import warnings
from enum import IntEnum
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from luthier.allocator import out_of_memory
from luthier.kernels.ends import Ends
from luthier.kernels.sizes import power_of_2
from luthier.kernels.spare import empty

OLDEST = 91500  # of cuDNN: what comes with the oldest torch we take
LARGEST = {9: 256, 10: 128}  # head size by the first digit of the compute capability
ROUND = 128  # tokens: batches have a plan for each length, and only those of full rows come again and again


class Machine(NamedTuple):
    """What decides who computes attention."""

    major: int  # of the GPU's compute capability
    version: int  # of cuDNN, 91900 for 9.19.0; 0: none
    frontend: bool  # whether NVIDIA's frontend is installed


def machine(place: torch.device) -> Machine:
    """Of the GPU `place`."""
    return Machine(torch.cuda.get_device_capability(place)[0], *_installed())


@cache
def _installed() -> tuple[int, bool]:
    cudnn: Any = torch.backends.cudnn
    version = None if torch.version.hip else cudnn.version()  # MIOpen's, on AMD's GPUs
    return version or 0, _loads()


def _loads() -> bool:
    """Whether NVIDIA's frontend is there. Training does not need it, so that one that is broken stops nobody."""
    try:
        return hasattr(import_module("cudnn"), "pygraph")
    except ModuleNotFoundError:
        return False
    except Exception as error:
        warnings.warn(f"nvidia-cudnn-frontend is installed, but cannot be loaded: {error}", stacklevel=2)
        return False


def way(at: Machine, size: int, tokens: int, segments: int, longest: int) -> Literal["batch", "packed"] | None:
    """How cuDNN computes 16-bit attention of a head size over so many tokens in so many segments; None: it does not."""
    if at.version < OLDEST or size > LARGEST.get(at.major, 0) or size % 8:
        return None
    if segments * longest == tokens and -longest % ROUND <= 1:  # a row's last token may be left out: nothing follows it
        return "batch"
    return "packed" if at.frontend else None


def forward(q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, spare: int = 0) -> tuple[Tensor, Tensor] | None:
    """Causal attention inside each segment, where cuDNN computes it; None where it does not.

    Args: those of `varlen.forward`, for which `varlen.takes` holds.

    Returns [T, Hq, D], with `spare` more values behind each token where the frontend computed it; and the fp32
    logarithms [Hq, T] of the sums of exponentials. A plan of memory traces flash attention instead: it leaves the same,
    and what cuDNN takes meanwhile is less than 1 MiB, besides a batch's logarithms once more.
    """
    if not q.is_cuda or any(x.stride()[1:] != (q.shape[-1], 1) for x in (q, k, v)):
        return None
    at = machine(q.device)
    chosen = way(at, q.shape[-1], len(q), len(ends), ends.longest)
    if chosen is None:
        return None
    shape = _shape(q, k, v, ends, scale, spare, packed=chosen == "packed")
    found = plan(shape) if at.frontend else None
    if found is not None:
        return _computed(q, k, v, ends, shape, *found)
    return _batch(q, k, v, len(ends), scale) if chosen == "batch" else None


def _batch(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float) -> tuple[Tensor, Tensor]:
    """By torch."""
    q, k, v = (x.view(segments, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    o, sums = found[:2]
    return o.transpose(1, 2).flatten(0, 1), _by_heads(sums.reshape(q.shape[:3]))


def _by_heads(sums: Tensor) -> Tensor:
    """[segments, Hq, longest], as cuDNN writes those of a batch, as [Hq, T]."""
    return sums.transpose(0, 1).flatten(1)


# By the frontend. Dimensions are those of a batch [segments, heads, longest, D]; where each segment of packed rows
# begins is told in values from the beginning of the tensor.


class _Shape(NamedTuple):
    """What a plan is made for."""

    place: torch.device
    dtype: torch.dtype
    packed: bool  # each segment has a place and a length of its own; else each is as long as the longest
    segments: int
    longest: int
    heads: int
    groups: int
    size: int
    strides: tuple[int, ...]  # values from token to token, of queries, keys, values and what comes out
    scale: float


class _Part(IntEnum):
    """The tensors of a plan; those from LENGTHS on where rows are packed."""

    Q, K, V, OUT, SUMS, LENGTHS, Q_STARTS, K_STARTS, V_STARTS, OUT_STARTS, SUMS_STARTS = range(1, 12)


def _shape(q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, spare: int, *, packed: bool) -> _Shape:
    segments, longest, (_, heads, size) = len(ends), ends.longest, q.shape
    if packed:
        segments, longest = max(power_of_2(segments), 2), max(power_of_2(longest), ROUND)
    strides = (q.stride(0), k.stride(0), v.stride(0), heads * size + spare)
    return _Shape(q.device, q.dtype, packed, segments, longest, heads, k.shape[1], size, strides, scale)


def _computed(
    q: Tensor, k: Tensor, v: Tensor, ends: Ends, shape: _Shape, graph: Any, workspace: int
) -> tuple[Tensor, Tensor]:
    tokens, heads, size = q.shape
    width = heads * size
    o = empty(q, tokens, width, shape.strides[-1] - width).view(q.shape)
    sums = q.new_empty(tokens * heads, dtype=torch.float32)
    parts = [q, k, v, o, sums]
    if shape.packed:
        parts += ends.made((shape.segments, heads, *shape.strides), lambda: _places(ends.edges, shape))
    _run(graph, dict(zip(_Part, parts, strict=False)), q.new_empty(workspace, dtype=torch.uint8))
    return o, sums.view(tokens, heads).t() if shape.packed else _by_heads(sums.view(len(ends), heads, -1))


def _places(edges: Tensor, shape: _Shape) -> list[Tensor]:
    """Tokens of each segment, and where each begins in each tensor with tokens."""
    # Those beyond ours are empty. One edge more than there is, as cuDNN reads numbers that begin at 16 bytes.
    edges = torch.cat([edges, edges[-1:].expand(shape.segments + 2 - len(edges))])
    return [edges.diff(), *(edges * _strides((*shape.strides, shape.heads), shape.place))]


@cache
def _strides(strides: tuple[int, ...], place: torch.device) -> Tensor:
    """int64 [n, 1], which a recording cannot bring there."""
    return torch.tensor(strides, dtype=torch.int64).to(place)[:, None]


@cache
def plan(shape: _Shape) -> tuple[Any, int] | None:
    """cuDNN's plan, and the bytes that it needs meanwhile; None where cuDNN has none."""
    try:
        return _planned(shape)
    except Exception as error:  # its own kinds, and RuntimeError
        if out_of_memory(error):  # it may have one later
            raise torch.OutOfMemoryError(str(error)) from error
        warnings.warn(f"cuDNN has no attention for {shape}, torch computes it: {error}", stacklevel=2)
        return None


def _planned(shape: _Shape) -> tuple[Any, int]:
    cudnn: Any = import_module("cudnn")
    types = cudnn.data_type
    kind = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}[shape.dtype]
    inside = {"intermediate_data_type": types.FLOAT, "compute_data_type": types.FLOAT}
    graph = cudnn.pygraph(io_data_type=kind, handle=_handle(shape.place), **inside)
    lengths, starts = _told(graph, types, shape) if shape.packed else ({}, {})

    def read(part: _Part) -> Any:
        options = {"data_type": kind, "ragged_offset": starts.get(part)}
        dim, stride = _laid_out(shape, part)
        return graph.tensor(name=part.name, uid=int(part), dim=dim, stride=stride, **options)

    options = {"generate_stats": True, "attn_scale": shape.scale, "use_causal_mask": True, **lengths}
    out, sums = graph.sdpa(name="attention", q=read(_Part.Q), k=read(_Part.K), v=read(_Part.V), **options)
    for part, tensor in ((_Part.OUT, out), (_Part.SUMS, sums)):
        dim, stride = _laid_out(shape, part)
        tensor.set_uid(int(part)).set_output(True).set_dim(dim).set_stride(stride).set_ragged_offset(starts.get(part))
    sums.set_data_type(types.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, graph.get_workspace_size()


def _told(graph: Any, types: Any, shape: _Shape) -> tuple[dict[str, Any], dict[_Part, Any]]:
    """Of packed rows: how attention is told the lengths of segments, and where they begin in each tensor."""

    def numbers(part: _Part, count: int, kind: Any) -> Any:
        return graph.tensor(name=part.name, uid=int(part), dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)

    lengths = numbers(_Part.LENGTHS, shape.segments, types.INT32)
    ours = (_Part.Q, _Part.K, _Part.V, _Part.OUT, _Part.SUMS)
    starts = {part: numbers(_Part[f"{part.name}_STARTS"], shape.segments + 1, types.INT64) for part in ours}
    return {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}, starts


def _laid_out(shape: _Shape, part: _Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A tensor's dimensions, and for each of them how many values lie from one to the next."""
    _, _, packed, segments, longest, heads, groups, size, *_ = shape
    if part == _Part.SUMS:  # of a batch, cuDNN before 9.26 writes them in no other order
        strides = (longest * heads, 1, heads, 1) if packed else (heads * longest, longest, 1, 1)
        return (segments, heads, longest, 1), strides
    stride = dict(zip(_Part, shape.strides, strict=False))[part]
    count = groups if part in (_Part.K, _Part.V) else heads
    return (segments, count, longest, size), (longest * stride, size, stride, 1)


@cache
def _handle(place: torch.device) -> Any:
    with torch.cuda.device(place):
        return import_module("cudnn").create_handle()


def _run(graph: Any, parts: dict[_Part, Tensor], room: Tensor) -> None:
    """In the current stream, so that it can be recorded."""
    handle, stream = _handle(room.device), torch.cuda.current_stream(room.device).cuda_stream
    import_module("cudnn").set_stream(handle=handle, stream=stream)
    graph.execute({int(part): tensor.data_ptr() for part, tensor in parts.items()}, room.data_ptr(), handle=handle)
