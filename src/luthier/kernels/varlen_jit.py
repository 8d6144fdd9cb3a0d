"""The Triton kernels of `varlen_forward.py` and `varlen_backward.py`, which allocate what they write.

Blocks are of `ROWS` queries and `KEYS` keys of one segment; `blocks` says where, those that take longest first.
Products are of the tensors' dtype, sums in fp32. `WIDE` is the head size, or the next power of two. What queries must
not see is hidden in blocks of keys that reach their own tokens alone, since all of the others are before them; but
`queries` asks for each block, as that is faster there.
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


@triton.jit
def _write_turned(  # type: ignore
    x, values, cos, sin, start, first, step, count, at, HALF: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """`_write`, turned back by rotary embedding of features i and i + `HALF`, all of a head; where it is 0 as they are.
    The segment begins at `start` of `cos` and `sin`."""
    if HALF == 0:
        _write(x, values, first, step, count, at, SIZE, WIDE)
    else:
        one, other = tl.split(tl.permute(tl.reshape(values, (values.shape[0], 2, HALF)), (0, 2, 1)))
        c = _read(cos + start * HALF, first, HALF, count, at, HALF, HALF).to(tl.float32)
        s = _read(sin + start * HALF, first, HALF, count, at, HALF, HALF).to(tl.float32)
        _write(x, one * c + other * s, first, step, count, at, HALF, HALF)
        _write(x + HALF, other * c - one * s, first, step, count, at, HALF, HALF)


@triton.jit
def _block(blocks):  # type: ignore
    """Where this program's segment begins, its tokens, and the first of the block's."""
    own = blocks + tl.program_id(1) * 3
    return tl.load(own).to(tl.int64), tl.load(own + 1), tl.load(own + 2)


@triton.jit
def _last_first(blocks, ROWS: tl.constexpr):  # type: ignore
    """`_block`, from the segment's end on, since the last queries see most keys; below 0 where there is no such."""
    start, count, before = _block(blocks)
    return start, count, (tl.cdiv(count, ROWS) - 1) * ROWS - before


@triton.jit(do_not_specialize=["sum_head"])
def attended(  # type: ignore
    q, k, v, blocks, o, sums, scale, sum_head, sum_step, q_step, k_step, v_step, o_step,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What a block of queries sees, and the logarithms of their sums of exponentials: by a sum that begins anew,
    smaller, whenever a score is higher than all before it (Milakov and Gimelshein, 2018, arXiv:1805.02867)."""
    head = tl.program_id(0)
    start, count, first = _last_first(blocks, ROWS)
    if first >= 0:
        rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
        k += start * k_step + head // GROUP * SIZE
        v += start * v_step + head // GROUP * SIZE
        query = _read(q + start * q_step + head * SIZE, first, q_step, count, rows, SIZE, WIDE)
        top, mass = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        found = tl.zeros([ROWS, WIDE], tl.float32)
        for low in tl.range(0, first + ROWS, KEYS):
            key = _read(k, low, k_step, count, keys, SIZE, WIDE)
            value = _read(v, low, v_step, count, keys, SIZE, WIDE)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * 1.4426950408889634)
            if first < low + KEYS:
                score = tl.where((low + keys)[None, :] <= (first + rows)[:, None], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            share, left = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
            mass = mass * left + tl.sum(share, 1)
            found = tl.dot(share.to(value.dtype), value, found * left[:, None], input_precision="ieee")
            top = higher
        _write(o + start * o_step + head * SIZE, found / mass[:, None], first, o_step, count, rows, SIZE, WIDE)
        at = head * sum_head + (start + first + rows) * sum_step
        tl.store(sums + at, (top + tl.log2(mass)) * 0.6931471805599453, first + rows < count)


@triton.jit(do_not_specialize=["sum_head"])
def queries(  # type: ignore
    do, o, q, k, v, sums, inner, blocks, cos, sin, dq, scale,
    sum_head, sum_step, do_step, o_step, q_step, k_step, v_step, dq_step,
    HALF: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and `inner`, the products of rows of `do` and `o`."""
    head = tl.program_id(0)
    start, count, first = _last_first(blocks, ROWS)
    if first >= 0:
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
        dq += start * dq_step + head * SIZE
        _write_turned(dq, found * scale, cos, sin, start, first, dq_step, count, rows, HALF, SIZE, WIDE)


@triton.jit(do_not_specialize=["sum_head"])
def keys_and_values(  # type: ignore
    do, q, k, v, sums, inner, blocks, cos, sin, dk, dv, scale,
    sum_head, sum_step, do_step, q_step, k_step, v_step, dk_step,
    HALF: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, from `HEADS` of the query heads that share them, one after the
    other: all of them, or a part of the sum."""
    part = tl.program_id(0)
    start, count, low = _block(blocks)
    if low < count:
        rows, keys, which = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, 2)
        group = part * HEADS // GROUP
        key = _read(k + start * k_step + group * SIZE, low, k_step, count, keys, SIZE, WIDE)
        value = _read(v + start * v_step + group * SIZE, low, v_step, count, keys, SIZE, WIDE)
        key_slope, value_slope = tl.zeros([KEYS, WIDE], tl.float32), tl.zeros([KEYS, WIDE], tl.float32)
        blocks_of_rows = tl.cdiv(count - low, ROWS)
        for turn in tl.range(0, HEADS * blocks_of_rows):
            head, first = part * HEADS + turn // blocks_of_rows, low + turn % blocks_of_rows * ROWS
            query = _read(q + start * q_step + head * SIZE, first, q_step, count, rows, SIZE, WIDE)
            above = _read(do + start * do_step + head * SIZE, first, do_step, count, rows, SIZE, WIDE)
            at = (head * sum_head + (start + first + rows) * sum_step)[:, None]
            # Both by one load of as many values as there are threads: of fewer, each thread would read what it needs.
            both = tl.load(tl.where(which[None, :] == 0, sums + at, inner + at), (first + rows < count)[:, None], 0.0)
            total, level = tl.split(both)
            total *= 1.4426950408889634
            score = tl.dot(key, tl.trans(query), input_precision="ieee")
            share = tl.exp2(score * (scale * 1.4426950408889634) - total[None, :])
            if first < low + KEYS:
                share = tl.where((low + keys)[:, None] <= (first + rows)[None, :], share, 0.0)
            value_slope = tl.dot(share.to(value.dtype), above, value_slope, input_precision="ieee")
            slope = share * (tl.dot(value, tl.trans(above), input_precision="ieee") - level[None, :])
            key_slope = tl.dot(slope.to(query.dtype), query, key_slope, input_precision="ieee")
        dk += start * dk_step + part * SIZE
        _write_turned(dk, key_slope * scale, cos, sin, start, low, dk_step, count, keys, HALF, SIZE, WIDE)
        _write(dv + start * dk_step + part * SIZE, value_slope, low, dk_step, count, keys, SIZE, WIDE)


@triton.jit
def summed(  # type: ignore
    parts, cos, sin, out, between, step,
    HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over the query heads that share keys, of keys, turned back as `_write_turned` does, and of values:
    [2, T, heads, PARTS, SIZE] to two tensors [T, heads, SIZE], `between` values apart."""
    token, which, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = at < WIDTH
    parts += (which * tl.num_programs(0) + token) * WIDTH * PARTS
    total = _summed(parts, at, inside, PARTS, SIZE)
    if HALF != 0 and which == 0:
        sign = tl.where(at % SIZE < HALF, 1, -1)
        other = _summed(parts, at + sign * HALF, inside, PARTS, SIZE) * sign
        c = tl.load(cos + token * HALF + at % HALF, inside, 0.0).to(tl.float32)
        s = tl.load(sin + token * HALF + at % HALF, inside, 0.0).to(tl.float32)
        total = total * c + other * s
    tl.store(out + which * between + token * step + at, total.to(out.dtype.element_ty), inside)


@triton.jit
def _summed(parts, at, inside, PARTS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore
    own = parts + at // SIZE * (PARTS * SIZE) + at % SIZE
    total = tl.load(own, inside, 0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(own + part * SIZE, inside, 0.0)
    return total
