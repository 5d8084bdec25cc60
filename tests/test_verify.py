"""`verify`: whatever is not as it was written is named, and nothing else is; also while a job writes and deletes."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import Target
from ranks import run as on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phema_dist import PostHocEMA
from phema_dist.cli import main
from phema_dist.errors import RunError, StorageError
from phema_dist.storage import scan
from phema_dist.storage.manifest import Manifest, from_json, to_json
from phema_dist.storage.run import open_run, write_index
from phema_dist.storage.store import LocalStore, open_store
from phema_dist.storage.verify import Verdict, verify

SECOND = "snapshots/000000000010-a0"
SHARD = f"{SECOND}/sigma_rel-0.05/rank-00001.safetensors"
MANIFEST = f"{SECOND}/rank-00001-of-00002.json"


def train(url: str) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 8), nn.BatchNorm1d(8)))
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=5) as ema:
        for _ in range(20):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)
            ema.update_(model)
            ema._session.writer.drain()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    on_ranks(2, train, str(folder))
    run = open_run(open_store(folder))
    for snapshot in run.complete[:-1]:  # where rank 1 was late, rank 0 has not written it
        write_index(run.store, snapshot)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Four snapshots of two ranks, for a test to damage; a shard has more than one block."""
    shutil.copytree(trained, tmp_path / "run", copy_function=os.link)
    return tmp_path / "run"


def of(run: Path) -> Verdict:
    return verify(open_store(run))


def put(path: Path, content: bytes) -> None:
    path.unlink()  # it is a link to what other tests need
    path.write_bytes(content)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    put(path, content)


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    put(a, second)
    put(b, first)


def test_a_whole_run_is_read_once_and_found_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, list[tuple[int, int]]] = {}
    lock, read_into = threading.Lock(), LocalStore.read_into

    def watched(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        with lock:
            read.setdefault(key, []).append((start, start + len(buffer)))
        read_into(self, key, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", watched)
    told = []
    verdict = verify(open_store(run), lambda num_bytes, total: told.append((num_bytes, total)))
    assert (verdict.problems, verdict.notes, verdict.num_complete) == ((), (), 4)
    sizes = {str(path.relative_to(run)): path.stat().st_size for path in run.rglob("*.safetensors")}
    assert verdict.num_bytes == sum(sizes.values()) == sum(num_bytes for num_bytes, _ in told) == told[-1][1]
    for key, num_bytes in sizes.items():
        ends = [0, *(end for _, end in sorted(read[key]))]
        assert sorted(read[key]) == list(pairwise(ends))
        assert ends[-1] == num_bytes
        assert max(last - first for first, last in read[key]) <= 4 << 20
    assert read.keys() == sizes.keys()
    assert max(map(len, read.values())) > 2  # more than one block


@pytest.mark.parametrize(
    ("harm", "key", "rank", "words"),
    [
        (lambda run: flip(run / SHARD, 20), SHARD, 1, "its header"),
        (lambda run: flip(run / SHARD, -1), SHARD, 1, "1 of 2 blocks of its data"),
        (lambda run: flip(run / SHARD, 5000), SHARD, 1, "1 of 2 blocks of its data"),
        (lambda run: (run / SHARD).unlink(), SHARD, 1, "is gone"),
        (lambda run: put(run / SHARD, (run / SHARD).read_bytes()[:1000]), SHARD, 1, "has 1000 bytes"),
        (lambda run: put(run / SHARD, (run / SHARD).read_bytes() + b"!"), SHARD, 1, "were written"),
        (lambda run: swap(run / SHARD, run / SHARD.replace("0.05", "0.28")), SHARD, 1, "2 of 2 blocks"),
        (lambda run: swap(run / SHARD, run / SHARD.replace("10-a0", "15-a0")), SHARD, 1, "2 of 2 blocks"),
        (lambda run: flip(run / MANIFEST, 300), MANIFEST, 1, "rank-00001-of-00002.json"),
        (lambda run: put(run / MANIFEST, b"\x80\x04K\x01."), MANIFEST, 1, "must be JSON"),
        (lambda run: swap(run / MANIFEST, run / MANIFEST.replace("10-a0", "15-a0")), MANIFEST, 1, "at t=15"),
        (lambda run: flip(run / SECOND / "index.json", 400), f"{SECOND}/index.json", None, "index.json"),
        (lambda run: swap(run / SECOND / "index.json", run / "snapshots/000000000005-a0/index.json"),
         f"{SECOND}/index.json", None, "is not what the manifests are"),
        (lambda run: (run / MANIFEST).unlink(), SECOND, None, "manifests of rank 1 of 2 are missing, though its index"),
        (lambda run: flip(run / "run.json", 100), "", None, "run.json"),
        (lambda run: flip(run / "attempts/0.json", 30), "", None, "attempts/0.json"),
        (lambda run: (run / "attempts/0.json").unlink(), SECOND, None, "its attempt is not recorded"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_written_is_named(
    run: Path,
    harm: Callable[[Path], object],
    key: str,
    rank: int | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(run)
    found = {finding.key: finding for finding in of(run).problems}
    assert key in found
    assert found[key].rank == rank
    assert words in found[key].text
    assert key in found[key].text
    assert "\n" not in found[key].text
    assert len(found) <= 4  # those that were swapped, and no others
    if key == SHARD and words.endswith("data"):
        assert "1.weight" in found[key].tensors or "0.weight" in found[key].tensors
        assert f"It holds values of {found[key].tensors[0]}" in found[key].text
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"damaged: {found[key].text}" in out
    assert out[-1].startswith(f"{run}: {len(found)} problem")


def test_any_byte_that_is_flipped_is_found(run: Path) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file())
    assert of(run).problems == ()
    generator = torch.Generator().manual_seed(1)
    for path in files:
        position = int(torch.randint(path.stat().st_size, (), generator=generator))
        flip(path, position)
        (finding, *others) = of(run).problems
        assert (str(path.relative_to(run)) in finding.text, others) == (True, []), (path, position, finding)
        flip(path, position)
    assert of(run).problems == ()


def rewrite(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    """A manifest as a job could have written it: its checksum is right."""
    put(path, to_json(change(from_json(Manifest, path.read_bytes(), str(path)))))


def test_files_that_are_right_and_do_not_hold_all_of_it_are_named(run: Path) -> None:
    (run / SECOND / "index.json").unlink()
    rewrite(run / MANIFEST, lambda manifest: replace(manifest, files=manifest.files[1:]))
    (run / SHARD).unlink()
    (finding,) = of(run).problems
    assert finding.key == SECOND
    assert "sigma_rel 0.05" in finding.text
    assert "must be held by some rank" in finding.text
    assert {"0.weight", "1.weight"} & set(finding.tensors)


def test_counts_in_a_manifest_that_do_not_fit_its_files_are_named(run: Path) -> None:
    (run / SECOND / "index.json").unlink()
    rewrite(run / MANIFEST, lambda m: replace(m, files=(replace(m.files[0], checksums=("0" * 16,)), *m.files[1:])))
    (finding,) = of(run).problems
    assert finding.key == SHARD
    assert "has 1 checksums in its manifest; there should be 3" in finding.text
    absurd = 10**15
    rewrite(run / MANIFEST, lambda m: replace(m, files=(replace(m.files[0], header_bytes=absurd), *m.files[1:])))
    (finding,) = of(run).problems
    assert finding.key == SHARD
    assert "bytes; 1000000" in finding.text


def test_what_is_incomplete_is_a_note_and_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / MANIFEST).unlink()
    (run / SECOND / "index.json").unlink()
    left = run / "snapshots/000000000003-a0/index.json"  # of one that was deleted before an older job wrote that
    left.parent.mkdir()
    left.write_bytes((run / "snapshots/000000000005-a0/index.json").read_bytes())
    third = "snapshots/000000000015-a0"
    (run / third / "index.json").unlink()
    rewrite(run / third / "rank-00001-of-00002.json", lambda m: replace(m, files=(), refused="not finite"))
    (run / third / "extra.safetensors").write_bytes(b"what?")
    verdict = of(run)
    assert (verdict.problems, verdict.num_complete) == ((), 2)
    assert [(note.key, note.is_note) for note in verdict.notes] == [
        ("snapshots/000000000003-a0", True),
        (SECOND, True),
        (third, True),
        (f"{third}/extra.safetensors", True),
        *((f"{third}/sigma_rel-{s}/rank-00001.safetensors", True) for s in (0.05, 0.28)),
    ]
    assert "manifests of rank 1 of 2 are missing" in verdict.notes[1].text
    assert "rank 1 had nothing to give: not finite" in verdict.notes[2].text
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{run}: no damage; 2 complete snapshots, ")
    assert main(["verify", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [note["key"] for note in facts["notes"]] == [note.key for note in verdict.notes]
    assert facts["problems"] == []


def test_hidden_snapshots_are_read_too(run: Path) -> None:
    PostHocEMA.from_model(
        nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 8), nn.BatchNorm1d(8)), run, resume=5
    )._session.writer.abandon(5)  # type: ignore[union-attr]
    assert [s.t for s in open_run(open_store(run)).abandoned] == [10, 15, 20]
    flip(run / SHARD, -1)
    verdict = of(run)
    assert verdict.num_complete == 3
    assert [finding.key for finding in verdict.problems] == [SHARD]


def test_a_lost_record_of_an_attempt_is_named_where_others_build_on_it(run: Path) -> None:
    model = nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 8), nn.BatchNorm1d(8))
    PostHocEMA.from_model(model, run, resume=True)._session.writer.abandon(5)  # type: ignore[union-attr]
    (run / "attempts/0.json").unlink()
    found = of(run).problems
    assert found[0].key == "attempts/1.json"
    assert "goes on from attempt 0, which is not recorded" in found[0].text
    assert len(found) == 5


def test_nothing_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="must hold a run"):
        of(tmp_path)
    assert main(["verify", str(tmp_path)]) == 1
    assert "must hold a run" in capsys.readouterr().err


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool], also: Callable[[str], object]) -> None:
    read_into = LocalStore.read_into

    def read(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        also(key)
        if fails(key):
            raise StorageError(f"reading {key}: the disk answered: Input/output error.")
        read_into(self, key, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", read)


def test_a_file_that_cannot_be_read_is_named_and_many_of_them_are_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    failing(monkeypatch, lambda key: key == SHARD, asked.append)
    (finding,) = of(run).problems
    assert (finding.key, finding.rank) == (SHARD, 1)
    assert "cannot be read: " in finding.text
    assert asked.count(SHARD) <= 2  # readers; the rest of it is not tried
    monkeypatch.setattr(scan, "_MOST_UNREADABLE", 3)
    failing(monkeypatch, lambda key: True, asked.append)
    with pytest.raises(StorageError, match="Input/output error"):
        of(run)


@pytest.mark.parametrize("how_far", ["manifests", "all of it"])
def test_a_snapshot_that_goes_while_we_read_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, how_far: str
) -> None:
    done = threading.Event()

    def delete(key: str) -> None:
        if key.startswith(SECOND) and not done.is_set():
            done.set()
            store = open_store(run)
            keys = sorted(store.list(SECOND), key=lambda key: not key.endswith("index.json"))
            documents = [key for key in keys if key.endswith(".json")]
            store.delete(documents)
            data = [key for key in keys if key not in documents]
            store.delete(data[:1] if how_far == "manifests" else data)

    failing(monkeypatch, lambda key: False, delete)
    verdict = of(run)
    assert done.is_set()
    assert verdict.problems == ()
    assert [note.key for note in verdict.notes] == ([SECOND] if how_far == "manifests" else [])
    assert verdict.num_complete == 3


@pytest.fixture
def job(any_store_url: Target) -> Iterator[Callable[[], None]]:
    """A job that writes and deletes while a test looks; the function that the test gets says how it fared."""
    url, options = any_store_url
    stop, begun, errors = threading.Event(), threading.Event(), []

    def write() -> None:
        model = nn.Linear(300, 300)
        try:
            with PostHocEMA.from_model(
                model, url, update_every=1, checkpoint_every=1, max_checkpoints=3, storage_options=options
            ) as ema:
                while not stop.is_set():
                    ema.update_(model)
                    if ema.t > 3:
                        begun.set()
                    ema._session.writer.drain()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
            begun.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(60)

    def end() -> None:
        stop.set()
        thread.join(60)
        assert errors == []

    yield end
    stop.set()
    thread.join(60)


def test_a_run_that_is_being_written_is_whole(any_store_url: Target, job: Callable[[], None]) -> None:
    store = open_store(*any_store_url)
    for _ in range(10):
        verdict = verify(store)
        assert verdict.problems == ()
        assert verdict.num_complete > 1
    job()
    assert verify(store).notes == ()
