"""What is asked for is made around snapshots that turn out to be damaged or gone, on all ranks alike."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn

from phema_dist.ema import PostHocEMA
from phema_dist.errors import DamagedError, KeyMissingError, SnapshotError
from phema_dist.ranks import ALONE, join
from phema_dist.shard import Box, whole
from phema_dist.storage.manifest import RunInfo
from phema_dist.storage.run import delete_snapshot, open_run
from phema_dist.storage.store import open_store
from phema_dist.synthesis.consolidate import empty_state, fill_states
from phema_dist.synthesis.recipe import Recipe
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.synthesis.stream import stream
from phema_dist.target import Power

State = dict[str, torch.Tensor]
SHAPE = (6, 4)


def write_run(folder: Path) -> None:
    model = nn.Linear(*reversed(SHAPE), bias=False)
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1) as ema:
        for t in (10, 20, 30, 40):
            with torch.no_grad():
                model.weight.normal_(generator=torch.Generator().manual_seed(t))
            ema.update_(model, t=t)
            ema._session.writer.drain()  # type: ignore[union-attr]


def shard(folder: Path, t: int) -> Path:
    return next((folder / "snapshots").glob(f"{t:012d}-a0/sigma_rel-0.05/*.safetensors"))


def damage(path: Path) -> None:
    """Flip a bit of the last number in it."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def made(folder: Path, request: Request) -> tuple[list[Recipe], State]:
    """On this rank: the rows that are its part, the others nan."""
    store, group = open_store(folder), join()
    states: list[State] = []

    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        states[:] = [empty_state(info)]
        states[0]["weight"].fill_(torch.nan)
        start, stop = (SHAPE[0] * r // group.size for r in (group.rank, group.rank + 1))
        boxes: dict[str, list[Box]] = {"weight": [whole(SHAPE).rows(start, stop)]}
        stream(store, info, recipes, fill_states(states), wanted=boxes)

    return fulfil(store, group, request, make), states[0]


def used(recipes: Sequence[Recipe]) -> list[int]:
    return sorted({term.snapshot.t for term in recipes[0].terms})


WANTED = Request((Power(0.15),))


def test_a_damaged_snapshot_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path / "run")
    assert used(made(tmp_path / "run", WANTED)[0]) == [10, 20, 30, 40]
    damage(shard(tmp_path / "run", 20))
    with caplog.at_level(logging.WARNING):
        recipes, state = made(tmp_path / "run", WANTED)
    assert used(recipes) == [10, 30, 40]
    assert "t=20" in recipes[0].certificate.left_out[0]
    assert "000000000020-a0/sigma_rel-0.05/rank-00000.safetensors is damaged" in caplog.text

    store = open_store(tmp_path / "run")
    delete_snapshot(store, "snapshots/000000000020-a0")
    without, expected = made(tmp_path / "run", WANTED)
    assert [term.coefficient for term in without[0].terms] == [term.coefficient for term in recipes[0].terms]
    assert torch.equal(state["weight"], expected["weight"])


def test_strict_refuses_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    damage(shard(tmp_path / "run", 20))
    with pytest.raises(DamagedError, match="000000000020-a0"):
        made(tmp_path / "run", Request((Power(0.15),), strict=True))


def test_when_all_are_damaged_the_reasons_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for t in (10, 20, 30, 40):
        damage(shard(tmp_path / "run", t))
    with pytest.raises(SnapshotError, match=r"no complete snapshot.*t=30: .*is damaged"):
        made(tmp_path / "run", WANTED)


def half(folder: Path, request: Request) -> tuple[list[int], State]:
    recipes, state = made(folder, request)
    return used(recipes), state


def test_all_ranks_leave_out_what_one_of_them_found_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("storage.snapshot", "training.writer"):
        monkeypatch.setattr(f"phema_dist.{module}.BLOCK_BYTES", 16)  # a row: rank 0 never reads the damaged one
    write_run(tmp_path / "run")
    damage(shard(tmp_path / "run", 20))
    found = ranks.run(2, half, tmp_path / "run", WANTED)
    assert [which for which, _ in found] == [[10, 30, 40]] * 2
    _, expected = made(tmp_path / "run", WANTED)
    both = torch.where(found[0][1]["weight"].isnan(), found[1][1]["weight"], found[0][1]["weight"])
    assert torch.equal(both, expected["weight"])


def strict_outcome(folder: Path) -> str:
    return ranks.outcome(lambda: made(folder, Request((Power(0.15),), strict=True)))


def test_all_ranks_refuse_together(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    damage(shard(tmp_path / "run", 20))
    assert all(text.startswith("DamagedError: ") for text in ranks.run(2, strict_outcome, tmp_path / "run"))


def test_what_retention_deletes_meanwhile_is_planned_without_once(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    store, calls = open_store(tmp_path / "run"), 0

    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            delete_snapshot(store, open_run(store).complete[1].folder)
        stream(store, info, recipes, fill_states([empty_state(info)]))

    assert used(fulfil(store, ALONE, WANTED, make)) == [10, 30, 40]
    assert calls == 2


def test_a_file_that_is_gone_for_good_is_not_asked_for_for_ever(tmp_path: Path) -> None:
    write_run(tmp_path / "run")

    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        raise KeyMissingError("it is gone")

    with pytest.raises(KeyMissingError, match="it is gone"):
        fulfil(open_store(tmp_path / "run"), ALONE, WANTED, make)
