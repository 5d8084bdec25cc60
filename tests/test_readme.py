"""Every block of README.md runs, in order, as a reader would run it."""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT, run_page
from safetensors.torch import load_file

from phema_dist import synthesize


# dcp says so whenever there is no process group.
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (tmp_path / "eval.py").write_text("import sys; print(f'loss: {len(sys.argv[1]) / 8:.2f}')")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [torch.randn(8, 4) for _ in range(50)],
    }
    assert run_page("README.md", names, lambda text: text.replace("--steps 500000", "--steps 5000")) == 7
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {"best.safetensors", "sweep.md", "sweep.svg"}
    assert (tmp_path / "profiles.svg").exists()
    (average,) = synthesize("runs/mine", [0.10])
    assert average.t == 500
    assert torch.equal(load_file("ema.safetensors")["0.weight"], average.state_dict["0.weight"])

    shutil.rmtree("training/500")  # the script goes on from the training checkpoint that is there, here on one rank
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    runpy.run_path("train.py")
    (again,) = synthesize("runs/mine", [0.10])
    assert (Path("training/500/.metadata").exists(), again.t) == (True, 500)
    assert not torch.equal(average.state_dict["0.weight"], again.state_dict["0.weight"])


def test_the_first_page_stays_one_that_is_read() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 210
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
