"""Every block of README.md runs, in order, as a reader would run it; only the bucket is the tests' own."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import Target
from s3_server import ADMIN, REGION, S3Server

from phema_dist.cli import main

README = Path(__file__).parents[1] / "README.md"


# dcp says so whenever there is no process group.
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
@pytest.mark.s3
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_url: Target, s3_server: S3Server) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    text = README.read_text().replace("s3://bucket/run", s3_url[0]).replace("https://...", s3_server.endpoint)

    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    names = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [torch.randn(8, 4) for _ in range(50)],
        "images_seen": 64,
    }
    exec(blocks[0], names)  # noqa: S102
    exec(blocks.pop(1), names)  # noqa: S102
    names["ema"].close()  # type: ignore[attr-defined]
    before_the_first_snapshot, _, afterwards = blocks[1].partition("with ema.state_dict")
    exec(before_the_first_snapshot, names)  # noqa: S102
    for t in range(100, 2000, 100):
        names["ema"].update_(model, t=t)  # type: ignore[attr-defined]
    exec(blocks[2], names)  # noqa: S102
    assert names["ema"].t == 1900  # type: ignore[attr-defined]
    for t in range(2000, 3000, 100):
        names["ema"].update_(model, t=t)  # type: ignore[attr-defined]
    names["ema"].close()  # type: ignore[attr-defined]
    exec(f"with ema.state_dict{afterwards}", names)  # noqa: S102
    for block in blocks[3:]:
        exec(block, names)  # noqa: S102

    (tmp_path / "eval.py").write_text("import sys; print(f'loss: {len(sys.argv[1]) / 8:.2f}')")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    commands = [line.partition("#")[0] for line in text.splitlines() if line.startswith("phema ")]
    assert len(commands) == 13
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert (tmp_path / "ema.safetensors").exists()
    assert (tmp_path / "joined.safetensors").exists()
    assert len(list((tmp_path / "averages").rglob("*.safetensors"))) == 4
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {"best.safetensors", "sweep.md", "sweep.svg"}
    assert (tmp_path / "profiles.svg").exists()


def test_the_commands_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^(?:make|.*`make) (\w+)", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
