"""Averaging lengths in other numbers, against what EMAs with those numbers really average."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phema_dist import (
    ProfileError,
    beta_to_sigma_rel,
    half_life_to_sigma_rel,
    sigma_rel_to_half_life,
    translate,
)
from phema_dist.cli import main
from phema_dist.profile import MAX_SIGMA_REL, gamma_to_sigma_rel
from phema_dist.translation import half_life_to_beta

ORACLES = json.loads((Path(__file__).parent / "oracles.json").read_text())


def spread(betas: np.ndarray) -> float:
    """sigma_rel of an EMA with these betas, one for each step, by the share of each step in it."""
    kept = np.cumprod(np.append(betas, 1.0)[::-1])[::-1]
    shares, times = (1 - betas) * kept[1:], np.arange(1, len(betas) + 1)
    mean = shares @ times / shares.sum()
    return float(np.sqrt(shares @ (times - mean) ** 2 / shares.sum())) / len(betas)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.3, 0.69])
def test_a_half_life_that_is_a_share_of_t_has_that_sigma_rel(fraction: float) -> None:
    steps = np.arange(1, 100_001)
    torchtitan = 2.0 ** (-1.0 / (fraction * steps))  # its decay at each update
    assert half_life_to_sigma_rel(fraction) == pytest.approx(spread(torchtitan), rel=1e-3)
    edm = 0.5 ** (256 / np.minimum(np.inf, steps * 256 * fraction))  # batches of 256, before its half-life is reached
    assert half_life_to_sigma_rel(fraction) == pytest.approx(spread(edm), rel=1e-3)


def test_half_lives_of_the_tracked_lengths() -> None:
    for sigma_rel, gamma in ORACLES["gamma"].items():
        assert sigma_rel_to_half_life(float(sigma_rel)) == pytest.approx(math.log(2) / (gamma + 1), rel=1e-12)
        assert translate(float(sigma_rel)).gamma == pytest.approx(gamma, rel=1e-12)
    for sigma_rel, beta in ORACLES["beta_table_T_1000"].items():
        if sigma_rel != "about":
            assert translate(float(sigma_rel), 1000).beta == pytest.approx(beta, abs=5e-4)
    assert half_life_to_sigma_rel(math.log(2)) == pytest.approx(MAX_SIGMA_REL, rel=1e-12)


@given(st.floats(1e-4, MAX_SIGMA_REL), st.floats(1.0, 1e9))
def test_round_trips(sigma_rel: float, t: float) -> None:
    said = translate(sigma_rel, t)
    assert half_life_to_sigma_rel(said.half_life_fraction) == pytest.approx(sigma_rel, rel=1e-9)
    assert gamma_to_sigma_rel(said.gamma) == pytest.approx(sigma_rel, rel=1e-9)
    assert said.half_life == pytest.approx(said.half_life_fraction * t)
    if said.beta is None:
        assert said.mean_age is not None
        assert said.mean_age < 0.5
    elif said.beta_half_life:
        assert half_life_to_beta(said.beta_half_life) == pytest.approx(said.beta, rel=1e-12)
        # beta itself is rounded: near 1 little is left of its digits
        assert beta_to_sigma_rel(said.beta, t) == pytest.approx(sigma_rel, rel=1e-9 + 1e-15 / (1 - said.beta))


def test_the_half_life_of_a_constant_beta_is_one() -> None:
    said = translate(0.1, 200_000)
    assert said.beta is not None
    assert said.beta_half_life is not None
    assert said.beta**said.beta_half_life == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 0.7, math.inf, math.nan])
def test_an_infeasible_half_life_is_refused_with_the_bound(fraction: float) -> None:
    with pytest.raises(ProfileError, match=r"\(0, ln 2 = 0\.693147\]"):
        half_life_to_sigma_rel(fraction)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    assert main(["convert", *arguments, "--json"]) == 0
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


def test_all_ways_to_say_it_mean_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = said(capsys, "--sigma-rel", "0.1", "--t", "200000", "--batch", "256")
    assert wanted["gamma"] == pytest.approx(ORACLES["gamma"]["0.1"])
    for name, key in [
        ("--gamma", "gamma"), ("--half-life", "half_life_fraction"), ("--beta", "beta"),
        ("--half-life-steps", "beta_half_life"), ("--half-life-kimg", "half_life_kimg"),
    ]:  # fmt: skip
        found = said(capsys, name, repr(wanted[key]), "--t", "200000", "--batch", "256")
        assert found == {key: pytest.approx(value, rel=1e-9) for key, value in wanted.items()}


def test_the_example_in_the_help_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    example = " ".join(capsys.readouterr().out.split()).partition("example: phema ")[2].split()
    assert main(example) == 0
    rows = dict(line.rsplit("  ", 1)[0].rstrip().rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {name.strip(): value for name, value in rows.items()} == {
        "sigma_rel": "0.1", "gamma": "6.9372", "half-life / t": "0.0873289", "mean age / t": "0.111892",
        "half-life": "17,465.8", "mean age": "22,378.4", "constant beta": "0.999955315", "its half-life": "15,511.5",
    }  # fmt: skip
    assert main(["convert", "--sigma-rel", "0.01", "--t", "20"]) == 0
    assert "constant beta" in (table := capsys.readouterr().out)
    assert "none" in table


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sigma-rel", "0.4"], "sigma_rel must lie in (0, 0.28867]"),
        (["--gamma", "-0.5"], "gamma must be finite and >= 0"),
        (["--half-life", "0.8"], "(0, ln 2 = 0.693147]"),
        (["--beta", "0.9999", "--t", "2000"], "beta must be at most 0.9990005, uniform over t=2000"),
        (["--beta", "0.9999"], "--t must say how long the training is"),
        (["--half-life-kimg", "500", "--t", "2000"], "--batch must say how many images"),
        (["--half-life-steps", "0", "--t", "2000"], "a half-life must be a positive number"),
        (["--sigma-rel", "0.1", "--t", "0"], "t must be positive and finite"),
        (["--sigma-rel", "0.1", "--t", "inf"], "t must be positive and finite"),
        (["--beta", "0.999", "--t", "inf"], "t must be positive and finite"),
        (["--beta", "0.999", "--t", "nan"], "t must be positive and finite"),
        (["--half-life-steps", "100", "--t=-5"], "t must be positive and finite"),
        (["--sigma-rel", "0.1", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_bound(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 2
    assert told in capsys.readouterr().err
