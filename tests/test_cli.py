"""The command line, called as a person would."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Target
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from phema_dist import PostHocEMA, synthesize
from phema_dist.cli import main
from phema_dist.cli.arguments import size
from phema_dist.target import ConstantBeta, Explicit, Power, UniformTail


@pytest.fixture
def run(any_store_url: Target) -> Target:
    url, options = any_store_url
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight  # tied
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=10, storage_options=options) as ema:
        for _ in range(60):
            with torch.no_grad():
                model[0].weight.add_(torch.randn(8, 8))
            ema.update_(model)
            ema._session.writer.drain()
    return any_store_url


@pytest.fixture
def local_run(tmp_path: Path) -> Path:
    model = nn.Linear(4, 4)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as ema:
        for _ in range(30):
            ema.update_(model)
            ema._session.writer.drain()
    return tmp_path / "run"


def options_of(target: Target) -> list[str]:
    return ["--storage-options", json.dumps(target[1])] if target[1] else []


def test_ls_and_synthesize_on_every_kind_of_storage(
    run: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", run[0], *options_of(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sigma_rels 0.05, 0.28, 8 tensors, t in steps" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["10", "20", "30", "40", "50", "60"]
    assert all(line.endswith("  complete") for line in lines[2:])

    assert main(["ls", run[0], "--json", *options_of(run)]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert [row["t"] for row in listing["snapshots"]] == [10, 20, 30, 40, 50, 60]
    assert all(row["complete"] and row["bytes"] > 0 for row in listing["snapshots"])
    for command in ("verify", "gc"):
        assert main([command, run[0], *options_of(run)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{run[0]}: no damage; 6 complete snapshots, ")
    assert told[1:] == [f"{run[0]}: nothing to remove"]

    out = tmp_path / "made/average.safetensors"
    assert main(["synthesize", run[0], "--sigma-rel", "0.15", "--out", str(out), *options_of(run)]) == 0
    assert "profile error" in capsys.readouterr().out
    (wanted,) = synthesize(run[0], [0.15], storage_options=run[1])
    found = load_file(out)
    assert found.keys() == wanted.state_dict.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict.items())
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model.load_state_dict(found, strict=True)
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["phema_dist"])
    assert facts["sigma_rel"] == 0.15
    assert facts["t"] == 60
    assert sum(term[2] for term in facts["terms"]) == pytest.approx(1)
    assert facts["certificate"]["profile_error"] == wanted.certificate.profile_error
    assert facts["library"].startswith("phema-dist ")
    assert [path.name for path in out.parent.iterdir()] == ["average.safetensors"]


def test_a_folder_gets_one_checkpoint_or_one_folder_per_length(local_run: Path, tmp_path: Path) -> None:
    assert main(["synthesize", str(local_run), "--sigma-rel", "0.2", "--out", str(tmp_path / "one")]) == 0
    several = ["--sigma-rel", "0.2", "--sigma-rel", "0.1", "--t", "20", "--dtype", "bf16"]
    assert main(["synthesize", str(local_run), *several, "--out", str(tmp_path / "several")]) == 0
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("[os]*/**/*.safetensors"))
    assert made == [
        "one/model.safetensors",
        "several/sigma_rel-0.1/model.safetensors",
        "several/sigma_rel-0.2/model.safetensors",
    ]
    assert load_file(tmp_path / made[1])["weight"].dtype == torch.bfloat16


def test_a_result_is_not_overwritten_unless_forced(local_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "average.safetensors"
    command = ["synthesize", str(local_run), "--sigma-rel", "0.15", "--out", str(out)]
    out.write_bytes(b"precious")
    assert main(command) == 2
    assert out.read_bytes() == b"precious"
    assert main([*command, "--force"]) == 0
    assert "weight" in load_file(out)


def test_a_damaged_snapshot_is_left_out_or_with_strict_an_error_that_leaves_no_file(
    local_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shard = local_run / "snapshots/000000000020-a0/sigma_rel-0.28/rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.write_bytes(content)
    out = tmp_path / "made/average.safetensors"
    command = ["synthesize", str(local_run), "--sigma-rel", "0.15", "--out", str(out)]
    assert main([*command, "--strict"]) == 1
    assert "000000000020-a0/sigma_rel-0.28/rank-00000.safetensors" in capsys.readouterr().err
    assert not out.parent.exists()
    assert main(command) == 0
    assert "from snapshots: 2," in capsys.readouterr().out
    assert "000000000020-a0/sigma_rel-0.28/rank-00000.safetensors" in caplog.text
    assert main(command) == 0
    assert "it was there already" in capsys.readouterr().out


def test_every_kind_of_target_is_made_in_one_pass(
    local_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--tail", "0.5", "--sigma-rel", "0.2", "--beta", "0.9", "--sigma-rel", "0.2@20", "--beta", "0.8@20",
        "--beta-every", "2", "--coefficients", '{"10": 0.25, "30": 0.75}', "--sigma-rel", "0.2",
    ]  # fmt: skip
    assert main(["synthesize", str(local_run), *arguments, "--out", str(tmp_path / "made")]) == 0
    wanted = [
        UniformTail(0.5), Power(0.2), ConstantBeta(0.9, 2), Power(0.2, 20), ConstantBeta(0.8, 2, 20),
        Explicit(((10, 0.25), (30, 0.75))),
    ]  # fmt: skip
    told = capsys.readouterr().out.splitlines()
    for target, average, line in zip(wanted, synthesize(local_run, wanted), told, strict=True):
        path = tmp_path / "made" / target.name / "model.safetensors"
        assert line.startswith(f"{path}: {target.name} at t={average.t}, ")
        found = load_file(path)
        assert all(torch.equal(found[name], tensor) for name, tensor in average.state_dict.items())
        assert average.target == target
        assert average.sigma_rel == (target.sigma_rel if isinstance(target, Power) else None)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("123", 123), ("500MB", 500_000_000), ("5GiB", 5 << 30), ("1.5kb", 1500), ("2 TB", 2 * 10**12), ("7b", 7)],
)
def test_sizes_are_read_as_people_write_them(text: str, num_bytes: int) -> None:
    assert size(text) == num_bytes


def test_an_incomplete_snapshot_is_listed_with_its_reason(local_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (local_run / "snapshots/000000000020-a0/rank-00000-of-00001.json").unlink()
    assert main(["ls", str(local_run)]) == 0
    assert "incomplete: manifests of rank 0 of 1 are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ls", "nowhere"], 1, "nowhere must hold a run of phema-dist"),
        (["ls", "nosuch://bucket/run"], 2, "nosuch"),
        (["synthesize", "RUN", "--sigma-rel", "0.15", "--t", "5", "--out", "x"], 1, "at or before t=5"),
        (["synthesize", "RUN", "--sigma-rel", "0.15", "--out", "s3://bucket/x"], 2, "must be a local file"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--sigma-rel", "0.2", "--out", "x.safetensors"], 2, "a folder"),
        (["synthesize", "RUN", "--sigma-rel", "0.35", "--out", "x"], 2, "must lie in (0, 0.28867]"),
        (["synthesize", "RUN", "--sigma-rel", "wide", "--out", "x"], 2, "wide"),
        (["synthesize", "RUN", "--sigma-rel", "0.1"], 2, "--out"),
        (["synthesize", "RUN", "--out", "x"], 2, "--sigma-rel, --beta, --tail or --coefficients"),
        (["synthesize", "RUN", "--beta", "1.5", "--out", "x"], 2, "1.5"),
        (["synthesize", "RUN", "--tail", "0", "--out", "x"], 2, "0"),
        (["synthesize", "RUN", "--tail", "0.2@soon", "--out", "x"], 2, "soon"),
        (["synthesize", "RUN", "--beta", "0.9", "--beta-every", "0", "--out", "x"], 2, "must be above 0"),
        (["synthesize", "RUN", "--coefficients", '{"a": 1}', "--out", "x"], 2, "must be like"),
        (["synthesize", "RUN", "--coefficients", '{"15": 1}', "--out", "x"], 1, "t=15"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--out", "x.ckpt"], 2, "end in .safetensors or .pt"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--out", "x.pt", "--format", "safetensors"], 2, "must fit"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--out", "x.safetensors", "--sharded"], 2, "a folder"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--out", "x", "--sharded", "--format", "pt"], 2, "consolidate"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--out", "x", "--max-file-size", "big"], 2, "500MB"),
        (["synthesize", "RUN", "--sigma-rel", "0.1", "--out", "x", "--memory", "0"], 2, "500MB"),
        (["verify", "nowhere"], 1, "nowhere must hold a run of phema-dist"),
        (["gc", "nowhere"], 1, "nowhere must hold a run of phema-dist"),
        (["gc", "RUN", "--keep", "0"], 2, "keep must be at least 1; got 0"),
        (["gc", "RUN", "--keep", "some"], 2, "some"),
        (["gc", "RUN", "--keep", "2", "--retention", "first"], 2, "first"),
        (["pin", "nowhere", "--t", "1"], 1, "nowhere must hold a run of phema-dist"),
        (["pin", "RUN", "--t", "14"], 1, "no complete snapshot. The nearest are t=10 and t=20."),
        (["pin", "RUN", "--t", "14", "--remove"], 1, "must be pinned to be unpinned; pinned is nothing"),
        (["pin", "RUN"], 2, "--t"),
        (["consolidate", "RUN", "--out", "x"], 1, "rank-*-of-*.safetensors"),
        (["ls", "RUN", "--storage-options", "[1]"], 2, "JSON object"),
        ([], 2, "COMMAND"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = [str(local_run) if argument == "RUN" else argument for argument in arguments]
    with contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():  # of argparse
        assert main(arguments) == code
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert text.startswith("usage: ") or len(text.strip().splitlines()) == 1


def test_a_poor_certificate_warns_and_does_not_fail(local_run: Path, tmp_path: Path) -> None:
    for snapshot in ("000000000010-a0", "000000000020-a0"):
        (local_run / f"snapshots/{snapshot}/rank-00000-of-00001.json").unlink()
    command = [sys.executable, "-m", "phema_dist", "synthesize", str(local_run), "--sigma-rel", "0.12"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x")], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "WARNING: sigma_rel=0.12 at t=30: the profile error is" in done.stderr
    assert "left out a snapshot that cannot be used, t=10" in done.stderr


@pytest.mark.parametrize("command", ["ls", "verify", "gc", "pin", "synthesize", "consolidate"])
def test_help_has_an_example_that_runs(
    command: str, local_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = " ".join(capsys.readouterr().out.split()).partition("example: phema ")[2].split()
    assert example[0] == command
    if command == "consolidate":
        assert (
            main(["synthesize", str(local_run), "--sigma-rel", "0.2", "--sharded", "--out", str(tmp_path / "sharded")])
            == 0
        )
    words = [str(tmp_path / "sharded") if word == "sharded/" else word for word in example]
    words = [str(local_run) if word.startswith(("s3:", "runs/")) else word for word in words]
    assert main([str(tmp_path / word) if word.endswith(("/", ".safetensors")) else word for word in words]) == 0


def test_an_average_beyond_the_dtype_of_the_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1e5)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as ema:
        ema.update_(model)
    out = str(tmp_path / "out.safetensors")
    arguments = ["synthesize", str(tmp_path / "run"), "--sigma-rel", "0.28", "--out", out, "--dtype"]
    assert main([*arguments, "fp16"]) == 2
    assert "weight exceeds the range of float16" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*arguments, "bf16"]) == 0


def test_gc_refuses_a_retention_of_nothing(local_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["gc", str(local_run), "--retention", "last"])
    assert "--retention says which snapshots --keep N keeps" in capsys.readouterr().err
