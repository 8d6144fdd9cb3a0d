"""Attention's forward pass by cuDNN, which has kernels of its own for Hopper and Blackwell; FlashAttention 2 has none.

The backward pass is not cuDNN's, but takes its sums: on Hopper cuDNN's would add up in any order (before 9.25 there is
no other way for packed rows), and a resumed run would not be the run that was stopped. The forward pass has one order.

Segments that are all as long are a batch, which torch computes by cuDNN itself. Others go through NVIDIA's frontend
(nvidia-cudnn-frontend), where it is installed. It makes a plan for each number and length of segments, which takes
longer than a small model's step: both are rounded up to powers of two, so that few plans come again and again.
"""

from __future__ import annotations

import warnings
from enum import IntEnum
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

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

    Returns [T, Hq, D], with `spare` more values behind each token where rows are packed; and the fp32 logarithms
    [Hq, T] of the sums of exponentials, which lie as it wrote them. A plan traces flash attention instead: it leaves
    the same, and what cuDNN takes meanwhile is less than 1 MiB.
    """
    if not q.is_cuda or any(x.stride()[1:] != (q.shape[-1], 1) for x in (q, k, v)):
        return None
    chosen = way(machine(q.device), q.shape[-1], len(q), len(ends), ends.longest)
    if chosen == "batch":
        return _batch(q, k, v, len(ends), scale)
    return _packed(q, k, v, ends, scale, spare) if chosen else None


def _batch(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    q, k, v = (x.view(segments, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    o, sums = found[:2]
    return o.transpose(1, 2).flatten(0, 1), sums.reshape(segments, heads, -1).transpose(0, 1).reshape(heads, tokens)


# Packed rows, by the frontend. Dimensions are those of a batch [segments, heads, longest, D]; where each segment begins
# is told in values from the beginning of the tensor.


class _Shape(NamedTuple):
    """What a plan is made for."""

    place: torch.device
    dtype: torch.dtype
    segments: int
    longest: int
    heads: int
    groups: int
    size: int
    strides: tuple[int, ...]  # values from token to token, of queries, keys, values and what comes out
    scale: float


class _Part(IntEnum):
    """The tensors of a plan."""

    Q, K, V, OUT, SUMS, LENGTHS, Q_STARTS, K_STARTS, V_STARTS, OUT_STARTS, SUM_STARTS = range(1, 12)


def _packed(q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, spare: int) -> tuple[Tensor, Tensor] | None:
    tokens, heads, size = q.shape
    segments, longest = max(power_of_2(len(ends)), 2), max(power_of_2(ends.longest), ROUND)
    strides = (q.stride(0), k.stride(0), v.stride(0), heads * size + spare)
    shape = _Shape(q.device, q.dtype, segments, longest, heads, k.shape[1], size, strides, scale)
    found = plan(shape)
    if found is None:
        return None
    graph, workspace = found
    o = empty(q, tokens, heads * size, spare).view(q.shape)
    sums = q.new_empty(tokens, heads, dtype=torch.float32)
    places = ends.made((segments, heads, *strides), lambda: _places(ends.edges, shape))
    _run(graph, dict(zip(_Part, (q, k, v, o, sums, *places), strict=True)), q.new_empty(workspace, dtype=torch.uint8))
    return o, sums.t()


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
    except torch.OutOfMemoryError:  # it may have one later
        raise
    except Exception as error:  # its own kinds, and RuntimeError
        warnings.warn(f"cuDNN has no attention for {shape}: {error}", stacklevel=2)
        return None


def _planned(shape: _Shape) -> tuple[Any, int]:
    cudnn: Any = import_module("cudnn")
    types = cudnn.data_type
    kind = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}[shape.dtype]
    options = {"intermediate_data_type": types.FLOAT, "compute_data_type": types.FLOAT}
    graph = cudnn.pygraph(io_data_type=kind, handle=_handle(shape.place), **options)

    def numbers(part: _Part, count: int, kind: Any) -> Any:
        return graph.tensor(name=part.name, uid=int(part), dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)

    starts = {part: numbers(part, shape.segments + 1, types.INT64) for part in list(_Part)[_Part.LENGTHS :]}
    lengths = numbers(_Part.LENGTHS, shape.segments, types.INT32)
    read = {}
    for part, heads, stride in zip(_Part, (shape.heads, shape.groups, shape.groups), shape.strides, strict=False):
        dim, strides = _laid_out(shape, heads, stride)
        read[part] = graph.tensor(name=part.name, uid=int(part), dim=dim, stride=strides, data_type=kind)
        read[part].set_ragged_offset(starts[_Part[f"{part.name}_STARTS"]])
    out, sums = graph.sdpa(
        name="attention",
        q=read[_Part.Q],
        k=read[_Part.K],
        v=read[_Part.V],
        generate_stats=True,
        attn_scale=shape.scale,
        use_causal_mask=True,
        use_padding_mask=True,
        seq_len_q=lengths,
        seq_len_kv=lengths,
    )
    dim, strides = _laid_out(shape, shape.heads, shape.strides[-1])
    out.set_uid(int(_Part.OUT)).set_output(True).set_dim(dim).set_stride(strides)
    out.set_ragged_offset(starts[_Part.OUT_STARTS])
    sums.set_uid(int(_Part.SUMS)).set_output(True).set_dim((*dim[:3], 1)).set_data_type(types.FLOAT)
    sums.set_stride((shape.longest * shape.heads, 1, shape.heads, 1)).set_ragged_offset(starts[_Part.SUM_STARTS])
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, graph.get_workspace_size()


def _laid_out(shape: _Shape, heads: int, stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dimensions and strides of [segments, heads, longest, D], with `stride` from token to token."""
    return (shape.segments, heads, shape.longest, shape.size), (shape.longest * stride, shape.size, stride, 1)


@cache
def _handle(place: torch.device) -> Any:
    with torch.cuda.device(place):
        return import_module("cudnn").create_handle()


def _run(graph: Any, parts: dict[_Part, Tensor], room: Tensor) -> None:
    """In the current stream, so that it can be recorded."""
    handle, stream = _handle(room.device), torch.cuda.current_stream(room.device).cuda_stream
    import_module("cudnn").set_stream(handle=handle, stream=stream)
    graph.execute({int(part): tensor.data_ptr() for part, tensor in parts.items()}, room.data_ptr(), handle=handle)
