"""kill -9 at every point at which a put or a deletion can be cut off, on one rank or on all; then random kills."""

import functools
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch.distributed as dist
from conftest import Target
from s3_server import S3Server
from soak import Job, Kills, chaos, in_new_process, kill_loops, look, ranks, statuses

Phase = Literal["start", "snapshot"]
EVERY, DIES_AT, LAST = 2, 6, 7
CHANGES = ("write", "link", "unlink", "rmdir", "rename")  # between them, a death leaves what one of these leaves


class Deaths:
    """Counts the calls by which the store changes the disk, on one rank and in one phase; dies at one of them."""

    def __init__(self, folder: Path, phase: Phase, rank: int, dies_at: int | None) -> None:
        self._folder, self._phase, self._rank, self._dies_at = folder, phase, rank, dies_at
        self.calls: list[str] = []
        self._armed = False

    def before_step(self, t: int) -> None:
        """As the job's. The other rank is always a step ahead, so that there is one order of calls."""
        if dist.get_rank() != self._rank:
            (self._folder / f"done-{t - 1}").touch()
            return
        if t == 0:
            for name in CHANGES:
                setattr(os, name, functools.partial(self._called, name, getattr(os, name)))
            self._armed = self._phase == "start"
            return
        if self._armed:
            self._armed = False
            (self._folder / "calls").write_text("\n".join(self.calls))
        if self._phase == "snapshot" and t <= DIES_AT:
            end = time.monotonic() + 60
            while not (self._folder / f"done-{t}").exists() and time.monotonic() < end:
                time.sleep(0.001)
            self._armed = t == DIES_AT

    def _called(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ours = sys._getframe(1).f_globals["__name__"].startswith("phema_dist.storage")
        if self._armed and ours:
            if len(self.calls) == self._dies_at:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls.append(name)
        return original(*args, **kwargs)


def shards(url: Path) -> dict[tuple[int, str], str]:
    """The bits of all that a run lists: a digest of each data file, by t and name."""
    store, run = look(str(url), {})
    return {
        (snapshot.t, file.name): hashlib.sha256(store.get(f"{snapshot.folder}/{file.name}")).hexdigest()
        for snapshot in (run.complete if run else ())
        for manifest in snapshot.manifests
        for file in manifest.files
    }


def train(folder: Path, last: int, **changes: Any) -> list[int]:
    job = Job(str(folder / "run"), {}, last, EVERY, max_checkpoints=changes.pop("max_checkpoints", 2))
    with ranks(2, lambda _: job._replace(**changes).train()) as pids:
        return statuses(pids)


def die_everywhere(folder: Path, phase: Phase, rank: int, whom: Literal["one", "all"]) -> list[str]:
    """Kill a rank at each of its calls, in a fresh run each time; what the calls were."""
    assert train(folder / "whole", LAST + 2, max_checkpoints=100) == [0, 0]
    wanted = shards(folder / "whole/run")
    (folder / "counted").mkdir()
    deaths = Deaths(folder / "counted", phase, rank, None)
    assert train(folder / "counted", LAST, before_step=deaths.before_step) == [0, 0]
    calls = (folder / "counted/calls").read_text().split()
    for number, call in enumerate(calls):
        where = folder / str(number)
        where.mkdir()
        deaths = Deaths(where, phase, rank, number)
        job = Job(str(where / "run"), {}, LAST, EVERY, max_checkpoints=2, before_step=deaths.before_step)
        with ranks(2, lambda _: job.train()) as pids:  # noqa: B023  forked at once
            (killed,) = statuses(pids[rank : rank + 1])
            assert killed == -signal.SIGKILL, f"nobody died at {number}, {call}"
            if whom == "one":
                # Without its peer a rank cannot begin; but if it has begun, it notices nothing.
                (other,) = statuses(pids[1 - rank : 2 - rank])
                assert other == (1 if phase == "start" else 0)
        found = shards(where / "run")
        newest = max((t for t, _ in found), default=0)
        assert found.items() <= wanted.items(), f"after death at {number}, {call}, something listed is not whole"
        assert newest >= (DIES_AT - EVERY if phase == "snapshot" else 0), f"{call} took what was complete"
        if number % (2 if whom == "all" else 3):
            continue  # going on takes as long as all else, and what is left differs little from call to call
        assert train(where, LAST + 2) == [0, 0], f"after death at {number}, {call}, the job does not go on"
        found = shards(where / "run")
        assert found.items() <= wanted.items(), f"after death at {number}, {call}, the job went on wrongly"
        assert max(t for t, _ in found) == LAST + 2
    return calls


def die_in_every_way(folder: Path, whom: Literal["one", "all"]) -> dict[tuple[Phase, int], list[str]]:
    ways: list[tuple[Phase, int]] = [("snapshot", 0), ("snapshot", 1), ("start", 0)]
    return {(phase, rank): die_everywhere(folder / f"{phase}-{rank}", phase, rank, whom) for phase, rank in ways}


@pytest.mark.parametrize("whom", ["one", "all"])
def test_kill_9_at_any_point_leaves_whole_snapshots_only_and_the_job_goes_on(whom: str, tmp_path: Path) -> None:
    calls = in_new_process(die_in_every_way, tmp_path, whom, timeout=150)
    # Two profiles and the manifest, each in a hidden file that gets its name at once; rank 0 deletes, and indexes.
    put = ["write", "link", "unlink"]
    assert calls["snapshot", 1] == 3 * put
    assert calls["snapshot", 0][:9] == 3 * put
    assert calls["snapshot", 0].count("link") == 4
    assert calls["snapshot", 0].count("rmdir") >= 3
    assert calls["start", 0] == 2 * put  # run.json and the attempt


def test_random_kills_on_a_disk(tmp_path: Path) -> None:
    kills: Kills = in_new_process(kill_loops, str(tmp_path / "run"), {}, 3, 1, timeout=100)
    assert kills.snapshots_verified > 3


@pytest.mark.s3
def test_random_kills_on_s3(s3_url: Target) -> None:
    kills: Kills = in_new_process(kill_loops, s3_url[0], s3_url[1] | {"client": "obstore"}, 2, 2, timeout=100)
    assert kills.snapshots_verified > 0


@pytest.mark.s3
def test_chaos(s3_server: S3Server, s3_url: Target) -> None:
    found = chaos(s3_server, s3_url[0].split("/")[2], seconds=6, seed=3, client="obstore")
    assert sum(found.faults.values()) > 1
