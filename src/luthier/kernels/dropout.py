"""Dropout masks that depend on what is dropped, never on how a step is cut into micro-batches or processes."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 2⁶⁴/φ and splitmix64's two, signed
_LANES = 4  # 16-bit draws in a 64-bit hash


def dropout_mask(
    seed: int,
    step: int,
    samples: Tensor,
    positions: Tensor,
    module: int,
    features: int,
    p: float,
    dtype: torch.dtype,
) -> Tensor:
    """A [T, features] mask of 0 (with probability `p`, to 1/65536) and 1/(1-p).

    `samples` and `positions` are int64 [T]. Each value is a function of (seed, step, sample, module, position, feature)
    alone: a counter-based generator, here splitmix64's finaliser (Steele, Lea and Flood, 2014) over a key per token and
    four features a hash.
    """
    tokens = _mix(_mix(samples + mask_key(seed, step, module)) + positions)
    blocks = torch.arange(-(-features // _LANES), device=samples.device) * _MULTIPLIERS[0]
    draws = _mix(tokens[:, None] + blocks).view(torch.int16)[:, :features]
    kept = draws >= round(p * 65536) - 32768
    return kept.to(dtype).mul_(1 / (1 - p))


def mask_key(*parts: int) -> int:
    """What the masks of a (seed, step, module) have in common: an int64. Of (seed, step) alone it is
    what `kernels/drop.py` makes that from."""
    key = 0
    for part in parts:
        x = (key + part + _MULTIPLIERS[0]) % 2**64
        x = ((x ^ (x >> 30)) * _MULTIPLIERS[1]) % 2**64
        x = ((x ^ (x >> 27)) * _MULTIPLIERS[2]) % 2**64
        key = x ^ (x >> 31)
    return (key + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    x = x + _MULTIPLIERS[0]
    x = (x ^ _shift(x, 30)) * _MULTIPLIERS[1]
    x = (x ^ _shift(x, 27)) * _MULTIPLIERS[2]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
