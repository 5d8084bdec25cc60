"""The examples, as `make demo` runs them, only shorter."""

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Target
from ranks import launch
from s3_server import ADMIN, REGION, S3Server
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[1] / "examples"


def torchrun(tmp_path: Path, script: str, *arguments: str) -> None:
    """Run a script in a folder of its own, on two ranks, as `make demo` does; with `launch` it takes half as long."""
    command = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    command += [str(EXAMPLES / script), *arguments]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=170)
        if "terminate called without an active exception" not in done.stderr:  # of gloo, at its end
            break
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_library_adds_at_most_six_lines_to_a_training_script() -> None:
    names = ("train_digits_plain.py", "train_digits.py")
    plain, averaged = ((EXAMPLES / name).read_text().splitlines() for name in names)
    changes = [line for line in difflib.ndiff(plain, averaged) if line[0] in "+-"]
    assert [line for line in changes if line[0] == "-"] == []
    assert len([line for line in changes if line[1:].strip()]) <= 6


def test_the_plain_script_trains(tmp_path: Path) -> None:
    script = str(EXAMPLES / "train_digits_plain.py")
    launch(2, script, "--steps", "40", "--wrapper", "fsdp2", folder=tmp_path)
    assert (tmp_path / "raw.safetensors").exists()


QUICK = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import digits
digits.NUM_HELD_OUT = 100
digits.train_classifier.__defaults__ = (32, 4)  # epochs
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_train_and_sweep_on_a_disk(tmp_path: Path) -> None:
    torchrun(tmp_path, "train_digits.py", "--steps", "100", "--checkpoint-dir", "run")
    quick = tmp_path / "quick.py"  # the same scripts, with a judge of less experience
    quick.write_text(QUICK)
    words = (str(EXAMPLES / "sweep_digits.py"), "--checkpoint-dir", "run", "--out", "out")
    assert re.search(r"best.*sigma_rel", launch(1, str(quick), *words, folder=tmp_path))
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out/sweep.md").read_text().splitlines()) > 12
    with safe_open(tmp_path / "out/best.safetensors", "pt") as file:
        assert "write.weight" in file.keys()  # noqa: SIM118  not a dict
    measuring = f"{sys.executable} {quick} {EXAMPLES / 'eval_digits.py'} {{checkpoint}}"
    words = ("sweep", "run", "--sigma-rel", "0.11", "--eval", measuring, "--out", "swept")
    table = launch(1, "phema_dist", *words, folder=tmp_path)
    (row,) = (line for line in (tmp_path / "out/sweep.md").read_text().splitlines() if line.startswith("| 0.11 |"))
    (measured,) = re.findall(r"sigma_rel = 0\.11: (\S+)", table)
    assert f"{float(measured):.3f}" == row.split("|")[3].strip()  # the same number by both ways


@pytest.mark.s3
def test_train_on_s3_leaves_nothing_on_the_disk_but_the_result(
    tmp_path: Path, s3_url: Target, s3_server: S3Server
) -> None:
    environment = {
        "AWS_ACCESS_KEY_ID": ADMIN.key,
        "AWS_SECRET_ACCESS_KEY": ADMIN.secret,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": s3_server.endpoint,
    }
    arguments = ("--steps", "100", "--wrapper", "fsdp2", "--checkpoint-dir", s3_url[0])
    launch(2, str(EXAMPLES / "train_digits.py"), *arguments, folder=tmp_path, **environment)
    synthesis = ("synthesize", s3_url[0], "--sigma-rel", "0.1", "--out", "ema.safetensors")
    launch(1, "phema_dist", *synthesis, folder=tmp_path, **environment)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema.safetensors", "raw.safetensors"]
