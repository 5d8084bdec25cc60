"""Adding up snapshots in one fixed order, so that a result has the same bits whoever makes it, and beside what else.

Each term is added by one fused multiply-add, in the order of terms, to a sum that begins at zero; one whose coefficient
is 0 changes nothing. A matrix product does just that, and much faster for several targets, if its kernel keeps that
order. Whether it does is asked of the machine, not believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

TERMS_AT_ONCE = 48
_FEW = 3  # targets for which adding a snapshot while it is hot is faster than collecting a batch
_ROWS = 4  # of a matrix product, and multiples: kernels for fewer keep another order
_WIDTH = 16384  # columns of a matrix product, always: narrow ones are made by kernels of another order


def num_rows(num_targets: int) -> int:
    """How many rows of sums to provide for a number of targets; those beyond it are scratch."""
    return -(-num_targets // _ROWS) * _ROWS


def prefers_batches(num_targets: int, dtype: torch.dtype) -> bool:
    """Whether `add_batch` is faster with all rows of a batch at once."""
    return num_targets >= _FEW and _product_keeps_order(num_rows(num_targets), TERMS_AT_ONCE, dtype)


def add_batch(sums: torch.Tensor, factors: torch.Tensor, rows: Iterable[torch.Tensor], *, first: bool) -> None:
    """Add up to `TERMS_AT_ONCE` terms: sums[k] += sum over j of factors[k, j] * rows[j].

    Args:
        sums: [num_rows, n]; overwritten if this is the `first` batch.
        factors: [targets, terms], float64.
        rows: a matrix [num_rows + terms, n], of which the first `num_rows` are scratch; or the terms' rows of n, one
            after another and possibly in one place.
        first: whether `sums` holds nothing yet.
    """
    done = 0
    num_targets, num_terms = factors.shape
    if isinstance(rows, torch.Tensor):
        if _product_keeps_order(len(sums), num_terms, sums.dtype):
            done = rows.shape[1] // _WIDTH * _WIDTH
            _add_product(sums[:, :done], factors, rows[:, :done], first=first)
        if done == rows.shape[1]:
            return
        rows = rows[len(sums) :, done:]
    _add_in_turn(sums[:num_targets, done:], factors, rows, first=first)


def _add_product(sums: torch.Tensor, factors: torch.Tensor, values: torch.Tensor, *, first: bool) -> None:
    # What was added before takes part as the first terms, with coefficient 1: a product begins its own sums at zero.
    matrix = torch.eye(len(sums), len(values), dtype=sums.dtype, device="cpu")
    matrix[: len(factors), len(sums) :] = factors
    if first:
        matrix, values = matrix[:, len(sums) :], values[len(sums) :]
    else:
        values[: len(factors)] = sums[: len(factors)]
        values[len(factors) : len(sums)] = 0  # what is there may be no number, and 0 times that is none
    for i in range(0, values.shape[1], _WIDTH):
        torch.mm(matrix, values[:, i : i + _WIDTH], out=sums[:, i : i + _WIDTH])


def _add_in_turn(sums: torch.Tensor, factors: torch.Tensor, rows: Iterable[torch.Tensor], *, first: bool) -> None:
    if first:
        sums.zero_()
    for row, coefficients in zip(rows, factors.T.tolist(), strict=True):
        for k, coefficient in enumerate(coefficients):
            if coefficient:
                sums[k].add_(row, alpha=coefficient)


@cache
def _product_keeps_order(rows: int, terms: int, dtype: torch.dtype) -> bool:
    """Whether a matrix product of this shape gives the bits of additions in turn, here and now."""
    if not dtype.is_floating_point:
        return False
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(rows, terms, generator=generator, dtype=torch.float64, device="cpu")
    values = torch.randn(rows + terms, _WIDTH, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    found, wanted = (torch.empty(rows, _WIDTH, dtype=dtype, device="cpu") for _ in range(2))
    for first in (True, False):
        _add_product(found, factors, values, first=first)
        _add_in_turn(wanted, factors, values[rows:], first=first)
    return torch.equal(found, wanted)
