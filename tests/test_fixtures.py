"""Runs of old versions load for ever: each fixture is one that such a version wrote, and what it read from it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_fixture
import pytest
import torch
import torch.distributed.checkpoint as dcp
from make_fixture import EVERY, OTHERS, STEPS, TRACKED, Model

from phema_dist import PostHocEMA, SynthesisReader, synthesize
from phema_dist.cli import main
from phema_dist.errors import RunError
from phema_dist.profile import beta, sigma_rel_to_gamma
from phema_dist.storage.manifest import FORMAT
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

FIXTURES = sorted(path for path in (Path(__file__).parent / "fixtures").iterdir() if path.is_dir())
each = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
LAST = STEPS[-1]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The newest one, for a test to change."""
    shutil.copytree(FIXTURES[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def expected(fixture: Path) -> dict[str, dict[str, torch.Tensor]]:
    model = Model().state_dict()
    found = json.loads((fixture / "expected.json").read_text())
    return {
        sigma_rel: {
            name: torch.tensor(values, dtype=model[name].dtype if name in {"seen", "running"} else torch.float32).view(
                model[name].shape
            )
            for name, values in state.items()
        }
        for sigma_rel, state in found.items()
    }


def averaged(sigma_rel: float) -> dict[str, torch.Tensor]:
    """What a tracked average must be at the end, worked out beside the library."""
    model, gamma = Model(), sigma_rel_to_gamma(sigma_rel)
    result = {name: torch.zeros(values.shape, dtype=torch.float64) for name, values in model.named_parameters()}
    for step in range(1, LAST + 1):
        model.set_to(step)
        for name, values in model.named_parameters():
            keep = beta(gamma, step, 1)
            result[name] = keep * result[name] + (1 - keep) * values.detach().double()
    return result


def test_every_format_that_ever_landed_has_a_fixture() -> None:
    formats = {json.loads((fixture / "run/run.json").read_text())["format"] for fixture in FIXTURES}
    assert formats == set(range(1, FORMAT + 1))
    documents = [(fixture / "run/run.json").read_bytes() for fixture in FIXTURES]
    assert {document.startswith(b'{"xxh3":"') for document in documents} == {True, False}


@each
def test_a_run_of_an_old_version_is_whole(fixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(open_store(fixture / "run"))
    assert [(s.t, s.attempt, s.problem) for s in run.snapshots] == [(2, 0, None), (4, 0, None), (6, 1, None)]
    assert (run.pins, [a.world_size for a in run.attempts], run.abandoned) == ({4}, [2, 2], ())
    assert run.info.aliases == {"head.weight": "body.weight"}
    assert main(["ls", str(fixture / "run"), "--json"]) == 0
    assert [row["complete"] for row in json.loads(capsys.readouterr().out)["snapshots"]] == [True] * 3


@each
def test_a_run_of_an_old_version_makes_the_averages_that_it_made(fixture: Path) -> None:
    wanted = expected(fixture)
    for made in synthesize(fixture / "run", [*TRACKED, *OTHERS]):
        for name, values in wanted[str(made.sigma_rel)].items():
            found = made.state_dict[name]
            assert (found.dtype, found.shape) == (values.dtype, values.shape)
            if made.sigma_rel in TRACKED:
                assert torch.equal(found, values), name
            torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4)
    for sigma_rel in TRACKED:
        for name, values in averaged(sigma_rel).items():
            torch.testing.assert_close(wanted[str(sigma_rel)][name].double(), values, rtol=1e-6, atol=1e-6)
    last = Model()
    last.set_to(LAST)
    assert all(torch.equal(wanted["0.05"][name], values) for name, values in last.named_buffers())


@each
def test_a_run_of_an_old_version_loads_into_a_model_and_goes_on(fixture: Path, tmp_path: Path) -> None:
    state = {name: torch.full_like(values, 7) for name, values in Model().float().state_dict().items()}
    with pytest.warns(UserWarning, match="torch.distributed is (disabled|unavailable)|single process"):
        dcp.load(state, storage_reader=SynthesisReader(fixture / "run", TRACKED[0]))
    torch.testing.assert_close(state, {k: v.to(state[k].dtype) for k, v in expected(fixture)[str(TRACKED[0])].items()})
    shutil.copytree(fixture / "run", tmp_path / "run")
    model = Model()
    with PostHocEMA.from_model(model, tmp_path / "run", 20, TRACKED, 1, EVERY, resume=True) as ema:
        assert ema.t == LAST
        model.set_to(LAST + 1)
        ema.update_()
    run = open_run(open_store(tmp_path / "run"))
    assert [(s.t, s.attempt) for s in run.complete] == [(2, 0), (4, 0), (6, 1), (7, 2)]


def test_the_script_makes_such_a_run_and_never_touches_one_that_is_there(tmp_path: Path) -> None:
    script = Path(make_fixture.__file__)
    subprocess.run([sys.executable, script, tmp_path / "new"], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "new/expected.json").read_bytes() == (FIXTURES[0] / "expected.json").read_bytes()
    again = subprocess.run([sys.executable, script, tmp_path / "new"], check=False, capture_output=True, timeout=120)
    assert again.returncode == 1
    assert b"FileExistsError" in again.stderr


def unsealed(path: Path) -> dict[str, object]:
    document = json.loads(path.read_bytes())
    document.pop("xxh3", None)
    return document


@pytest.mark.parametrize(
    ("library", "install"),
    [
        ("0.9.0", "pip install 'phema-dist>=0.9.0'"),
        ("1.0rc1", "pip install 'phema-dist>=1.0rc1'"),
        ("9; rm -rf /", "pip install --upgrade phema-dist"),
        (None, "pip install --upgrade phema-dist"),
    ],
)
def test_a_newer_format_is_refused_with_what_to_install(copied: Path, library: str | None, install: str) -> None:
    newer = {**unsealed(copied / "run.json"), "format": FORMAT + 1, "library": library, "something": "new"}
    (copied / "run.json").write_text(json.dumps(newer))
    with pytest.raises(RunError, match=r"run\.json has format \d; this phema-dist reads formats up to") as caught:
        open_run(open_store(copied))
    assert str(caught.value).endswith(f"Upgrade phema-dist: {install}.")


def test_a_snapshot_of_a_newer_format_is_left_out(copied: Path) -> None:
    path = next(copied.glob("snapshots/*6-a1/rank-00001-of-00002.json"))
    path.write_text(json.dumps({**unsealed(path), "format": FORMAT + 1}))
    problems = [s.problem for s in open_run(open_store(copied)).snapshots]
    assert problems[:2] == [None, None]
    assert f"has format {FORMAT + 1}; this phema-dist reads formats up to {FORMAT}. Upgrade" in str(problems[2])
