"""Attaching: one update after each round of steps that really happened, and none of it waits for a device."""

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_accelerator import DEVICE, FakeAccelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from phema_dist import PostHocEMA, SettingsError
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.training import device
from phema_dist.training.attach import Attachment, DeviceRounds
from phema_dist.training.device import SideStream
from phema_dist.training.tracker import Tracker

OVERFLOWS = {0, 3, 4, 8}  # steps whose gradients are infinite
Optimizer = type[torch.optim.Optimizer]


def nothing() -> None:
    pass


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccelerator]:
    """Training's stream is this thread."""
    fake = FakeAccelerator(monkeypatch, this_thread=True)
    yield fake
    fake.close()


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, *, overflow: bool = False
) -> None:
    """One step of training, with gradients of one or of infinity."""
    loss = sum(parameter.sum() for parameter in model.parameters()) * (float("inf") if overflow else 1)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


# When a round is told


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_there_is_one_update_for_each_step_that_changed_the_parameters(
    kind: Optimizer, fused: bool, scaled: bool
) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)  # type: ignore[call-arg]
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    told: list[list[list[float]]] = []
    Attachment([optimizer], lambda _: told.append(model.weight.tolist()), nothing)

    changed = []
    for i in range(12):
        before = model.weight.tolist()
        step(model, optimizer, scaler, overflow=scaled and i in OVERFLOWS)
        if model.weight.tolist() != before:
            changed.append(model.weight.tolist())
    assert len(changed) == (12 - len(OVERFLOWS) if scaled else 12)
    assert told == changed


def test_accumulated_gradients_are_one_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    told: list[torch.Tensor | None] = []
    Attachment([optimizer], told.append, nothing)
    for _ in range(3):
        for _ in range(4):
            model(torch.ones(5, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told == [None] * 3


def test_a_closure_that_is_called_often_is_one_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    told: list[torch.Tensor | None] = []
    Attachment([optimizer], told.append, nothing)
    num_evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal num_evaluations
        num_evaluations += 1
        optimizer.zero_grad()
        loss = (model(torch.ones(5, 2)) - 3).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert num_evaluations > 3
    assert told == [None] * 3


def test_a_step_without_gradients_is_a_step() -> None:
    """Also where GradScaler found no gradient to check, and says 0 instead of a tensor."""
    frozen = torch.optim.SGD([nn.Parameter(torch.zeros(2), requires_grad=False)], fused=True)
    told: list[torch.Tensor | None] = []
    Attachment([frozen], told.append, nothing)
    with torch.no_grad():
        frozen.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(frozen)
    assert told == [None] * 2


def optimizers(number: int) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], fused=True) for _ in range(number)]


def real_rounds(
    num_optimizers: int, steps: Sequence[tuple[int, bool]], *, on_device: bool, given_as: float = 1.0
) -> list[int]:
    """After which of the steps (position, skipped) there was an update, told as a fused optimizer would."""
    found: list[int] = []
    num_told = 0

    def stepped(skips: torch.Tensor | None) -> None:
        nonlocal num_told
        num_told += 1
        num_skipped, latest = (0, 0) if skips is None else skips.tolist()
        if not latest:
            found.append(index)
        assert num_told - num_skipped == len(found)

    place = DEVICE if on_device else torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "of", lambda _: place)
        attached = optimizers(num_optimizers)
        Attachment(attached, stepped, nothing)
        for index, (position, skipped) in enumerate(steps):  # noqa: B007  read by stepped
            attached[position].found_inf = torch.tensor(given_as * skipped)  # type: ignore[attr-defined]
            attached[position].step()
            del attached[position].found_inf  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("order", "steps", "updates"),
    [
        ("D", "DDD", "^^^"),
        ("DG", "DGDG", " ^ ^"),
        ("DG", "DDDGDDDG", "   ^   ^"),
        ("DG", "DDD", "   "),
        ("DG", "GDGD", "  ^ "),
        ("DG", "DGGDG", " ^  ^"),
        ("DG", "DgDG", "   ^"),  # small: skipped
        ("DG", "dGDG", "   ^"),
        ("DG", "DdG", "  ^"),
        ("DG", "DgdG", "   ^"),
        ("DEG", "DEGDGDEG", "  ^    ^"),
        ("DEG", "DEgDEG", "     ^"),
        ("DEG", "DEgdEG", "      "),  # E, again and without D
        ("DEG", "EGDEG", "    ^"),
        ("DEG", "DGEG", "    "),
    ],
)
def test_a_round_is_each_optimizer_in_turn(order: str, steps: str, updates: str, on_device: bool) -> None:
    found = real_rounds(len(order), [(order.index(s.upper()), s.islower()) for s in steps], on_device=on_device)
    assert found == [i for i, update in enumerate(updates) if update == "^"]


def test_only_a_last_step_that_is_repeated_is_missed_on_a_device() -> None:
    """The host, which cannot know that the first G was skipped, sees a G without a D."""
    steps = [(0, False), (1, True), (1, False)]
    assert real_rounds(2, steps, on_device=False) == [2]
    assert real_rounds(2, steps, on_device=True) == []


def test_infinities_on_two_devices_are_one_skipped_step() -> None:
    assert real_rounds(1, [(0, True), (0, False)], on_device=True, given_as=2.0) == [1]


@st.composite
def steps_in_order(draw: st.DrawFn) -> tuple[int, list[tuple[int, bool]]]:
    """Rounds in which the first optimizer steps one to three times and each other one once; any step may be skipped."""
    num_optimizers = draw(st.integers(1, 3))
    steps = []
    for num_first in draw(st.lists(st.integers(1, 3))):
        steps += [(position, draw(st.booleans())) for position in [0] * num_first + list(range(1, num_optimizers))]
    return num_optimizers, steps


@st.composite
def steps_in_any_order(draw: st.DrawFn) -> tuple[int, list[tuple[int, bool]]]:
    num_optimizers = draw(st.integers(1, 3))
    return num_optimizers, draw(st.lists(st.tuples(st.integers(0, num_optimizers - 1), st.booleans())))


@settings(deadline=None)
@given(steps_in_order())
def test_what_is_found_out_later_is_the_same(case: tuple[int, list[tuple[int, bool]]]) -> None:
    assert real_rounds(*case, on_device=True) == real_rounds(*case, on_device=False)


@settings(deadline=None)
@given(steps_in_any_order())
def test_in_any_order_no_update_is_made_that_was_none(case: tuple[int, list[tuple[int, bool]]]) -> None:
    assert set(real_rounds(*case, on_device=True)) <= set(real_rounds(*case, on_device=False))


def test_nothing_is_read_from_a_device() -> None:
    """On the meta device there is nothing to read, and trying raises."""
    first, second = optimizers(2)
    told: list[torch.Tensor | None] = []
    Attachment([first, second], told.append, nothing)
    for found_inf in (torch.zeros((), device="meta"), None, torch.zeros((), device="meta")):
        for optimizer in (first, second):
            if found_inf is not None:
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
            vars(optimizer).pop("found_inf", None)
    assert [skips.device.type for skips in told if skips is not None] == ["meta"] * 3


# Hooks


def test_every_step_is_fenced_before_it_changes_anything() -> None:
    models = [nn.Linear(2, 1) for _ in range(2)]
    attached = [torch.optim.SGD(model.parameters(), lr=1) for model in models]
    fenced: list[float] = []
    Attachment(attached, lambda _: None, lambda: fenced.append(sum(m.bias.item() for m in models)))
    before = []
    for _ in range(3):
        for model, optimizer in zip(models, attached, strict=True):
            before.append(sum(m.bias.item() for m in models))
            step(model, optimizer, None)
    assert fenced == before


def test_an_error_in_an_update_costs_that_update_only() -> None:
    first, second = optimizers(2)
    told = 0

    def stepped(_: torch.Tensor | None) -> None:
        nonlocal told
        told += 1
        if told == 1:
            raise OSError("full")

    Attachment([first, second], stepped, nothing)
    first.step()
    with pytest.raises(OSError, match="full"):
        second.step()
    for _ in range(2):
        first.step()
        second.step()
    assert told == 3


def test_an_error_in_a_step_is_no_step() -> None:
    first, second = optimizers(2)
    told: list[torch.Tensor | None] = []
    Attachment([first, second], told.append, nothing)

    def closure() -> float:
        raise ValueError("a bad batch")

    first.step()
    with pytest.raises(ValueError, match="a bad batch"):
        second.step(closure)
    assert not told
    first.step()
    second.step()
    assert len(told) == 1


def test_removed_hooks_tell_nothing_and_leave_others() -> None:
    (optimizer,) = optimizers(1)
    told: list[str] = []
    optimizer.register_step_post_hook(lambda *_: told.append("other"))
    attachment = Attachment([optimizer], lambda _: told.append("step"), lambda: told.append("fence"))
    attachment.remove()
    assert told == ["fence"]  # what would have been fenced by the next step
    attachment.remove()
    optimizer.step()
    assert told == ["fence", "fence", "other"]


def test_what_cannot_be_attached_is_refused() -> None:
    (optimizer,) = optimizers(1)
    attach = partial(Attachment, stepped=lambda _: None, fence=nothing)
    with pytest.raises(SettingsError, match=r"needs the optimizers .* ema\.attach\(optimizer\)"):
        attach([])
    with pytest.raises(SettingsError, match="attached once"):
        attach([optimizer, *optimizers(1), optimizer])
    with pytest.raises(SettingsError, match=r"got Linear.*call update_ after each step"):
        attach([optimizer, nn.Linear(1, 1)])  # type: ignore[list-item]
    assert not optimizer._optimizer_step_post_hooks


# A whole PostHocEMA


def averaged(folder: Path, where: torch.device | None = None) -> tuple[int, list[torch.Tensor]]:
    """The clock and the averages of a run whose GradScaler skips steps; attached, on `where`."""
    model = nn.Sequential(nn.Linear(300, 100), nn.BatchNorm1d(100))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    model.to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, fused=True)
    scaler = torch.amp.GradScaler("cpu" if where is None else where.type)
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=5) as ema:
        ema.attach(optimizer)
        for i in range(18):
            with torch.no_grad():
                model[1].running_mean.fill_(i)  # as a forward does
            step(model, optimizer, scaler, overflow=i in OVERFLOWS)
        assert ema._session is not None
        ema._session.writer.settle()
        return ema.t, [flat.clone() for averages in ema._session.tracker.averages for flat in averages]


def test_skipped_steps_found_out_later_give_the_same_averages(
    tmp_path: Path, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, found = averaged(tmp_path / "device")
    assert accelerator.side[0].num_launched() > 0
    monkeypatch.undo()
    expected_t, expected = averaged(tmp_path / "cpu")
    assert t == expected_t == 18 - len(OVERFLOWS)
    assert all(map(torch.equal, found, expected))


def test_skipped_steps_and_skipped_updates_do_not_mix(
    tmp_path: Path, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that a device skips do not count; updates that come too soon do, and the next one covers their time."""
    allowed, update = threading.Semaphore(0), Tracker.update

    def update_when_allowed(tracker: Tracker, flats: list[torch.Tensor], t: int) -> bool:
        assert allowed.acquire(timeout=60)
        return update(tracker, flats, t)

    monkeypatch.setattr(Tracker, "update", update_when_allowed)
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)  # after k real steps it is 1 - k / 8
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, on_busy="skip", sigma_rels=(0.28,)) as ema:
        ema.attach(optimizer)
        for i in range(14):
            step(model, optimizer, scaler, overflow=i in OVERFLOWS)
            if i >= 8:
                for _ in range(14):
                    allowed.release()
                ema._session.writer.settle()
        assert ema.t == ema.status()["t"] == 14 - len(OVERFLOWS)
        assert ema.status()["updates_skipped"] >= 4
        times = ema._session.tracker.history.times().tolist()
        assert times[-5:] == [6, 7, 8, 9, 10]
        assert len(times) < 9
        wanted, before, gamma = 0.0, 0, sigma_rel_to_gamma(0.28)
        for t in times:
            keep = (before / t) ** (gamma + 1)
            wanted, before = keep * wanted + (1 - keep) * (1 - t / 8), t
        torch.testing.assert_close(ema._session.tracker.averages[0][0], torch.full((3,), wanted))


@pytest.mark.parametrize("fenced", [True, False])
def test_averages_are_exact_although_the_copy_is_late_and_only_because_the_next_step_is_fenced(
    tmp_path: Path, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    if not fenced:
        monkeypatch.setattr(SideStream, "fence", lambda _: None)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    stepped = threading.Semaphore(0)
    wait = SideStream.wait

    def wait_late(side_stream: SideStream, slot: int) -> None:
        """Nobody asks for the copy before the next step, unless the fence does."""
        stepped.acquire()
        wait(side_stream, slot)

    staged: list[float] = []
    update = Tracker.update

    def update_and_tell(tracker: Tracker, flats: list[torch.Tensor], t: int) -> bool:
        staged.append(flats[0][-1].item())
        return update(tracker, flats, t)

    monkeypatch.setattr(SideStream, "wait", wait_late)
    monkeypatch.setattr(Tracker, "update", update_and_tell)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1) as ema:
        ema.attach(optimizer)
        expected = []
        for i in range(6):
            step(model, optimizer, None)
            expected.append(model.bias.item())
            if i > 0:
                stepped.release()
        ema._session.writer.fence()
        stepped.release(2)  # for the last update, and for the last snapshot
        ema._session.writer.settle()
    assert (staged == expected) is fenced


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_a_gpu_skipped_steps_are_found_out_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    step_on_device = DeviceRounds.step

    def step_without_waiting(rounds: DeviceRounds, position: int, found_inf: torch.Tensor, *, told: bool) -> None:
        torch.cuda.set_sync_debug_mode("error")
        step_on_device(rounds, position, found_inf, told=told)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DeviceRounds, "step", step_without_waiting)
    t, found = averaged(tmp_path / "gpu", torch.device("cuda", torch.cuda.current_device()))
    expected_t, expected = averaged(tmp_path / "cpu")
    assert t == expected_t
    assert all(map(torch.equal, found, expected))


def test_the_step_that_makes_an_optimizers_state_is_none() -> None:
    """torch's get_state_dict calls it, with zeros for gradients and for the learning rate."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped: list[object] = []
    attachment = Attachment([optimizer], stepped.append, lambda: None)
    get_state_dict(model, optimizer)
    assert optimizer.state
    assert not stepped
    optimizer.step()
    assert len(stepped) == 1
    attachment.remove()


def test_optimizers_that_never_make_a_round_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    attachment = Attachment([first, second], lambda _: None, lambda: None)
    for _ in range(250):
        first.step()
    assert len(caplog.messages) == 1
    assert "number 2 of 2 has not stepped in turn" in caplog.messages[0]
    attachment.remove()
