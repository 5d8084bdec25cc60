"""PostHocEMA in one process: the promises that a training loop relies on."""

import inspect
import json
import logging
import math
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from phema_dist import (
    BackgroundError,
    LayoutError,
    PostHocEMA,
    RunError,
    SettingsError,
    SnapshotError,
    StorageError,
    synthesize,
)
from phema_dist.storage.run import delete_snapshot, open_run
from phema_dist.storage.store import LocalStore, open_store


class Clock(nn.Module):
    """A model whose parameter is the unit vector of the current step: its averages show their own profile."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_steps + 1))

    @torch.no_grad()
    def set(self, t: int) -> None:
        self.weight.zero_()
        self.weight[t] = 1


def tracked(gamma: float, times: list[int], size: int) -> np.ndarray:
    """The average of unit vectors, by the recursion as the paper writes it, in float64."""
    average, before = np.zeros(size), 0
    for t in times:
        average *= (1 - (t - before) / t) ** (gamma + 1)
        average[t] += 1 - (1 - (t - before) / t) ** (gamma + 1)
        before = t
    return average


def gamma_of(sigma_rel: float) -> float:
    """By bisection, sharing nothing with the library."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wide else (low, middle)
    return low


def relative_width(profile: np.ndarray, times: list[int]) -> float:
    """Standard deviation over t, each update's mass spread over the time since the one before."""
    ends = np.array(times, dtype=float)
    starts = np.array([0, *times[:-1]], dtype=float)
    mass = profile[times]
    mean = (mass * (starts + ends) / 2).sum()
    second = (mass * (starts**2 + starts * ends + ends**2) / 3).sum()
    return float(math.sqrt(second - mean**2) / times[-1])


@pytest.mark.parametrize("update_every", [1, 7, 10])
def test_a_run_keeps_the_profile_that_was_asked_for_at_any_cadence(tmp_path: Path, update_every: int) -> None:
    num_steps, sigma_rels = 2000, (0.05, 0.10, 0.28)
    model = Clock(num_steps)
    with PostHocEMA.from_model(
        model, tmp_path / "run", sigma_rels=sigma_rels, update_every=update_every, checkpoint_every=100
    ) as ema:
        for t in range(1, num_steps + 1):
            model.set(t)
            ema.update_(model)
    times = sorted({*range(update_every, num_steps + 1, update_every), *range(100, num_steps + 1, 100)})
    *stored, between = synthesize(tmp_path / "run", [*sigma_rels, 0.15])
    for sigma_rel, average in zip(sigma_rels, stored, strict=True):
        profile = average.state_dict["weight"].double().numpy()
        assert relative_width(profile, times) == pytest.approx(sigma_rel, rel=0.02)
        np.testing.assert_allclose(profile, tracked(gamma_of(sigma_rel), times, num_steps + 1), atol=1e-7)

    wanted = tracked(gamma_of(0.15), times, num_steps + 1)
    per_interval = 1 / np.diff([0, *times])
    error = between.state_dict["weight"].double().numpy() - wanted
    measured = math.sqrt((error[times] ** 2 * per_interval).sum() / (wanted[times] ** 2 * per_interval).sum())
    assert measured == pytest.approx(between.certificate.recorded_error, rel=0.01)
    assert between.certificate.profile_error == pytest.approx(measured, rel=0.1)


def test_a_late_origin_does_not_bend_the_profile(tmp_path: Path) -> None:
    model = Clock(1500)
    with PostHocEMA.from_model(
        model, tmp_path / "run", update_every=1, checkpoint_every=300, update_after_step=500
    ) as ema:
        for t in range(1, 1501):
            model.set(t)
            ema.update_(model)
    (average,) = synthesize(tmp_path / "run", [0.05])
    profile = average.state_dict["weight"].double().numpy()
    assert profile[:501].sum() == 0
    np.testing.assert_allclose(profile[501:], tracked(gamma_of(0.05), list(range(1, 1001)), 1001)[1:], atol=1e-7)


def test_time_may_count_anything_that_grows(tmp_path: Path) -> None:
    """Batches of 64, then of 128: one average over images."""
    model = Clock(300)
    images = [64 * i for i in range(1, 151)] + [64 * 150 + 128 * i for i in range(1, 151)]
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=100, t_unit="images") as ema:
        for step, t in enumerate(images, 1):
            model.set(step)
            ema.update_(model, t=t)
        assert ema.t == images[-1]
    (average,) = synthesize(tmp_path / "run", [0.05])
    assert average.t == images[-1]
    profile = np.zeros(images[-1] + 1)
    profile[images] = average.state_dict["weight"].double().numpy()[1:]
    assert relative_width(profile, images) == pytest.approx(0.05, rel=0.02)


def test_averages_keep_moving_in_a_long_run(tmp_path: Path) -> None:
    """At T = 2e5, an update every step: an fp32 average that takes in every one of them loses 17% of its movement."""
    num_steps, sigma_rel = 200_000, 0.28
    generator = torch.Generator().manual_seed(0)
    start = 1 + torch.randn(64, generator=generator, dtype=torch.float64) * 0.1
    drift = torch.randn(64, generator=generator, dtype=torch.float64) * 0.01
    noise = torch.randn(1000, 64, generator=generator, dtype=torch.float64) * 0.001
    model = nn.Linear(64, 1, bias=False)
    average, gamma = start.clone(), gamma_of(sigma_rel)
    with (
        torch.no_grad(),
        PostHocEMA.from_model(
            model, tmp_path / "run", sigma_rels=(sigma_rel,), update_every=1, checkpoint_every=num_steps
        ) as ema,
    ):
        for t in range(1, num_steps + 1):
            now = start + drift * (t / num_steps) + noise[t * 7919 % 1000]
            average.lerp_(now, 1 - (1 - 1 / t) ** (gamma + 1))
            model.weight.copy_(now[None])
            ema.update_(model)
    (found,) = synthesize(tmp_path / "run", [sigma_rel])
    lost = (found.state_dict["weight"][0].double() - average).norm() / (average - start).norm()
    assert lost < 0.01


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_synthesizing_a_stored_profile_at_a_stored_t_returns_its_bits(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    model = nn.Sequential(nn.Linear(33, 65), nn.BatchNorm1d(65))
    with PostHocEMA.from_model(
        model, tmp_path / "run", update_every=3, checkpoint_every=10, checkpoint_dtype=dtype
    ) as ema:
        for _ in range(40):
            perturb(model)
            ema.update_(model)
            ema._session.writer.drain()
    # Read with safetensors' own reader, not with ours.
    from safetensors.torch import load_file  # noqa: PLC0415

    for t in (20, 40):
        for found in synthesize(tmp_path / "run", [0.05, 0.28], t=t):
            folder = tmp_path / f"run/snapshots/{t:012d}-a0/sigma_rel-{found.sigma_rel}"
            stored = load_file(folder / "rank-00000.safetensors")
            assert found.certificate.num_snapshots == 1
            assert found.state_dict.keys() == stored.keys()
            for name, tensor in stored.items():
                wanted = tensor.float() if name != "1.num_batches_tracked" else tensor
                assert torch.equal(bits(found.state_dict[name]), bits(wanted))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)
        else:
            tensor.add_(1)


def trained(url: str | Path, num_steps: int = 100, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with PostHocEMA.from_model(model, url, **{"update_every": 1, "checkpoint_every": 10, **settings}) as ema:  # type: ignore[arg-type]
        for _ in range(num_steps):
            perturb(model)
            ema.update_(model)
            ema._session.writer.drain()
    return model


def test_a_run_is_not_overwritten_but_continued(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a run already, its newest complete snapshot is t=100.*resume=True"):
        PostHocEMA.from_model(model, tmp_path / "run")
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10, resume=45)
    assert ema.t == 45  # the model is there; the averages are of t=40, and the next update covers what lies between
    ema.close()
    run = open_run(open_store(tmp_path / "run"))
    assert [s.t for s in run.complete] == [10, 20, 30, 40]
    assert [s.t for s in run.abandoned] == [50, 60, 70, 80, 90, 100]
    assert run.attempts[-1].parent == 0


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def steps(model: nn.Module, ema: PostHocEMA, first: int, last: int) -> None:
        for step in range(first, last + 1):
            torch.manual_seed(step)
            perturb(model)
            ema.update_(model)
            ema._session.writer.drain()

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))

    every = {"update_every": 3, "checkpoint_every": 10}
    whole, model = tmp_path / "whole", fresh()
    with PostHocEMA.from_model(model, whole, **every) as ema:
        steps(model, ema, 1, 60)
    parts, model = tmp_path / "parts", fresh()
    with PostHocEMA.from_model(model, parts, **every) as ema:
        steps(model, ema, 1, 30)
    with PostHocEMA.from_model(model, parts, **every, resume=True) as ema:
        steps(model, ema, 31, 50)
    with PostHocEMA.from_path(parts, model, **every) as ema:
        steps(model, ema, 51, 60)
    for a, b in zip(synthesize(whole, [0.05, 0.1, 0.28]), synthesize(parts, [0.05, 0.1, 0.28]), strict=True):
        assert a.certificate == b.certificate
        assert all(torch.equal(bits(x), bits(b.state_dict[name])) for name, x in a.state_dict.items())


def test_resume_begins_afresh_where_nothing_is_stored(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    PostHocEMA.from_model(model, tmp_path / "run", resume=True).close()
    later = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, resume=700)
    assert later.t == 700  # the model is there, though no average is
    later.update_(model)
    later.close()
    assert torch.equal(synthesize(tmp_path / "run", [0.05])[0].state_dict["weight"], model.weight)
    assert len(open_run(open_store(tmp_path / "run")).attempts) == 2


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", 10)
    message = r"another model: 1 tensors differ, the first is 1\.weight: .*\[4, 16\].*\[4, 17\]"
    with pytest.raises(RunError, match=message):
        PostHocEMA.from_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(17, 4)), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"tracks sigma_rels \(0\.05, 0\.28\), which cannot change; got \(0\.05, 0\.1\)"):
        PostHocEMA.from_path(tmp_path / "run", sigma_rels=(0.05, 0.1))


def test_what_t_counts_and_where_it_begins_cannot_change(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"update_every": 1, "checkpoint_every": 5, "t_unit": "images", "update_after_step": 3}
    with PostHocEMA.from_model(nn.Linear(2, 2), tmp_path, **settings) as ema:
        for _ in range(10):
            ema.update_()
    for other in ({"t_unit": "tokens"}, {"update_after_step": 4}):
        with pytest.raises(RunError, match=r"has (t_unit 'images'|update_after_step 3), which cannot change; got"):
            PostHocEMA.from_model(nn.Linear(2, 2), tmp_path, resume=True, **settings | other)
    for same in (settings, {}):
        PostHocEMA.from_model(nn.Linear(2, 2), tmp_path, resume=True, **same).close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_rels": (0.05, 0.35)}, r"sigma_rel must lie in \(0, 0\.28867\].*got 0\.35"),
        ({"sigma_rels": ()}, "one or more"),
        ({"sigma_rels": (0.1, 0.1)}, "different"),
        ({"update_every": 0}, "update_every must be an integer of at least 1; got 0"),
        ({"max_checkpoints": 0}, "max_checkpoints must be"),
        ({"checkpoint_dtype": torch.int8}, r"checkpoint_dtype must be .*; got torch\.int8"),
        ({"calculation_dtype": torch.float16}, "calculation_dtype must be float32 or float64"),
        ({"checkpoint_dir": "nosuch://bucket/run"}, "nosuch"),
    ],
)
def test_bad_settings_are_told_before_anything_is_stored(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PostHocEMA.from_model(nn.Linear(2, 2), **{"checkpoint_dir": tmp_path / "run", **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_time_must_grow(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path / "run") as ema:
        ema.update_(model, t=50)
        with pytest.raises(SettingsError, match=r"got t=50 at t=50.*resume=50"):
            ema.update_(model, t=50)
    with pytest.raises(SettingsError, match="closed"):
        ema.update_(model)


def test_a_changed_model_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1)
    ema.update_(model)
    model[1].weight = nn.Parameter(torch.zeros(1, 3))
    with pytest.raises(LayoutError, match=r"1\.weight must stay .*\(3, 3\).*found Parameter torch.float32 \(1, 3\)"):
        ema.update_(model)
    with pytest.raises(LayoutError, match=r"2\.weight is not in the run and \(3, 3\) in the model"):
        ema.update_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)))
    ema.close()


def test_an_added_parameter_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=2)
    ema.update_(model)
    model[0].gain = nn.Parameter(torch.ones(3))
    with pytest.raises(LayoutError, match=r"0\.gain of shape \(3,\) was added"):
        ema.update_(model)
    del model[0].gain
    model.append(nn.Linear(3, 3))
    ema.update_(model)  # no update is due
    with pytest.raises(LayoutError, match=r"2\.weight of shape \(3, 3\) was added"):
        ema.update_(model)
    ema.close()


@pytest.mark.parametrize("fused", [False, True])
def test_attached_optimizers_under_a_scaler_average_what_the_real_steps_left(fused: bool, tmp_path: Path) -> None:
    """Two optimizers; infinities in the gradients of the one, of the other, or of both skip some of their steps.

    A round is a step of the first, and then one of the second before the first steps again.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, fused=fused) for part in model]
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0, growth_interval=3)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5)
    twin = PostHocEMA.from_model(model, tmp_path / "twin", update_every=1, checkpoint_every=5)
    ema.attach(*optimizers)
    num_real, begun = 0, False
    for step in range(23):
        scaler.scale(model(torch.randn(8, 3)).square().mean()).backward()
        overflows = [position for position in (0, 1) if step % (4 + position) == 3]
        for position in overflows:
            model[position].weight.grad[0, 0] = torch.inf
        before = [part.weight.detach().clone() for part in model]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        first, second = (not torch.equal(was, part.weight) for was, part in zip(before, model, strict=True))
        begun = begun or first
        if second and begun:
            num_real += 1
            twin.update_(model)
        begun = begun and not second
        for each in (ema, twin):
            each._session.writer.drain()
    assert 0 < num_real < 20
    assert ema.t == twin.t == num_real
    assert ema._session.tracker.history.knots == twin._session.tracker.history.knots
    ema.close()
    twin.close()
    for one, other in zip(
        synthesize(tmp_path / "run", [0.05, 0.2]), synthesize(tmp_path / "twin", [0.05, 0.2]), strict=True
    ):
        assert all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)


def test_attach_goes_on_with_a_run_that_was_opened_by_its_path(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = PostHocEMA.from_path(tmp_path / "run", model=model, update_every=1)
    images = [10_000]
    ema.attach(optimizer, t=lambda: images[0])
    with pytest.raises(SettingsError, match="attach was called before"):
        ema.attach(optimizer)
    optimizer.step()
    assert ema.t == 10_000
    ema.close()
    optimizer.step()  # nothing is attached any more
    with pytest.raises(SettingsError, match="closed"):
        ema.attach(optimizer)


@pytest.mark.parametrize("resume", ["auto", None, -1, 1.5])
def test_a_moment_that_is_none_is_refused(resume: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must be"):
        PostHocEMA.from_model(nn.Linear(2, 2), tmp_path / "run", resume=resume)


def test_what_a_start_from_nothing_hides_stays_and_may_come_back(tmp_path: Path) -> None:
    """As when the folder of the training checkpoints is lost, and a script takes that for a new run."""
    model = trained(tmp_path, num_steps=30)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=10, resume=0) as ema:
        for _ in range(40):
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    run = open_run(open_store(tmp_path))
    assert [(s.t, s.attempt) for s in run.complete] == [(t, 1) for t in (10, 20, 30, 40)]
    assert [s.t for s in run.abandoned] == [10, 20, 30]
    (tmp_path / "attempts/1.json").unlink()
    for folder in (tmp_path / "snapshots").glob("*-a1"):
        shutil.rmtree(folder)
    run = open_run(open_store(tmp_path))
    assert ([(s.t, s.attempt) for s in run.complete], run.abandoned) == ([(t, 0) for t in (10, 20, 30)], ())


def test_a_job_that_restarts_before_the_first_snapshot_begins_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "phema_dist")
    model = trained(tmp_path / "run", num_steps=30)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10, resume=3) as ema:
        assert ema.t == 3
        (said,) = [record for record in caplog.records if "resume=3" in record.message]
        assert said.levelno == logging.INFO  # training_state may be loaded next
        assert said.message.endswith(
            "resume=3: averaging begins afresh; the snapshots of before (t=10, 20, 30) are hidden, until `phema gc "
            "--abandoned` deletes them"
        )
        assert "the averages saw nothing of t=1 to 3, unless training_state is loaded" in caplog.text
        assert "going on from" not in caplog.text
        run = open_run(open_store(tmp_path / "run"))
        assert (run.complete, [s.t for s in run.abandoned]) == ((), [10, 20, 30])
        for _ in range(17):
            ema.update_(model)
    run = open_run(open_store(tmp_path / "run"))
    assert [(s.t, s.attempt) for s in run.complete] == [(13, 1), (20, 1)]
    assert [s.t for s in run.abandoned] == [10, 20, 30]  # of before it was begun afresh: somebody may want them back
    PostHocEMA.from_model(model, tmp_path / "run", resume=0).close()
    (said,) = [record for record in caplog.records if "resume=0" in record.message]
    assert said.levelno == logging.WARNING
    assert "resume=0: averaging begins afresh; the snapshots of before (t=13, 20) are hidden" in said.message


def test_after_an_outage_all_snapshots_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    put, working = LocalStore.put, threading.Event()

    def put_when_working(store: LocalStore, key: str, data: bytes | bytearray) -> None:
        assert working.wait(30)
        put(store, key, data)

    working.set()
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1)
    monkeypatch.setattr(LocalStore, "put", put_when_working)
    writer = ema._session.writer
    working.clear()
    for _ in range(12):
        ema.update_(model)
    assert writer.counts.skipped > 5
    working.set()
    writer.drain()
    skipped = writer.counts.skipped
    for _ in range(40):
        time.sleep(0.05)  # puts take less
        ema.update_(model)
        writer.drain()
    assert writer._grid.every == 1
    assert writer.counts.skipped - skipped < 16
    ema.close()


def test_updates_by_hand_beside_attached_optimizers_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1) as ema:
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(SettingsError, match="count their steps twice"):
            ema.update_(model)


def test_an_incomplete_snapshot_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path / "run")
    snapshots = tmp_path / "run/snapshots"
    (snapshots / "000000000050-a0/rank-00000-of-00001.json").unlink()
    (snapshots / "000000000070-a0/sigma_rel-0.28/rank-00000.safetensors").unlink()
    (snapshots / "000000000100-a0/sigma_rel-0.05/rank-00000.safetensors").write_bytes(b"cut short")
    run = open_run(open_store(tmp_path / "run"))
    assert [s.t for s in run.complete] == [10, 20, 30, 40, 60, 80, 90]
    problems = {s.t: s.problem for s in run.snapshots if s.problem}
    assert problems[50] == "manifests of rank 0 of 1 are missing"
    assert problems[70] == "sigma_rel-0.28/rank-00000.safetensors of rank 0 is missing"
    assert "has 9 bytes instead of" in str(problems[100])
    with caplog.at_level(logging.WARNING):
        (found,) = synthesize(tmp_path / "run", [0.1])
    assert found.t == 90
    assert found.certificate.num_snapshots == 7
    assert [text.partition(":")[0] for text in found.certificate.left_out] == ["t=50", "t=70"]
    assert "left out a snapshot that cannot be used, t=50" in caplog.text


@pytest.mark.parametrize(("t", "position"), [(80, -3), (10, 20)], ids=["data", "header"])
def test_a_flipped_byte_is_left_out_naming_the_file(
    tmp_path: Path, t: int, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "run")
    name = f"{t:012d}-a0/sigma_rel-0.05/rank-00000.safetensors"
    path = tmp_path / "run/snapshots" / name
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    (found,) = synthesize(tmp_path / "run", [0.1])
    (left_out,) = found.certificate.left_out
    assert left_out.startswith(f"t={t}: ")
    assert name in left_out
    assert "checksum" in left_out
    assert f"left out a snapshot that cannot be used, {left_out}" in caplog.text


def test_without_any_complete_snapshot_the_error_says_what_to_wait_for(tmp_path: Path) -> None:
    with (
        PostHocEMA.from_model(nn.Linear(2, 2), tmp_path / "run") as ema,
        pytest.raises(SnapshotError, match=r"no complete snapshot yet.*checkpoint_every"),
        ema.state_dict(sigma_rel=0.1),
    ):
        pass
    with pytest.raises(RunError, match=r"must hold a run of phema-dist; there is no run\.json"):
        PostHocEMA.from_path(tmp_path / "elsewhere")


def test_updates_go_on_while_a_put_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, original, hung = threading.Event(), LocalStore.put, threading.Event()

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        if "000000000010" in key and not released.is_set():
            hung.set()
            assert released.wait(60)
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    model = nn.Linear(16, 16)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10)
    for _ in range(10):
        perturb(model)
        ema.update_(model)
    assert hung.wait(60)
    for _ in range(505):  # would never end if an update, or a snapshot, waited for storage
        perturb(model)
        ema.update_(model)
    ema._session.writer._averages.wait_until_fewer(1)
    assert ema._session.tracker.t == 515
    assert not released.is_set()
    assert ema._session.writer.counts.skipped > 0
    released.set()
    ema.close()
    complete = [s.t for s in open_run(open_store(tmp_path / "run")).complete]
    assert complete[0] == 10
    assert complete[-1] == 515


def test_after_a_skip_all_ranks_come_to_take_the_same_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ones are taken follows from the number of calls alone: here, every other one."""
    released, original = threading.Event(), LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        assert released.wait(60) or "snapshots" not in key
        original(self, key, data)

    released.set()
    monkeypatch.setattr(LocalStore, "put", put)
    monkeypatch.setattr("phema_dist.training.policy._QUICK", 0.0)  # a pause of the machine looks like a quick storage
    model = nn.Linear(16, 16)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as ema:
        released.clear()
        for t in range(1, 161):
            ema.update_(model)
            if t == 25:
                released.set()
            if t > 25:
                ema._session.writer.drain()
        assert ema._session.writer.counts.skipped == 1 + 7
    assert [s.t for s in open_run(open_store(tmp_path / "run")).complete] == [10, 40, 60, 80, 100, 120, 140, 160]


def test_a_failed_put_costs_that_snapshot_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        if "000000000030" in key and key.endswith("0.28/rank-00000.safetensors"):
            raise StorageError("the disk is full")
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    trained(tmp_path / "run", 50)
    run = open_run(open_store(tmp_path / "run"))
    assert [s.t for s in run.complete] == [10, 20, 40, 50]
    assert "rank 0, t=30: the snapshot is lost, training goes on: the disk is full" in caplog.text


def test_non_finite_parameters_never_enter_an_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = torch.randn(60, 4, 4)

    def run(url: Path, *, broken: bool) -> dict[str, torch.Tensor]:
        model = nn.Linear(4, 4, bias=False)
        with (
            torch.no_grad(),
            PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=20) as ema,
        ):
            for t in range(1, 61):
                model.weight.copy_(values[t - 1])
                if 25 <= t <= 45 and broken:
                    model.weight[2, 1] = float("nan") if t % 2 else float("inf")
                if broken or not 25 <= t <= 45:
                    ema.update_(model, t=t)
                ema._session.writer.drain()
        return synthesize(url, [0.28])[0].state_dict

    broken, skipped = run(tmp_path / "broken", broken=True), run(tmp_path / "skipped", broken=False)
    assert torch.equal(broken["weight"], skipped["weight"])
    incomplete = [s for s in open_run(open_store(tmp_path / "broken")).snapshots if s.problem]
    assert [s.t for s in incomplete] == [40]
    assert "its parameters are not finite" in str(incomplete[0].problem)


def test_large_values_are_not_taken_for_infinities(tmp_path: Path) -> None:
    model = nn.Linear(1000, 100, bias=False)
    with torch.no_grad(), PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        model.weight.fill_(1e38)  # a sum of them overflows
        ema.update_(model)
    assert synthesize(tmp_path / "run", [0.05])[0].state_dict["weight"].eq(1e38).all()


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e6), (torch.bfloat16, 3.4e38)])
def test_an_average_beyond_the_checkpoint_dtype_is_stored_as_float32_and_noted(
    dtype: torch.dtype, value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1, checkpoint_dtype=dtype)
    ema.update_(model)
    ema._session.writer.drain()
    with torch.no_grad():
        model[1].weight.fill_(value)
    ema.update_(model)
    ema._session.writer.drain()
    ema.update_(model)
    ema.close()
    noted = [message for message in caplog.messages if "exceed the range" in message]
    assert len(noted) == 1
    assert "1.weight" in noted[0]
    newest = next((tmp_path / "run").glob("snapshots/*3-a0/sigma_rel-0.28/*.safetensors"))
    stored = {name: tensor.dtype for name, tensor in load_file(newest).items()}
    assert stored == {"0.weight": dtype, "0.bias": dtype, "1.weight": torch.float32, "1.bias": dtype}
    for t in (1, 2, 3):
        (found,) = synthesize(tmp_path / "run", [0.28], t=t)
        assert all(bool(tensor.isfinite().all()) for tensor in found.state_dict.values())
    expected = ema._session.tracker.boxes()[1]["1.weight"][0][1]
    assert torch.equal(found.state_dict["1.weight"], expected)


def test_averages_too_small_for_float16_are_stored_as_float32(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 4) * 1e-6)  # a layer scale
        model[2].bias.zero_()  # zero is zero
    settings = {"update_every": 1, "checkpoint_every": 1, "checkpoint_dtype": torch.float16}
    with PostHocEMA.from_model(model, tmp_path / "run", **settings) as ema:  # type: ignore[arg-type]
        ema.update_(model)
    (file,) = (tmp_path / "run").glob("snapshots/*/sigma_rel-0.28/*.safetensors")
    stored = {name: tensor.dtype for name, tensor in load_file(file).items()}
    assert {name for name, dtype in stored.items() if dtype == torch.float32} == {"1.weight"}
    (found,) = synthesize(tmp_path / "run", [0.28])
    assert torch.equal(found.state_dict["1.weight"], model[1].weight)


def test_doubling_the_batch_and_changing_the_cadence_keep_the_width(tmp_path: Path) -> None:
    """The parameters are t and t squared, so an average shows the mean and the width of its own profile."""
    model = nn.Linear(2, 1, bias=False).double()
    last, images, step, first = 128_000, 0, 0, True
    for upto, batch, update_every in ((last // 2, 64, 3), (last, 128, 1)):
        ema = PostHocEMA.from_model(
            model, tmp_path / "run", sigma_rels=(0.05, 0.28), update_every=update_every, checkpoint_every=50,
            resume=not first, t_unit="images",
        )  # fmt: skip
        while images < upto:
            images, step = images + batch, step + 1
            with torch.no_grad():
                model.weight.copy_(torch.tensor([[images, images**2]], dtype=torch.float64))
            ema.update_(model, t=images)
            if step % 50 == 0:
                ema._session.writer.drain()
        ema.close()
        first = False
    for sigma_rel in (0.05, 0.08, 0.12, 0.2, 0.28):
        (found,) = synthesize(tmp_path / "run", [sigma_rel], calculation_dtype=torch.float64)
        assert found.t == last
        mean, mean_square = found.state_dict["weight"][0].tolist()
        assert math.sqrt(mean_square - mean**2) / last == pytest.approx(sigma_rel, rel=0.02)


def test_steps_that_diverged_leave_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Parameters are NaN from step 500 to 510: as if no update had been made there."""
    found = []
    for name in ("diverged", "nothing"):
        model = nn.Linear(3, 2, bias=False)
        generator = torch.Generator().manual_seed(0)
        ema = PostHocEMA.from_model(model, tmp_path / name, update_every=1, checkpoint_every=499)
        for t in range(1, 701):
            values = torch.randn(2, 3, generator=generator) + t / 100
            bad = 500 <= t <= 510
            with torch.no_grad():
                model.weight.copy_(torch.full((2, 3), torch.nan) if bad else values)
            if name == "diverged" or not bad:
                ema.update_(model, t=t)
        ema.close()
        found.append(synthesize(tmp_path / name, [0.05, 0.12, 0.28]))
        assert ema._session.tracker.num_refused == (11 if name == "diverged" else 0)
    for one, other in zip(*found, strict=True):
        assert one.state_dict.keys() == other.state_dict.keys()
        assert bool(one.state_dict["weight"].isfinite().all())
        assert all(torch.equal(one.state_dict[key], other.state_dict[key]) for key in one.state_dict)
    told = [message for message in caplog.messages if "not finite" in message or "finite again" in message]
    assert [message.split(", ", 2)[-1].split(":")[0] for message in told] == ["t=500", "t=511"]
    assert "11 updates" in told[1]


def test_retention_keeps_the_number_asked_for_and_never_the_last_ones_only(tmp_path: Path) -> None:
    trained(tmp_path / "run", 400, max_checkpoints=6)
    complete = [s.t for s in open_run(open_store(tmp_path / "run")).complete]
    assert len(complete) == 6
    assert complete[-1] == 400
    assert complete[0] < 200


def test_pinned_snapshots_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    store.put("pins/30", b"")
    trained(tmp_path / "run", 200, max_checkpoints=2)
    assert 30 in [s.t for s in open_run(store).complete]


def test_a_later_attempt_supersedes_the_older_one(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    older = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5)
    newer = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5, resume=True)
    with pytest.raises(BackgroundError, match=r"attempt 0 of .* is superseded by attempt 1"):
        for _ in range(10_000):
            older.update_(model)
    for _ in range(5):
        newer.update_(model)
    newer.close()
    assert [(s.t, s.attempt) for s in open_run(open_store(tmp_path / "run")).complete] == [(5, 1)]


def test_close_writes_a_last_snapshot(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=4) as ema:
        for _ in range(43):
            ema.update_(model)
    (snapshot,) = open_run(open_store(tmp_path / "run")).complete
    assert snapshot.t == 40


def test_only_save_diff_leaves_frozen_parameters_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1, only_save_diff=True) as ema:
        ema.update_(model)
        with ema.state_dict(sigma_rel=0.1) as state:
            assert set(state) == {"1.weight", "1.bias"}
            model.load_state_dict(state, strict=False)
        with ema.model(model, sigma_rel=0.1):
            pass


def test_reading_and_writing_touch_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle  # noqa: PLC0415

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    model = trained(tmp_path / "run", 20)
    with PostHocEMA.from_path(tmp_path / "run").state_dict(sigma_rel=0.15) as state:
        model.load_state_dict(state)


def test_a_snapshot_that_retention_deletes_meanwhile_is_planned_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "run", 50)
    original, gone = LocalStore.read_into, []

    def read_into(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        if not gone:
            gone.append("000000000020-a0")
            delete_snapshot(self, f"snapshots/{gone[0]}")
        original(self, key, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", read_into)
    for make in (
        lambda: synthesize(tmp_path / "run", [0.15])[0].state_dict,
        lambda: PostHocEMA.from_path(tmp_path / "run").state_dict(sigma_rel=0.15).__enter__(),
    ):
        gone.clear()
        made = make()
        assert torch.equal(made["0.weight"], synthesize(tmp_path / "run", [0.15])[0].state_dict["0.weight"])


def test_manifests_hold_what_a_stranger_needs(tmp_path: Path) -> None:
    trained(tmp_path / "run", 10)
    manifest = json.loads((tmp_path / "run/snapshots/000000000010-a0/rank-00000-of-00001.json").read_text())
    assert manifest["updates"] == [[10, 10]]
    assert manifest["format"] == 1
    assert json.loads((tmp_path / "run/attempts/0.json").read_text())["token"] == manifest["token"]


def test_host_memory_is_what_is_promised(tmp_path: Path) -> None:
    """4 bytes per element and profile of averages, two staging buffers, one snapshot buffer per profile."""
    model = nn.Linear(1000, 1000, bias=False).bfloat16()
    ema = PostHocEMA.from_model(model, tmp_path / "run", checkpoint_dtype=torch.bfloat16)
    writer, elements = ema._session.writer, 1_000_000
    assert sum(flat.nbytes for average in ema._session.tracker.averages for flat in average) == 2 * 4 * elements
    assert sum(flat.nbytes for slot in writer._staging.slots for flat in slot) == 2 * 2 * elements
    images = [image for files in writer._buffers.files for image in files]
    assert sum(len(image.buffer) for image in images) == pytest.approx(2 * 2 * elements, rel=0.01)
    ema.close()


def test_the_signatures_are_the_predecessors() -> None:
    def positional(function: object) -> list[str]:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    assert positional(PostHocEMA.from_model) == [
        "model", "checkpoint_dir", "max_checkpoints", "sigma_rels", "update_every", "checkpoint_every",
        "checkpoint_dtype", "calculation_dtype", "only_save_diff", "update_after_step",
    ]  # fmt: skip
    assert positional(PostHocEMA.from_path) == [
        "checkpoint_dir", "model", "max_checkpoints", "sigma_rels", "update_every", "checkpoint_every",
        "checkpoint_dtype", "only_save_diff",
    ]  # fmt: skip
    assert positional(PostHocEMA.model) == ["model", "sigma_rel", "step", "calculation_dtype"]
    assert positional(PostHocEMA.state_dict) == ["sigma_rel", "step", "calculation_dtype"]


UNCLOSED = """
import sys, torch
from phema_dist import PostHocEMA
from phema_dist.storage.store import LocalStore
model = torch.nn.Linear(4, 4)
ema = PostHocEMA.from_model(model, sys.argv[1], update_every=1, checkpoint_every=10)
put = LocalStore.put
def slow(self, key, data):
    import time
    time.sleep(0.5)
    put(self, key, data)
LocalStore.put = slow
for _ in range(10):
    ema.update_(model)
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_program_that_ends_without_close_stores_what_was_queued(tmp_path: Path, end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED + end, tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == {"": 0, "1 / 0": 1}.get(end, 3)
    assert "PostHocEMA was not closed" in done.stderr
    assert [s.t for s in open_run(open_store(tmp_path / "run")).complete] == [10]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking with threads is what is tested
def test_a_forked_child_neither_writes_nor_waits(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        ema.update_(model)
    assert open_run(open_store(tmp_path / "run")).complete[-1].t == 2


def test_the_clock_goes_on_where_the_model_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """resume=24: the model is at 24, the averages at 20; the next update covers what lies between."""
    caplog.set_level(logging.INFO, "phema_dist")
    model = Clock(60)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as ema:
        for t in range(1, 26):
            model.set(t)
            ema.update_(model)
            ema._session.writer.drain()
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10, resume=24) as ema:
        assert ema.t == 24
        for t in range(25, 61):
            model.set(t)
            ema.update_(model)
    assert "going on from t=20 of attempt 0" in caplog.text
    assert "the averages saw nothing of t=21 to 24, unless training_state is loaded" in caplog.text
    warnings = (record.message for record in caplog.records if record.levelno > logging.INFO)
    warned = next(text for text in warnings if "saw nothing" in text)
    assert "t=25: the averages saw nothing of t=21 to 24; to go on exactly, load the training_state" in warned
    times = [*range(1, 21), *range(25, 61)]
    found = synthesize(tmp_path / "run", [0.28])[0].state_dict["weight"].double().numpy()
    np.testing.assert_allclose(found, tracked(gamma_of(0.28), times, 61), atol=1e-7)


def test_resuming_from_nothing_but_incomplete_snapshots_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "run", 20)
    for manifest in (tmp_path / "run/snapshots").glob("*/*.json"):
        manifest.unlink()
    PostHocEMA.from_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), tmp_path / "run", resume=True).close()
    assert "cannot go on from t=20: manifests of rank 0 of 1 are missing" in caplog.text


def test_a_superseded_job_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes its check, uploads slowly, and meanwhile another job has continued the run."""
    model, begun, go_on, original = nn.Linear(4, 4), threading.Event(), threading.Event(), LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        if "000000000015-a0" in key and key.endswith(".json"):
            begun.set()
            assert go_on.wait(60)
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    older = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5, max_checkpoints=2)
    for _ in range(15):
        older.update_(model)
        if not begun.is_set() and older.t < 15:
            older._session.writer.drain()
    assert begun.wait(60)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5, resume=True) as newer:
        for _ in range(30):
            newer.update_(model)
            newer._session.writer.drain()
    before = [(s.t, s.attempt) for s in open_run(open_store(tmp_path / "run")).complete]
    go_on.set()
    with pytest.raises(BackgroundError, match="superseded by attempt 1"):
        older.close()
    assert [(s.t, s.attempt) for s in open_run(open_store(tmp_path / "run")).complete] == before
    assert len(before) > 6


def test_what_no_rank_will_finish_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        if "000000000030-a0/rank" in key:
            raise StorageError("no space for the manifest")
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    trained(tmp_path / "run", 60)
    assert [s.t for s in open_run(open_store(tmp_path / "run")).snapshots] == [10, 20, 40, 50, 60]


def test_pins_hold_on_an_abandoned_branch(tmp_path: Path) -> None:
    trained(tmp_path / "run", 30)
    store = open_store(tmp_path / "run")
    store.put("pins/000000000030", b"")
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with PostHocEMA.from_model(model, store.url, update_every=1, checkpoint_every=7, resume=10) as ema:
        for _ in range(35):
            ema.update_(model)
            ema._session.writer.drain()
    assert [s.t for s in open_run(store).abandoned] == [30]


def test_a_last_snapshot_that_is_not_stored_is_an_error_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 4)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1)
    ema.update_(model)

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(LocalStore, "put", put)
    with pytest.raises(BackgroundError, match="the last snapshot could not be stored: the disk is full"):
        ema.close()


def test_a_deletion_that_fails_is_not_called_a_lost_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def delete(self: LocalStore, keys: object) -> None:
        raise StorageError("may not delete")

    monkeypatch.setattr(LocalStore, "delete", delete)
    trained(tmp_path / "run", 50, max_checkpoints=2)
    assert [s.t for s in open_run(open_store(tmp_path / "run")).complete] == [10, 20, 30, 40, 50]
    assert "older snapshots could not be deleted: may not delete" in caplog.text
    assert "is lost" not in caplog.text


def test_an_average_is_not_averaged(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        with (
            ema.model(model, sigma_rel=0.1),
            pytest.raises(SettingsError, match="the parameters are an average"),
        ):
            ema.update_(model)
        ema.update_(model)


def test_the_users_defaults_for_dtype_device_and_mode_do_not_matter(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).bfloat16()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1)
            for _ in range(3):
                ema.update_(model)
                ema._session.writer.drain()
            with ema.state_dict(sigma_rel=0.1) as state:
                assert state["weight"].dtype == torch.float32
                torch.testing.assert_close(state["weight"], model.weight.float(), rtol=1e-4, atol=1e-6)
            (found,) = synthesize(tmp_path / "run", [0.2])
            torch.testing.assert_close(found.state_dict["weight"], model.weight.float(), rtol=1e-4, atol=1e-6)
            ema.close()
            again = PostHocEMA.from_path(tmp_path / "run", model)
            again.update_()
            again.close()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("t", [5.5, "7", None])
def test_t_is_an_integer(tmp_path: Path, t: object) -> None:
    with PostHocEMA.from_model(nn.Linear(2, 2), tmp_path / "run") as ema:
        if t is None:
            ema.update_(t=np.int64(4))
            ema.update_(t=torch.tensor(5))
            assert ema.t == 5
        else:
            with pytest.raises(SettingsError, match="t must be an integer"):
                ema.update_(t=t)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="from_model"):
        PostHocEMA(nn.Linear(2, 2), tmp_path / "run")  # type: ignore[arg-type]


def test_what_the_certificate_warns_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path / "run", 50, checkpoint_dtype=torch.bfloat16)
    synthesize(tmp_path / "run", [0.1])
    assert caplog.text == ""  # parameters move much further than they are rounded; tests/test_noise.py has the others
    synthesize(tmp_path / "run", [0.1], t=45)
    assert "t=40, where a snapshot is, would be more exact" in caplog.text
    with pytest.raises(SnapshotError, match=r"complete snapshots up to t=50; got t=60"):
        synthesize(tmp_path / "run", [0.1], t=60)


def test_a_last_snapshot_that_was_due_and_skipped_is_written_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, original = threading.Event(), LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        assert "snapshots" not in key or released.wait(60)
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    model = nn.Linear(16, 16)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10)
    for _ in range(30):
        ema.update_(model)
    ema.update_(model)  # while this one waits, the snapshot at 30 is skipped
    released.set()
    ema.close()
    assert open_run(open_store(tmp_path / "run")).complete[-1].t == 31

    again = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10, resume=True)
    again._session.writer._grid.every = 1024
    for _ in range(9):
        again.update_(model)
    again.close()  # at 40, which was due and not taken
    assert open_run(open_store(tmp_path / "run")).complete[-1].t == 40


def test_what_a_killed_put_left_behind_goes_with_its_snapshot(tmp_path: Path) -> None:
    trained(tmp_path / "run", 10)
    folder = tmp_path / "run/snapshots/000000000010-a0"
    (folder / "sigma_rel-0.05/.0123456789abcdef.tmp").write_bytes(b"cut short")
    delete_snapshot(open_store(tmp_path / "run"), "snapshots/000000000010-a0")
    assert not folder.exists()
