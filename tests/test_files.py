"""Checkpoints on disk: any number of ranks writes the same bytes, whole or not at all, and goes on after a kill."""

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from phema_dist import PostHocEMA, synthesize
from phema_dist.cli import main
from phema_dist.errors import SettingsError
from phema_dist.shard import check_exact_cover, whole
from phema_dist.storage.store import LocalStore
from phema_dist.synthesis import export, files
from phema_dist.synthesis.checkpoint import Form, Item, cut, divide

State = dict[str, torch.Tensor]


class Model(nn.Module):
    """Tied, empty, 0-d, integer, float64 and uneven tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.wide = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Model()
    folder = tmp_path_factory.mktemp("stored") / "run"
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=10) as ema:
        for _ in range(50):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            model.norm.num_batches_tracked.add_(1)
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    return folder


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), err.getvalue()


def phema(*arguments: object, world_size: int = 1) -> str:
    """Run a command on that many ranks, which must go well; what rank 0 said."""
    answers = ranks.run(world_size, call, list(map(str, arguments)))
    assert [code for code, _, _ in answers] == [0] * world_size, answers
    assert all(said == ("", "") for _, *said in answers[1:] for said in [tuple(said)])
    return str(answers[0][1])


def refusal(*arguments: object, world_size: int = 1) -> str:
    """The same, of a command that must fail on all ranks, and be told by rank 0 in one line."""
    answers = ranks.run(world_size, call, list(map(str, arguments)))
    assert all(code in {1, 2} for code, _, _ in answers), answers
    assert all(err == "" for _, _, err in answers[1:])
    assert sum(line.startswith("phema: ") for line in answers[0][2].splitlines()) == 1  # beside warnings
    return str(answers[0][2])


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def facts_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["phema_dist"]))


SMALL = ["--max-file-size", "150"]  # cuts the model into several files


def test_any_number_of_ranks_writes_the_same_bytes(run: Path, tmp_path: Path) -> None:
    wanted = synthesize(run, [0.15, 0.2])
    for size in (1, 2, 3):
        said = phema(
            "synthesize", run, "--sigma-rel", 0.15, "--sigma-rel", 0.2, "--out", tmp_path / str(size), world_size=size
        )
        assert len(said.splitlines()) == 2
    made = content(tmp_path / "1")
    assert list(made) == ["sigma_rel-0.15/model.safetensors", "sigma_rel-0.2/model.safetensors"]
    assert content(tmp_path / "2") == content(tmp_path / "3") == made
    for name, average in zip(made, wanted, strict=True):
        found = load_file(tmp_path / "1" / name)
        assert same(found, average.state_dict)
        Model().load_state_dict(found, strict=True)
    assert facts_of(tmp_path / "1/sigma_rel-0.2/model.safetensors")["sigma_rel"] == 0.2


@pytest.mark.parametrize("size", [1, 2])
def test_above_a_size_there_are_numbered_files_and_an_index(run: Path, tmp_path: Path, size: int) -> None:
    (wanted,) = synthesize(run, [0.15])
    said = phema("synthesize", run, "--sigma-rel", 0.15, "--out", tmp_path, *SMALL, world_size=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [*names, "model.safetensors.index.json"]
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 2
    assert f"model.safetensors.index.json: sigma_rel-0.15 at t=50 in {len(names)} files" in said
    found: State = {}
    for name in names:
        with safe_open(tmp_path / name, "pt") as file:
            part = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open has no iterator
            assert file.metadata()["format"] == "pt"
        assert {index["weight_map"][key] for key in part} == {name}
        num_bytes = sum(tensor.nbytes for tensor in part.values())
        assert num_bytes <= 150 or len({key.replace("tied", "first") for key in part if part[key].numel()}) == 1
        found |= part
    assert same(found, wanted.state_dict)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert index["weight_map"]["tied.weight"] == index["weight_map"]["first.weight"]


items = st.builds(
    lambda i, shape, num_names, dtype: Item(f"t{i}", tuple(f"t{i}.{n}" for n in range(num_names)), shape, dtype),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    st.integers(1, 2),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)


@given(st.lists(items, max_size=8, unique_by=lambda item: item.fqn), st.integers(1, 5), st.integers(1, 400))
def test_ranks_and_files_divide_a_checkpoint_exactly(tensors: list[Item], num_ranks: int, limit: int) -> None:
    parts = [(item, whole(item.shape)) for item in tensors]
    cuts = [cut(parts, rank, num_ranks) for rank in range(num_ranks)]
    for item in tensors:
        boxes = [box for part in cuts for other, box in part if other == item]
        check_exact_cover(item.fqn, item.shape, boxes)
        assert len(boxes) >= 1  # empty ones have a place too
    for part in cuts:
        assert len({item.fqn for item, _ in part}) == len(part)  # a box of each at most
    written = [file for (file,) in divide(tensors, Form(max_file_bytes=limit), "m.safetensors", num_ranks)]
    assert [item for file in written for item, _ in file.parts] == tensors
    for file in written:
        assert file.data_bytes <= limit or len(file.parts) == 1 or sum(i.num_bytes > 0 for i, _ in file.parts) == 1


def test_names_can_be_chosen_and_changed(run: Path, tmp_path: Path) -> None:
    (wanted,) = synthesize(run, [0.15])
    out = tmp_path / "some.safetensors"
    base = ["synthesize", run, "--sigma-rel", 0.15, "--out", out]
    phema(*base, "--keys", "tied.*", "--keys", "last.*")
    assert load_file(out).keys() == {"tied.weight", "last.weight", "last.bias"}
    assert torch.equal(load_file(out)["tied.weight"], wanted.state_dict["first.weight"])
    assert "was written with keys ['tied.*', 'last.*'], not []" in refusal(*base)
    changed = [*base, "--keys", "norm.*", "--strip-prefix", "norm.", "--prefix", "model.norm."]
    phema(*changed, "--force", "--dtype", "bf16")
    found = load_file(out)
    assert found.keys() == {f"model.{name}" for name in wanted.state_dict if name.startswith("norm.")}
    assert found["model.norm.weight"].dtype == torch.bfloat16
    assert found["model.norm.num_batches_tracked"] == 50

    message = refusal(*base, "--force", "--keys", "first.*", "--keys", "frist.*", world_size=2)
    assert "no tensor of the run fits 'frist.*'; it has " in message
    assert "first.weight" in message
    message = refusal(*base, "--force", "--strip-prefix", "norm.")
    assert "every name must begin with 'norm.' for it to be stripped" in message
    assert facts_of(out)["form"]["dtype"] == "bfloat16"


def test_what_is_there_is_kept_if_it_is_the_same_and_refused_if_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["synthesize", str(run), "--sigma-rel", "0.15", "--out", str(tmp_path)]
    assert call([*base, "--t", "40"])[0] == 0
    before = (tmp_path / "model.safetensors").stat()
    reads = []
    original = LocalStore.read_into
    monkeypatch.setattr(LocalStore, "read_into", lambda *a: reads.append(a) or original(*a))
    code, said, _ = call([*base, "--t", "40"])
    assert (code, "it was there already" in said) == (0, True)
    kept = (tmp_path / "model.safetensors").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for arguments, message in [
        ([], "was made for t=40, not t=50; pass --t 40 for the same"),
        (["--t", "40", "--dtype", "fp16"], "was written with dtype 'float32', not 'float16'"),
        (["--t", "40", *SMALL], "is part of the same average divided into files otherwise"),
    ]:
        code, _, err = call([*base, *arguments])
        assert code == 2
        assert message in err
        assert "--force" in err
    other = ["0.2" if word == "0.15" else word for word in base]
    assert "holds another average, sigma_rel-0.15" in call(other)[2]
    assert reads == []
    damaged = (tmp_path / "model.safetensors").read_bytes()[:-1]
    (tmp_path / "model.safetensors").write_bytes(damaged)
    assert "is not a whole checkpoint file of phema_dist: it has" in call([*base, "--t", "40"])[2]
    for foreign in (b"", b"foreign", b"\0" * 20, b"\xff" * 20):
        (tmp_path / "model.safetensors").write_bytes(foreign)
        assert "is not a whole checkpoint file of phema_dist" in call([*base, "--t", "40"])[2]
        assert (tmp_path / "model.safetensors").read_bytes() == foreign


def test_force_leaves_only_the_new_checkpoint(run: Path, tmp_path: Path) -> None:
    base = ["synthesize", run, "--sigma-rel", 0.15]
    for name in ("numbered", "changed"):
        phema(*base, "--out", tmp_path / name, *SMALL)
    phema(*base, "--out", tmp_path / "one")
    (tmp_path / "one/config.json").write_text("{}")
    phema("synthesize", run, "--sigma-rel", 0.2, "--out", tmp_path / "other", *SMALL)
    phema("synthesize", run, "--sigma-rel", 0.2, "--out", tmp_path / "changed", *SMALL, "--force")
    assert content(tmp_path / "changed") == content(tmp_path / "other")
    phema(*base, "--out", tmp_path / "changed", "--force")
    assert content(tmp_path / "changed") == {"model.safetensors": content(tmp_path / "one")["model.safetensors"]}
    phema(*base, "--out", tmp_path / "one", *SMALL, "--force", world_size=2)
    assert content(tmp_path / "one") == {**content(tmp_path / "numbered"), "config.json": b"{}"}


CHANGES = ("pwrite", "fsync", "link", "unlink", "replace", "rename", "truncate", "mkdir")


def dies(victim: int, moment: int, arguments: list[str]) -> int:
    """Run a command that is killed, with this process, at a certain call that changes the disk; their number if not."""
    count = 0
    originals = {name: getattr(os, name) for name in CHANGES}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment and dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counting

    try:
        for name, function in originals.items():
            setattr(os, name, counted(function))
        call(arguments)
    finally:
        for name, function in originals.items():
            setattr(os, name, function)
    return count


FORMS = {"one": [], "numbered": SMALL, "sharded": ["--sharded"], "pickled": ["--format", "pt"]}


@pytest.mark.parametrize(
    ("form", "size", "victim"),
    [("one", 1, 0), ("numbered", 1, 0), ("numbered", 2, 0), ("numbered", 2, 1), ("sharded", 2, 0), ("pickled", 1, 0)],
)
def test_a_kill_leaves_nothing_or_whole_files_and_the_next_run_finishes(
    run: Path, tmp_path: Path, form: str, size: int, victim: int
) -> None:
    command = ["synthesize", str(run), "--sigma-rel", "0.15", "--sigma-rel", "0.2", *FORMS[form], "--out"]
    num_changes = ranks.run(size, dies, victim, 0, [*command, str(tmp_path / "undisturbed")])[victim]
    wanted = content(tmp_path / "undisturbed")
    found: set[int] = set()
    for i in range(num_moments := 5 if size == 1 else 2):
        moment = num_changes - i * num_changes // num_moments - (i > 0)
        out = tmp_path / f"killed-at-{moment}"
        with pytest.raises(ranks.RanksFailedError, match="the process died"):
            ranks.run(size, dies, victim, moment, [*command, str(out)])
        visible = {name: data for name, data in content(out).items() if "/." not in name}
        assert visible.items() <= wanted.items()
        for index in (name for name in visible if name.endswith(".index.json")):  # it comes last
            folder = index.partition("/")[0]
            assert {n for n in visible if n.startswith(folder)} == {n for n in wanted if n.startswith(folder)}
        inodes = {name: (out / name).stat().st_ino for name in visible}
        if form == "sharded":
            phema(*command, out, world_size=size)
        else:
            assert call([*command, str(out)])[0] == 0  # any number of ranks goes on
        assert content(out) == wanted, moment
        assert {name: (out / name).stat().st_ino for name in visible} == inodes
        found.add(len(visible))
    assert len(found) > 1 or size > 1


def is_whole(folder: Path, numbered: dict[str, bytes]) -> bool:
    """Whether what a reader would load is one checkpoint: a single file, or all that the index names."""
    visible = {name: data for name, data in content(folder).items() if not name.startswith(".")}
    index = "model.safetensors.index.json"
    return "model.safetensors" in visible or index not in visible or numbered.items() <= visible.items()


@pytest.mark.parametrize("before", [[], SMALL])
def test_a_kill_while_a_checkpoint_is_replaced_mixes_nothing(run: Path, tmp_path: Path, before: list[str]) -> None:
    old = ["synthesize", str(run), "--sigma-rel", "0.2", *before, "--out"]
    new = ["synthesize", str(run), "--sigma-rel", "0.15", *SMALL, "--force", "--out"]
    assert call([*old, str(tmp_path / "old")])[0] == call([*new, str(tmp_path / "new")])[0] == 0
    contents = [content(tmp_path / name) for name in ("old", "new")]
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    num_changes = ranks.run(1, dies, 0, 0, [*new, str(tmp_path / "counted")])[0]
    for moment in range(num_changes, num_changes // 3, -num_changes // 6):
        out = tmp_path / f"killed-at-{moment}"
        shutil.copytree(tmp_path / "old", out)
        with pytest.raises(ranks.RanksFailedError, match="the process died"):
            ranks.run(1, dies, 0, moment, [*new, str(out)])
        assert any(is_whole(out, numbered) for numbered in contents), moment
        assert call([*new, str(out)])[0] == 0
        assert content(out) == contents[1]


def flip(run: Path, t: int) -> None:
    shard = next(run.glob(f"snapshots/{t:012d}-a0/sigma_rel-0.28/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_damage_that_is_met_halfway_begins_again_without_that_snapshot(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "run")
    command = ["synthesize", str(tmp_path / "run"), "--sigma-rel", "0.15", *SMALL, "--out"]
    published: list[str] = []
    real = files.publish

    def publish(hidden: Path, fd: int, path: Path, *, replace: bool) -> None:
        real(hidden, fd, path, replace=replace)
        published.append(path.name)
        if len(published) == 2:
            flip(tmp_path / "run", 20)

    with monkeypatch.context() as patch:
        patch.setattr(export, "publish", publish)
        patch.setattr(files, "publish", publish)  # of the index
        assert call([*command, str(tmp_path / "halfway")])[0] == 0
    names = list(content(tmp_path / "halfway"))
    assert published == [*names[:2], *names]
    assert "000000000020-a0/sigma_rel-0.28/rank-00000.safetensors is damaged" in caplog.text
    assert call([*command, str(tmp_path / "from-the-start")])[0] == 0
    assert content(tmp_path / "halfway") == content(tmp_path / "from-the-start")
    facts = facts_of(tmp_path / "halfway" / names[0])
    assert [t for sigma_rel, t, *_ in facts["terms"] if sigma_rel == 0.28] == [10, 30, 40, 50]

    for lost in (names[-1], names[1]):  # as after a kill: the damage is not known to the plan any more
        (tmp_path / "halfway" / lost).unlink()
    phema(*command, tmp_path / "halfway", world_size=2)
    assert content(tmp_path / "halfway") == content(tmp_path / "from-the-start")
    flip(tmp_path / "run", 50)  # the newest one: so the average ends earlier
    assert call([*command, str(tmp_path / "earlier")])[0] == 0
    assert facts_of(tmp_path / "earlier" / names[0])["t"] == 40
    assert "it was there already" in call([*command, str(tmp_path / "earlier")])[1]


def test_damage_spares_what_is_whole_and_begins_the_rest_again(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    base = ["synthesize", str(tmp_path / "run"), *SMALL, "--sigma-rel", "0.15", "--sigma-rel", "0.2", "--out"]
    assert call([*base, str(tmp_path / "out")])[0] == 0
    before = content(tmp_path / "out/sigma_rel-0.15")
    begun = sorted((tmp_path / "out/sigma_rel-0.2").iterdir())
    begun[-1].unlink()  # the index, and
    begun[-2].unlink()  # a file, as if a kill had come before them
    flip(tmp_path / "run", 20)
    phema(*base, tmp_path / "out", world_size=2)
    assert content(tmp_path / "out/sigma_rel-0.15") == before  # made while the snapshot was whole
    assert call([*base, str(tmp_path / "from-the-start")])[0] == 0
    assert content(tmp_path / "out/sigma_rel-0.2") == content(tmp_path / "from-the-start/sigma_rel-0.2")


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "phema_dist",
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def test_torchrun_divides_the_work_and_fails_as_a_whole(run: Path, tmp_path: Path) -> None:
    words = ("synthesize", str(run), "--sigma-rel", "0.15", "--out", str(tmp_path / "out"), "--sharded")
    assert ranks.launch(2, "phema_dist", *words, folder=tmp_path).count("profile error") == 1
    assert len(content(tmp_path / "out")) == 2
    failed = torchrun("synthesize", run, "--sigma-rel", 0.2, "--out", tmp_path / "out", "--sharded")
    assert failed.returncode != 0
    assert failed.stderr.count("phema: WARNING") == 1  # of rank 0
    assert failed.stderr.count("phema: ") == 2
    assert "holds another average, sigma_rel-0.15" in failed.stderr
    assert re.search(r"exitcode  : (1|2|-6)", failed.stderr)  # 6: gloo now and then aborts when it ends


def test_the_hidden_file_of_a_living_process_is_left_alone(run: Path, tmp_path: Path) -> None:
    alive, fd = files.create(tmp_path / "model.safetensors", b"head", 100)
    dead, dead_fd = files.create(tmp_path / "model.safetensors", b"head", 100)
    os.close(dead_fd)
    of_another = tmp_path / ".notes.safetensors.0123456789abcdef.tmp"
    of_another.write_text("not ours")
    assert call(["synthesize", str(run), "--sigma-rel", "0.15", "--out", str(tmp_path)])[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", alive.name, of_another.name}
    assert not dead.exists()
    files.write_at(fd, b"body", 96)
    files.publish(alive, fd, tmp_path / "second.safetensors", replace=False)
    with pytest.raises(SettingsError, match="has appeared while it was made"):
        files.publish(tmp_path / "second.safetensors", fd, tmp_path / "model.safetensors", replace=False)
    files.discard(alive, fd)
    assert (tmp_path / "second.safetensors").read_bytes() == b"head" + bytes(92) + b"body"


def full_disk(arguments: list[str], limit: int) -> tuple[int, str, str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        return call(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("form", ["one", "numbered", "sharded", "pickled"])
def test_a_disk_that_refuses_is_told_and_leaves_no_file(run: Path, tmp_path: Path, form: str) -> None:
    command = ["synthesize", str(run), "--sigma-rel", "0.15", "--out", str(tmp_path / "out"), *FORMS[form]]
    answers = ranks.run(2, full_disk, command, 1000)
    assert [code for code, _, _ in answers] == [1, 1]
    assert re.search(r"writing .*out/\S+: the disk answered: File too large", answers[0][2])
    assert content(tmp_path / "out") == {}


def test_a_disk_that_refuses_the_pt_file_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: object, buffer: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export._Releasing, "write", write)
    code, _, said = call(["synthesize", str(run), "--sigma-rel", "0.15", "--out", str(tmp_path / "x.pt")])
    assert (code, content(tmp_path)) == (1, {})
    assert f"writing {tmp_path}/x.pt: the disk answered: No space left on device." in said


PEAK = """
import sys
import phema_dist.synthesis.consolidate, phema_dist.synthesis.join, phema_dist.synthesis.reader, tqdm
from phema_dist.cli import main

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

before, run, out = peak(), *sys.argv[1:]
two = ["--sigma-rel", "0.15", "--sigma-rel", "0.2"]
main(["synthesize", run, *two, "--out", out + "/files"])
main(["synthesize", run, *two[:2], "--out", out + "/model.pt"])
main(["synthesize", run, *two[:2], "--out", out + "/shards", "--sharded"])
main(["consolidate", out + "/shards", "--out", out + "/joined.pt"])
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(24)])  # 96 MB
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]
        ema.update_(model)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "run"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 6
    assert int(done.stdout.splitlines()[-1]) < 64 << 20


def ranks_see(arguments: list[str], folders: list[str]) -> tuple[int, str, str]:
    os.chdir(folders[dist.get_rank()])
    return call(arguments)


def test_ranks_that_do_not_share_the_folder_say_so(run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    command = ["synthesize", str(run), "--sigma-rel", "0.15", "--out", "."]
    answers = ranks.run(2, ranks_see, command, [str(folder) for folder in folders])
    assert "rank 1: all ranks must see the folder" in answers[0][2]
    assert [content(folder) for folder in folders] == [{}, {}]
    ranks.run(2, os.chdir, "/")


def load_sharded(folder: str) -> State:
    """Load a folder of shards as torch does, each rank its rows of `first.weight`, and all of the rest."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {
        name: torch.full_like(tensor, -1 if tensor.dtype == torch.int64 else torch.nan)
        for name, tensor in Model().state_dict().items()
    }
    state["first.weight"] = distribute_tensor(state["first.weight"], mesh, [Shard(0)])
    dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}


@pytest.mark.parametrize("size", [1, 3, 5])
def test_shards_load_into_another_world_and_join_to_what_one_process_makes(
    run: Path, tmp_path: Path, size: int
) -> None:
    base = ["synthesize", run, "--sigma-rel", 0.15]
    (wanted,) = synthesize(run, [0.15])
    phema(*base, "--out", tmp_path / "shards", "--sharded", world_size=size)
    names = [f"rank-{rank:05d}-of-{size:05d}.safetensors" for rank in range(size)]
    assert list(content(tmp_path / "shards")) == names
    sizes = [len(data) - files.read_header(tmp_path / "shards" / name)[1]
             for name, data in content(tmp_path / "shards").items()]  # fmt: skip
    assert max(sizes) <= sum(sizes) / size + 2 * 7 * 8  # two rows of the widest
    for state in ranks.run(2, load_sharded, str(tmp_path / "shards")):
        assert same(state, wanted.state_dict)

    for number, options in enumerate(([], SMALL, ["--format", "pt"])):
        direct, joined = tmp_path / f"direct-{number}", tmp_path / f"joined-{number}"
        phema(*base, "--out", direct, *options)
        said = phema("consolidate", tmp_path / "shards", "--out", joined, *options, world_size=1 + number % 2)
        assert "sigma_rel-0.15 at t=50" in said
        assert content(joined) == content(direct)
    assert "it was there already" in phema("consolidate", tmp_path / "shards", "--out", tmp_path / "joined-0")
    phema("synthesize", run, "--sigma-rel", 0.2, "--out", tmp_path / "joined-0", "--force")
    assert "holds another average" in refusal("consolidate", tmp_path / "shards", "--out", tmp_path / "joined-0")


def test_shards_that_do_not_belong_together_are_not_joined(run: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out.safetensors"
    base = ["synthesize", run, "--sharded", "--out", shards]
    phema(*base, "--sigma-rel", 0.15, world_size=3)
    join = ["consolidate", shards, "--out", out]
    second = shards / "rank-00001-of-00003.safetensors"
    original = second.read_bytes()

    assert "rank-00000-of-00002.safetensors belongs" not in refusal(*base, "--sigma-rel", 0.15, world_size=2)
    second.unlink()
    assert "of all 3 ranks; rank-00001-of-00003.safetensors is missing" in refusal(*join)
    assert "2 of them were there already" in phema(*base, "--sigma-rel", 0.15, world_size=3)
    assert second.read_bytes() == original

    phema("synthesize", run, "--sharded", "--out", tmp_path / "other", "--sigma-rel", 0.2, world_size=3)
    shutil.copy(tmp_path / "other" / second.name, second)
    message = refusal(*join, world_size=2)
    assert "rank-00001-of-00003.safetensors holds another average, sigma_rel-0.2" in message
    second.write_bytes(original[:-1])
    assert "must be a file that --sharded wrote: ValueError('it has " in refusal(*join)
    shutil.copy(shards / "rank-00000-of-00003.safetensors", second)
    assert "it says that it is of rank 0 of 3" in refusal(*join)
    second.write_bytes(original)
    shutil.copy(second, shards / "rank-00000-of-00002.safetensors")
    assert "found those of 2 and of 3 ranks" in refusal(*join)
    assert "there is none" in refusal("consolidate", tmp_path / "nowhere", "--out", out)
    assert not out.exists()
    phema(*base, "--sigma-rel", 0.15, "--force", world_size=2)
    assert [path.name for path in sorted(shards.iterdir())] == [
        "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_a_pt_file_is_a_plain_state_dict(run: Path, tmp_path: Path, size: int) -> None:
    (wanted,) = synthesize(run, [0.15])
    out = tmp_path / "average.pt"
    command = ["synthesize", run, "--sigma-rel", 0.15, "--out", out]
    phema(*command, world_size=size)
    assert list(content(tmp_path)) == ["average.pt"]
    state = torch.load(out, weights_only=True)
    assert same(dict(state), wanted.state_dict)
    Model().load_state_dict(state, strict=True)
    assert state["tied.weight"].data_ptr() == state["first.weight"].data_ptr()
    assert state["first.weight"].untyped_storage().nbytes() == state["first.weight"].nbytes
    assert state._metadata["phema_dist"]["sigma_rel"] == 0.15
    assert "it was there already" in phema(*command)
    assert "was made for t=50, not t=40" in refusal(*command, "--t", 40)
    out.write_bytes(out.read_bytes()[:-10])
    assert "is not a whole checkpoint file of phema_dist" in refusal(*command)


@pytest.mark.parametrize("first", [[], ["--sharded"]])
def test_shards_and_other_checkpoints_never_share_a_folder(run: Path, tmp_path: Path, first: list[str]) -> None:
    phema("synthesize", run, "--sigma-rel", 0.1, "--out", tmp_path, *first)
    before = content(tmp_path)
    second = [] if first else ["--sharded"]
    for force in ([], ["--force"]):
        said = refusal("synthesize", run, "--sigma-rel", 0.2, "--out", tmp_path, *second, *force)
        assert "must not hold both the files of --sharded and other checkpoints" in said
    if first:
        assert "must not hold both" in refusal("consolidate", tmp_path, "--out", tmp_path / "joined.safetensors")
    assert content(tmp_path) == before


def test_who_writes_into_a_folder_waits_for_who_does(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands at once, each with --force and numbered files: the later one replaces all of the earlier one's."""
    original, begun = export.publish, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> None:
        begun.set()
        time.sleep(0.1)
        original(*args, **kwargs)

    monkeypatch.setattr(export, "publish", slow)
    command = ["synthesize", str(run), "--out", str(tmp_path / "made"), "--force", "--max-file-size", "100"]
    codes: list[int] = []
    other = threading.Thread(target=lambda: codes.append(main([*command, "--sigma-rel", "0.1"])))
    other.start()
    assert begun.wait(30)
    codes.append(main([*command, "--sigma-rel", "0.2"]))
    other.join()
    assert codes == [0, 0]
    assert "another process is writing" in caplog.text
    made = list((tmp_path / "made").glob("*.safetensors"))
    assert len(made) > 2
    for path in made:
        with safe_open(path, "pt") as opened:
            assert '"sigma_rel": 0.2' in opened.metadata()["phema_dist"]


def test_names_that_no_file_can_have_are_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    one = ["synthesize", run, "--sigma-rel", 0.05, "--out", out, "--keys", "scale", "--strip-prefix", "scale"]
    assert "no tensor may be named ''" in refusal(*one)
    assert "no tensor may be named '__metadata__'" in refusal(*one, "--prefix", "__metadata__")
    out.mkdir()
    said = refusal("synthesize", run, "--sigma-rel", 0.05, "--out", tmp_path, "--force")
    assert "must be a file, and is a folder" in said
