"""Adding up snapshots in one fixed order, so that a result has the same bits whoever makes it, and beside what else.

Terms are added in batches. Those of a batch are added one after another, each by one fused multiply-add, to a sum that
begins at zero; then that is added to the batches before it. A term whose coefficient is 0 changes nothing. A matrix
product does just that, and much faster for several targets, if its kernel keeps that order. Whether it does is asked of
the machine, not believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

# Terms of a batch, at most. Products of more are slower: what they read falls out of the caches.
BATCH = 24
_FEW = 3  # targets for which adding a snapshot while it is hot is faster than collecting a batch
_ROWS = 4  # of a matrix product, and multiples: kernels for fewer keep another order
_WIDTH = 16384  # columns of a matrix product, always: narrow ones are made by kernels of another order


def num_rows(num_targets: int) -> int:
    """How many rows of sums to provide for a number of targets; those beyond it are scratch."""
    return -(-num_targets // _ROWS) * _ROWS


def prefers_batches(num_targets: int, dtype: torch.dtype) -> bool:
    """Whether `add_batch` is faster with all rows of a batch at once."""
    return num_targets >= _FEW and _product_keeps_order(num_rows(num_targets), BATCH, dtype)


def add_batch(
    sums: torch.Tensor,
    factors: torch.Tensor,
    rows: torch.Tensor | Iterable[torch.Tensor],
    *,
    first: bool,
    scratch: torch.Tensor,
) -> None:
    """Add a batch: sums[k] += sum over j of factors[k, j] * rows[j].

    Args:
        sums: [num_rows, n]; overwritten by the `first` batch.
        factors: [targets, terms], float64; at most `BATCH` terms.
        rows: a matrix [terms, n]; or the rows one after another, possibly in one place.
        first: whether `sums` holds nothing yet.
        scratch: [num_rows, n]; overwritten.
    """
    num_targets, num_terms = factors.shape
    done = 0
    if isinstance(rows, torch.Tensor):
        # 0 times what is no number would be none: a target must not fall ill of a term that has no part in it.
        harmless = bool((factors != 0).all()) or bool(rows.sum().isfinite())
        if harmless and _product_keeps_order(len(sums), num_terms, sums.dtype):
            done = rows.shape[1] // _WIDTH * _WIDTH
            _add_product(sums[:, :done], factors, rows[:, :done], first=first)
        if done == rows.shape[1]:
            return
        rows = rows[:, done:]
    _add_in_turn(sums[:num_targets, done:], factors, rows, first=first, scratch=scratch[:num_targets, done:])


def _add_product(sums: torch.Tensor, factors: torch.Tensor, values: torch.Tensor, *, first: bool) -> None:
    matrix = torch.zeros(len(sums), len(values), dtype=sums.dtype, device="cpu")
    matrix[: len(factors)] = factors
    for i in range(0, values.shape[1], _WIDTH):
        found, terms = sums[:, i : i + _WIDTH], values[:, i : i + _WIDTH]
        torch.addmm(found, matrix, terms, beta=not first, out=found)  # beta=0: whatever was there


def _add_in_turn(
    sums: torch.Tensor, factors: torch.Tensor, rows: Iterable[torch.Tensor], *, first: bool, scratch: torch.Tensor
) -> None:
    chain = sums if first else scratch
    chain.zero_()
    for row, coefficients in zip(rows, factors.T.tolist(), strict=True):
        for k, coefficient in enumerate(coefficients):
            if coefficient:
                chain[k].add_(row, alpha=coefficient)
    if not first:
        sums.add_(scratch)


@cache
def _product_keeps_order(rows: int, terms: int, dtype: torch.dtype) -> bool:
    """Whether a matrix product of this shape gives the bits of additions in turn, here and now."""
    if not dtype.is_floating_point:
        return False
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(rows, terms, generator=generator, dtype=torch.float64, device="cpu")
    values = torch.randn(terms, _WIDTH, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    found = torch.randn(rows, _WIDTH, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    wanted, scratch = found.clone(), torch.empty_like(found)
    for first in (True, False):
        _add_product(found, factors, values, first=first)
        _add_in_turn(wanted, factors, values, first=first, scratch=scratch)
        if not torch.equal(found, wanted):
            return False
    return True
