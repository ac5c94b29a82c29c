"""Blocks of chunks for the chunked WKV-7: how tokens are cut into them, where documents start in them, and all that is
computed before values and states come in. The maths and its letters are those of `chunked`.

Shapes: B batch, T time, H heads, K key width, C tokens of a chunk, D a width (K or V); b, h: the batches and heads of a
block, n its chunks, N = n b h, M = b h. A dimension of size C + 1 holds c'_1, c_1, .., c_C.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """What is worked on together: some batches and heads, and `count` chunks from token `start` on.

    `size` is the number of real tokens, the rest of the chunks is padding; `length` is C.
    """

    batches: slice
    heads: slice
    start: int
    size: int
    count: int
    length: int

    def view(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """The block's tokens as [b, n, C, h, D]: a view, or a copy padded with identity (zero) tokens."""
        x = x_BTHD[self.batches, self.start : self.start + self.size, self.heads]
        padding = self.count * self.length - self.size
        if padding:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
        return x.unflatten(1, (self.count, self.length))

    def write(self, out_BTHD: torch.Tensor, x_bnChD: torch.Tensor) -> None:
        """Store [b, n, C, h, D] at the block's tokens, without the padding."""
        out = out_BTHD[self.batches, self.start : self.start + self.size, self.heads]
        if self.size == self.count * self.length:
            out.unflatten(1, (self.count, self.length)).copy_(x_bnChD)
        else:
            out.copy_(x_bnChD.flatten(1, 2)[:, : self.size])


def plan_blocks(shape: torch.Size, length: int, floats: int) -> list[list[Block]]:
    """For each group of batches and heads its blocks in time order.

    shape: that of r_BTHK.
    length: C, a power of two; what is left at the end is one shorter chunk, a power of two as well, padded.
    floats: of one [C, K] operand over the chunks, batches and heads of a block; at least one chunk is taken.
    """
    batch, time, heads, width = shape
    places = max(1, floats // (length * width))
    head_step = min(heads, places)
    batch_step = min(batch, max(1, places // heads))
    count = max(1, places // (head_step * batch_step))
    whole, rest = divmod(time, length)
    # start, real tokens, chunks, length
    spans = [
        (i * length, min(count, whole - i) * length, min(count, whole - i), length)
        for i in range(0, whole, count)
    ]
    if rest:
        spans.append((whole * length, rest, 1, 1 << (rest - 1).bit_length()))
    return [
        [
            Block(slice(i, min(i + batch_step, batch)), slice(j, min(j + head_step, heads)), *span)
            for span in spans
        ]
        for i in range(0, batch, batch_step)
        for j in range(0, heads, head_step)
    ]


def as_rows(x_bnChD: torch.Tensor) -> torch.Tensor:
    """[b, n, C, h, D] as [n, b, h, C, D]: all that is done at one link of the serial chain lies together."""
    return x_bnChD.permute(1, 0, 3, 2, 4)


def as_tokens(x_ND: torch.Tensor, block: Block) -> torch.Tensor:
    """[N, rows, D] as [b, n, rows, h, D]."""
    heads = block.heads.stop - block.heads.start
    return x_ND.unflatten(0, (block.count, -1, heads)).permute(1, 0, 3, 2, 4)


def centring(length: int, like: torch.Tensor) -> torch.Tensor:
    """[C + 1, C]: maps the log_w of a chunk to (c'_1, c_1, .., c_C) - m, summing only what lies between."""
    index = torch.arange(length + 1, device=like.device)
    before = (index.unsqueeze(1) > index[:-1]).to(like.dtype)
    return before - before[length // 2]


def _unit_inverse(lower_NCC: torch.Tensor) -> torch.Tensor:
    """(I - L)^{-1} of a strictly lower triangular L, C a power of two, by doubling the size of inverted blocks.

    Every intermediate is the inverse of a diagonal block, so nothing large has to cancel; the Neumann product
    (I + L)(I + L^2)(I + L^4).. does cancel and loses everything on repeated keys.
    """
    length = lower_NCC.shape[-1]
    index = torch.arange(length, device=lower_NCC.device)

    def corners(size: int) -> torch.Tensor:
        part = index // size
        return lower_NCC * ((part.unsqueeze(1) == part + 1) & (part % 2 == 0)).to(lower_NCC.dtype)

    inverse = torch.eye(length, dtype=lower_NCC.dtype, device=lower_NCC.device) + corners(1)
    size = 2
    while size < length:
        inverse = torch.baddbmm(inverse, torch.bmm(inverse, corners(size)), inverse)
        size *= 2
    return inverse


def _keep_(x: torch.Tensor, mask: torch.Tensor) -> None:
    """x <- where(mask, x, 0) in place, on the bits: ten times faster than masked_fill, and infinities vanish too."""
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    x.view(bits).bitwise_and_(-mask.to(bits))


@dataclass(frozen=True)
class Borders:
    """Masks of a block in which a document starts; the float ones hold 0 and 1. M is b h."""

    same_nb1: torch.Tensor  # bool [n, b, 1, C, C]: the two tokens are of one document
    meets_N: torch.Tensor  # [N, 2C, 1]: the rows of A, R that see the state that enters
    enters_N: torch.Tensor  # [N, 2C, 1]: the rows of B, K that reach the state that leaves
    survives_nM: torch.Tensor  # [n, b h, 1, 1]: the state that enters reaches the state that leaves


def _borders(block: Block, reset_BT: torch.Tensor | None, dtype: torch.dtype) -> Borders | None:
    if reset_BT is None:
        return None
    reset = reset_BT[block.batches, block.start : block.start + block.size]
    if not reset.any():
        return None
    reset = torch.nn.functional.pad(reset, (0, block.count * block.length - block.size))
    document = reset.unflatten(1, (block.count, block.length)).transpose(0, 1).cumsum(-1)
    heads = block.heads.stop - block.heads.start

    def each_row(mask_nbC: torch.Tensor) -> torch.Tensor:
        return mask_nbC.to(dtype).repeat_interleave(heads, dim=1).flatten(0, 1).repeat(1, 2).unsqueeze(-1)

    return Borders(
        same_nb1=(document.unsqueeze(-1) == document.unsqueeze(-2)).unsqueeze(2),
        meets_N=each_row(document == 0),
        enters_N=each_row(document == document[..., -1:]),
        survives_nM=(document[..., -1] == 0).to(dtype).repeat_interleave(heads, dim=1)[..., None, None],
    )


@dataclass(frozen=True)
class Prepared:
    """All of a block that does not depend on values and states; forward and backward both build it."""

    block: Block
    borders: Borders | None
    grow: torch.Tensor  # [b, n, C, h, K]: e^{c' - m}, the factor of A
    fall: torch.Tensor  # [b, n, C, h, K]: e^{c - m}, the factor of R
    rise: torch.Tensor  # [b, n, C, h, K]: e^{m - c}, the factor of B and K
    enter: torch.Tensor  # [b h, K, 1]: e^m of the first chunk
    leave: torch.Tensor  # [n, b h, K, 1]: e^{c_C - m}, times e^m of the chunk that follows in the block
    ar: torch.Tensor  # [N, 2C, K]: A, R
    rw: torch.Tensor  # [N, 2C, K]: R, W as they meet the state
    bk: torch.Tensor  # [N, 2C, K]: B, K
    bk_state: torch.Tensor  # [N, 2C, K]: B, K as they enter the state
    mask: torch.Tensor  # bool, [2C, 2C] or [n, b, 1, 2C, 2C]
    scores: torch.Tensor  # [N, 2C, 2C]: L M; Q P
    inverse: torch.Tensor  # [N, C, C]: F

    def mask_(self, x_N: torch.Tensor) -> None:
        """Zero the masked pairs of [N, 2C, 2C] in place."""
        heads = self.block.heads.stop - self.block.heads.start
        _keep_(x_N.unflatten(0, (self.block.count, -1, heads)), self.mask)


def prepare(
    block: Block,
    r: torch.Tensor,
    log_w: torch.Tensor,
    k: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    reset_BT: torch.Tensor | None,
) -> Prepared:
    """Prepare a block of r, log_w, k, a, b, each [B, T, H, K] over all tokens, float32 or float64.

    reset_BT: bool, True at the first token of a document, or None.
    """
    length = block.length
    log_w = block.view(log_w)
    batch, count, _, heads, width = log_w.shape
    flat = log_w.flatten(3).flatten(0, 1)
    factors = torch.bmm(centring(length, flat).expand(len(flat), -1, -1), flat).exp_()
    factors = factors.view(batch, count, length + 1, heads, width)
    grow, fall = factors[:, :, :-1], factors[:, :, 1:]
    rise = fall.reciprocal()

    rows = (count, batch, heads, 2 * length, width)
    ar, bk = log_w.new_empty(rows), log_w.new_empty(rows)
    torch.mul(as_rows(block.view(a)), as_rows(grow), out=ar[..., :length, :])
    torch.mul(as_rows(block.view(r)), as_rows(fall), out=ar[..., length:, :])
    torch.mul(as_rows(block.view(b)), as_rows(rise), out=bk[..., :length, :])
    torch.mul(as_rows(block.view(k)), as_rows(rise), out=bk[..., length:, :])
    ar, bk = ar.flatten(0, 2), bk.flatten(0, 2)

    index = torch.arange(length, device=log_w.device)
    strict, loose = index.unsqueeze(1) > index, index.unsqueeze(1) >= index
    mask = torch.cat((strict, loose)).repeat(1, 2)
    borders = _borders(block, reset_BT, log_w.dtype)
    meets, bk_state = ar, bk
    if borders is not None:
        mask = mask & borders.same_nb1.repeat(1, 1, 1, 2, 2)
        meets, bk_state = ar * borders.meets_N, bk * borders.enters_N

    scores = torch.bmm(ar, bk.mT)
    _keep_(scores.unflatten(0, (count, batch, heads)), mask)
    inverse = _unit_inverse(scores[:, :length, :length])
    rw = torch.cat((meets[:, length:], torch.bmm(inverse, meets[:, :length])), dim=1)

    # e^m is the inverse of the first row's factor, since c'_1 = 0.
    middle = factors[:, :, 0].transpose(0, 1).flatten(1, 2).reciprocal().unsqueeze(-1)
    leave = factors[:, :, -1].transpose(0, 1).flatten(1, 2).unsqueeze(-1).clone()
    leave[:-1] *= middle[1:]
    return Prepared(
        block, borders, grow, fall, rise, middle[0], leave, ar, rw, bk, bk_state, mask, scores, inverse
    )
