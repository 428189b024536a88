"""The Triton kernels.

How they share the work: a *chunk table* has one row of int64 for each program, saying which tensor and which elements
it reads; a table of addresses says where the tensors lie, so that one launch covers a list of any length. Each program
writes its partial result to its own place, and a second kernel adds the places up in a fixed order: no atomics, the
same bits every time.

Loads are 128 bits wide where a chunk is full and aligned (the branch with ``tl.multiple_of``); other elements go
through the same arithmetic one by one. Everything narrower than float64 is widened to float32 on load.

Squares are summed lane by lane in float32 over at most a chunk and in float64 from there on. When a chunk's sum is not
finite it is read a second time, in float64, which separates overflow of a square from NaN and infinity: large finite
values are summed right, non-finite ones are counted, and the usual case pays nothing for either.
"""

# Triton compiles this source: branches on constants stay nested and written out.
# ruff: noqa: SIM102, SIM108, SIM300

from __future__ import annotations

import triton
import triton.language as tl

SKETCH_COLUMNS = tl.constexpr(8)
"""Columns of the sketch's chunk table: tensor, offset, begin, end, word, slot, key, next key."""

SLAB_COLUMNS = tl.constexpr(5)
"""Columns of the table of slabs: first bucket, buckets, first and last slot, first cell."""

CHUNK_COLUMNS = tl.constexpr(3)
"""Columns of the flat chunk table: tensor, begin, count."""


@triton.jit
def _address(table, index, ELEMENT: tl.constexpr):
    return tl.load(table + index).to(tl.pointer_type(ELEMENT))


@triton.jit
def _is_aligned(pointer):
    return pointer.to(tl.int64) % 16 == 0


@triton.jit
def _widen(x, BITWISE_BF16: tl.constexpr):
    """float32, or float64 unchanged.

    8-bit floats come as integers, e4m3fn as uint8 and e5m2 as int8, since not every device converts them: shifted into
    place the exponent is too small by the difference of the biases, which a product repairs, subnormals included.
    """
    if x.dtype == tl.float64:
        wide = x
    elif x.dtype == tl.uint8:
        rest = x.to(tl.uint32) & 0x7F
        size = (rest << 20).to(tl.float32, bitcast=True) * 2.0**120
        size = tl.where(rest == 0x7F, float("nan"), size)
        wide = (size.to(tl.uint32, bitcast=True) | (x.to(tl.uint32) & 0x80) << 24).to(tl.float32, bitcast=True)
    elif x.dtype == tl.int8:
        rest = x.to(tl.uint8, bitcast=True).to(tl.uint32) & 0x7F
        size = (rest << 21).to(tl.float32, bitcast=True) * 2.0**112
        bits = tl.where(rest < 0x7C, size.to(tl.uint32, bitcast=True), (rest << 21) | 0x7F800000)
        sign = (x.to(tl.uint8, bitcast=True).to(tl.uint32) & 0x80) << 24
        wide = (bits | sign).to(tl.float32, bitcast=True)
    elif BITWISE_BF16 and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _narrow(x, ELEMENT: tl.constexpr, BITWISE_BF16: tl.constexpr):
    """``x`` rounded to nearest even. The interpreter's own conversion to bfloat16 truncates, hence the bits."""
    if BITWISE_BF16 and ELEMENT == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        narrow = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(ELEMENT)
    return narrow


@triton.jit
def _scalar(pointer, high, low):
    """A float64 scalar: read on the device, or the sum of two float32 arguments (48 bits of a Python float)."""
    if pointer is None:
        value = tl.cast(high, tl.float64) + tl.cast(low, tl.float64)
    else:
        value = tl.load(pointer).to(tl.float64)
    return value


@triton.jit
def _is_nonfinite(x):
    return (tl.abs(x) < float("inf")) == 0


@triton.jit
def _reduce_range(partials, total, begin, end, out, COLUMNS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """``out[c] = sum(partials[c, begin:end])`` in a fixed order, or ``+=``."""
    for column in tl.static_range(COLUMNS):
        acc = tl.zeros([BLOCK], tl.float64)
        for first in range(begin, end, BLOCK):
            index = first + tl.arange(0, BLOCK)
            acc += tl.load(partials + column * total + index, mask=index < end, other=0.0)
        result = tl.sum(acc)
        if ADD:
            result += tl.load(out + column)
        tl.store(out + column, result)


@triton.jit(do_not_specialize=["total"])
def reduce_kernel(partials, total, ranges, out, COLUMNS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage of the moments: row ``r`` of ``out`` is, or with ADD gets, the partials of chunks ``ranges[r]``."""
    row = tl.program_id(0)
    begin = tl.load(ranges + 2 * row)
    end = tl.load(ranges + 2 * row + 1)
    _reduce_range(partials, total, begin, end, out + row * COLUMNS, COLUMNS, ADD, BLOCK)


@triton.jit
def _power(exponent):
    """A scale of 8 bits in float32: 2 to the ``exponent`` less 127; 255 is NaN, and 0 is a subnormal number."""
    bits = exponent.to(tl.uint32)
    bits = tl.where(bits == 0, 0x400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _second(addresses, tensor, offset, SECOND: tl.constexpr, SCALED: tl.constexpr):
    """Where the second moments, or the scales, of a tensor's elements from ``offset`` on lie; None without any."""
    if SECOND is None:
        second = None
    elif SCALED:
        second = _address(addresses, tensor, SECOND) + offset // 32
    else:
        second = _address(addresses, tensor, SECOND) + offset
    return second


@triton.jit
def _divisor(v, eps):
    """``sqrt(v) + eps``; infinity where ``v`` is 0, so that finite elements count as 0 and others as NaN.

    In float32 the fast root takes a subnormal for 0, so those are scaled first. A ``v`` of 0 is seen in the root: ``v``
    itself would hold a register until then.
    """
    eps = eps.to(v.dtype)
    if v.dtype == tl.float64:
        root = tl.sqrt(v)
        divisor = root + tl.where(root == 0.0, float("inf"), eps)
    else:
        small = v < 2.0**-126
        root = tl.sqrt(tl.where(small, v * 2.0**64, v))
        divisor = root * tl.where(small, 2.0**-32, 1.0) + tl.where(root == 0.0, float("inf"), eps)
    return divisor


@triton.jit
def _taken(
    pointer, second, start, index, mask, eps, SCALED: tl.constexpr, ACC: tl.constexpr, BITWISE_BF16: tl.constexpr
):
    """What elements at ``pointer + start + index`` count as: ``x``, ``x / (sqrt(v) + eps)`` in ``ACC``, or scaled.

    ``second`` is where the second moments of ``pointer``'s elements begin or, SCALED, their scales, one for 32.
    Elements outside of ``mask`` are 0. ``start`` is a scalar: kept apart it costs no register for each element.
    """
    if mask is None:
        x = _widen(tl.load(pointer + start + index), BITWISE_BF16)
    else:
        x = _widen(tl.load(pointer + start + index, mask=mask, other=0.0), BITWISE_BF16)
    if SCALED:
        if mask is None:
            scale = _power(tl.load(second + (start + index) // 32))
        else:
            scale = _power(tl.load(second + (start + index) // 32, mask=mask, other=127))
        x = x.to(ACC) * scale.to(ACC)
    elif second is not None:
        if mask is None:
            v = _widen(tl.load(second + start + index), BITWISE_BF16)
        else:
            v = _widen(tl.load(second + start + index, mask=mask, other=1.0), BITWISE_BF16)
        x = x.to(ACC) / _divisor(v.to(ACC), eps)
    return x


@triton.jit(do_not_specialize=["first_chunk", "total"])
def moments_kernel(
    addresses,
    scale_addresses,
    chunks,
    first_chunk,
    partials,
    total,
    ELEMENT: tl.constexpr,
    SECOND: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """Sum of squares and non-finite count of one chunk: ``partials[0, chunk]`` and ``partials[1, chunk]``.

    SECOND is the type of the scales; with None there are none.
    """
    chunk = (first_chunk + tl.program_id(0)).to(tl.int64)
    row = chunks + chunk * CHUNK_COLUMNS
    begin = tl.load(row + 1)
    count = tl.load(row + 2).to(tl.int32)
    pointer = _address(addresses, tl.load(row), ELEMENT) + begin
    scales = _second(scale_addresses, tl.load(row), begin, SECOND, SCALED)
    index = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], ACC)

    full = count // (WIDTH * UNROLL)
    if _is_aligned(pointer):
        for step in range(full):
            here = tl.multiple_of(pointer + step * (WIDTH * UNROLL), 16)
            there = None
            if SCALED:
                there = scales + step * (WIDTH * UNROLL // 32)
            for u in tl.static_range(UNROLL):
                x = _taken(here, there, u * WIDTH, index, None, None, SCALED, ACC, BITWISE_BF16)
                acc += x * x
    else:
        for step in range(full):
            for u in tl.static_range(UNROLL):
                first = (step * UNROLL + u) * WIDTH
                x = _taken(pointer, scales, first, index, None, None, SCALED, ACC, BITWISE_BF16)
                acc += x * x
    for first in range(full * (WIDTH * UNROLL), count, WIDTH):
        x = _taken(pointer, scales, first, index, first + index < count, None, SCALED, ACC, BITWISE_BF16)
        acc += x * x

    square = tl.sum(acc.to(tl.float64))
    nonfinite = square * 0.0
    if _is_nonfinite(square):
        exact = tl.zeros([WIDTH], tl.float64)
        bad = tl.zeros([WIDTH], tl.int32)
        for first in range(0, count, WIDTH):
            x = _taken(pointer, scales, first, index, first + index < count, None, SCALED, tl.float64, BITWISE_BF16)
            exact += x.to(tl.float64) * x.to(tl.float64)
            bad += _is_nonfinite(x).to(tl.int32)
        square = tl.sum(exact)
        nonfinite = tl.sum(bad).to(tl.float64)
    tl.store(partials + chunk, square)
    tl.store(partials + total + chunk, nonfinite)


@triton.jit
def _pair_step(
    a_pointer,
    b_pointer,
    mask,
    weight,
    rest,
    aa,
    bb,
    ab,
    A: tl.constexpr,
    ACC: tl.constexpr,
    MIX: tl.constexpr,
    MOMENTS: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """A tile ``[n, WIDTH]`` of both lists: moments of the old values, then the mix.

    A tile and not a vector, because stores keep later loads from moving up: all loads of a tile go out first.
    """
    if mask is None:
        x = _widen(tl.load(a_pointer), BITWISE_BF16).to(ACC)
        y = _widen(tl.load(b_pointer), BITWISE_BF16).to(ACC)
    else:
        x = _widen(tl.load(a_pointer, mask=mask, other=0.0), BITWISE_BF16).to(ACC)
        y = _widen(tl.load(b_pointer, mask=mask, other=0.0), BITWISE_BF16).to(ACC)
    if MOMENTS:
        aa += tl.sum(x * x, axis=0)
        bb += tl.sum(y * y, axis=0)
        ab += tl.sum(x * y, axis=0)
    if MIX:
        tl.store(a_pointer, _narrow(weight * x + rest * y, A, BITWISE_BF16), mask=mask)
    return aa, bb, ab


@triton.jit(do_not_specialize=["first_chunk", "total"])
def pair_kernel(
    a_addresses,
    b_addresses,
    chunks,
    first_chunk,
    partials,
    total,
    weight_pointer,
    weight_high,
    weight_low,
    A: tl.constexpr,
    B: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    MIX: tl.constexpr,
    MOMENTS: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """``|a|^2, |b|^2, <a, b>`` of one chunk (MOMENTS), and ``a <- w * a + (1 - w) * b`` in the same pass (MIX)."""
    chunk = (first_chunk + tl.program_id(0)).to(tl.int64)
    row = chunks + chunk * CHUNK_COLUMNS
    tensor = tl.load(row)
    begin = tl.load(row + 1)
    count = tl.load(row + 2).to(tl.int32)
    a = _address(a_addresses, tensor, A) + begin
    b = _address(b_addresses, tensor, B) + begin
    index = tl.arange(0, WIDTH)[None, :]
    tile = tl.arange(0, UNROLL)[:, None] * WIDTH + index
    aa = tl.zeros([WIDTH], ACC)
    bb = tl.zeros([WIDTH], ACC)
    ab = tl.zeros([WIDTH], ACC)
    weight64 = _scalar(weight_pointer, weight_high, weight_low)
    weight = weight64.to(ACC)
    rest = (1.0 - weight64).to(ACC)

    full = count // (WIDTH * UNROLL)
    if _is_aligned(a) & _is_aligned(b):
        for step in range(full):
            a_here = tl.multiple_of(a + step * (WIDTH * UNROLL), 16)
            b_here = tl.multiple_of(b + step * (WIDTH * UNROLL), 16)
            aa, bb, ab = _pair_step(
                a_here + tile, b_here + tile, None, weight, rest, aa, bb, ab, A, ACC, MIX, MOMENTS, BITWISE_BF16
            )
    else:
        for step in range(full):
            offset = step * (WIDTH * UNROLL) + tile
            aa, bb, ab = _pair_step(
                a + offset, b + offset, None, weight, rest, aa, bb, ab, A, ACC, MIX, MOMENTS, BITWISE_BF16
            )
    for first in range(full * (WIDTH * UNROLL), count, WIDTH):
        offset = first + index
        aa, bb, ab = _pair_step(
            a + offset, b + offset, offset < count, weight, rest, aa, bb, ab, A, ACC, MIX, MOMENTS, BITWISE_BF16
        )

    if MOMENTS:
        square_a = tl.sum(aa.to(tl.float64))
        square_b = tl.sum(bb.to(tl.float64))
        dot = tl.sum(ab.to(tl.float64))
        if not MIX:  # after a mix the old values are gone
            if _is_nonfinite(square_a) | _is_nonfinite(square_b) | _is_nonfinite(dot):
                aa64 = tl.zeros([WIDTH], tl.float64)
                bb64 = tl.zeros([WIDTH], tl.float64)
                ab64 = tl.zeros([WIDTH], tl.float64)
                for first in range(0, count, WIDTH):
                    offset = first + index
                    aa64, bb64, ab64 = _pair_step(
                        a + offset,
                        b + offset,
                        offset < count,
                        weight64,
                        weight64,
                        aa64,
                        bb64,
                        ab64,
                        A,
                        tl.float64,
                        False,
                        True,
                        BITWISE_BF16,
                    )
                square_a = tl.sum(aa64)
                square_b = tl.sum(bb64)
                dot = tl.sum(ab64)
        tl.store(partials + chunk, square_a)
        tl.store(partials + total + chunk, square_b)
        tl.store(partials + 2 * total + chunk, dot)


@triton.jit
def _finalize32(h):
    """MurmurHash3's 32-bit avalanche step, as in :mod:`gac_kernels.layout`."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _sign_words(word, first, key, next_key, WORDS: tl.constexpr):
    """Sign words ``first .. first + WORDS`` of a chunk whose first has low half ``word``.

    A chunk spans fewer than 2**32 words, so the high half of the index changes at most once, where the low one wraps.
    """
    low = word + (first + tl.arange(0, WORDS)).to(tl.uint32)
    return _finalize32(low ^ tl.where(low < word, next_key, key))


@triton.jit
def _flip(x, words, shifts):
    """``x`` with the signs that ``words`` holds: bit ``31 - shift`` of a word negates."""
    if x.dtype == tl.float64:
        flipped = tl.where(((words[:, None] << shifts) & 0x80000000) != 0, -x, x)
    else:
        sign = (words[:, None] << shifts) & 0x80000000
        flipped = (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return flipped


@triton.jit(do_not_specialize=["first_chunk", "total"])
def sketch_kernel(
    addresses,
    second_addresses,
    chunks,
    first_chunk,
    lane_partials,
    partials,
    total,
    eps_high,
    eps_low,
    ELEMENT: tl.constexpr,
    SECOND: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """Signed lane sums and moments of one chunk: some rows of one slab of one tensor.

    Element ``i`` of the chunk, counted from the start of its first row, lies at ``address + offset + i`` and exists for
    ``begin <= i < end``. A tile is ``[WORDS, 32]``: with 128-bit loads a thread holds neighbours within one word and
    computes that word's hash once. Rows wider than a tile are split over the second grid axis. SECOND is the type of
    the second moments or, SCALED, of the scales; with None there are neither.
    """
    chunk = (first_chunk + tl.program_id(0)).to(tl.int64)
    block = tl.program_id(1)
    BLOCKS: tl.constexpr = (LANES + WORDS * 32 - 1) // (WORDS * 32)
    row = chunks + chunk * SKETCH_COLUMNS
    offset = tl.load(row + 1)
    begin = tl.load(row + 2).to(tl.int32)
    end = tl.load(row + 3).to(tl.int32)
    word = tl.load(row + 4).to(tl.uint32)
    slot = tl.load(row + 5)
    key = tl.load(row + 6).to(tl.uint32)
    next_key = tl.load(row + 7).to(tl.uint32)
    pointer = _address(addresses, tl.load(row), ELEMENT) + offset
    second = _second(second_addresses, tl.load(row), offset, SECOND, SCALED)
    eps = None
    aligned = _is_aligned(pointer)
    if SECOND is not None and not SCALED:
        eps = _scalar(None, eps_high, eps_low)
        aligned = aligned & _is_aligned(second)
    lane = block * (WORDS * 32) + tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    shifts = (31 - tl.arange(0, 32)[None, :]).to(tl.uint32)
    acc = tl.zeros([WORDS, 32], ACC)
    square = tl.zeros([WORDS, 32], ACC)

    # Steps of UNROLL rows that are there in full, between a head and a tail of single rows.
    STEP: tl.constexpr = UNROLL * LANES
    rows = tl.cdiv(end, LANES)
    first_step = tl.cdiv(begin, STEP)
    last_step = tl.maximum(end // STEP, first_step)
    if LANES % (WORDS * 32) != 0:
        last_step = first_step
    head = tl.minimum(first_step * UNROLL, rows)
    resume = tl.minimum(last_step * UNROLL, rows)
    if aligned:
        for step in range(first_step, last_step):
            here = tl.multiple_of(pointer + step * STEP, 16)
            there = None
            if SCALED:
                there = second + step * (STEP // 32)
            elif SECOND is not None:
                there = tl.multiple_of(second + step * STEP, 16)
            for u in tl.static_range(UNROLL):
                x = _taken(here, there, u * LANES, lane, None, eps, SCALED, ACC, BITWISE_BF16)
                words = _sign_words(word, block * WORDS + (step * UNROLL + u) * (LANES // 32), key, next_key, WORDS)
                square += x * x
                acc += _flip(x, words, shifts)
    else:
        for step in range(first_step, last_step):
            for u in tl.static_range(UNROLL):
                x = _taken(pointer, second, (step * UNROLL + u) * LANES, lane, None, eps, SCALED, ACC, BITWISE_BF16)
                words = _sign_words(word, block * WORDS + (step * UNROLL + u) * (LANES // 32), key, next_key, WORDS)
                square += x * x
                acc += _flip(x, words, shifts)
    for single in range(head + rows - resume):
        r = single + tl.where(single >= head, resume - head, 0)
        index = r * LANES + lane
        mask = (index >= begin) & (index < end) & (lane < LANES)
        x = _taken(pointer, second, 0, index, mask, eps, SCALED, ACC, BITWISE_BF16)
        words = _sign_words(word, block * WORDS + r * (LANES // 32), key, next_key, WORDS)
        square += x * x
        acc += _flip(x, words, shifts)

    tl.store(lane_partials + slot * LANES + lane, acc, mask=lane < LANES)
    place = chunk * BLOCKS + block
    sum_of_squares = tl.sum(square.to(tl.float64))
    nonfinite = sum_of_squares * 0.0
    if _is_nonfinite(sum_of_squares):
        exact = tl.zeros([WORDS, 32], tl.float64)
        bad = tl.zeros([WORDS, 32], tl.int32)
        for r in range(rows):
            index = r * LANES + lane
            mask = (index >= begin) & (index < end) & (lane < LANES)
            x = _taken(pointer, second, 0, index, mask, eps, SCALED, tl.float64, BITWISE_BF16)
            exact += x.to(tl.float64) * x.to(tl.float64)
            bad += _is_nonfinite(x).to(tl.int32)
        sum_of_squares = tl.sum(exact)
        nonfinite = tl.sum(bad).to(tl.float64)
    tl.store(partials + place, sum_of_squares)
    tl.store(partials + total + place, nonfinite)


@triton.jit
def _slab_sum(lane_partials, first, last, lane, mask, LANES: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    """The sum of a slab's slots ``first .. last``, WIDTH lanes of them, in a fixed order."""
    acc = tl.zeros([SLOTS, WIDTH], tl.float64)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < last)[:, None] & mask[None, :]
        acc += tl.load(lane_partials + slot[:, None] * LANES + lane[None, :], mask=there, other=0.0).to(tl.float64)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["total", "moment_rows"])
def sketch_finish_kernel(
    lane_partials,
    slabs,
    out,
    scale_pointer,
    scale_high,
    scale_low,
    partials,
    total,
    ranges,
    moments,
    moment_rows,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second stage of the sketch: the first programs add up moments, the others ``WIDTH`` buckets of a slab each.

    A row of ``slabs`` is: first bucket, number of buckets, the range of slots (chunks) that belong to the slab, and its
    first cell. ACCUMULATE adds to the buckets, ADD to the moments.
    """
    program = tl.program_id(0)
    if program < moment_rows:
        begin = tl.load(ranges + 2 * program)
        end = tl.load(ranges + 2 * program + 1)
        _reduce_range(partials, total, begin, end, moments + program * 2, 2, ADD, BLOCK)
    else:
        BLOCKS: tl.constexpr = (LANES + WIDTH - 1) // WIDTH
        slab = slabs + ((program - moment_rows) // BLOCKS).to(tl.int64) * SLAB_COLUMNS
        lane = (program - moment_rows) % BLOCKS * WIDTH + tl.arange(0, WIDTH)
        bucket = tl.load(slab)
        mask = lane < tl.load(slab + 1).to(tl.int32)
        value = _slab_sum(lane_partials, tl.load(slab + 2), tl.load(slab + 3), lane, mask, LANES, WIDTH, SLOTS)
        value *= _scalar(scale_pointer, scale_high, scale_low)
        if ACCUMULATE:
            value += tl.load(out + bucket + lane, mask=mask, other=0.0).to(tl.float64)
        tl.store(out + bucket + lane, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["all_partials"])
def sketch_absorb_kernel(
    lane_partials,
    slabs,
    previous,
    total,
    scale_pointer,
    scale_high,
    scale_low,
    partials,
    all_partials,
    ranges,
    sums,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second stage of ``absorb_sketch_``, as ``sketch_finish_kernel`` and ``absorb_kernel``: adds to all it writes.

    The first program adds up moments, the others the squares of what WIDTH buckets of a slab gain, a cell each.
    """
    program = tl.program_id(0)
    if program < 1:
        _reduce_range(partials, all_partials, tl.load(ranges), tl.load(ranges + 1), sums, 2, True, BLOCK)
    else:
        BLOCKS: tl.constexpr = (LANES + WIDTH - 1) // WIDTH
        block = (program - 1) % BLOCKS
        slab = slabs + ((program - 1) // BLOCKS).to(tl.int64) * SLAB_COLUMNS
        lane = block * WIDTH + tl.arange(0, WIDTH)
        bucket = tl.load(slab)
        mask = lane < tl.load(slab + 1).to(tl.int32)
        value = _slab_sum(lane_partials, tl.load(slab + 2), tl.load(slab + 3), lane, mask, LANES, WIDTH, SLOTS)
        now = value.to(tl.float32)
        delta = now.to(tl.float64) - tl.load(previous + bucket + lane, mask=mask, other=0.0).to(tl.float64)
        delta = tl.where(mask, delta * _scalar(scale_pointer, scale_high, scale_low), 0.0)
        gained = tl.load(total + bucket + lane, mask=mask, other=0.0).to(tl.float64) + delta
        tl.store(previous + bucket + lane, now, mask=mask)
        tl.store(total + bucket + lane, gained.to(tl.float32), mask=mask)
        cell = sums + 2 + tl.load(slab + 4) + block
        tl.store(cell, tl.load(cell) + tl.sum(delta * delta))


@triton.jit
def _accumulate_step(
    pointer,
    second,
    previous,
    total,
    index,
    mask,
    scale,
    eps,
    square,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """A tile ``[n, WIDTH]``: its loads go out before its stores, which keep later loads from moving up."""
    x = _taken(pointer, second, 0, index, mask, eps, SCALED, ACC, BITWISE_BF16)
    before = tl.load(total + index, mask=mask)
    added = x.to(tl.float64)
    if previous is not None:
        now = x.to(tl.float32)
        added = now.to(tl.float64) - tl.load(previous + index, mask=mask).to(tl.float64)
        tl.store(previous + index, now, mask=mask)
    if mask is not None:
        added = tl.where(mask, added, 0.0)
    tl.store(total + index, (before.to(tl.float64) + scale * added).to(tl.float32), mask=mask)
    return square + tl.sum(added * added, axis=0)


@triton.jit(do_not_specialize=["first_chunk", "count_all"])
def accumulate_kernel(
    addresses,
    second_addresses,
    chunks,
    offsets,
    first_chunk,
    previous,
    total,
    partials,
    count_all,
    scale_pointer,
    scale_high,
    scale_low,
    eps_high,
    eps_low,
    ELEMENT: tl.constexpr,
    SECOND: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """One chunk of ``accumulate_``: what it adds to ``total``, and its moments. Sums and differences are float64.

    ``offsets`` says where in ``total`` (and ``previous``) each tensor begins. SECOND is the type of the second moments
    or, SCALED, of the scales, which act in ACC; with None there are neither.
    """
    chunk = (first_chunk + tl.program_id(0)).to(tl.int64)
    row = chunks + chunk * CHUNK_COLUMNS
    tensor = tl.load(row)
    begin = tl.load(row + 1)
    count = tl.load(row + 2).to(tl.int32)
    place = tl.load(offsets + tensor) + begin
    pointer = _address(addresses, tensor, ELEMENT) + begin
    to = total + place
    aligned = _is_aligned(pointer) & _is_aligned(to)
    second = _second(second_addresses, tensor, begin, SECOND, SCALED)
    eps = None
    if SECOND is not None and not SCALED:
        eps = _scalar(None, eps_high, eps_low)
        aligned = aligned & _is_aligned(second)
    if previous is None:
        last = None
    else:
        last = previous + place
        aligned = aligned & _is_aligned(last)
    scale = _scalar(scale_pointer, scale_high, scale_low)
    index = tl.arange(0, WIDTH)[None, :]
    tile = tl.arange(0, UNROLL)[:, None] * WIDTH + index
    square = tl.zeros([WIDTH], tl.float64)

    full = count // (WIDTH * UNROLL)
    if aligned:
        for step in range(full):
            first = step * (WIDTH * UNROLL)
            here = tl.multiple_of(pointer + first, 16)
            sum_here = tl.multiple_of(to + first, 16)
            there = None
            last_here = None
            if SCALED:
                there = second + first // 32
            elif SECOND is not None:
                there = tl.multiple_of(second + first, 16)
            if previous is not None:
                last_here = tl.multiple_of(last + first, 16)
            square = _accumulate_step(
                here, there, last_here, sum_here, tile, None, scale, eps, square, SCALED, ACC, BITWISE_BF16
            )
    else:
        for step in range(full):
            offset = step * (WIDTH * UNROLL) + tile
            square = _accumulate_step(
                pointer, second, last, to, offset, None, scale, eps, square, SCALED, ACC, BITWISE_BF16
            )
    for first in range(full * (WIDTH * UNROLL), count, WIDTH):
        offset = first + index
        square = _accumulate_step(
            pointer, second, last, to, offset, offset < count, scale, eps, square, SCALED, ACC, BITWISE_BF16
        )

    sum_of_squares = tl.sum(square)
    nonfinite = sum_of_squares * 0.0
    if _is_nonfinite(sum_of_squares):
        exact = tl.zeros([WIDTH], tl.float64)
        bad = tl.zeros([WIDTH], tl.int32)
        for first in range(0, count, WIDTH):
            offset = first + tl.arange(0, WIDTH)
            x = _taken(pointer, second, 0, offset, offset < count, eps, SCALED, tl.float64, BITWISE_BF16)
            exact += x.to(tl.float64) * x.to(tl.float64)
            bad += _is_nonfinite(x).to(tl.int32)
        if previous is None:  # what was there before is gone
            sum_of_squares = tl.sum(exact)
        nonfinite = tl.sum(bad).to(tl.float64)
    tl.store(partials + chunk, sum_of_squares)
    tl.store(partials + count_all + chunk, nonfinite)


@triton.jit(do_not_specialize=["numel"])
def absorb_kernel(
    current,
    previous,
    total,
    numel,
    scale_pointer,
    scale_high,
    scale_low,
    out,
    CELL: tl.constexpr,
    ADD: tl.constexpr,
):
    """One cell of ``absorb_``, in float64 throughout: sketches are small beside gradients."""
    cell = tl.program_id(0).to(tl.int64)
    index = cell * CELL + tl.arange(0, CELL)
    mask = index < numel
    now = tl.load(current + index, mask=mask, other=0.0)
    delta = now.to(tl.float64)
    if previous is not None:
        delta -= tl.load(previous + index, mask=mask, other=0.0).to(tl.float64)
        tl.store(previous + index, now, mask=mask)
    delta *= _scalar(scale_pointer, scale_high, scale_low)
    delta = tl.where(mask, delta, 0.0)
    sum_so_far = tl.load(total + index, mask=mask, other=0.0).to(tl.float64)
    tl.store(total + index, (sum_so_far + delta).to(tl.float32), mask=mask)
    squares = tl.sum(delta * delta)
    if ADD:
        squares += tl.load(out + cell)
    tl.store(out + cell, squares)


@triton.jit
def _wide64(x, BITWISE_BF16: tl.constexpr):
    return _widen(x, BITWISE_BF16).to(tl.float64)


@triton.jit(do_not_specialize=["length"])
def token_kernel(
    logprobs,
    logprob_row,
    logprob_column,
    advantages,
    advantage_row,
    advantage_column,
    token_mask,
    mask_row,
    mask_column,
    is_expert,
    length,
    out,
    WIDTH: tl.constexpr,
    BITWISE_BF16: tl.constexpr,
):
    """The seven sums of one sequence, in float64: there are few tokens, and ``1 - p`` needs the digits."""
    row = tl.program_id(0).to(tl.int64)
    rollout = (
        tl.load(is_expert + row + tl.zeros([WIDTH], tl.int32)) == 0
    )  # a block: the interpreter cannot `and` scalars
    count = tl.zeros([WIDTH], tl.float64)
    logp_sum = tl.zeros([WIDTH], tl.float64)
    a_sum = tl.zeros([WIDTH], tl.float64)
    aa_sum = tl.zeros([WIDTH], tl.float64)
    phi_sum = tl.zeros([WIDTH], tl.float64)
    phi2_sum = tl.zeros([WIDTH], tl.float64)
    phi_a_sum = tl.zeros([WIDTH], tl.float64)
    for first in range(0, length, WIDTH):
        column = (first + tl.arange(0, WIDTH)).to(tl.int64)
        inside = column < length
        counts = tl.load(token_mask + row * mask_row + column * mask_column, mask=inside, other=0)
        if counts.dtype.is_floating():
            counts = _widen(counts, BITWISE_BF16)
        use = inside & (counts != 0)
        logp = _wide64(
            tl.load(logprobs + row * logprob_row + column * logprob_column, mask=use, other=0.0), BITWISE_BF16
        )
        a = _wide64(
            tl.load(advantages + row * advantage_row + column * advantage_column, mask=use & rollout, other=0.0),
            BITWISE_BF16,
        )
        p = tl.exp(logp)
        phi = tl.where(use, p * (1.0 - p), 0.0)
        count += use.to(tl.float64)
        logp_sum += logp
        a_sum += a
        aa_sum += a * a
        phi_sum += phi
        phi2_sum += phi * phi
        phi_a_sum += phi * a
    place = out + row * 7
    tl.store(place, tl.sum(count))
    tl.store(place + 1, tl.sum(logp_sum))
    tl.store(place + 2, tl.sum(a_sum))
    tl.store(place + 3, tl.sum(aa_sum))
    tl.store(place + 4, tl.sum(phi_sum))
    tl.store(place + 5, tl.sum(phi2_sum))
    tl.store(place + 6, tl.sum(phi_a_sum))
