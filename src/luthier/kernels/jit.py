"""The Triton kernels of `fused.py`, `activated.py`, `adapted.py`, `rectangles.py`, `drop.py` and `nf4.py`, which say
what they compute and allocate what they write.

They stand apart so that a plan can follow those allocations where Triton is not installed. Sums are taken in fp32, and
a value is rounded to the tensors' dtype where the twin stores it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(  # type: ignore
    x, update, weight, out, scales, width, out_apart, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(update + row * width + at, inside, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(update + row * width + at, value, inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    factor = tl.load(weight + at, inside, 0.0)
    normed = (wide * scale).to(factor.dtype).to(tl.float32) * factor.to(tl.float32)
    tl.store(out + row * out_apart + at, normed, inside)
    tl.store(scales + row, scale)


@triton.jit
def rms_norm_backward(  # type: ignore
    dy, x, scales, weight, residual, dx, out, width, residual_apart, dx_apart, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, inside, 0.0)
    scale = tl.load(scales + row)
    normed = value.to(tl.float32) * scale
    stored = tl.load(weight + at, inside, 0.0)
    factor = stored.to(tl.float32)
    gradient = tl.load(dy + row * width + at, inside, 0.0).to(tl.float32) * factor
    inner = tl.sum(gradient * normed) / width
    change = (gradient - normed * inner) * scale
    if ADD:
        change += tl.load(residual + row * residual_apart + at, inside, 0.0).to(tl.float32)
    tl.store(dx + row * dx_apart + at, change, inside)
    tl.store(out + row * width + at, normed.to(stored.dtype).to(tl.float32) * factor, inside)


@triton.jit
def layer_norm(x, weight, bias, out, moments, width, out_apart, eps, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(value) / width
    apart = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart) / width + eps)
    factor, shift = tl.load(weight + at, inside, 0.0).to(tl.float32), tl.load(bias + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_apart + at, apart * scale * factor + shift, inside)
    tl.store(moments + 2 * row, scale)
    tl.store(moments + 2 * row + 1, mean)


@triton.jit
def layer_norm_backward(  # type: ignore
    dy, x, moments, weight, bias, residual, dx, out, width, residual_apart, dx_apart, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    scale, mean = tl.load(moments + 2 * row), tl.load(moments + 2 * row + 1)
    normed = (tl.load(x + row * width + at, inside, 0.0).to(tl.float32) - mean) * scale
    factor, shift = tl.load(weight + at, inside, 0.0).to(tl.float32), tl.load(bias + at, inside, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + at, inside, 0.0).to(tl.float32) * factor  # 0 outside: so are the sums
    inner, level = tl.sum(gradient * normed) / width, tl.sum(gradient) / width
    more = tl.load(residual + row * residual_apart + at, inside, 0.0).to(tl.float32)
    tl.store(dx + row * dx_apart + at, (gradient - level - normed * inner) * scale + more, inside)
    tl.store(out + row * width + at, normed * factor + shift, inside)


@triton.jit
def _act(x, ACT: tl.constexpr):  # type: ignore
    """The activation and its slope."""
    if ACT == "silu":
        share = tl.sigmoid(x)
        slope = share * (1 + x - x * share)
    elif ACT == "gelu":
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u / 2)) / 2 is sigmoid(u)
        slope = share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return x * share, slope


@triton.jit
def activate(  # type: ignore
    x, out, x_apart, out_apart, width, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    start = x + row * x_apart
    value, _ = _act(tl.load(start + at, inside, 0.0).to(tl.float32), ACT)
    if GATED:
        value *= tl.load(start + width + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_apart + at, value, inside)


@triton.jit
def activate_backward(  # type: ignore
    dh, x, x_apart, width, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    start = x + row * x_apart
    value, slope = _act(tl.load(start + at, inside, 0.0).to(tl.float32), ACT)
    gradient = tl.load(dh + row * width + at, inside, 0.0).to(tl.float32)
    hidden = value
    if GATED:
        up = tl.load(start + width + at, inside, 0.0).to(tl.float32)
        tl.store(start + width + at, gradient * value, inside)
        gradient, hidden = gradient * up, value * up
    tl.store(start + at, gradient * slope, inside)
    tl.store(dh + row * width + at, hidden, inside)


@triton.jit(do_not_specialize=["tokens", "chunk", "ranks"])
def activate_backward_dA(  # type: ignore
    dh, x, dinner, parts, tokens, chunk, width, ranks, x_apart, dinner_apart, ACT: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    column, rank, start = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :], tl.arange(0, RANKS), part * chunk
    found = tl.zeros([RANKS, COLUMNS], tl.float32)
    for low in tl.range(0, tl.minimum(chunk, tokens - start), ROWS, num_stages=STAGES):
        token = (start + low + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (token < tokens) & (column < width)
        place = x + token * x_apart + column
        value, slope = _act(tl.load(place, inside, 0.0).to(tl.float32), ACT)
        gradient = tl.load(dh + token * width + column, inside, 0.0).to(tl.float32)
        # Columns behind the ranks are read, too, and their sums not stored: with a mask, single values would be read.
        factor = tl.load(dinner + token * dinner_apart + rank[None, :], token < tokens, 0.0)
        hidden = value
        if GATED:
            up = tl.load(place + width, inside, 0.0).to(tl.float32)
            tl.store(place + width, gradient * value, inside)
            gradient, hidden = gradient * up, value * up
        tl.store(place, gradient * slope, inside)
        found = tl.dot(tl.trans(factor), hidden.to(factor.dtype), found, input_precision="ieee")
    own = (rank < ranks)[:, None] & (column < width)
    tl.store(parts + (part * ranks + rank[:, None]) * width + column, found, own)


@triton.jit(do_not_specialize=["chunks"])
def dA_sums(parts, dA, chunks, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # type: ignore
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dA + at, _total(parts, at, at < size, 0, chunks, size, BLOCK, PARTS), at < size)


@triton.jit
def exponentials(logits, largest, mass, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    start = logits + row * WIDTH
    top, total = tl.full([BLOCK], -3e38, tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        value = tl.load(start + first + at, first + at < WIDTH, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    highest = tl.max(top)
    tl.store(largest + row, highest)
    tl.store(mass + row, tl.sum(total * tl.exp(top - highest)))
    for first in range(0, WIDTH, BLOCK):
        value = tl.load(start + first + at, first + at < WIDTH, float("-inf")).to(tl.float32)
        tl.store(start + first + at, tl.exp(value - highest), first + at < WIDTH)


@triton.jit
def turn(  # type: ignore
    x, cos, sin, heads, stride, apart,
    HALF: tl.constexpr, BACK: tl.constexpr, NEIGHBOURS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (at < HALF)
    first = x + token * stride + head * apart + (2 * at if NEIGHBOURS else at)
    second = first + (1 if NEIGHBOURS else HALF)
    a, b = tl.load(first, inside, 0.0).to(tl.float32), tl.load(second, inside, 0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + at, at < HALF, 0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + at, at < HALF, 0.0).to(tl.float32)
    if BACK:
        s = -s
    tl.store(first, a * c - b * s, inside)
    tl.store(second, b * c + a * s, inside)


@triton.jit
def gather(ids, table, out, width, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + tl.load(ids + row) * width + at, at < width, 0.0)
    tl.store(out + row * width + at, value, at < width)


@triton.jit
def _shift(x, BITS: tl.constexpr):  # type: ignore
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(x):  # type: ignore
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


@triton.jit(do_not_specialize=["module"])
def drop(x, out, samples, positions, key, module, width, apart, least, factor, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    token = _mix(_mix(_mix(tl.load(key) + module) + tl.load(samples + row)) + tl.load(positions + row))
    drawn = _mix(token + (at // 4).to(tl.int64) * -0x61C8864680B583EB)
    lane = (drawn >> ((at % 4) * 16).to(tl.int64)) & 0xFFFF
    kept = ((lane + 32768) & 0xFFFF) >= least  # the lane as a signed number, moved to begin at 0
    value = tl.load(x + row * apart + at, inside, 0.0)
    tl.store(out + row * width + at, tl.where(kept, value.to(tl.float32) * factor, 0.0), inside)


@triton.jit
def rectangles(table, factors, source, target, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    entry = tl.program_id(0)
    told = table + entry * 8
    read, write = tl.load(told).to(source.dtype), tl.load(told + 1).to(target.dtype)
    read_apart, write_apart = tl.load(told + 2), tl.load(told + 3)
    columns, count = tl.load(told + 5).to(tl.int32), (tl.load(told + 4) * tl.load(told + 5)).to(tl.int32)
    first, width = tl.load(told + 6).to(tl.int32), tl.load(told + 7).to(tl.int32)
    factor = tl.load(factors + entry)
    start = tl.program_id(1) * BLOCK
    while start < count:
        at = start + tl.arange(0, BLOCK)
        row, column = at // columns, at % columns - first
        seen = (at < count) & (column >= 0) & (column < width)
        value = tl.load(read + row * read_apart + column, seen, 0.0).to(tl.float32) * factor
        place = write + row * write_apart + column + first
        if ADD:
            value += tl.load(place, at < count, 0.0).to(tl.float32)
        tl.store(place, value, at < count)
        start += tl.num_programs(1) * BLOCK


@triton.jit(do_not_specialize=["tokens", "chunk"])
def adapted(  # type: ignore
    dy, B, inner, blocks, inner_parts, B_parts, tokens, chunk, width, spare, dy_step, B_step, inner_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    told, start = blocks + block * 3, part * chunk
    # What is read ahead has to be read 16 bytes at a time.
    first, columns = tl.multiple_of(tl.load(told), 16), tl.multiple_of(tl.load(told + 1), 16)
    rank = tl.multiple_of(tl.load(told + 2), 8)
    rows, column, at = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    own, there = column < columns, (rank + at < spare)[None, :]
    factor = B + (first + column).to(tl.int64)[:, None] * B_step + (rank + at)[None, :]
    factor = tl.load(factor, own[:, None] & there, 0.0)
    found = tl.zeros([COLUMNS, RANKS], tl.float32)
    for low in tl.range(0, tl.minimum(chunk, tokens - start), ROWS, num_stages=STAGES):
        token = (start + low + rows).to(tl.int64)[:, None]
        tile = tl.load(dy + token * dy_step + (first + column)[None, :], (token < tokens) & own[None, :], 0.0)
        value = tl.load(inner + token * inner_step + (rank + at)[None, :], (token < tokens) & there, 0.0)
        summand = tl.dot(tile, factor, input_precision="ieee")
        tl.store(inner_parts + (block * tokens + token) * RANKS + at[None, :], summand, token < tokens)
        found = tl.dot(tl.trans(tile), value, found, input_precision="ieee")
    place = B_parts + (part * width + first + column).to(tl.int64)[:, None] * RANKS + at[None, :]
    tl.store(place, found, own[:, None])


@triton.jit(do_not_specialize=["tokens", "chunks"])
def adapted_sums(  # type: ignore
    inner_parts, B_parts, sums, dinner, dB, tokens, chunks, width, dinner_step, dB_step,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    told = sums + tl.program_id(1) * 6
    first, columns, rank, ranks = tl.load(told + 2), tl.load(told + 3), tl.load(told + 4), tl.load(told + 5)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, own = at // RANKS, at % RANKS
    if tl.program_id(2) == 0:
        there, last = row < tokens, tl.load(told + 1)
        total = _total(inner_parts, at, there, tl.load(told), last, tokens * RANKS, BLOCK, PARTS)
        tl.store(dinner + row.to(tl.int64) * dinner_step + rank + own, total, there & (own < ranks))
    else:
        there = row < columns
        total = _total(B_parts + first * RANKS, at, there, 0, chunks, width * RANKS, BLOCK, PARTS)
        tl.store(dB + (first + row).to(tl.int64) * dB_step + rank + own, total, there & (own < ranks))


@triton.jit
def _total(parts, at, there, first, last, apart, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # type: ignore
    """The sum of the parts from `first` to `last`, which are so far apart."""
    total = tl.zeros([BLOCK], tl.float32)
    for low in tl.range(first, last, PARTS):
        part = low + tl.arange(0, PARTS)
        place = parts + part.to(tl.int64)[:, None] * apart + at[None, :]
        total += tl.sum(tl.load(place, (part < last)[:, None] & there[None, :], 0.0), 0)
    return total


@triton.jit
def dequantize(  # type: ignore
    packed, absmax, nested, offset, code, values, out, count, width, apart,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    first, pair = block.to(tl.int64) * BLOCK, tl.arange(0, BLOCK // 2)[None, :]
    scale = tl.load(absmax + block, first < count, 0)
    if DOUBLE:
        # As int32: an 8-bit offset would be taken for a signed one.
        scale = tl.load(code + scale.to(tl.int32)) * tl.load(nested + block // NESTED, first < count, 0.0)
        scale += tl.load(offset)
    if WHOLE:  # so are the blocks, which lie in one row each: what is read, or written, lies side by side
        inside, there = (first < count)[:, None], (first < count)[:, None]
        row, start = (block // (width // BLOCK)).to(tl.int64), block % (width // BLOCK) * BLOCK
        place = row[:, None] * apart + start[:, None] + tl.arange(0, BLOCK)[None, :]
    else:  # a block goes on in the next row, or in some more
        inside = first[:, None] + pair * 2 < count
        there = first[:, None] + tl.arange(0, BLOCK)[None, :] < count
        row, column = first // width, (first % width).to(tl.int32)[:, None] + tl.arange(0, BLOCK)[None, :]
        place = row[:, None] * apart + column + column // width * (apart - width)
    byte = tl.load(packed + (first // 2)[:, None] + pair, inside, 0).to(tl.int32)
    index = tl.reshape(tl.join(byte >> 4, byte & 15), (BLOCKS * BLOCK,))
    # Out of shared memory: as pointers, each index would take an address of 64 bits.
    found = tl.reshape(tl.gather(tl.load(values + tl.arange(0, 16)), index, 0), (BLOCKS, BLOCK))
    tl.store(out + place, (found * scale[:, None]).to(out.dtype.element_ty), there)
