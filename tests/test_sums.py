"""Sums have the bits of additions in turn, whichever way they are made."""

import pytest
import torch

from phema_dist.synthesis import sums
from phema_dist.synthesis.sums import BATCH, add_batch, num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("num_targets", [1, 3, 4, 8, 13])
def test_a_matrix_product_is_used_only_where_it_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, num_targets: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_targets)
    coefficients = torch.randn(num_targets, 30, dtype=torch.float64)
    coefficients[0, [0, 7]] = 0
    values = torch.randn(30, 70_001, dtype=torch.float64).to(dtype)
    batches = [slice(0, BATCH), slice(BATCH, 30)]

    def added(*, one_place: bool) -> torch.Tensor:
        found = torch.full((num_rows(num_targets), 70_001), torch.nan, dtype=dtype)
        for batch in batches:
            rows, scratch = iter(values[batch]) if one_place else values[batch], torch.full_like(found, torch.nan)
            add_batch(found, coefficients[:, batch], rows, first=not batch.start, scratch=scratch)
        return found[:num_targets]

    as_it_comes = added(one_place=False)
    assert torch.equal(as_it_comes, added(one_place=True))
    monkeypatch.setattr(sums, "_product_keeps_order", lambda *_: False)
    assert torch.equal(as_it_comes, added(one_place=False))
    total = torch.zeros(num_targets, 70_001, dtype=dtype)
    for batch in batches:
        chain = torch.zeros_like(total)
        for column, row in zip(coefficients[:, batch].T.tolist(), values[batch], strict=True):
            for k, coefficient in enumerate(column):
                chain[k].add_(row, alpha=coefficient)
        total += chain
    assert torch.equal(as_it_comes, total)
    exact = coefficients.to(total.real.dtype).double() @ values.to(torch.complex128).real
    error = (total.to(torch.complex128).real - exact).abs().max()
    assert error < 30 * torch.finfo(dtype).eps * 10


@pytest.mark.parametrize("num_targets", [1, 8])
def test_what_has_no_part_in_a_target_does_not_harm_it(num_targets: int) -> None:
    coefficients = torch.ones(num_targets, 3, dtype=torch.float64)
    coefficients[0, 1] = 0
    values = torch.ones(3, 40_000)
    values[1, 20_000] = torch.inf
    found = torch.empty(num_rows(num_targets), 40_000)
    add_batch(found, coefficients, values, first=True, scratch=torch.empty_like(found))
    assert torch.equal(found[0], torch.full((40_000,), 2.0))
    assert torch.equal(found[1:num_targets].isinf().sum(1), torch.ones(num_targets - 1))


def test_a_product_that_adds_in_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(found: torch.Tensor, factors: torch.Tensor, values: torch.Tensor, *, first: bool) -> None:
        sums._add_in_turn(found, factors.flip(1), values.flip(0), first=first, scratch=torch.empty_like(found))

    assert sums._product_keeps_order.__wrapped__(4, 16, torch.float32)
    monkeypatch.setattr(sums, "_add_product", backwards)
    assert not sums._product_keeps_order.__wrapped__(4, 16, torch.float32)
