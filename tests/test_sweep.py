"""A sweep finds the best length by a metric, goes on after a kill, and keeps the best checkpoint and nothing else."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Target
from safetensors.torch import load_file
from torch import nn

from phema_dist import PostHocEMA, ProfileError, SettingsError, sweep, synthesize, synthesize_files
from phema_dist.cli import main
from phema_dist.plot import sweep_figure
from phema_dist.prediction import in_percent
from phema_dist.selection import sweep as module
from phema_dist.selection.grid import next_sigma_rel, parse_grid
from phema_dist.selection.metric import last_number

GRID = "0.05:0.25:5"
OPTIMUM = 0.12
# Measures the distance to the optimum; says in a file which sigma_rel it was asked for, and how full the folder was.
EVAL = """
import math, os, pathlib, signal, sys
checkpoint, sigma_rel = pathlib.Path(sys.argv[1]), float(sys.argv[2])
assert checkpoint.stat().st_size > 0
here, folder = pathlib.Path(__file__).parent, checkpoint.parents[2]
used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
with (here / "calls").open("a") as calls:
    print(sigma_rel, used, len(list(folder.glob(".sweep/sigma_rel-*/*"))), file=calls)
number = len((here / "calls").read_text().splitlines())
if str(number) in sys.argv[3:]:
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
print("done 3 of 3; loss:", math.log(sigma_rel / 0.12) ** 2)
"""


def make_run(url: str | Path, seed: int = 0, width: int = 8, **settings: object) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(width, width)
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=10, **settings) as ema:  # type: ignore[arg-type]
        for _ in range(40):
            with torch.no_grad():
                model.weight.add_(torch.randn(width, width))
            ema.update_(model)
            ema._session.writer.drain()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("sweep") / "run"
    make_run(url)
    return url


@pytest.fixture
def command(tmp_path: Path) -> str:
    (tmp_path / "eval.py").write_text(EVAL)
    return f"{sys.executable} -I -S {tmp_path / 'eval.py'} {{checkpoint}} {{sigma_rel}}"


def calls(tmp_path: Path) -> list[float]:
    return [float(line.split()[0]) for line in (tmp_path / "calls").read_text().splitlines()]


def loss(sigma_rel: float) -> float:
    return math.log(sigma_rel / OPTIMUM) ** 2


def test_a_command_finds_the_best_length_on_every_kind_of_storage(
    any_store_url: Target, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, options = any_store_url
    make_run(url, storage_options=options)
    out = tmp_path / "out"
    words = ["sweep", url, "--sigma-rel", GRID, "--eval", command, "--out", str(out), "--refine", "8"]
    words += ["--storage-options", json.dumps(options)] if options else []
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()
    tried = calls(tmp_path)
    assert tried[:5] == [0.05, 0.0748, 0.112, 0.167, 0.25]
    assert 5 < len(tried) <= 13
    best = min(tried, key=loss)
    assert abs(best / OPTIMUM - 1) < 0.05
    assert told[: len(tried)] == [f"sigma_rel = {s:g}: {loss(s):.4g}" for s in tried]
    assert told[-1] == f"best: sigma_rel = {best:g}, {loss(best):.4g}; {out / 'best.safetensors'}"

    assert sorted(path.name for path in out.rglob("*")) == ["best.safetensors", "sweep.json", "sweep.md", "sweep.svg"]
    (wanted,) = synthesize(url, [best], storage_options=options)
    found = load_file(out / "best.safetensors")
    assert found.keys() == wanted.state_dict.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict.items())
    rows = (out / "sweep.md").read_text().splitlines()
    assert rows == told[len(tried) : -1]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [f"{s:g}" for s in sorted(tried)]
    assert [row for row in rows if "**best**" in row] == [row for row in rows if row.startswith(f"| {best:g} |")]
    assert b"<svg" in (out / "sweep.svg").read_bytes()

    assert main(words) == 0  # there is nothing left to do
    assert calls(tmp_path) == tried
    assert capsys.readouterr().out.splitlines() == told[len(tried) :]


def test_after_each_kill_it_goes_on_without_evaluating_again(run: Path, command: str, tmp_path: Path) -> None:
    words = ["sweep", str(run), "--sigma-rel", GRID, "--out", str(tmp_path / "out"), "--eval"]
    killing = f"{command} 3 7"  # in the middle of a batch, and while it refines
    program = [sys.executable, "-m", "phema_dist", *words, killing]
    for _ in range(2):
        assert subprocess.run(program, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert main([*words, killing]) == 0
    tried = calls(tmp_path)
    again = [tried[2], tried[6]]  # what they were killed at
    assert tried[3] == again[0]
    assert tried[7] == again[1]
    assert len(set(tried)) == len(tried) - 2 == 9

    (tmp_path / "calls").unlink()
    quiet = f"{command} 100"
    assert main([*words[:-2], str(tmp_path / "other"), "--eval", quiet]) == 0
    assert calls(tmp_path) == list(dict.fromkeys(tried))
    best = [(tmp_path / folder / "best.safetensors").read_bytes() for folder in ("out", "other")]
    assert best[0] == best[1]


@pytest.mark.parametrize("number", [2, 3, 6])
def test_a_death_before_a_checkpoint_is_put_away_loses_nothing(
    run: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tidy, seen = module.tidy, []

    def dying(*arguments: object) -> None:
        seen.append(arguments)
        if len(seen) == number:
            raise KeyboardInterrupt
        tidy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tidy", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(run, [0.05, 0.1, 0.2], command, out=tmp_path / "out")
    found = sweep(run, [0.05, 0.1, 0.2], command, out=tmp_path / "out")
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 7
    assert found.best
    (wanted,) = synthesize(run, [found.best.sigma_rel])
    assert found.checkpoint
    assert torch.equal(load_file(found.checkpoint)["weight"], wanted.state_dict["weight"])
    assert not list((tmp_path / "out").glob("sigma_rel-*"))


def test_the_disk_budget_holds_and_is_used(tmp_path: Path, command: str) -> None:
    make_run(tmp_path / "run", width=128)
    size = 128 * 129 * 4 + 8192  # and what a checkpoint says of itself
    passes = []

    @contextmanager
    def reading() -> Iterator[object]:
        passes.append(1)
        yield lambda _, __: None

    grid, out = "0.03:0.28:7", tmp_path / "out"
    sweep(tmp_path / "run", grid, command, out=out, budget_bytes=4 * size, refine=2, reading=reading)  # type: ignore[arg-type]
    rows = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert max(int(used) for _, used, _ in rows) <= 4 * size
    assert [int(number) for _, _, number in rows] == [3, 2, 1, 3, 2, 1, 1, 1, 1]
    assert len(passes) == 3 + 2
    with pytest.raises(SettingsError, match=r"must hold two checkpoints.*got 100,000\. Allow more \(--disk\)"):
        sweep(tmp_path / "run", grid, command, out=tmp_path / "small", budget_bytes=100_000)
    sweep(tmp_path / "run", grid, command, out=tmp_path / "small", budget_bytes=100_000, dtype=torch.bfloat16)


def test_all_checkpoints_stay_if_they_are_to(run: Path, command: str, tmp_path: Path) -> None:
    words = ["sweep", str(run), "--sigma-rel", "0.1,0.2", "--out", str(tmp_path / "out"), "--eval", command]
    for refine in ("2", "3"):
        assert main([*words, "--keep-all", "--refine", refine]) == 0
    made = {path.parent.name for path in tmp_path.glob("out/*/model.safetensors")}
    assert made == {f"sigma_rel-{sigma_rel}" for sigma_rel in calls(tmp_path)}
    assert len(made) == 5
    assert main([*words, "--refine", "4"]) == 0  # nor does another call delete what was kept
    assert {path.parent.name for path in tmp_path.glob("out/*/model.safetensors")} == made
    best = json.loads((tmp_path / "out/sweep.json").read_text())["points"]
    chosen = min((p["metrics"]["metric"], p["sigma_rel"]) for p in best)[1]
    (wanted,) = synthesize(run, [chosen])
    assert torch.equal(load_file(tmp_path / "out/best.safetensors")["weight"], wanted.state_dict["weight"])


def test_what_fails_is_told_and_tried_again_and_the_others_are_measured(
    run: Path, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "eval.py"
    failing = (
        'if sigma_rel == 0.1: print("out of\\nmemory"); print("cuda", file=sys.stderr); sys.exit(3)\n'
        'if sigma_rel == 0.15: print("no number here, v1.2.3"); sys.exit()\n'
    )
    program.write_text(EVAL.replace('print("done', f'{failing}print("done'))
    words = ["sweep", str(run), "--sigma-rel", "0.05,0.1,0.15,0.2", "--out", str(tmp_path / "out"), "--eval", command]
    assert main([*words, "--refine", "0"]) == 1
    told = capfd.readouterr()
    assert "sigma_rel=0.1: the command failed with exit code 3; it printed: out of memory" in told.err
    assert "sigma_rel=0.15: the command must print a number; it printed: no number here" in told.err
    assert "cuda\n" in told.err
    assert "best: sigma_rel = 0.2, " in told.out
    assert "the best is at the edge of what was tried; longer ones may be better\n" in told.out
    row = re.search(r"^\| 0\.1 \| \| (.*%)", (tmp_path / "out/sweep.md").read_text(), re.MULTILINE)
    assert row
    (wanted,) = synthesize(run, [0.1])
    assert row[1].startswith(in_percent(wanted.certificate.profile_error))
    assert not list((tmp_path / "out").glob("sigma_rel-*"))

    program.write_text(EVAL)
    assert main([*words, "--refine", "0"]) == 0
    assert calls(tmp_path) == [0.05, 0.1, 0.15, 0.2, 0.1, 0.15]
    assert "best: sigma_rel = 0.1, " in capfd.readouterr().out

    assert main([*words[:-3], str(tmp_path / "none"), "--eval", f"{sys.executable} -S -c exit(1) {{checkpoint}}"]) == 1
    told = capfd.readouterr()
    assert told.err.count("it printed nothing") == 4
    assert "there is no best one" in told.err


def test_a_folder_is_of_one_run_command_and_t(run: Path, command: str, tmp_path: Path) -> None:
    make_run(tmp_path / "second", seed=1)
    out = tmp_path / "out"
    first = sweep(run, [0.1, 0.2], command, out=out, refine=0)
    with pytest.raises(SettingsError, match=r"holds a sweep of another run \(.*/run, now .*/second\)\. Choose another"):
        sweep(tmp_path / "second", [0.1, 0.2], command, out=out)
    with pytest.raises(SettingsError, match=r"another t \(40, now 20\)"):
        sweep(run, [0.1, 0.2], command, out=out, t=20)
    with pytest.raises(SettingsError, match=r"another evaluate \(.* 9\), dtype \(float32, now float16\)"):
        sweep(run, [0.1, 0.2], f"{command} 9", out=out, dtype=torch.float16)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sweep(run, [0.1, 0.2], command, out=out, refine=0, t=40).points == first.points
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "best.safetensors").unlink()  # it is made again, without an evaluation
    assert sweep(run, [0.1, 0.2], command, out=out, refine=0).points == first.points
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # One that nobody measured, of snapshots that the run has deleted since.
    synthesize_files(run, {0.12: out / ".sweep/sigma_rel-0.12/model.safetensors"}, t=20)
    with pytest.raises(SettingsError, match="was not made by this sweep"):
        sweep(run, [0.12], command, out=out)
    stored = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**stored, "making": [0.12]}))
    found = sweep(run, [0.12], command, out=out)
    (wanted,) = synthesize(run, [0.12])
    assert found.checkpoint
    assert torch.equal(load_file(found.checkpoint)["weight"], wanted.state_dict["weight"])

    found = sweep(tmp_path / "second", [0.1, 0.2], command, out=out, refine=0, t=20, force=True)
    assert len(calls(tmp_path)) == 5
    (wanted,) = synthesize(tmp_path / "second", [0.1], t=20)
    assert found.checkpoint
    assert torch.equal(load_file(found.checkpoint)["weight"], wanted.state_dict["weight"])

    for url in (run, tmp_path / "second"):  # nor is the best one of another run taken for this one's
        found = sweep(url, [0.1], lambda _: 1.0, out=tmp_path / "same", force=True)
        (wanted,) = synthesize(url, [0.1])
        assert found.checkpoint
        assert torch.equal(load_file(found.checkpoint)["weight"], wanted.state_dict["weight"])


@pytest.mark.parametrize("name", ["best.safetensors", "sweep.md", ".sweep/sigma_rel-0.1/model.safetensors"])
def test_what_is_of_no_sweep_stays(run: Path, command: str, tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for force in (False, True)[: 2 if "sigma_rel" in name else 1]:
        with pytest.raises(SettingsError, match=r"[Cc]hoose another --out"):
            sweep(run, [0.1, 0.2], command, out=tmp_path / "out", force=force)
    assert path.read_text() == "precious"
    assert not (tmp_path / "calls").exists()


def test_checkpoints_of_others_in_its_folder_stay(run: Path, command: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    sweep(run, [0.1, 0.2], command, out=out, refine=0)
    synthesize_files(run, {s: out / f"sigma_rel-{s}/model.safetensors" for s in (0.2, 0.22)})
    for folder in (out / "sigma_rel-mine", out / "sigma_rel-0.28", out / "sigma_rel-0.15", elsewhere):
        folder.mkdir()
        (folder / "model.safetensors").write_text("precious")
    (out / "sigma_rel-link").symlink_to(elsewhere)
    files = {path: path.read_bytes() for path in [*out.glob("sigma_rel-*/*"), elsewhere / "model.safetensors"]}
    assert len(files) == 7
    for grid, force in (([0.1, 0.2], False), ([0.15, 0.22], False), ([0.1, 0.2, 0.15], True)):
        sweep(run, grid, command, out=out, refine=0, force=force)
        assert {path: path.read_bytes() for path in files} == files
    for s in (0.22, 0.28):  # nor are they replaced by those that are to be kept
        with pytest.raises(SettingsError, match="was not made by this sweep"):
            sweep(run, [s], command, out=out, refine=0, keep_all=True)
    assert {path: path.read_bytes() for path in files} == files

    best = (out / "best.safetensors").read_bytes()
    (out / "best.safetensors").write_text("mine")
    with pytest.raises(SettingsError, match="Move it away"):
        sweep(run, [0.1, 0.2], command, out=out, refine=0)
    assert (out / "best.safetensors").read_text() == "mine"
    sweep(run, [0.1, 0.2, 0.15], command, out=out, refine=0, force=True)
    assert (out / "best.safetensors").read_bytes() == best


@pytest.mark.parametrize("name", [".sweep", ".sweep/sigma_rel-0.12", ".sweep/sigma_rel-0.12/model.safetensors"])
def test_no_link_is_followed(run: Path, command: str, tmp_path: Path, name: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    sweep(run, [0.1], command, out=out, refine=0)
    stored = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**stored, "making": [0.12]}))
    precious = elsewhere / "sigma_rel-0.12/model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(elsewhere / name.removeprefix(".sweep").removeprefix("/"))
    for grid in ([0.1], [0.12]):
        with pytest.raises(SettingsError, match="was not made by this sweep"):
            sweep(run, grid, command, out=out, refine=0)
    assert precious.read_text() == "precious"


def test_a_new_sweep_deletes_what_the_old_one_kept(run: Path, command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(run, [0.1, 0.2], command, out=out, refine=0, keep_all=True)
    (out / "sigma_rel-0.2/model.safetensors").write_text("mine now")
    sweep(run, [0.15], command, out=out, refine=0, force=True)
    assert [path.parent.name for path in out.glob("sigma_rel-*/*")] == ["sigma_rel-0.2"]


def test_a_url_is_no_folder_and_shows_no_key(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sweep", str(run), "--sigma-rel", "0.1", "--eval", "true {checkpoint}", "--out", "s3://AK:SECRET@b/x"]
    assert main(words) == 2
    assert "got s3://b/x." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_callable_is_given_tensors_and_may_measure_several_things(run: Path, tmp_path: Path) -> None:
    states = []

    def measure(state: dict[str, torch.Tensor]) -> dict[str, float]:
        states.append(state)
        return {"norm": float(state["weight"].norm()), "loss": float("nan")}

    found = sweep(run, [0.05, 0.1, 0.2], measure, refine=0)
    wanted = synthesize(run, [0.05, 0.1, 0.2])
    for state, average, point in zip(states, wanted, found.points, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in average.state_dict.items())
        assert point.metrics == {"norm": float(average.state_dict["weight"].norm()), "loss": None}
        assert point.profile_error == average.certificate.profile_error
    norms = {point.sigma_rel: point.value for point in found.points}
    assert found.best
    assert found.best.sigma_rel == min(norms, key=norms.__getitem__)
    assert found.checkpoint is None
    highest = sweep(run, [0.05, 0.1, 0.2], measure, refine=0, maximize=True, budget_bytes=1).best
    assert highest
    assert highest.sigma_rel == max(norms, key=norms.__getitem__)

    for number in (9, 9):
        kept = sweep(run, [0.05, 0.1, 0.2], measure, refine=0, out=tmp_path / "out")
        assert len(states) == number
    assert kept.points == found.points
    best = wanted[[0.05, 0.1, 0.2].index(found.best.sigma_rel)].state_dict
    assert torch.equal(load_file(tmp_path / "out/best.safetensors")["weight"], best["weight"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "best.safetensors", "sweep.json", "sweep.md", "sweep.svg",
    ]  # fmt: skip


def test_a_metric_that_is_not_finite_never_wins(run: Path) -> None:
    values = iter([math.nan, 2.0, 1.0, -math.inf])
    found = sweep(run, [0.05, 0.1, 0.15, 0.2], lambda _: next(values), refine=0)
    assert found.best
    assert found.best.sigma_rel == 0.15
    assert found.table.count("not finite") == 2
    assert sweep(run, [0.05, 0.1], lambda _: math.nan).best is None


def test_what_is_wrong_with_a_run_is_said_once(tmp_path: Path, command: str, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run/snapshots/000000000020-a0/rank-00000-of-00001.json").unlink()
    found = sweep(tmp_path / "run", [0.1, 0.2], command, out=tmp_path / "out", refine=2)
    assert len(found.points) == 4
    assert sum("left out a snapshot" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("optimum", [0.021, 0.05, 0.0513, 0.118, 0.2, 0.28, 0.4])
def test_refinement_closes_in_on_the_optimum(optimum: float) -> None:
    losses = {sigma_rel: math.log(sigma_rel / optimum) ** 2 for sigma_rel in parse_grid("0.05:0.28:6")}
    for _ in range(12):
        found = next_sigma_rel(losses)
        if found is None:
            break
        assert found not in losses
        losses[found] = math.log(found / optimum) ** 2
    best = min(losses, key=losses.__getitem__)
    assert found is None
    assert len(losses) - 6 <= 10
    assert abs(math.log(best / min(max(optimum, 0.05), 0.28))) <= math.log(1.05) / 2


def test_there_is_nothing_to_refine_without_a_metric_or_neighbours() -> None:
    assert next_sigma_rel({}) is None
    assert next_sigma_rel({0.1: 1.0}) is None
    assert next_sigma_rel({0.1: math.inf, 0.2: math.inf}) is None
    assert next_sigma_rel({0.1: 1.0, 0.104: 2.0}) is None
    assert next_sigma_rel({0.1: 1.0, 0.2: math.inf}) == 0.13  # 2^0.382


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("0.05:0.2:3", (0.05, 0.1, 0.2)),
        ("0.1,0.05,0.1", (0.1, 0.05)),
        ("0.15", (0.15,)),
        ("0.1:0.1005:4", (0.1, 0.100166, 0.100333, 0.1005)),
    ],
)
def test_grids_are_read(text: str, grid: tuple[float, ...]) -> None:
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "0.1:0.2", "0.2:0.1:3", "0:0.1:3", "0.1:0.2:1", "0.1:0.4:3", "0.1,wide", "0.3"])
def test_a_grid_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_grid(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.5", 0.5),
        ("loss: 1.2e-3\n", 0.0012),
        ("top5 accuracy 0.85%, took 12s", 0.85),
        ("tensor(-3.25)", -3.25),
        ("(0.1,0.5)", 0.5),
        ("FID50k = 1,234.5.", 1234.5),
        ("loss=.5 on v1.2.3 of 2026-11-22", 0.5),
        ("\x1b[32mloss 7\x1b[0m", 7),
        ("loss: nan", math.nan),
        ("-inf", -math.inf),
        ("loss \N{MINUS SIGN}0.5", -0.5),
        ("0.5 of \u0663", 0.5),
        ("0.5 \u0131nf", 0.5),
        ("loss 1.Next", 1),
        ("1,234,5678", 5678),
        ("no info", None),
        ("", None),
    ],
)
def test_the_last_number_is_found(text: str, number: float | None) -> None:
    found = last_number(text)
    assert found == number or (found is not None and number is not None and math.isnan(found) and math.isnan(number))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python eval.py", r"must say where the checkpoint goes, as \{checkpoint\}"),
        ("nosuchprogram {checkpoint}", "nosuchprogram is none"),
        ("python 'eval.py {checkpoint}", "No closing quotation"),
        ("", "got nothing"),
    ],
)
def test_a_command_that_cannot_be_is_refused_before_anything_is_made(
    run: Path, tmp_path: Path, command: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        sweep(run, [0.1], command, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_are_refused(run: Path, command: str, tmp_path: Path) -> None:
    for message, settings in {
        "a local one": {"out": "s3://bucket/out"},
        "refine must be at least 0": {"out": tmp_path / "out", "refine": -1},
        "give `out`": {},
    }.items():
        with pytest.raises(SettingsError, match=message):
            sweep(run, [0.1], command, **settings)  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="at least one"):
        sweep(run, [], command, out=tmp_path / "out")
    with pytest.raises(SettingsError, match="an empty one"):
        sweep(run, [0.1], lambda _: {})


@pytest.mark.parametrize("text", ["7" * 200_000 + "x", ",234" * 50_000 + "x", "1,234" * 50_000 + "x"])
def test_a_long_text_is_read_in_time(text: str) -> None:
    start = time.perf_counter()
    last_number(text)
    assert time.perf_counter() - start < 20  # or hours


@pytest.mark.parametrize("metrics", [{"$\\foo$": 1.0}, {"a": 1e308}, {"\x00": 1.0}])
def test_no_picture_loses_a_sweep(run: Path, tmp_path: Path, metrics: dict[str, float]) -> None:
    signs = iter([1, -1])
    found = sweep(
        run, [0.1, 0.2], lambda _: {name: next(signs) * x for name, x in metrics.items()}, out=tmp_path, refine=0
    )
    assert found.checkpoint
    assert found.checkpoint.exists()
    assert (tmp_path / "sweep.svg").exists() or "$" not in str(metrics)


def test_the_figure_shows_every_metric_and_its_best() -> None:
    rows = [(0.2, {"loss": 2.0, "distance": 5.0}), (0.1, {"loss": 3.0, "distance": None}), (0.05, {"loss": 4.0})]
    left, right = sweep_figure(rows, maximize=True).axes  # type: ignore[arg-type]
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss", "distance")
    np.testing.assert_array_equal(left.lines[0].get_data(), [[0.05, 0.1, 0.2], [4, 3, 2]])
    assert [line.get_data() for line in left.lines[1:]] == [([0.05], [4.0])]
    assert [line.get_data() for line in right.lines[1:]] == [([0.2], [5.0])]


def test_help_has_an_example_that_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "eval.py").write_text("import sys; print(abs(float(sys.argv[1].split('-')[1].split('/')[0]) - 0.12))")
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    example = " ".join(capsys.readouterr().out.split()).partition("example: phema ")[2]
    words = [str(run) if word.startswith("runs/") else word for word in shlex.split(example)]
    assert main(words) == 0
    assert (tmp_path / "sweep/best.safetensors").exists()
