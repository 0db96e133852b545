"""Triton kernels of the head for Hopper GPUs; `kernels/head_fused.py` calls them.

`project` is the one product here: tiles of hidden @ head.T are accumulated in float32 registers and reduced there, so logits
are neither rounded to bfloat16 nor written. What its epilogue does with a tile is its KIND:

- MEASURE: per row the tile's largest logit, sum of exponentials, and sum of exponentials times logits;
- EXPONENTIALS: exp(z - reference of the row), written in bfloat16, and their sums: the softmax but for a factor of the row;
- SLOPES: the gradient of the logits, written in bfloat16, from the row's normaliser and the gradients of its results.

Logits are kept in units of log 2, because the hardware has exp2. LOW stands for the logit of a column beyond the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

MEASURE = tl.constexpr(0)
EXPONENTIALS = tl.constexpr(1)
SLOPES = tl.constexpr(2)
LOW = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
TWO_LOG2E = tl.constexpr(2.8853900817779268)


@triton.jit
def _tanh(values: tl.tensor) -> tl.tensor:
    """1 - 2 / (1 + exp(2 x)): right at both ends, and to 1e-7 absolute between."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(values * TWO_LOG2E))


@triton.jit
def _place(tile: int, rows: int, columns: int, GROUP: tl.constexpr) -> tl.tensor:
    """Row and column of a tile: GROUP row tiles share a column of the head before the next column's turn."""
    group = tile // (GROUP * columns)
    height = min(rows - group * GROUP, GROUP)
    inner = tile - group * GROUP * columns
    return group * GROUP + inner % height, inner // height


@triton.jit
def _accumulate(
    x_desc: tl.tensor, w_desc: tl.tensor, row: int, column: int, D: int, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
) -> tl.tensor:
    """[BM, BN] f32: rows of x times rows of w."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, tl.cdiv(D, BK)):
        a = x_desc.load([row, k * BK])
        b = w_desc.load([column, k * BK])
        total = tl.dot(a, b.T, total)
    return total


@triton.jit
def _keep_targets(z: tl.tensor, targets: tl.tensor, at: tl.tensor, row: tl.tensor, real: tl.tensor, start: int, BN: tl.constexpr) -> None:
    """Store the logits of the targets that are among a tile's columns; most tiles have none."""
    local = tl.load(targets + row, mask=real, other=-1).to(tl.int32) - start
    hit = (local >= 0) & (local < BN) & real
    if tl.max(hit.to(tl.int32), 0) > 0:
        tl.store(at + row, tl.sum(tl.where(tl.arange(0, BN)[None, :] == local[:, None], z, 0.0), 1), mask=hit)


# fmt: off
@triton.jit
def project(
    x_desc: tl.tensor, w_desc: tl.tensor, out_desc: tl.tensor, targets: tl.tensor,
    reference: tl.tensor, first: tl.tensor, second: tl.tensor,
    top: tl.tensor, mass: tl.tensor, turn: tl.tensor, at: tl.tensor,
    M: int, V: int, D: int, inner: float, outer: float,
    KIND: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
) -> None:
    # fmt: on
    """The product, and what its KIND makes of each tile.

    x_desc [M, D] and w_desc [Vp, D] bf16 in blocks [BM, BK] and [BN, BK]; out_desc [M, width] bf16 in blocks [BM, BN], unused by
    MEASURE; targets [M] int64. reference [M]: EXPONENTIALS subtracts it, SLOPES takes normalisers from it; first, second [M]: SLOPES'
    factors of p and of p log2 p. top, mass, turn [tiles, M]: largest logit, sum of exponentials, sum of these times logits; at [M]:
    logit of the target. Raw products times `inner` go into tanh; they, or it, times `outer` are the logits.
    """
    rows = tl.cdiv(M, BM)
    columns = tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=FLATTEN):
        row_tile, column_tile = _place(tile, rows, columns, GROUP)
        z = _accumulate(x_desc, w_desc, row_tile * BM, column_tile * BN, D, BM, BN, BK)
        row = row_tile * BM + tl.arange(0, BM)
        real = row < M
        if CAP:
            z = _tanh(z * inner)
            bend = 1.0 - z * z
        z = z * outer
        if KIND != SLOPES:
            _keep_targets(z, targets, at, row, real, column_tile * BN, BN)
        if column_tile == columns - 1:
            z = tl.where((column_tile * BN + tl.arange(0, BN))[None, :] < V, z, LOW)
        if KIND == MEASURE:
            base = tl.max(z, 1)
            tl.store(top + column_tile * M + row, base, mask=real)
        else:
            base = tl.load(reference + row, mask=real, other=0.0)
        z = z - base[:, None]
        p = tl.exp2(z)
        if KIND != SLOPES:
            tl.store(mass + column_tile * M + row, tl.sum(p, 1), mask=real)
        if KIND == MEASURE:
            tl.store(turn + column_tile * M + row, tl.sum(p * z, 1), mask=real)
        else:
            if KIND == SLOPES:
                by = tl.load(first + row, mask=real, other=0.0)[:, None]
                if ENTROPY:
                    by = by + tl.load(second + row, mask=real, other=0.0)[:, None] * z
                p = -p * by
            if CAP:
                p = p * bend
            out_desc.store([row_tile * BM, column_tile * BN], p.to(tl.bfloat16))


@triton.jit
def combine(
    top: tl.tensor,
    mass: tl.tensor,
    turn: tl.tensor,
    at: tl.tensor,
    logprobs: tl.tensor,
    entropy: tl.tensor,
    normaliser: tl.tensor,
    M: int,
    tiles: int,
    BR: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Logprob, entropy (nats) and logsumexp (units of log 2) of each row from what MEASURE wrote of its tiles."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    real = row < M
    highest = tl.full((BR,), LOW, tl.float32)
    total = tl.zeros((BR,), tl.float32)
    moment = tl.zeros((BR,), tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        place = tile[:, None] * M + row[None, :]
        there = (tile < tiles)[:, None] & real[None, :]
        tops = tl.load(top + place, mask=there, other=LOW)
        sums = tl.load(mass + place, mask=there, other=0.0)
        turns = tl.load(turn + place, mask=there, other=0.0)
        higher = tl.maximum(highest, tl.max(tops, 0))
        shift = tl.exp2(tops - higher[None, :])
        before = tl.exp2(highest - higher)
        moment = (moment + total * (highest - higher)) * before + tl.sum((turns + sums * (tops - higher[None, :])) * shift, 0)
        total = total * before + tl.sum(sums * shift, 0)
        highest = higher
    log_total = tl.log2(total)
    tl.store(logprobs + row, (tl.load(at + row, mask=real, other=0.0) - highest - log_total) * LN2, mask=real)
    tl.store(entropy + row, (log_total - moment / total) * LN2, mask=real)
    tl.store(normaliser + row, highest + log_total, mask=real)


@triton.jit
def target_logits(
    x: tl.tensor,
    w: tl.tensor,
    targets: tl.tensor,
    result: tl.tensor,
    V: int,
    D: int,
    inner: float,
    outer: float,
    lift: float,
    CAP: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """A row's reference: the logit of its target, in units of log 2, plus `lift`. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    total = tl.zeros((BD,), tl.float32)
    for start in range(0, D, BD):
        at = start + tl.arange(0, BD)
        there = (at < D) & inside
        total += tl.load(x + row * D + at, mask=there, other=0.0).to(tl.float32) * tl.load(w + target * D + at, mask=there, other=0.0).to(
            tl.float32
        )
    raw = tl.sum(total, 0)
    if CAP:
        raw = _tanh(raw * inner)
    tl.store(result + row, raw * outer + lift)


@triton.jit
def finish(
    x: tl.tensor,  # [M, D] bf16: multiplied by the row's factor, in place
    out: tl.tensor,  # [M, width] bf16: exponentials; the target's place gets minus the others' sum
    targets: tl.tensor,  # [M] int64
    reference: tl.tensor,  # [M] f32
    at: tl.tensor,  # [M] f32
    mass: tl.tensor,  # [tiles, M] f32
    share: tl.tensor,  # [M] f32: weights of the loss
    losses: tl.tensor,  # [M] f32: weight x negative logprob
    factors: tl.tensor,  # [M] f32: what gradients of the row are to be multiplied by
    trouble: tl.tensor,  # [1] int32: 1 if a row's exponentials overflow
    M: int,
    V: int,
    D: int,
    width: int,
    tiles: int,
    outer: float,
    bend: float,
    CAP: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """The row's sum, loss and factor from what EXPONENTIALS wrote."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    real = row < M
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        there = (tile < tiles)[:, None] & real[None, :]
        total += tl.sum(tl.load(mass + tile[:, None] * M + row[None, :], mask=there, other=0.0), 0)
    weight = tl.load(share + row, mask=real, other=0.0)
    base = tl.load(reference + row, mask=real, other=0.0)
    z = tl.load(at + row, mask=real, other=0.0)
    tl.store(losses + row, weight * tl.maximum((tl.log2(total) + base - z) * LN2, 0.0), mask=real)
    factor = weight / total * bend
    tl.store(factors + row, factor, mask=real)
    fine = (total < 1e38) | (row >= M)
    tl.store(trouble + row * 0, 1, mask=(~fine) & real)
    pinned = tl.exp2(z - base) - total
    if CAP:
        pinned = pinned * (1.0 - (z / outer) * (z / outer))
    target = tl.load(targets + row, mask=real, other=-1)
    tl.store(out + row.to(tl.int64) * width + target, pinned.to(tl.bfloat16), mask=real & (target >= 0) & (target < V))
    for start in range(0, D, BD):
        at_d = start + tl.arange(0, BD)
        there = real[:, None] & (at_d < D)[None, :]
        place = x + row.to(tl.int64)[:, None] * D + at_d[None, :]
        tl.store(place, (tl.load(place, mask=there, other=0.0).to(tl.float32) * factor[:, None]).to(tl.bfloat16), mask=there)


@triton.jit
def pin(
    out: tl.tensor,
    targets: tl.tensor,
    logprobs: tl.tensor,
    normaliser: tl.tensor,
    of_target: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    M: int,
    V: int,
    width: int,
    outer: float,
    CAP: tl.constexpr,
    BR: tl.constexpr,
) -> None:
    """SLOPES leaves out that the target's own logprob grows with its logit: set these places anew, computed in float32."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    real = row < M
    log2_p = tl.load(logprobs + row, mask=real, other=0.0) / LN2
    by = tl.load(first + row, mask=real, other=0.0) + tl.load(second + row, mask=real, other=0.0) * log2_p
    slope = tl.load(of_target + row, mask=real, other=0.0) - tl.exp2(log2_p) * by
    if CAP:
        capped = (log2_p + tl.load(normaliser + row, mask=real, other=0.0)) / outer
        slope = slope * (1.0 - capped * capped)
    target = tl.load(targets + row, mask=real, other=-1)
    tl.store(out + row.to(tl.int64) * width + target, slope.to(tl.bfloat16), mask=real & (target >= 0) & (target < V))


@triton.jit
def gather_sum(
    parts: tl.tensor,
    factors: tl.tensor,
    rows: tl.tensor,
    result: tl.tensor,
    M: int,
    D: int,
    splits: int,
    SCALED: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """result[rows[i]] = factors[i] * sum_s parts[s, i], in bfloat16. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(rows + row)
    factor = 1.0
    if SCALED:
        factor = tl.load(factors + row)
    for start in range(0, D, BD):
        at = start + tl.arange(0, BD)
        there = at < D
        total = tl.zeros((BD,), tl.float32)
        for part in range(splits):
            total += tl.load(parts + (part * M + row) * D + at, mask=there, other=0.0)
        tl.store(result + target * D + at, (total * factor).to(tl.bfloat16), mask=there)


@triton.jit
def multiply(values: tl.tensor, number: tl.tensor, count: int, BLOCK: tl.constexpr) -> None:
    """values *= number, in place; nothing is read or written if it is 1."""
    by = tl.load(number).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        tl.store(values + at, (tl.load(values + at, mask=there).to(tl.float32) * by).to(values.dtype.element_ty), mask=there)
