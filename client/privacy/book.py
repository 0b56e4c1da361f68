"""What one backward pass leaves of each parameter's per-record gradients, and their norms and clipped sums.

Book-Keeping (Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost", section 3): the gradient
of a matrix W (m, n) for one record is a sum over its positions t of g_t a_t', of the output's gradient and the layer's
input. Both are at hand after one backward pass, and give the norm, from the two Gram matrices (Goodfellow 2015, "Efficient
Per-Example Gradient Computations"; Li et al. 2022 for sequences), and the clipped sum, in one product; no (B, m, n) of
per-record gradients is kept. An embedding's gradient is kept by the rows that it touches. What is small, such as a bias,
is kept whole.

Norms and sums are float32 (double where the model is), whatever the precision of the pass.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Of the sum of |g_s . g_t| |a_s . a_t| over positions: a Gram norm's rounding, added to it, so that terms that cancel
# can make a record count for less, and never for more.
MARGIN = 8.0
# Squares below this may be rounded to few digits, or to zero, in a Gram matrix: a length of 1e-14 in float32.
FAINT = {torch.float32: 1e-28, torch.float64: 1e-280}


@dataclass(frozen=True)
class Outer:
    """Per-record gradients (m, n): the sum over t of left_t right_t', of left (B, T, m) and right (B, T, n)."""

    left: Tensor
    right: Tensor

    def norms_by_gram(self) -> bool:
        """Whether the Gram matrices (T, T) are cheaper than the gradients (m, n) themselves (Bu et al., section 3.3)."""
        return bool(2 * self.left.shape[1] ** 2 <= self.left.shape[2] * self.right.shape[2])

    def is_larger_than_its_product(self) -> bool:
        """Whether the gradients (m, n) take less memory than the two factors."""
        _, positions, m = self.left.shape
        n = self.right.shape[2]
        return bool(m * n <= positions * (m + n))

    def product(self) -> Tensor:
        """Return the gradients (B, m, n)."""
        return torch.bmm(wide(self.left).transpose(1, 2), wide(self.right))

    def squared_norms(self) -> Tensor:
        """Return (B,)."""
        if not self.norms_by_gram():
            return self.product().square_().sum((1, 2))
        left, right = wide(self.left), wide(self.right)
        lefts, rights = torch.bmm(left, left.transpose(1, 2)), torch.bmm(right, right.transpose(1, 2))
        faint = FAINT[left.dtype]
        squares = [gram.diagonal(dim1=1, dim2=2).clamp_min(0) for gram in (lefts, rights)]
        lengths = squares[0].sqrt() * squares[1].sqrt()
        margin = MARGIN * torch.finfo(left.dtype).eps * lengths.sum(1).square_()
        # Positions whose squares are lost below the smallest numbers: at most this much of the gradient's norm.
        lost = (squares[0] < faint) | (squares[1] < faint)
        most = squares[0].clamp_min(faint).sqrt() * squares[1].clamp_min(faint).sqrt()
        unseen = torch.where(lost, most, 0.0).sum(1)
        seen = lefts.mul_(rights).sum((1, 2)).clamp_min_(0) + margin
        return (seen.sqrt_() + unseen).square_()


@dataclass(frozen=True)
class Rows:
    """Per-record gradients of a table (V, n): row ids_t gets values_t, of ids (B, T) and values (B, T, n)."""

    ids: Tensor
    values: Tensor

    def gathered(self, table: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the values of one record and row: the record (U,), the row (U,) and the sum (U, n) of each pair."""
        records = torch.arange(len(self.ids), device=self.ids.device).unsqueeze(1)
        pairs, place = torch.unique(records * table + self.ids, return_inverse=True)
        values = wide(self.values).flatten(0, 1)
        sums = values.new_zeros((len(pairs), values.shape[1])).index_add_(0, place.flatten(), values)
        return pairs // table, pairs % table, sums


@dataclass
class Entry:
    """The per-record gradients of one tensor, over all its uses in one pass.

    `shape` is the tensor's, a matrix's first dimension being m (or V) and the others n together.
    """

    shape: torch.Size
    records: int
    device: torch.device
    outers: list[Outer] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    whole: Tensor | None = None  # (B, *shape)

    def add_outer(self, left: Tensor, right: Tensor) -> None:
        """Add a use as a matrix; where the product is smaller than its factors, it is kept instead."""
        outer = Outer(left, right)
        if outer.is_larger_than_its_product():
            self.add_whole(outer.product())
        else:
            self.outers.append(outer)

    def add_rows(self, ids: Tensor, values: Tensor) -> None:
        """Add a use as a table."""
        self.rows.append(Rows(ids, values))

    def add_whole(self, gradients: Tensor) -> None:
        """Add gradients (B, ...), of as many values as the tensor has."""
        gradients = wide(gradients).reshape(self.records, *self.shape)
        self.whole = gradients if self.whole is None else self.whole + gradients

    def factors(self) -> tuple[Outer | None, Rows | None]:
        """Join the uses of a kind along their positions."""
        outer = rows = None
        if self.outers:
            outer = Outer(_joined([use.left for use in self.outers]), _joined([use.right for use in self.outers]))
        if self.rows:
            rows = Rows(_joined([use.ids for use in self.rows]), _joined([use.values for use in self.rows]))
        return outer, rows

    def per_record(self) -> Tensor:
        """Return the gradients whole, (B, *shape)."""
        outer, rows = self.factors()
        total = self.whole
        if total is None:
            kind = wide(outer.left if outer else rows.values if rows else torch.zeros((), device=self.device))
            total = kind.new_zeros((self.records, *self.shape))
        if outer is not None:
            total = total + outer.product().reshape(total.shape)
        if rows is not None:
            records, ids, sums = rows.gathered(self.shape[0])
            total = total.clone() if total is self.whole else total
            total.flatten(2).index_put_((records, ids), sums, accumulate=True)
        return total

    def squared_norms(self) -> Tensor:
        """Return (B,)."""
        outer, rows = self.factors()
        if self.whole is not None:
            return (
                (self.whole if outer is None and rows is None else self.per_record())
                .reshape(self.records, -1)
                .square()
                .sum(1)
            )
        total = torch.zeros(self.records, device=self.device) if outer is None else outer.squared_norms()
        if rows is not None:
            records, _, sums = rows.gathered(self.shape[0])
            norms = sums.new_zeros(self.records).index_add_(0, records, sums.square().sum(1))
            total = total + norms
        if outer is not None and rows is not None:  # a tied weight: the two uses meet in the rows that both touch
            left, right, values = wide(outer.left), wide(outer.right), wide(rows.values)
            met = left.gather(2, rows.ids.unsqueeze(1).expand(-1, left.shape[1], -1))
            cross = met * torch.bmm(right, values.transpose(1, 2))
            margin = MARGIN * torch.finfo(left.dtype).eps * cross.abs().sum((1, 2))
            margin = margin + 2 * FAINT[left.dtype] * met.abs().sum((1, 2))  # products that are lost below it
            total = (total + 2 * cross.sum((1, 2))).clamp_min_(0) + margin
        return total

    def add_to(self, total: Tensor | None, factors: Tensor, kept: Tensor | None) -> Tensor:
        """Add the sum over records of factor x gradient to `total` (shape), in place; None begins a new one.

        `kept` (B,) marks the records that count; the others' values may be anything. None: all do.
        """
        scales, outers = factors.view(-1, 1, 1), list(self.outers)
        if total is None and outers:  # rather than to write zeros and add to them
            total = torch.mm(*_scaled(outers.pop(), scales, kept)).view(self.shape)
        if total is None:
            total = factors.new_zeros(self.shape)
        flat = total.view(total.shape[0], -1) if total.dim() > 1 else total.view(-1, 1)
        for outer in outers:
            flat.addmm_(*_scaled(outer, scales, kept))
        for use in self.rows:
            values = _clean(wide(use.values), kept) * scales
            flat.index_add_(0, use.ids.flatten(), values.flatten(0, 1))
        if self.whole is not None:
            whole = _clean(self.whole.reshape(self.records, -1), kept)
            total.view(-1).add_(factors @ whole)
        return total


def _scaled(outer: Outer, scales: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the two factors (m, B T) and (B T, n) of a scaled sum over records."""
    left, right = _clean(wide(outer.left), kept), _clean(wide(outer.right), kept)
    left, right = (left * scales, right) if left.shape[2] <= right.shape[2] else (left, right * scales)
    return left.flatten(0, 1).t(), right.flatten(0, 1)


def wide(values: Tensor) -> Tensor:
    """Return `values` in float32, or in double where they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def sum_type(values: Tensor) -> torch.dtype:
    """Precision of a sum of `values`: as in `wide`."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _clean(values: Tensor, kept: Tensor | None) -> Tensor:
    """Put zeros where a record does not count: zero times a NaN is a NaN."""
    if kept is None:
        return values
    return torch.where(kept.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
