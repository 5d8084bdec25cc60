"""The Lightning callback on the real Trainer: its run is the one of a plain loop, bit for bit, resumed or not."""

import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import run

from phema_dist import BackgroundError, PostHocEMA, Power, ProfileError, RunError, SettingsError, synthesize
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """In this process too, for tests of one."""
    import lightning_job  # noqa: PLC0415  takes seconds

    return lightning_job


@pytest.fixture(scope="module")
def by_hand(job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a plain loop."""
    folder: Path = tmp_path_factory.mktemp("by") / "hand"
    job.by_hand(str(folder))
    return folder


def on_ranks(num_ranks: int, name: str, *args: Any) -> Any:
    return run(num_ranks, call, name, args, timeout=170)


def call(name: str, args: tuple[Any, ...]) -> Any:
    import lightning_job  # noqa: PLC0415

    return getattr(lightning_job, name)(*args)


def stored(folder: Path) -> dict[tuple[int, float], dict[str, torch.Tensor]]:
    """Each tracked average of each complete snapshot."""
    found = open_run(open_store(str(folder)))
    keys = [(snapshot.t, sigma_rel) for snapshot in found.complete for sigma_rel in found.info.sigma_rels]
    made = synthesize(str(folder), [Power(sigma_rel, t=t) for t, sigma_rel in keys])
    return dict(zip(keys, (average.state_dict for average in made), strict=True))


def assert_same_runs(one: Path, other: Path) -> None:
    left, right = stored(one), stored(other)
    assert list(left) == list(right) == [(t, sigma_rel) for t in (4, 8, 12, 14) for sigma_rel in (0.05, 0.28)]
    for key, state in left.items():
        assert state.keys() == right[key].keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}
        assert all(torch.equal(tensor, right[key][fqn]) for fqn, tensor in state.items()), key


# The run, and Lightning's checkpoints


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_a_run_is_the_one_of_a_plain_loop(tmp_path: Path, by_hand: Path, kind: str) -> None:
    on_ranks(2, "fit", str(tmp_path / "run"), kind)
    assert_same_runs(tmp_path / "run", by_hand)


@pytest.mark.parametrize(
    ("kind", "num_ranks", "other_kind", "other_num_ranks"),
    [
        ("ddp", 2, "ddp", 2),
        ("ddp", 2, "one", 1),
        ("one", 1, "fsdp2-one-file", 2),
        ("fsdp2-one-file", 2, "ddp", 2),
        ("fsdp2", 2, "fsdp2", 1),
        ("fsdp1", 2, "fsdp1", 2),
    ],
)  # fmt: skip
def test_a_run_that_is_resumed_in_mid_epoch_is_the_one_of_a_plain_loop(
    tmp_path: Path, by_hand: Path, kind: str, num_ranks: int, other_kind: str, other_num_ranks: int
) -> None:
    """From a checkpoint at 10, between snapshots, of a training that went on to one that is hidden then."""
    on_ranks(num_ranks, "interrupted", str(tmp_path), str(tmp_path / "run"), kind, 10)
    assert sorted({t for t, _ in stored(tmp_path / "run")}) == [4, 8, 12]
    on_ranks(other_num_ranks, "resumed", str(tmp_path), str(tmp_path / "run"), other_kind)
    assert_same_runs(tmp_path / "run", by_hand)


def test_a_folder_that_lightning_consolidates_is_gone_on_from_too(
    tmp_path: Path, job: ModuleType, by_hand: Path
) -> None:
    on_ranks(2, "interrupted", str(tmp_path), str(tmp_path / "run"), "fsdp1", 10)
    job.consolidate(tmp_path / "saved.ckpt")
    assert torch.load(tmp_path / "saved.ckpt")["state_dict"].keys() == job.Net().state_dict().keys()
    job.resumed(str(tmp_path), str(tmp_path / "run"), "one")
    assert_same_runs(tmp_path / "run", by_hand)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "consolidated"])
def test_two_runs_of_one_trainer_are_each_gone_on_with(
    tmp_path: Path, job: ModuleType, by_hand: Path, kind: str
) -> None:
    job.by_hand(str(tmp_path / "hand"), update_every=1)
    on_ranks(2, "two_interrupted", str(tmp_path), "fsdp1" if kind == "consolidated" else kind, 10)
    if kind == "consolidated":
        job.consolidate(tmp_path / "saved.ckpt")
        job.two_resumed(str(tmp_path), "one")
    else:
        on_ranks(2, "two_resumed", str(tmp_path), kind)
    assert_same_runs(tmp_path / "run", by_hand)
    assert_same_runs(tmp_path / "often", tmp_path / "hand")


# What is evaluated


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp1", "fsdp2"])
def test_what_is_evaluated_is_the_consolidated_checkpoint(tmp_path: Path, job: ModuleType, kind: str) -> None:
    def losses(state: dict[str, torch.Tensor]) -> list[float]:
        model = job.Net()
        model.load_state_dict(state)
        return [job.loss_of(model, 1000 + i).item() for i in range(2)]

    job.by_hand(str(tmp_path / "hand"), update_every=1, checkpoint_every=job.PER_EPOCH)
    if kind == "one":  # without a process group, Lightning evaluates in inference mode
        found = [job.evaluated(str(tmp_path / "run"), kind, 0.28)]
    else:
        found = on_ranks(2, "evaluated", str(tmp_path / "run"), kind, 0.28)
    states = stored(tmp_path / "hand")
    first, last = (losses(states[t, 0.28]) for t in (job.PER_EPOCH, job.STEPS))
    assert found == [losses(job.Net().state_dict()) + first + last * 3] * len(found)
    assert {key: list(state) for key, state in stored(tmp_path / "run").items()} == {
        k: list(s) for k, s in states.items()
    }
    for key, state in stored(tmp_path / "run").items():  # training went on from its own parameters
        assert all(torch.equal(tensor, states[key][fqn]) for fqn, tensor in state.items())


def test_a_checkpoint_that_validation_saves_holds_the_parameters_of_training(
    tmp_path: Path, job: ModuleType, by_hand: Path
) -> None:
    saving = job.ModelCheckpoint(tmp_path, filename="saved", save_on_train_epoch_end=False)
    averages = job.Averages(str(tmp_path / "run"), evaluate_with=0.28)
    settings = {"enable_checkpointing": True, "limit_val_batches": 1, "max_epochs": 1}
    job.trainer(str(tmp_path), "one", averages, saving, **settings).fit(job.Net())
    job.resumed(str(tmp_path), str(tmp_path / "run"), "one")
    mine = stored(tmp_path / "run")
    for key, state in stored(by_hand).items():
        assert all(torch.equal(tensor, mine[key][fqn]) for fqn, tensor in state.items())


@pytest.mark.parametrize(
    ("kind", "when"), [("one", "step"), ("ddp", "step"), ("ddp", "end"), ("fsdp1", "end"), ("fsdp2", "step")]
)
def test_what_is_saved_while_validation_sees_the_average_are_the_parameters_of_training(
    tmp_path: Path, job: ModuleType, kind: str, when: str
) -> None:
    arguments = (str(tmp_path), kind, when)
    ranks = [job.saved_in_validation(*arguments)] if kind == "one" else on_ranks(2, "saved_in_validation", *arguments)
    for without, saving in ranks:
        assert saving == without  # validation went on with the same average, and with its own buffers
        assert saving[1][-1] == 2
    own, seen, light = (job.saved(tmp_path / when / f"{name}.ckpt") for name in ("own", "seen", "light"))
    for key, tensor in own.items():
        assert torch.equal(seen[key], tensor), key
        assert torch.equal(light[key], tensor), key


def test_a_checkpoint_is_not_saved_while_an_average_is_put_into_the_model(
    tmp_path: Path, job: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal may ask for."""
    averages = job.Averages(str(tmp_path / "run"), evaluate_with=0.28)
    trainer = job.trainer(str(tmp_path), "one", averages, limit_val_batches=1, num_sanity_val_steps=0)

    @contextmanager
    def interrupted(*_: Any, **__: Any) -> Iterator[None]:
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        yield

    monkeypatch.setattr(PostHocEMA, "model", interrupted)
    with pytest.raises(SettingsError, match="just being put"):
        trainer.fit(job.Net())
    assert not (tmp_path / "saved.ckpt").exists()


def test_two_averages_are_not_evaluated_at_once(tmp_path: Path, job: ModuleType) -> None:
    ours = [job.Averages(str(tmp_path / name), evaluate_with=0.28) for name in ("run", "other")]
    with pytest.raises(SettingsError, match="evaluate_with"):
        job.trainer(str(tmp_path), "one", *ours).fit(job.Net())


def test_before_there_is_an_average_the_parameters_are_evaluated(
    tmp_path: Path, job: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    model = job.Net()
    averages = job.Averages(str(tmp_path / "run"), evaluate_with=0.05)
    job.trainer(str(tmp_path), "one", averages, max_steps=3, limit_val_batches=1, val_check_interval=1).fit(model)
    assert len(model.evaluated) == 1 + 3
    assert caplog.text.count("the parameters are evaluated, not an average") == 1  # after the first of three steps


@pytest.mark.parametrize("error", [InterruptedError, KeyboardInterrupt])
def test_an_error_in_validation_gives_the_parameters_back_and_ends_the_threads(
    tmp_path: Path, job: ModuleType, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = job.Net()
    seen: list[dict[str, torch.Tensor]] = []

    def look() -> None:
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    def validation_step(*_: Any) -> None:
        look()
        raise error

    monkeypatch.setattr(model, "on_train_epoch_end", look)
    monkeypatch.setattr(model, "validation_step", validation_step)
    averages = job.Averages(str(tmp_path / "run"), evaluate_with=0.28)
    trainer = job.trainer(str(tmp_path), "one", averages, limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model)
    look()
    average, after = seen
    assert not any(torch.equal(average[name], after[name]) for name in after)
    own = job.Net()
    optimizer = torch.optim.Adam(own.parameters(), lr=0.02)
    for step in range(job.PER_EPOCH):
        optimizer.zero_grad()
        job.loss_of(own, step).backward()
        optimizer.step()
    assert all(torch.equal(parameter, after[name]) for name, parameter in own.named_parameters())
    assert not any("phema" in thread.name for thread in threading.enumerate())
    assert {t for t, _ in stored(tmp_path / "run")} == {4}


# When there is an update


def test_accumulated_batches_are_one_step(tmp_path: Path, job: ModuleType) -> None:
    averages = job.Averages(str(tmp_path / "run"))
    trainer = job.trainer(str(tmp_path), "one", averages, accumulate_grad_batches=3)
    trainer.fit(job.Net())
    assert averages.ema.t == trainer.global_step == 6  # 3, 3 and 1 of 7 batches, twice


def test_several_optimizers_make_one_update_together(tmp_path: Path, job: ModuleType) -> None:
    averages = job.Averages(str(tmp_path / "run"))
    model = job.Adversaries()
    trainer = job.trainer(str(tmp_path), "one", averages)
    trainer.fit(model)
    assert averages.ema.t == job.STEPS
    assert trainer.global_step == 2 * job.STEPS


def test_a_step_that_is_skipped_is_none(tmp_path: Path, job: ModuleType) -> None:
    averages = job.Averages(str(tmp_path / "run"))
    trainer = job.trainer(str(tmp_path), "one", averages, plugins=[job.scaled()])
    trainer.fit(job.Overflowing())
    assert averages.ema.t == job.STEPS - 2
    assert trainer.global_step == job.STEPS


def test_time_may_be_the_users(tmp_path: Path, job: ModuleType) -> None:
    model = job.Net()
    averages = job.Averages(str(tmp_path / "run"), t=lambda: 100 * (model.trainer.global_step + 1))
    job.trainer(str(tmp_path), "one", averages).fit(model)
    assert {t for t, _ in stored(tmp_path / "run")} == {400, 800, 1200, 1400}


# Around a fit


def test_fit_may_be_called_again_with_a_checkpoint_that_was_saved_after_the_first(
    tmp_path: Path, job: ModuleType, by_hand: Path
) -> None:
    averages = job.Averages(str(tmp_path / "run"))
    trainer = job.trainer(str(tmp_path), "one", averages, max_epochs=1)
    trainer.fit(job.Net())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    job.resumed(str(tmp_path), str(tmp_path / "run"), "one")
    mine, theirs = stored(tmp_path / "run"), stored(by_hand)
    assert {t for t, _ in mine} == {4, 6, 8, 12, 14}  # 6: of the first close
    assert all(torch.equal(tensor, mine[key][fqn]) for key, state in theirs.items() for fqn, tensor in state.items())


def test_fit_may_be_called_again_as_it_is(tmp_path: Path, job: ModuleType) -> None:
    averages = job.Averages(str(tmp_path / "run"))
    model = job.Net()
    trainer = job.trainer(str(tmp_path), "one", averages, max_epochs=1)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert averages.ema.t == job.STEPS
    assert {t for t, _ in stored(tmp_path / "run")} == {4, 6, 9, 13}  # calls are counted on from the snapshot


def test_before_a_fit_there_is_nothing_to_evaluate_with(tmp_path: Path, job: ModuleType) -> None:
    averages = job.Averages(str(tmp_path / "run"), evaluate_with=0.28)
    with pytest.raises(RunError, match="evaluate_with needs a run: fit before, or leave it out"):
        job.trainer(str(tmp_path), "one", averages, limit_val_batches=1).validate(job.Net(), verbose=False)


def test_a_checkpoint_that_a_fit_did_not_go_on_from_is_forgotten(tmp_path: Path, job: ModuleType) -> None:
    class BreakingNet(job.Net):  # type: ignore[name-defined,misc]
        def validation_step(self, *_: object) -> None:
            raise job.Interruption

    trainer = job.trainer(str(tmp_path), "one", job.Averages(str(tmp_path / "old")), max_epochs=1)
    trainer.fit(job.Net())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    averages = job.Averages(str(tmp_path / "run"))
    with pytest.raises(job.Interruption):  # in the sanity check, before the first step
        job.trainer(str(tmp_path), "one", averages, limit_val_batches=1).fit(
            BreakingNet(), ckpt_path=tmp_path / "saved.ckpt"
        )
    trainer = job.trainer(str(tmp_path), "one", averages, max_epochs=1)
    trainer.fit(job.Net())
    assert averages.ema.t == trainer.global_step == job.PER_EPOCH


def test_another_trainer_does_not_go_on_with_a_run_unasked(tmp_path: Path, job: ModuleType) -> None:
    averages = job.Averages(str(tmp_path / "run"))
    job.trainer(str(tmp_path), "one", averages, max_epochs=1).fit(job.Net())
    with pytest.raises(RunError, match="resume"):
        job.trainer(str(tmp_path), "one", averages, max_epochs=1).fit(job.Net())


def test_what_cannot_be_evaluated_is_told_at_once_and_the_wrong_t_with_a_checkpoint(
    tmp_path: Path, job: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ProfileError, match="sigma_rel must lie in"):
        job.Averages(str(tmp_path / "run"), evaluate_with=0.5)
    averages = job.Averages(str(tmp_path / "run"), evaluate_with=0.05)
    trainer = job.trainer(str(tmp_path), "one", averages, max_epochs=1)
    trainer.fit(job.Net())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with caplog.at_level("WARNING", "phema_dist"):
        trainer.test(job.Net())
        assert "is evaluated, not one at the t of" not in caplog.text
        trainer.test(job.Net(), ckpt_path=tmp_path / "saved.ckpt")
    assert "is evaluated, not one at the t of" in caplog.text


def test_a_checkpoint_without_averages_is_gone_on_from_by_its_t(tmp_path: Path, job: ModuleType) -> None:
    job.interrupted(str(tmp_path), str(tmp_path / "run"), "one", 10, exact_resume=False)
    assert torch.load(tmp_path / "saved.ckpt")["phema_dist"] == {"t": 10}
    job.resumed(str(tmp_path), str(tmp_path / "run"), "one", exact_resume=False)
    assert [(t, t < 10) for t, _ in stored(tmp_path / "run")][::2][:2] == [(4, True), (8, True)]


def test_an_error_on_several_ranks_leaves_a_checkpoint_with_the_clock(tmp_path: Path) -> None:
    on_ranks(2, "saved_on_error", str(tmp_path), str(tmp_path / "run"), 10)
    assert torch.load(tmp_path / "saved.ckpt")["phema_dist"] == {"t": 10}


def test_a_run_is_not_gone_on_with_unasked(tmp_path: Path, job: ModuleType) -> None:
    job.fit(str(tmp_path / "run"), "one")
    with pytest.raises(RunError, match="resume"):
        job.fit(str(tmp_path / "run"), "one")


def test_a_checkpoint_of_other_averages_is_refused(tmp_path: Path, job: ModuleType) -> None:
    job.interrupted(str(tmp_path), str(tmp_path / "run"), "one", 10)
    with pytest.raises(RunError, match="sigma_rels"):
        job.resumed(str(tmp_path), str(tmp_path / "other"), "one", sigma_rels=(0.05, 0.2))


def test_a_last_snapshot_that_is_lost_is_told_when_the_checkpoint_is_saved(tmp_path: Path, job: ModuleType) -> None:
    saving = job.ModelCheckpoint(tmp_path, filename="saved")
    averages = job.Breaking(str(tmp_path / "run"))
    with pytest.raises(BackgroundError, match="last snapshot"):
        job.trainer(str(tmp_path), "one", averages, saving, enable_checkpointing=True).fit(job.Net())
    assert torch.load(tmp_path / "saved.ckpt")["phema_dist"]["t"] == job.STEPS


def test_nothing_happens_in_a_fast_dev_run(tmp_path: Path, job: ModuleType) -> None:
    job.trainer(str(tmp_path), "one", job.Averages(str(tmp_path / "run")), fast_dev_run=True).fit(job.Net())
    assert not (tmp_path / "run").exists()


def test_how_it_fares_is_logged(tmp_path: Path, job: ModuleType) -> None:
    logger = job.Recorder()
    averages = job.Averages(str(tmp_path / "run"))
    job.trainer(str(tmp_path), "one", averages, logger=logger, log_every_n_steps=7).fit(job.Net())
    seen = [(step, metrics) for step, metrics in logger.seen if "phema_dist/t" in metrics]
    assert [(step, m["phema_dist/t"], m["phema_dist/snapshots_written"]) for step, m in seen] == [
        (7, 7, 1),
        (14, 14, 3),
    ]
    assert "phema_dist/last_error" not in seen[0][1]


def test_nothing_is_logged_where_the_trainer_never_logs(tmp_path: Path, job: ModuleType) -> None:
    logger = job.Recorder()
    averages = job.Averages(str(tmp_path / "run"))
    job.trainer(str(tmp_path), "one", averages, logger=logger, log_every_n_steps=0, max_epochs=1).fit(job.Net())
    assert not any("phema_dist/t" in metrics for _, metrics in logger.seen)


def test_a_callback_travels_to_processes_that_are_spawned(job: ModuleType) -> None:
    assert pickle.dumps(job.PostHocEMACallback("run", evaluate_with=0.1))


def test_what_from_model_does_not_have_is_refused_at_once(job: ModuleType) -> None:
    with pytest.raises(TypeError, match="sigma_rel"):
        job.PostHocEMACallback("run", sigma_rel=0.1)


def test_without_lightning_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "phema_dist.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match=r"phema-dist\[lightning\]"):
        import phema_dist.integrations.lightning  # noqa: F401, PLC0415
