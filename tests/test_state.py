"""Averages in the training checkpoint: what dcp.save stores and dcp.load brings back, in any world, bit for bit."""

import logging
import random
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import outcome, run
from test_distributed import SIGMA_RELS, Net, State, assert_same, set_values, wrapped
from test_matrix import take_values
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from phema_dist import PostHocEMA, RunError, SettingsError, StorageError, synthesize
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.storage.run import open_run
from phema_dist.storage.store import LocalStore, open_store
from phema_dist.synthesis.recipe import plan
from phema_dist.training import writer
from phema_dist.training.policy import Place

pytestmark = [
    # dcp says so whenever there is no process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning"),
]


def averages(ema: PostHocEMA) -> list[State]:
    """What this rank owns of each profile, put into full tensors of NaN."""
    assert ema._session is not None
    ema._session.writer.settle()
    shapes = {p.info.fqn: p.info.shape for s in ema._session.segments for p in s.pieces}
    found = []
    for held in ema._session.tracker.boxes():
        state = {}
        for fqn, boxes in held.items():
            full = torch.full(shapes[fqn], torch.nan)
            for box, view in boxes:
                full[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))] = view
            state[fqn] = full
        found.append(state)
    return found


def joined(parts: list[list[State]]) -> list[State]:
    """One full state per profile, of what all ranks own."""
    together: list[State] = [{} for _ in parts[0]]
    for rank in parts:
        for state, mine in zip(together, rank, strict=True):
            for fqn, tensor in mine.items():
                state[fqn] = torch.where(tensor.isnan(), state[fqn], tensor) if fqn in state else tensor
    for state in together:
        assert not any(tensor.isnan().any() for tensor in state.values())
    return together


def step_to(ema: PostHocEMA, model: nn.Module, last: int) -> None:
    while ema.t < last:
        take_values(model, ema.t + 1)
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]


def part(
    kind: str, folder: str, load_from: str | None, stop: int, save_to: str | None, asynchronous: bool
) -> tuple[int, list[State]]:
    """A job: goes on from a training checkpoint, trains up to `stop`, saves another one, dies some steps later."""
    model = wrapped(kind)
    ema = PostHocEMA.from_model(model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, resume=True)
    if load_from is not None:
        dcp.load({"ema": ema.training_state}, checkpoint_id=load_from)
    begun_at = ema.t
    step_to(ema, model, stop)
    found = averages(ema)
    if save_to is not None:
        if asynchronous:
            future = dcp.async_save({"ema": ema.training_state}, checkpoint_id=save_to)
            step_to(ema, model, stop + 4)  # the averages change while they are being written
            future.result()
        else:
            dcp.save({"ema": ema.training_state}, checkpoint_id=save_to)
            step_to(ema, model, stop + 4)
        ema._session.writer.drain()  # type: ignore[union-attr]
        if dist.is_initialized():
            dist.barrier()
    else:
        ema.close()
    return begun_at, found


def alone(folder: Path, stop: int) -> list[State]:
    model = Net()
    with PostHocEMA.from_model(model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10) as ema:
        step_to(ema, model, stop)
        return averages(ema)


WORLDS = [("ddp", 2), ("fsdp2", 4), ("fsdp1-full_shard-orig", 2), ("hsdp", 4), ("fsdp2-tp", 4)]


@pytest.mark.filterwarnings("ignore")
def test_interrupted_anywhere_and_resumed_in_other_worlds_the_averages_are_the_same_bits(tmp_path: Path) -> None:
    dice = random.Random(5)  # noqa: S311  no secret
    stops = sorted(dice.sample(range(6, 60), 5))
    before, load_from = 0, None
    run_folder = str(tmp_path / "run")
    for i, (stop, (kind, world_size)) in enumerate(zip(stops, WORLDS, strict=True)):
        save_to = str(tmp_path / f"training-{i}")
        parts = run(world_size, part, kind, run_folder, load_from, stop, save_to, i % 2 == 1)
        assert [begun_at for begun_at, _ in parts] == [before] * world_size
        before, load_from = stop, save_to
    begun_at, found = part("plain", run_folder, load_from, 63, None, asynchronous=False)
    assert begun_at == stops[-1]
    wanted = alone(tmp_path / "alone", 63)
    for mine, theirs in zip(joined([found]), joined([wanted]), strict=True):
        assert_same(mine, theirs)

    resumed, uninterrupted = open_run(open_store(run_folder)), open_run(open_store(tmp_path / "alone"))
    assert [s.t for s in resumed.complete] == [s.t for s in uninterrupted.complete] == [10, 20, 30, 40, 50, 60, 63]
    for sigma_rel in (0.05, 0.1, 0.2, 0.28):
        (one,), (other,) = synthesize(run_folder, [sigma_rel]), synthesize(tmp_path / "alone", [sigma_rel])
        assert_same(one.state_dict, other.state_dict)
        assert plan(resumed, [sigma_rel])[0].certificate.profile_error < 0.05


def test_it_waits_for_queued_updates_and_hands_out_a_copy(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, bias=False)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1)
    with torch.no_grad():
        model.weight.fill_(1)
    for _ in range(5):
        ema.update_(model)
    state = ema.training_state.state_dict()
    saved = state["averages"]["sigma_rel-0.05"]["weight"]
    assert saved.shape == (2, 3)
    assert torch.equal(saved.boxes[0][1], torch.ones(2, 3))
    with torch.no_grad():
        model.weight.fill_(7)
    ema.update_(model)
    ema.close()
    assert torch.equal(saved.boxes[0][1], torch.ones(2, 3))
    with pytest.raises(SettingsError, match="closed"):
        _ = ema.training_state


def test_loading_hides_later_snapshots_and_keeps_earlier_ones(tmp_path: Path) -> None:
    model, run_folder, saved = Net(), tmp_path / "run", str(tmp_path / "training")
    ema = PostHocEMA.from_model(model, run_folder, update_every=1, checkpoint_every=10)
    step_to(ema, model, 25)
    dcp.save({"ema": ema.training_state}, checkpoint_id=saved)
    step_to(ema, model, 40)
    ema._session.writer.abandon(10)  # type: ignore[union-attr]  as if killed

    with PostHocEMA.from_model(model, run_folder, update_every=1, checkpoint_every=10, resume=True) as ema:
        assert ema.t == 40
        step_to(ema, model, 43)  # went on by mistake; loading replaces that too
        dcp.load({"ema": ema.training_state}, checkpoint_id=saved)
        assert ema.t == 25
        found = open_run(open_store(run_folder))
        assert [s.t for s in found.complete] == [10, 20]
        assert {s.t for s in found.abandoned} == {30, 40}
        step_to(ema, model, 33)
    found = open_run(open_store(run_folder))
    assert [(s.t, s.attempt) for s in found.complete] == [(10, 0), (20, 0), (30, 2), (33, 2)]
    with PostHocEMA.from_model(model, tmp_path / "alone", update_every=1, checkpoint_every=10) as alone:
        step_to(alone, model, 33)
    for sigma_rel in (0.05, 0.12, 0.28):
        (one,), (other,) = synthesize(run_folder, [sigma_rel]), synthesize(tmp_path / "alone", [sigma_rel])
        assert_same(one.state_dict, other.state_dict)


def test_after_loading_ranks_are_waited_for_where_that_was_in_vain_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[int, int]] = []

    def look(place: Place, t: int) -> bool:
        looked.append((place.attempt.number, t))
        return place.attempt.number > 0  # another rank has lost its part of the first attempt's

    monkeypatch.setattr(writer, "wait_until_complete", look)
    model = nn.Linear(3, 2)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=2) as ema:
        assert ema._session is not None
        step_to(ema, model, 2)
        state = ema.training_state.state_dict()
        for attempt in range(2):
            step_to(ema, model, 4)
            for _ in range(2):
                ema._session.writer.drain()
                ema._session.writer.wait_for_others()
            if not attempt:
                ema.training_state.load_state_dict(state)
    assert looked == [(0, 4), (1, 4), (1, 4)]


def test_it_may_move_to_an_empty_folder(tmp_path: Path) -> None:
    model, saved = Net(), str(tmp_path / "training")
    with PostHocEMA.from_model(model, tmp_path / "old", update_every=1, checkpoint_every=10) as ema:
        step_to(ema, model, 25)
        dcp.save({"ema": ema.training_state}, checkpoint_id=saved)
        wanted = averages(ema)
    with PostHocEMA.from_model(model, tmp_path / "new", update_every=1, checkpoint_every=10) as ema:
        dcp.load({"ema": ema.training_state}, checkpoint_id=saved)
        for one, other in zip(averages(ema), wanted, strict=True):
            assert_same(one, other)
        step_to(ema, model, 30)
    assert [s.t for s in open_run(open_store(tmp_path / "new")).complete] == [30]


def test_a_state_of_another_run_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with PostHocEMA.from_model(model, tmp_path / "one", update_every=1, update_after_step=2) as one:
        step_to(one, model, 5)
        state = one.training_state.state_dict()
    with PostHocEMA.from_model(model, tmp_path / "other", update_every=1) as other:
        step_to(other, model, 3)
        before = averages(other)
        with pytest.raises(RunError, match=r"update_after_step 0; it has .* and 2"):
            other.training_state.load_state_dict(state)
        assert other.t == 3
        for a, b in zip(averages(other), before, strict=True):
            assert_same(a, b)


def refuse_on_one_rank(folder: str) -> str:
    model = wrapped("ddp")
    ema = PostHocEMA.from_model(model, folder, update_every=1)
    step_to(ema, model, 2)
    state = ema.training_state.state_dict()
    if dist.get_rank() == 1:
        state["clock"] = "nonsense"
    said = outcome(lambda: ema.training_state.load_state_dict(state))
    ema.close()
    return said


def test_what_one_rank_cannot_load_no_rank_loads(tmp_path: Path) -> None:
    for said in run(2, refuse_on_one_rank, str(tmp_path)):
        assert said.startswith("RunError: ")
        assert "the clock of training_state" in said


class OneHot(nn.Module):
    """At step k it is one at k and nothing else: an average shows its own profile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(200, dtype=torch.float64))


def one_hot_part(folder: str, load_from: str | None, stop: int, save_to: str, update_every: int) -> None:
    model = OneHot()
    fully_shard(model)
    ema = PostHocEMA.from_model(model, folder, update_every=update_every, checkpoint_every=10, resume=True)
    if load_from is not None:
        dcp.load({"ema": ema.training_state}, checkpoint_id=load_from)
    while ema.t < stop:
        with torch.no_grad():
            full = torch.nn.functional.one_hot(torch.tensor(ema.t), 200).double()
            model.seen.copy_(distribute_tensor(full, model.seen.device_mesh, model.seen.placements, src_data_rank=None))
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]
    dcp.save({"ema": ema.training_state}, checkpoint_id=save_to)


def test_what_is_synthesized_of_an_interrupted_run_is_what_its_certificate_says(tmp_path: Path) -> None:
    """Worlds and cadence change at random steps; the profile is measured, not believed."""
    times: list[int] = []
    load_from, dice = None, random.Random(1)  # noqa: S311  no secret
    calls = 0
    for i, stop in enumerate([*sorted(dice.sample(range(11, 190), 4)), 200]):
        update_every, save_to = dice.choice([1, 2, 3, 5]), str(tmp_path / f"training-{i}")
        run(dice.choice([2, 3, 4]), one_hot_part, str(tmp_path / "run"), load_from, stop, save_to, update_every)
        times += [t for t in range(calls + 1, stop + 1) if t % update_every == 0 or t % 10 == 0]
        calls, load_from = stop, save_to
    ends = torch.tensor(times, dtype=torch.float64)
    widths = ends.diff(prepend=torch.zeros(1, dtype=torch.float64))
    for sigma_rel in (0.05, 0.08, 0.15, 0.28):
        (found,) = synthesize(tmp_path / "run", [sigma_rel], calculation_dtype=torch.float64)
        assert found.t == 200
        exponent = sigma_rel_to_gamma(sigma_rel) + 1
        wanted = (ends / 200) ** exponent - ((ends - widths) / 200) ** exponent
        seen = found.state_dict["seen"]
        residual = seen[ends.long() - 1] - wanted
        measured = ((residual**2 / widths).sum() / (wanted**2 / widths).sum()).sqrt().item()
        assert measured == pytest.approx(found.certificate.recorded_error, rel=1e-3, abs=1e-7)
        assert measured < 0.05
        assert seen.sum().item() == pytest.approx(1, abs=1e-9)


def test_it_must_stand_where_dcp_can_see_it(tmp_path: Path) -> None:
    with PostHocEMA.from_model(nn.Linear(2, 2), tmp_path / "run") as ema:
        with pytest.raises(BaseException, match=r"must be an entry of the dict that dcp\.save") as caught:
            dcp.save({"train": {"ema": ema.training_state}}, checkpoint_id=tmp_path / "training")
        assert "load_state_dict" in str(caught.value)
        nested = {"train": {"ema": ema.training_state.state_dict()}}
        dcp.save(nested, checkpoint_id=tmp_path / "nested")
        dcp.load(nested, checkpoint_id=tmp_path / "nested")
        ema.training_state.load_state_dict(nested["train"]["ema"])


def load_what_one_rank_refuses(folder: str) -> tuple[int, bool]:
    model = wrapped("ddp")
    ema = PostHocEMA.from_model(model, folder, update_every=1)
    step_to(ema, model, 2)
    state = ema.training_state.state_dict()
    step_to(ema, model, 4)
    before = averages(ema)
    if dist.get_rank() == 1:
        state["averages"]["sigma_rel-0.28"].popitem()
    said = outcome(lambda: ema.training_state.load_state_dict(state))
    assert "holds other parts than this rank owns" in said
    unchanged = all(torch.equal(a[n].nan_to_num(), b[n].nan_to_num()) for a, b in zip(averages(ema), before) for n in b)  # noqa: B905
    found = ema.t, unchanged
    ema.close()
    return found


def test_no_rank_has_taken_anything_of_a_state_that_another_one_refuses(tmp_path: Path) -> None:
    assert run(2, load_what_one_rank_refuses, str(tmp_path)) == [(4, True), (4, True)]


def test_a_state_that_storage_does_not_let_begin_an_attempt_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1)
    step_to(ema, model, 5)
    state = ema.training_state.state_dict()
    step_to(ema, model, 15)
    before = averages(ema)

    def refuse(*_: object) -> None:
        raise StorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "list", refuse)
        with pytest.raises(StorageError, match="no answer"):
            ema.training_state.load_state_dict(state)
    assert ema.t == 15
    for one, other in zip(averages(ema), before, strict=True):
        assert_same(one, other)
    ema.close()


def test_a_state_of_another_folder_is_refused_where_snapshots_would_be_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    with PostHocEMA.from_model(model, tmp_path / "old", update_every=1, checkpoint_every=10) as ema:
        step_to(ema, model, 12)
        foreign = ema.training_state.state_dict()
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as ema:
        step_to(ema, model, 15)
        own = ema.training_state.state_dict()
        step_to(ema, model, 30)
        with pytest.raises(RunError, match="must come from this run"):
            ema.training_state.load_state_dict(foreign)
        caplog.set_level(logging.INFO, "phema_dist")
        assert "hides" not in caplog.text
        ema.training_state.load_state_dict(own)
        assert "going on from t=15 hides the snapshots at t=[20, 30]" in caplog.text
        assert "attempt 1 goes on from training_state, bit for bit, at t=15 on 1 ranks" in caplog.text
        assert max(record.levelno for record in caplog.records) == logging.INFO  # it was asked for
    caplog.clear()
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10, resume=True):
        assert "snapshots at t=[20, 30] stay hidden, because attempt 1 went on from t=15" in caplog.text


def disagree(folder: str) -> tuple[str, list[str]]:
    model = wrapped("fsdp")
    ema = PostHocEMA.from_model(model, folder, update_every=1)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("phema_dist").addHandler(handler)
    step_to(ema, model, 3)
    set_values(model, 4)
    if dist.get_rank() == 1:
        model.first.weight._local_tensor[0, 0] = torch.nan
    ema.update_(model)
    ema.training_state.state_dict()
    if dist.get_rank() == 0:
        ema.update_(model)
    said = outcome(ema.training_state.state_dict)
    logging.getLogger("phema_dist").removeHandler(handler)
    ema._session.writer.abandon(5)  # type: ignore[union-attr]
    return said, logged


def test_ranks_that_do_not_stand_at_the_same_moment_cannot_save_or_are_told(tmp_path: Path) -> None:
    (first, logged), (second, _) = run(2, disagree, str(tmp_path))
    assert "on every rank with the same t; their last ones are [5, 4]" in first
    assert "on every rank with the same t" in second
    assert any("training_state at t=4 is not exact" in text for text in logged)


def test_saving_does_not_wait_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, answers = LocalStore.put, threading.Event()

    def put_late(store: LocalStore, key: str, data: bytes | bytearray) -> None:
        assert answers.wait(30)
        put(store, key, data)

    model = nn.Linear(2, 2)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=2)
    monkeypatch.setattr(LocalStore, "put", put_late)
    for _ in range(4):  # storage still has the first snapshot when the second is due
        ema.update_(model)
    assert ema.training_state.state_dict()["averages"]
    assert not answers.is_set()
    assert ema._session.writer.counts.skipped == 1  # type: ignore[union-attr]
    answers.set()
    ema.close()
