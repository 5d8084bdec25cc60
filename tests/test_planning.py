"""A plan before training, and the run that follows it: what was predicted is what one-hot parameters measure."""

import contextlib
import json
import math
import os
import pickle
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import phema_dist
from phema_dist import PostHocEMA, ProfileError, SettingsError, host, planning, prediction, schedule, sizing, synthesize
from phema_dist.cli import main
from phema_dist.planning import GOOD_ERROR, alternatives, best_sigma_rels, plan
from phema_dist.prediction import Plan, in_units, update_times
from phema_dist.profile import PowerProfile, fit, recorded_errors
from phema_dist.schedule import MIN_RELATIVE_DT, reconstruction_errors, snapshots_to_keep
from phema_dist.sizing import count_parameters
from phema_dist.storage.run import open_run
from phema_dist.storage.snapshot import HALF_ULP
from phema_dist.storage.store import open_store
from phema_dist.training.staging import NUM_SLOTS

EXAMPLE = ["--steps", "500000", "--parameters", "1.3B"]


class Clock(nn.Module):
    """A model whose parameter is the unit vector of the current call, in float64: its averages are their profiles."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(calls + 1, dtype=torch.float64))

    @torch.no_grad()
    def set(self, call: int) -> None:
        self.weight.zero_()
        self.weight[call] = 1


def gamma_of(sigma_rel: float) -> float:
    """By bisection, sharing nothing with the library."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wide else (low, middle)
    return low


def tracked(gamma: float, times: np.ndarray) -> np.ndarray:
    """The mass of each update, by the recursion as the paper writes it."""
    masses, before = np.zeros(len(times)), 0
    for i, t in enumerate(times):
        masses *= ((t - (t - before)) / t) ** (gamma + 1)
        masses[i] += 1 - ((t - (t - before)) / t) ** (gamma + 1)
        before = t
    return masses


def follow(chosen: Plan, url: Path) -> None:
    """A real run by the plan."""
    calls = chosen.steps // chosen.t_per_call
    model = Clock(calls)
    with PostHocEMA.from_model(model, url, plan=chosen) as ema:
        for call in range(1, calls + 1):
            model.set(call)
            ema.update_(model, t=call * chosen.t_per_call)
            if call % chosen.checkpoint_every == 0:
                ema._session.writer.drain()  # or a slow disk would skip snapshots


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(plan(1203, 1204, max_checkpoints=12), id="all kept, 3 sigma_rels, the range of the defaults"),
        pytest.param(
            plan(997, 998, sigma_rels=(0.05, 0.28), max_checkpoints=8, checkpoint_every=23, update_every=7),
            id="retention, a rare update, an odd end",
        ),
        pytest.param(
            plan(300, 301, sigma_rels=(0.05, 0.28), max_checkpoints=10, update_every=15),
            id="so few updates that the continuous error is 0.028 instead of 0.016",
        ),
        pytest.param(
            plan(64 * 900, 901, t_per_call=64, sigma_rel_range=(0.05, 0.10), sigma_rels=(0.05, 0.07, 0.1),
                 max_checkpoints=40), id="t in samples, a tiny error",
        ),
    ],
)  # fmt: skip
def test_the_predicted_errors_are_those_of_a_real_run_of_one_hot_parameters(chosen: Plan, tmp_path: Path) -> None:
    follow(chosen, tmp_path / "run")
    run = open_run(open_store(tmp_path / "run"))
    assert tuple(s.t for s in run.complete) == chosen.ts
    knots = [(0, 0), *run.complete[-1].manifests[0].updates]
    times = np.concatenate([np.linspace(a, b, n + 1)[1:] for (a, _), (b, n) in pairwise(knots)])
    np.testing.assert_allclose(update_times(chosen), times)
    assert len(times) == chosen.num_updates

    targets = np.geomspace(*chosen.sigma_rel_range, 80)
    errors = []
    for sigma_rel, average in zip(targets, synthesize(tmp_path / "run", targets.tolist()), strict=True):
        profile = average.state_dict["weight"].numpy()[(times / chosen.t_per_call).round().astype(int)]
        wanted, widths = tracked(gamma_of(sigma_rel), times), np.diff(times, prepend=0)
        errors.append(math.sqrt(((profile - wanted) ** 2 / widths).sum() / (wanted**2 / widths).sum()))
    assert max(errors) == pytest.approx(chosen.worst_error, rel=0.05)
    assert np.mean(errors) == pytest.approx(chosen.mean_error, rel=0.05)
    assert 1e-6 < chosen.mean_error <= chosen.worst_error <= chosen.stop_error


def brute_force_times(p: Plan) -> list[int]:
    times = [0]
    for call in range(1, p.steps // p.t_per_call + 1):
        t = call * p.t_per_call
        due = call % p.update_every == 0 and (t - times[-1]) / t >= MIN_RELATIVE_DT
        if due or call % p.checkpoint_every == 0:
            times.append(t)
    return times[1:]


@pytest.mark.parametrize("t_per_call", [1, 3, 2048])
@pytest.mark.parametrize(("update_every", "checkpoint_every"), [(1, 1000), (7, 999), (10, 4), (3, 30_000)])
def test_updates_are_those_that_the_training_loop_makes(
    t_per_call: int, update_every: int, checkpoint_every: int
) -> None:
    calls = 40_001
    settings = Plan(
        calls * t_per_call, t_per_call, 1, 1, (0.05, 0.1), (0.05, 0.1), update_every, checkpoint_every, 20, "fp32",
        (), 0, 0.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
    assert update_times(settings).tolist() == brute_force_times(settings)


def test_in_a_long_run_the_updates_of_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MIN_RELATIVE_DT", 1e-3)  # or a long run is one of more than 10 000 calls
    chosen = plan(1060, 2, max_checkpoints=4, update_every=1)
    model = nn.Linear(1, 1)
    with PostHocEMA.from_model(model, tmp_path / "run", plan=chosen) as ema:
        for _ in range(1060):
            ema.update_(model)
    run = open_run(open_store(tmp_path / "run"))
    assert run.complete[-1].t == chosen.ts[-1]
    assert sum(count for _, count in run.complete[-1].manifests[0].updates) == chosen.num_updates < 1040


@pytest.mark.parametrize("wanted", [{}, {"max_checkpoints": 20}, {"sigma_rel_range": (0.02, 0.28)}])
def test_the_worst_error_is_the_worst_of_all_targets_however_narrow_its_bump(wanted: dict[str, Any]) -> None:
    chosen = plan(30_000, 10**6, **wanted)
    targets = [PowerProfile(float(s), chosen.ts[-1]) for s in np.geomspace(*chosen.sigma_rel_range, 300)]
    stored = [PowerProfile(s, t) for s in chosen.sigma_rels for t in chosen.ts]
    errors = recorded_errors(stored, fit(stored, targets)[0], targets, update_times(chosen))
    assert chosen.worst_error == pytest.approx(errors.max(), rel=0.04)
    assert chosen.mean_error == pytest.approx(errors.mean(), rel=0.1)  # between few targets


@pytest.mark.parametrize(
    "settings", [{"max_checkpoints": 16}, {"max_checkpoints": 15}, {"max_checkpoints": 8, "checkpoint_every": 2000}]
)
def test_the_error_at_an_early_stop_is_the_worst_of_the_second_half(settings: dict[str, Any]) -> None:
    chosen = plan(32_000, 1, sigma_rels=(0.05, 0.28), **settings)
    kept: tuple[int, ...] = ()
    at, between = [], []
    for t in range(chosen.checkpoint_every // 4, 32_001, chosen.checkpoint_every // 4):
        ts = snapshots_to_keep((*kept, t), chosen.sigma_rels, chosen.max_checkpoints)
        if 2 * t >= chosen.steps:
            error = reconstruction_errors(ts, chosen.sigma_rels, np.geomspace(0.05, 0.28, 80)).max()
            (between if t % chosen.checkpoint_every else at).append(error)
        kept = kept if t % chosen.checkpoint_every else ts
    assert ("checkpoint_every" in settings) == (max(between) > 1.05 * max(at))  # one is dropped for close's
    assert chosen.stop_error == pytest.approx(max(between + at), rel=0.1)
    assert set(kept) <= set(chosen.ts)


@pytest.mark.parametrize(("wanted", "number"), [((0.05, 0.20), 2), ((0.03, 0.12), 2), ((0.05, 0.15), 3)])
def test_the_tracked_sigma_rels_are_about_the_best(wanted: tuple[float, float], number: int) -> None:
    targets = np.geomspace(*wanted, 24)

    def worst(tracked: tuple[float, ...]) -> float:
        return float(reconstruction_errors(range(1, 21), tracked, targets).max())

    found = best_sigma_rels(wanted, number)
    grid = np.geomspace(wanted[0] / 1.2, wanted[1] * 1.2, 12 if number == 2 else 9)
    assert worst(found) < 1.15 * min(worst(tracked) for tracked in combinations(grid.tolist(), number))
    assert worst(found) < worst((wanted[0], wanted[1]))
    assert len(found) == number == len(set(found))


def test_large_coefficients_are_no_way_to_a_small_error() -> None:
    """From (0.095, 0.226, 0.28), 0.05 can be made with coefficients of norm 285."""
    found = best_sigma_rels((0.05, 0.28), 3)
    stored = [PowerProfile(s, t) for s in found for t in range(1, 21)]
    targets = [PowerProfile(float(s), 20) for s in np.geomspace(0.05, 0.28, 24)]
    x, errors = fit(stored, targets)
    assert np.linalg.norm(x, axis=0).max() < 50
    assert errors.max() < 0.003


def test_a_good_plan_takes_no_more_than_it_needs_and_never_more_than_there_is() -> None:
    wanted = {"ranks": 64, "sigma_rel_range": (0.05, 0.20)}
    rich = plan(500_000, 1_300_000_000, storage_bytes=2 * 10**12, **wanted)
    assert rich.stop_error <= planning.GOOD_ERROR
    assert (len(rich.sigma_rels), rich.checkpoint_dtype) == (2, "fp32")
    assert rich.bytes_in_all < 0.3e12
    assert plan(500_000, 1_300_000_000, **wanted) == rich

    fair = plan(500_000, 1_300_000_000, storage_bytes=160 * 10**9, **wanted)
    assert (len(fair.sigma_rels), fair.checkpoint_dtype) == (3, "fp32")
    assert fair.stop_error <= planning.GOOD_ERROR
    poor = plan(500_000, 1_300_000_000, storage_bytes=40 * 10**9, **wanted)
    assert poor.checkpoint_dtype == "fp16"
    assert "more snapshots, more frequent ones" in " ".join(planning.warnings(poor))
    for chosen, budget in ((fair, 160e9), (poor, 40e9)):
        assert len(chosen.ts) * chosen.snapshot_bytes == chosen.bytes_in_all <= budget
    frequent = plan(20_000, 10**9, storage_bytes=30 * 10**9, sigma_rels=(0.05, 0.28), checkpoint_every=1000)
    assert frequent.bytes_in_all == frequent.snapshot_bytes * (frequent.max_checkpoints + 1) <= 30e9


def test_where_two_sigma_rels_need_hundreds_of_snapshots_three_are_tracked() -> None:
    chosen = plan(500_000, 10**9, sigma_rel_range=(0.01, 0.28))
    assert (len(chosen.sigma_rels), chosen.max_checkpoints) == (3, len(chosen.ts))
    assert len(chosen.ts) < 100
    assert chosen.stop_error <= planning.GOOD_ERROR


def test_what_is_given_is_not_chosen() -> None:
    chosen = plan(
        30_000, 1000, max_checkpoints=7, checkpoint_dtype="bf16", sigma_rels=(0.1, 0.05), update_every=3,
        checkpoint_every=1000,
    )  # fmt: skip
    assert (chosen.max_checkpoints, chosen.checkpoint_dtype, chosen.sigma_rels) == (7, "bf16", (0.05, 0.1))
    assert (chosen.update_every, chosen.checkpoint_every, chosen.num_taken) == (3, 1000, 30)
    assert len(chosen.ts) == 7
    assert chosen.ts[-1] == 30_000


def test_alternatives_are_other_plans() -> None:
    chosen = plan(20_000, 10**6, sigma_rel_range=(0.05, 0.20))
    others = alternatives(chosen)
    assert list(others) == ["3 sigma_rels", "half the snapshots", "twice the snapshots", "taken twice as often", "fp16"]
    more, half, twice, often, small = others.values()
    assert (len(often.ts), often.num_taken) == (len(chosen.ts), 2 * chosen.num_taken)
    assert often.bytes_in_all == chosen.bytes_in_all + chosen.snapshot_bytes
    assert half.worst_error > chosen.worst_error > twice.worst_error
    assert more.worst_error < chosen.worst_error
    assert (2 * len(half.ts), len(twice.ts)) == (len(chosen.ts), 2 * len(chosen.ts))
    assert (small.worst_error, 2 * small.bytes_in_all) == (chosen.worst_error, chosen.bytes_in_all)
    assert small.rounding_noise == pytest.approx(2**13 * chosen.rounding_noise)
    assert list(alternatives(small))[-1] == "fp32"
    few = plan(20_000, 10**6, sigma_rels=(0.05, 0.20), sigma_rel_range=(0.05, 0.20), max_checkpoints=10)
    assert alternatives(few)["taken twice as often"].stop_error < 0.7 * few.stop_error


def test_rounding_noise_is_half_a_unit_times_the_norm_of_the_coefficients(tmp_path: Path) -> None:
    assert {"fp32": HALF_ULP["F32"], "fp16": HALF_ULP["F16"], "bf16": HALF_ULP["BF16"]} == prediction.HALF_ULP
    chosen = plan(400, 401, sigma_rels=(0.05, 0.28), max_checkpoints=8)
    follow(chosen, tmp_path / "run")
    averages = synthesize(tmp_path / "run", np.geomspace(0.05, 0.28, 80).tolist())
    norm = max(average.certificate.coefficient_norm for average in averages)
    assert chosen.rounding_noise == pytest.approx(norm * 2**-24 / math.sqrt(3), rel=5e-3)


def test_host_memory_and_storage_are_what_a_real_run_takes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 50))
    number = sum(p.numel() for p in model.parameters())
    chosen = plan(40, number, sigma_rels=(0.05, 0.1, 0.28), max_checkpoints=4, checkpoint_dtype="fp16")
    ema = PostHocEMA.from_model(model, tmp_path / "run", plan=chosen)
    writer, tracker = ema._session.writer, ema._session.tracker
    for _ in range(40):
        ema.update_(model)
        writer.drain()
    averages = sum(flat.nbytes for profile in tracker.averages for flat in profile)
    images = sum(file.stat().st_size for file in next((tmp_path / "run/snapshots").iterdir()).glob("sigma*/*"))
    held = averages + NUM_SLOTS * 4 * number + images
    ema.close()
    assert chosen.host_bytes_per_rank == pytest.approx(held, rel=0.02)
    stored = sum(file.stat().st_size for file in tmp_path.glob("run/snapshots/*/sigma*/*"))
    assert chosen.bytes_in_all == chosen.bytes_per_rank == pytest.approx(stored, rel=0.02)


def test_bandwidths_follow_from_the_time_of_a_step() -> None:
    chosen = plan(
        1000, 6400, ranks=64, sigma_rels=(0.05, 0.28), max_checkpoints=10, update_every=10, seconds_per_step=0.5
    )
    assert chosen.update_bytes_per_rank == 20 * 100  # 20 bytes per parameter and update for two averages
    assert chosen.host_bandwidth == 2000 / (10 * 0.5)
    assert chosen.upload_bytes_per_rank == 800
    assert chosen.upload_bandwidth == 800 / (100 * 0.5)
    assert plan(1000, 6400, sigma_rels=(0.05, 0.28)).host_bandwidth is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_rel_range": (0.05, 0.3)}, r"\(0, 0\.28867\]"),
        ({"sigma_rel_range": (0.2, 0.1)}, "a lower and a higher sigma_rel; got 0.2 and 0.1"),
        ({"sigma_rel_range": (0.1, 0.1)}, r"track that one, .*sigma_rels=\(0\.1,\)"),
        ({"sigma_rels": (0.1, 0.4)}, r"got 0\.4"),
        ({"sigma_rels": (0.1, 0.1)}, "different numbers"),
        ({"storage_bytes": 7999}, "two snapshots, which are 8 kB for 1000 parameters, 2 sigma_rels and fp16"),
        ({"storage_bytes": 15_999, "checkpoint_dtype": "fp32"}, "got 16 kB. With fp16, 8 kB"),
        ({"checkpoint_dtype": "float16"}, "must be one of fp32, fp16, bf16; got 'float16'"),
        ({"max_checkpoints": 1}, "at least 2"),
        ({"ranks": 0}, "ranks must be an integer of at least 1; got 0"),
        ({"update_every": 2.5}, "update_every must be an integer"),
        ({"seconds_per_step": 0}, "seconds_per_step must be above 0"),
        ({"checkpoint_every": 20_001}, "a run must have at least 20001 calls of update_"),
        ({"sigma_rel_range": (9e-4, 0.1)}, r"begin at 0\.001 or above; got 0\.0009"),
        ({"sigma_rel_range": (1e-300, 0.1)}, r"begin at 0\.001 or above"),
        ({"t_per_call": 15_000}, "steps=20000 at 15000 a call are 1"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, ProfileError), match=message):
        plan(20_000, 1000, **arguments)


def test_a_run_takes_its_settings_from_the_plan_and_refuses_others_by_name(tmp_path: Path) -> None:
    chosen = plan(
        500, 6, sigma_rels=(0.05, 0.28), max_checkpoints=5, checkpoint_dtype="fp16", checkpoint_every=50, update_every=2
    )
    model = nn.Linear(2, 2)
    others: dict[str, Any] = {
        "max_checkpoints": 6, "sigma_rels": (0.05, 0.1), "update_every": 3, "checkpoint_every": 51,
        "checkpoint_dtype": torch.bfloat16,
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(SettingsError, match=f"^{name} must be the plan's"):
            PostHocEMA.from_model(model, tmp_path / "run", plan=chosen, **{name: value})
    same = {"sigma_rels": [0.28, 0.05], "checkpoint_dtype": torch.float16, "update_every": 2}
    with PostHocEMA.from_model(model, tmp_path / "run", plan=chosen, **same) as ema:
        ema.update_(model)
        settings = ema._session._settings
    assert (settings.max_checkpoints, settings.update_every, settings.checkpoint_every) == (5, 2, 50)
    assert (settings.sigma_rels, settings.checkpoint_dtype) == ((0.05, 0.28), torch.float16)
    exact = plan(500, 6, sigma_rels=(0.05, 0.28), max_checkpoints=5)
    PostHocEMA.from_model(model, tmp_path / "exact", plan=exact, checkpoint_dtype=torch.float32).close()


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"plan must be what phema_dist\.plan returns; got dict"):
        PostHocEMA.from_model(nn.Linear(2, 2), tmp_path / "run", plan={"sigma_rels": (0.05,)})  # type: ignore[arg-type]


def test_plan_is_public() -> None:
    assert phema_dist.plan is plan
    assert phema_dist.Plan is Plan


# The command.


def test_the_example_of_the_help_runs_and_its_python_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    words = " ".join(capsys.readouterr().out.split()).partition("example: phema ")[2].split()
    assert main([*words, "--seconds-per-step", "0.5", "--plot", str(tmp_path / "error.png")]) == 0
    told = capsys.readouterr().out
    chosen = plan(
        500_000, 1_300_000_000, ranks=64, sigma_rel_range=(0.05, 0.2), storage_bytes=2 * 10**12, seconds_per_step=0.5
    )
    assert f"{chosen.checkpoint_every} calls, {len(chosen.ts)} of them at the end (all kept), fp32" in told
    assert f"worst {100 * chosen.worst_error:.2g}%, mean {100 * chosen.mean_error:.2g}%" in told
    assert "MB for each rank and update, 81.2 MB/s" in told
    assert [line.split("  ")[0] for line in told.splitlines()[-10:-3]] == [
        "", "this plan", "3 sigma_rels", "half the snapshots", "twice the snapshots", "taken twice as often", "fp16",
    ]  # fmt: skip
    with Image.open(tmp_path / "error.png") as picture:
        assert picture.size[0] > 500

    model = nn.Linear(2, 2)
    names = {"PostHocEMA": PostHocEMA, "model": model, "url": tmp_path / "run", "torch": torch}
    exec("\n".join(told.splitlines()[-2:]), names)  # noqa: S102  ours
    with names["ema"] as ema:
        assert ema._session._settings.sigma_rels == chosen.sigma_rels
        assert ema._session._settings.checkpoint_every == chosen.checkpoint_every


def test_json_has_everything_and_t_may_count_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--samples", "2e6", "--batch-size", "100", "--parameters", "350M", "--snapshots", "10", "--dtype", "bf16"]
    assert main(["plan", *words, "--ranks", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    chosen = plan(2_000_000, 350_000_000, t_per_call=100, ranks=4, max_checkpoints=10, checkpoint_dtype="bf16")
    for name, value in chosen.facts().items():
        assert facts[name] == (list(value) if isinstance(value, tuple) else value), name
    assert facts["steps"] == 2_000_000
    assert any("rounding of bf16" in warning for warning in facts["warnings"])
    assert facts["alternatives"]["fp32"]["rounding_noise"] < 1e-4

    monkeypatch.setattr(planning, "alternatives", lambda chosen: {})
    assert main(["plan", *words]) == 0
    *_, begin, update = capsys.readouterr().out.splitlines()
    assert begin.endswith('checkpoint_dtype=torch.bfloat16, t_unit="samples")')
    assert update.startswith("ema.update_(model, t=samples_seen)")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--parameters", "1B"], 2, "--steps"),
        (["--steps", "10"], 2, "--parameters"),
        (["--samples", "1000", "--parameters", "1B"], 2, "--samples needs --batch-size"),
        (["--steps", "10", "--batch-size", "2", "--parameters", "1B"], 2, "--samples needs --batch-size"),
        ([*EXAMPLE, "--sigma-rel", "0.05:wide"], 2, "LOW:HIGH"),
        (["--steps", "0", "--parameters", "1B"], 2, "above 0"),
        (["--steps", "1e400", "--parameters", "1B"], 2, "finite number above 0"),
        (["--steps", "_", "--parameters", "1B"], 2, "finite number above 0"),
        (["--steps", "10", "--parameters", "1e400"], 2, "finite number above 0"),
        ([*EXAMPLE, "--storage", "9" * 400 + "TB"], 2, "must be a size"),
        (["--steps", "1e18", "--parameters", "1B"], 2, "at most 2**53 steps and 10**9 calls"),
        (["--steps", "2e9", "--parameters", "1B"], 2, "at most 2**53 steps and 10**9 calls"),
        (["--steps", "1e5", "--parameters", "1B", "--checkpoint-every", "1"], 2, "at most 2000 snapshots"),
        (["--steps", "10", "--parameters", "large"], 2, "350M"),
        ([*EXAMPLE, "--sigma-rel", "0.05:0.35"], 2, "(0, 0.28867]"),
        ([*EXAMPLE, "--sigma-rel", "0.1"], 2, "needs no plan"),
        ([*EXAMPLE, "--storage", "1GB"], 2, "--storage must hold two snapshots, which are 10.4 GB for"),
        ([*EXAMPLE, "--storage", "10GB", "--dtype", "fp32"], 2, "With fp16, 10.4 GB."),
        ([*EXAMPLE, "--plot", "error.gif"], 2, "error.gif"),
        (["--steps", "10", "--size-from", "nowhere"], 2, "a .safetensors file, a Hugging Face folder"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():  # of argparse
        assert main(["plan", *words]) == code
    text = capsys.readouterr().err
    assert message in text
    assert text.startswith("usage: ") or len(text.strip().splitlines()) == 1


def test_the_table_marks_what_is_above_the_budget_noisy_or_poor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = plan(1000, 10**6, sigma_rels=(0.05, 0.28), max_checkpoints=20, checkpoint_dtype="fp16")
    others = {
        "twice": replace(chosen, ts=(*chosen.ts, *chosen.ts)),
        "noisy": replace(chosen, rounding_noise=0.006),
        "both": replace(chosen, stop_error=0.02, worst_error=0.02, rounding_noise=0.006),
    }
    monkeypatch.setattr(planning, "plan", lambda *_, **__: replace(chosen, worst_error=0.001, stop_error=0.002))
    monkeypatch.setattr(planning, "alternatives", lambda _: others)
    assert main(["plan", "--steps", "1000", "--parameters", "1M", "--storage", "100MB"]) == 0
    told = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line for line in told}
    assert rows["this plan"].endswith(" MB")
    assert rows["twice"].endswith(
        " MB   above --storage" if chosen.stop_error <= GOOD_ERROR else "above --storage, error above 1%"
    )
    assert "rounding above 0.5%" in rows["noisy"]
    assert rows["both"].endswith("error above 1%, rounding above 0.5%")
    assert any(
        line.startswith("rounding:") and line.endswith("less where a synthesis knows how far they move")
        for line in told
    )


def test_what_would_be_the_same_plan_is_no_alternative() -> None:
    chosen = plan(10, 5, sigma_rels=(0.06, 0.28))
    assert (chosen.max_checkpoints, chosen.checkpoint_every) == (10, 1)
    assert list(alternatives(chosen)) == ["3 sigma_rels", "half the snapshots", "fp16"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (34_741, "34.7 kB"),
        (999_999, "1 MB"),
        (25e8, "2.5 GB"),
        (2e18, "2e+03 PB"),
    ],
)
def test_bytes_are_said_in_the_largest_unit(num_bytes: float, text: str) -> None:
    assert in_units(num_bytes) == text


def test_a_plan_that_needs_more_memory_than_a_node_has_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planning, "alternatives", lambda chosen: {})  # they take time
    words = ["plan", "--steps", "1000", "--parameters", "6.4B", "--ranks", "16", "--sigma-rel", "0.05:0.2"]
    assert main([*words, "--node-memory", "100GB"]) == 0
    assert "host memory" not in caplog.text
    assert main([*words, "--node-memory", "64GB"]) == 0
    assert "averages of 8 ranks need 76.8 GB of host memory on a node" in caplog.text
    caplog.clear()
    assert main([*words, "--node-memory", "64GB", "--ranks-per-node", "4"]) == 0
    assert "host memory" not in caplog.text


# What the machine has, and what a checkpoint has.


def test_the_memory_limit_is_the_least_of_physical_memory_and_cgroups(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert host.memory_limit(tmp_path) is None
    assert host.shortage(10**12, 8, None) == ""
    write("proc/meminfo", "MemTotal:       1000 kB\nMemFree:   5 kB\n")
    assert host.memory_limit(tmp_path) == (1_024_000, "physical memory")
    write("proc/self/cgroup", "0::/jobs/7\n")
    write("sys/fs/cgroup/jobs/7/memory.max", "max\n")
    assert host.memory_limit(tmp_path) == (1_024_000, "physical memory")
    write("sys/fs/cgroup/jobs/memory.max", "900000\n")
    assert host.memory_limit(tmp_path) == (900_000, "the limit of its cgroup (memory.max)")
    write("sys/fs/cgroup/memory.max", "800000\n")  # in a container, its own group is the top
    assert host.memory_limit(tmp_path) == (800_000, "the limit of its cgroup (memory.max)")
    write("proc/self/cgroup", "9:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "700000\n")
    assert host.memory_limit(tmp_path) == (700_000, "the limit of its cgroup (memory.limit_in_bytes)")
    write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n")
    assert host.memory_limit(tmp_path) == (800_000, "the limit of its cgroup (memory.max)")
    assert host.shortage(400_000, 2, host.memory_limit(tmp_path)) == ""
    assert "the averages of 2 ranks need 0.0008 GB" in host.shortage(400_001, 2, host.memory_limit(tmp_path))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_this_machine_has_memory() -> None:
    limit = host.memory_limit()
    assert limit is not None
    assert 2**20 < limit[0] <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parameters_are_counted_in_every_kind_of_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    averaged = sum(p.numel() for p in model.parameters())
    floating = sum(v.numel() for v in model.state_dict().values() if v.is_floating_point())
    first, second = tmp_path / "hf/model-1.safetensors", tmp_path / "hf/model-2.safetensors"
    first.parent.mkdir()
    save_file({name: v for name, v in model.state_dict().items() if name.startswith("0")}, first)
    save_file({name: v.bfloat16() for name, v in model[1].named_parameters()} | {"n": torch.tensor(3)}, second)
    assert count_parameters(str(first)) == 72
    assert count_parameters(str(first.parent)) == averaged
    (tmp_path / "hf/other.safetensors").write_bytes(first.read_bytes())
    weight_map = {"0.weight": first.name, "0.bias": first.name, "1.weight": second.name}
    index = tmp_path / "hf/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert count_parameters(str(index)) == averaged
    assert count_parameters(str(index.parent)) == averaged

    optimizer = {"state": {"0.weight": torch.zeros(8, 8)}}
    dcp.save({"model": model.state_dict(), "optim": optimizer}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert count_parameters(str(tmp_path / "dcp")) == floating
    dcp.save({**model.state_dict(), "optim": optimizer}, checkpoint_id=tmp_path / "flat", no_dist=True)
    assert count_parameters(str(tmp_path / "flat")) == floating
    with PostHocEMA.from_model(model, tmp_path / "run") as ema:
        ema.update_(model)
    assert count_parameters(str(tmp_path / "run")) == averaged


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("cut.safetensors", "none.safetensors", "none.index.json"):
        with pytest.raises(SettingsError, match=f"{name} must be a checkpoint with a readable table of contents"):
            count_parameters(str(tmp_path / name))
    save_file({"n": torch.tensor(3)}, tmp_path / "integers.safetensors")
    with pytest.raises(SettingsError, match="it has none"):
        count_parameters(str(tmp_path / "integers.safetensors"))


@pytest.mark.parametrize(
    "text", ['{"weight_map": [1]}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": [1]}}', "[]", "{}"]
)
def test_an_index_without_files_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SettingsError, match="must have a weight_map of names to files"):
        count_parameters(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(5), b"\x80\x05K", b"cfoo\nbar\n."])
def test_damaged_metadata_is_one_clear_error(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    assert main(["plan", "--steps", "1000", "--size-from", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "must be a checkpoint with a readable table of contents" in told
    assert len(told.strip().splitlines()) == 1


def test_the_help_says_that_metadata_must_be_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "is a pickle, which can run code: only one that you trust" in " ".join(capsys.readouterr().out.split())


def test_credentials_of_a_url_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "ftp://user:SECRET@host.invalid/run"
    monkeypatch.setattr(sizing, "open_store", lambda *_: open_store(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"^ftp://host\.invalid/run must be") as told:
        count_parameters(url)
    assert "SECRET" not in str(told.value)
    monkeypatch.setattr(sizing, "_count", lambda _: 0)
    with pytest.raises(SettingsError, match=r"^ftp://host\.invalid/run must hold"):
        count_parameters(url)
