"""Sums have the bits of additions in turn, whichever way they are made."""

import pytest
import torch

from phema_dist.synthesis import sums
from phema_dist.synthesis.sums import add_batch, num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("num_targets", [1, 3, 4, 8, 13])
@pytest.mark.parametrize("at_once", [7, 20])
def test_a_matrix_product_is_used_only_where_it_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, num_targets: int, at_once: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_targets)
    coefficients = torch.randn(num_targets, 20, dtype=torch.float64)
    values = torch.randn(20, 70_001, dtype=torch.float64).to(dtype)

    def added() -> torch.Tensor:
        found = torch.full((num_rows(num_targets), 70_001), torch.nan, dtype=dtype)
        for begin in range(0, 20, at_once):
            batch = slice(begin, begin + at_once)
            scratch = torch.full_like(found, torch.nan)
            add_batch(found, coefficients[:, batch], torch.cat([scratch, values[batch]]), first=begin == 0)
        return found[:num_targets]

    as_it_comes = added()
    monkeypatch.setattr(sums, "_product_keeps_order", lambda *_: False)
    in_turn = added()
    assert torch.equal(as_it_comes, in_turn)
    chain = torch.zeros(num_targets, 70_001, dtype=dtype)
    for column, row in zip(coefficients.T.tolist(), values, strict=True):
        for k, coefficient in enumerate(column):
            chain[k].add_(row, alpha=coefficient)
    assert torch.equal(as_it_comes, chain)  # whatever is added at once
    exact = coefficients.to(in_turn.real.dtype).double() @ values.to(torch.complex128).real
    error = (in_turn.to(torch.complex128).real - exact).abs().max()
    assert error < 20 * torch.finfo(dtype).eps * 10


def test_a_product_that_adds_in_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(found: torch.Tensor, factors: torch.Tensor, values: torch.Tensor, *, first: bool) -> None:
        sums._add_in_turn(found, factors.flip(1), values[len(found) :].flip(0), first=first)

    monkeypatch.setattr(sums, "_add_product", backwards)
    assert not sums._product_keeps_order.__wrapped__(4, 16, torch.float32)
