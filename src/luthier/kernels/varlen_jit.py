"""The Triton kernels of `varlen_backward.py`, which says what they compute and allocates what they write.

Blocks are of `ROWS` queries and `KEYS` keys of one segment. Products are of the tensors' dtype, sums in fp32. `WIDE` is
the head size, or the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(x, first, step, count, at, SIZE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore
    """The tokens `first + at` below `count`, as rows."""
    place = tl.arange(0, WIDE)
    inside = (first + at < count)[:, None] & (place < SIZE)[None, :]
    return tl.load(x + (first + at)[:, None] * step + place[None, :], inside, 0.0)


@triton.jit
def _write(x, values, first, step, count, at, SIZE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore
    place = tl.arange(0, WIDE)
    inside = (first + at < count)[:, None] & (place < SIZE)[None, :]
    tl.store(x + (first + at)[:, None] * step + place[None, :], values.to(x.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["sum_head"])
def queries(  # type: ignore
    do, o, q, k, v, sums, edges, dq, inner, scale, sum_head, sum_step,
    q_step, k_step, v_step, do_step, o_step, dy_step,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and `inner`, the products of rows of `do` and `o`."""
    head, start = tl.program_id(0), tl.load(edges + tl.program_id(1)).to(tl.int64)
    count = (tl.load(edges + tl.program_id(1) + 1) - start).to(tl.int32)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * ROWS  # those with most keys before the others
    if first < count:
        rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
        k += start * k_step + head // GROUP * SIZE
        v += start * v_step + head // GROUP * SIZE
        query = _read(q + start * q_step + head * SIZE, first, q_step, count, rows, SIZE, WIDE)
        above = _read(do + start * do_step + head * SIZE, first, do_step, count, rows, SIZE, WIDE)
        below = _read(o + start * o_step + head * SIZE, first, o_step, count, rows, SIZE, WIDE)
        level = tl.sum(above.to(tl.float32) * below.to(tl.float32), 1)
        at, inside = head * sum_head + (start + first + rows) * sum_step, first + rows < count
        tl.store(inner + at, level, inside)
        total = tl.load(sums + at, inside, 0.0) * 1.4426950408889634
        found = tl.zeros([ROWS, WIDE], tl.float32)
        for low in tl.range(0, first + ROWS, KEYS):
            key = _read(k, low, k_step, count, keys, SIZE, WIDE)
            value = _read(v, low, v_step, count, keys, SIZE, WIDE)
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
            share = tl.exp2(score * (scale * 1.4426950408889634) - total[:, None])
            share = tl.where((low + keys)[None, :] <= (first + rows)[:, None], share, 0.0)
            slope = share * (tl.dot(above, tl.trans(value), input_precision="ieee") - level[:, None])
            found = tl.dot(slope.to(key.dtype), key, found, input_precision="ieee")
        _write(dq + start * dy_step + head * SIZE, found * scale, first, dy_step, count, rows, SIZE, WIDE)


@triton.jit(do_not_specialize=["sum_head"])
def keys_and_values(  # type: ignore
    do, q, k, v, sums, edges, dk, dv, inner, scale, sum_head, sum_step,
    q_step, k_step, v_step, do_step, o_step, dy_step,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, from all query heads that share them, one after the other."""
    group, start = tl.program_id(0), tl.load(edges + tl.program_id(1)).to(tl.int64)
    count = (tl.load(edges + tl.program_id(1) + 1) - start).to(tl.int32)
    low = tl.program_id(2) * KEYS  # those that most queries see before the others
    if low < count:
        rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
        key = _read(k + start * k_step + group * SIZE, low, k_step, count, keys, SIZE, WIDE)
        value = _read(v + start * v_step + group * SIZE, low, v_step, count, keys, SIZE, WIDE)
        key_slope, value_slope = tl.zeros([KEYS, WIDE], tl.float32), tl.zeros([KEYS, WIDE], tl.float32)
        blocks = tl.cdiv(count - low, ROWS)
        for turn in tl.range(0, GROUP * blocks):
            head, first = group * GROUP + turn // blocks, low + turn % blocks * ROWS
            at, inside = head * sum_head + (start + first + rows) * sum_step, first + rows < count
            query = _read(q + start * q_step + head * SIZE, first, q_step, count, rows, SIZE, WIDE)
            above = _read(do + start * do_step + head * SIZE, first, do_step, count, rows, SIZE, WIDE)
            total = tl.load(sums + at, inside, 0.0) * 1.4426950408889634
            level = tl.load(inner + at, inside, 0.0)
            score = tl.dot(key, tl.trans(query), input_precision="ieee")
            share = tl.exp2(score * (scale * 1.4426950408889634) - total[None, :])
            share = tl.where((low + keys)[:, None] <= (first + rows)[None, :], share, 0.0)
            value_slope = tl.dot(share.to(value.dtype), above, value_slope, input_precision="ieee")
            slope = share * (tl.dot(value, tl.trans(above), input_precision="ieee") - level[None, :])
            key_slope = tl.dot(slope.to(query.dtype), query, key_slope, input_precision="ieee")
        _write(dk + start * dy_step + group * SIZE, key_slope * scale, low, dy_step, count, keys, SIZE, WIDE)
        _write(dv + start * dy_step + group * SIZE, value_slope, low, dy_step, count, keys, SIZE, WIDE)
