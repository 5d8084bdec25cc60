"""Coming over from other libraries, each tested against the package itself.

Training is one-hot: the parameter is e_i from update i to the next, so that an average shows the share it has of each.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import ema_pytorch
import numpy as np
import numpy.typing as npt
import posthoc_ema
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from phema_dist import PostHocEMA, RunError, SettingsError, SnapshotError, SynthesisReader, profile, synthesize
from phema_dist.cli import main
from phema_dist.errors import ProfileError
from phema_dist.legacy import OneStepProfile, spread
from phema_dist.migration import Copied, Folder, copy_folder
from phema_dist.profile import PowerProfile
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

ORACLES = json.loads((Path(__file__).parent / "oracles.json").read_text())
GAMMAS = {float(sigma_rel): gamma for sigma_rel, gamma in ORACLES["gamma"].items()}
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A folder of theirs, and what their own library makes of it."""

    folder: Folder
    times: Array  # of the updates, since averaging began
    own: dict[float, Array]  # sigma_rel -> the share of each update


def train(
    path: Path, library: str, num_steps: int, every: int, snapshot_every: int,
    dtype: torch.dtype | None = None, first: int = 1, own: tuple[float, ...] = (),
) -> Trained:  # fmt: skip
    times = np.arange(0, num_steps - first + 1, every) + 1.0
    model = nn.Linear(len(times), 1, bias=False)
    nn.init.zeros_(model.weight)
    if library == "posthoc-ema":
        theirs = posthoc_ema.PostHocEMA.from_model(
            model, path, 10**6, (0.05, 0.28), every, snapshot_every, dtype, update_after_step=first
        )
        update = lambda: theirs.update_(model)  # noqa: E731
    else:
        theirs = ema_pytorch.PostHocEMA(
            model, sigma_rels=(0.05, 0.28), update_every=every, checkpoint_every_num_steps=snapshot_every,
            checkpoint_folder=str(path), checkpoint_dtype=dtype,
        )  # fmt: skip
        update = theirs.update
    with torch.no_grad():
        for step in range(1, num_steps + 1):
            if step >= first and (step - first) % every == 0:
                model.weight.zero_()[0, (step - first) // every] = 1
            update()
    made = {}
    for sigma_rel in own:
        if library == "posthoc-ema":
            with theirs.state_dict(sigma_rel, calculation_dtype=torch.float64) as state:
                made[sigma_rel] = state["weight"][0].double().numpy()
        else:
            averaged = theirs.synthesize_ema_model(sigma_rel=sigma_rel).ema_model
            made[sigma_rel] = averaged.weight[0].detach().double().numpy()
    return Trained(Folder(path, library, (0.05, 0.28), every), times, made)


def tracked(sigma_rel: float, times: Array) -> Array:
    """The share of each update in an average that is tracked directly: the paper's recursion, in float64."""
    shares = np.zeros(len(times))
    for i, t in enumerate(times):
        beta = (times[i - 1] / t) ** (GAMMAS[sigma_rel] + 1) if i else 0.0
        shares *= beta
        shares[i] = 1 - beta
    return shares


def error(found: Array, wanted: Array, times: Array) -> float:
    """Relative, in L2 over time."""
    widths = np.diff(times, prepend=0.0)
    return float(np.sqrt(np.sum((found - wanted) ** 2 / widths) / np.sum(wanted**2 / widths)))


def copy(folder: Folder, out: Path) -> list[Copied]:
    return list(copy_folder(folder, open_store(out)))


@pytest.fixture(scope="module")
def predecessors(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of the predecessor with its defaults, in float32: update_every 10, update_after_step 100."""
    path = tmp_path_factory.mktemp("posthoc") / "ema"
    return train(path, "posthoc-ema", 20_000, 10, 1000, first=100, own=(0.1, 0.15))


@pytest.fixture(scope="module")
def lucidrains(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("lucidrains") / "ema"
    return train(path, "ema-pytorch", 6_000, 10, 200, torch.float32, own=(0.1, 0.15))


@pytest.mark.parametrize("who", ["predecessors", "lucidrains"])
def test_synthesis_from_an_imported_run_is_right_where_their_own_is_not(
    who: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trained: Trained = request.getfixturevalue(who)
    copied = copy(trained.folder, tmp_path / "run")
    steps = range(1000, 20_001, 1000) if who == "predecessors" else range(200, 6_001, 200)
    assert [c.step for c in copied] == list(steps)
    assert [c.t for c in copied] == [step if who == "predecessors" else step - 9 for step in steps]
    for made in synthesize(tmp_path / "run", [0.1, 0.15]):
        sigma_rel = float(made.target.sigma_rel)
        wanted = tracked(sigma_rel, trained.times)
        ours = error(made.state_dict["weight"][0].double().numpy(), wanted, trained.times)
        assert ours < 0.01
        assert made.certificate.recorded_error == pytest.approx(ours, rel=0.1)  # the rest is float32's
        assert made.certificate.profile_error == pytest.approx(made.certificate.recorded_error, rel=1e-2)
        assert made.certificate.good
        assert error(trained.own[sigma_rel], wanted, trained.times) > 0.5


@pytest.mark.parametrize("who", ["predecessors", "lucidrains"])
@pytest.mark.parametrize("index", [0, 1])
def test_what_they_stored_has_the_masses_that_we_say(who: str, index: int, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(who)
    step, t = (8000, 8000 - 99) if who == "predecessors" else (3000, 2991)
    content = torch.load(trained.folder.path / f"{index}.{step}.pt", weights_only=True)
    (stored,) = (value[0].double().numpy() for name, value in content.items() if name.endswith("weight"))
    said = OneStepProfile(trained.folder.sigma_rels[index], t).masses(trained.times)
    assert said.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(said, stored, rtol=2e-3, atol=1e-9)  # their float32 loses that much
    np.testing.assert_array_equal(np.flatnonzero(said), np.arange(len(trained.times[trained.times <= t])))


@pytest.mark.parametrize(("asked", "really", "of_the_first"), [(0.05, 0.246, 0), (0.10, 0.297, 0), (0.28, 0.210, 0.43)])
def test_what_was_asked_for_and_what_came(asked: float, really: float, of_the_first: float) -> None:
    times = np.arange(0, 10_000, 10) + 1.0
    masses = OneStepProfile(asked, times[-1]).masses(times)
    assert spread(masses, times) == pytest.approx(really, abs=6e-4)
    assert masses[0] == pytest.approx(of_the_first, abs=5e-3)


def test_many_updates_are_compared_in_bins_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.arange(0, 200_000, 10) + 1.0
    stored = [OneStepProfile(sigma_rel, t) for sigma_rel in (0.05, 0.28) for t in times[999::1000]]
    aims = [PowerProfile(sigma_rel, times[-1]) for sigma_rel in (0.1, 0.15, 0.2)]
    binned, said = profile.fit(stored, aims, times)
    assert len(times) > profile.MAX_BINS
    monkeypatch.setattr(profile, "MAX_BINS", len(times))
    assert said == pytest.approx(profile.fit(stored, aims, times)[1], rel=1e-2)
    assert said == pytest.approx(profile.recorded_errors(stored, binned, aims, times), rel=1e-2)


def test_a_profile_of_updates_that_are_not_recorded_is_an_error() -> None:
    with pytest.raises(ProfileError, match="must have seen an update"):
        OneStepProfile(0.1, 5).masses(np.array([10.0, 20.0]))


@pytest.mark.parametrize("library", ["posthoc-ema", "ema-pytorch"])
def test_the_certificate_says_where_it_cannot_be_right(
    library: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = train(tmp_path / "ema", library, 6_000, 100, 500, torch.float16)
    copy(trained.folder, tmp_path / "run")
    (made,) = synthesize(tmp_path / "run", [0.1])
    measured = error(made.state_dict["weight"][0].double().numpy(), tracked(0.1, trained.times), trained.times)
    assert measured > 0.1
    assert not made.certificate.good
    assert made.certificate.coefficient_norm > 10
    assert made.certificate.rounding_noise > 0.005
    assert "the rounding of F16 snapshots changes parameters" in caplog.text
    assert "the profile error is" in caplog.text


@pytest.mark.parametrize(("first", "dtype"), [(1, None), (7, torch.float16), (100, torch.bfloat16)])
def test_when_averaging_began_is_read_from_the_files(
    first: int, dtype: torch.dtype | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = train(tmp_path / "ema", "posthoc-ema", 400, 3, 50, dtype, first)
    copied = copy(trained.folder, tmp_path / "run")
    run = open_run(open_store(tmp_path / "run"))
    assert run.info.origin == first - 1
    assert [c.t for c in copied] == [first + (s - first) // 3 * 3 for s in range(50, 401, 50) if s >= first]
    assert run.complete[-1].manifests[0].dtype == {None: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert ("if the model was too, posthoc-ema averaged in bfloat16" in caplog.text) == (dtype is torch.bfloat16)


def test_a_count_that_was_rounded_must_fit_what_is_said(tmp_path: Path) -> None:
    trained = train(tmp_path / "ema", "posthoc-ema", 6_000, 100, 3_000, torch.float16, 900)
    with pytest.raises(
        SnapshotError, match=r"0\.3000\.pt must hold the averages after 2901 calls.*--update-after-step"
    ):
        copy(trained.folder, tmp_path / "run")
    copy(replace(trained.folder, update_after_step=900), tmp_path / "run")
    assert open_run(open_store(tmp_path / "run")).info.origin == 899


@pytest.fixture
def small(tmp_path: Path) -> Folder:
    return train(tmp_path / "ema", "posthoc-ema", 60, 2, 20).folder


def test_foreign_missing_and_odd_files_are_refused_by_name(small: Folder, tmp_path: Path) -> None:
    def refused(match: str, folder: Folder = small) -> None:
        with pytest.raises((SnapshotError, SettingsError, ProfileError), match=match):
            copy(folder, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused(r"one index for each of the 3 sigma_rels", replace(small, sigma_rels=(0.05, 0.1, 0.28)))
    refused("its names are those of posthoc-ema, as weight", replace(small, library="ema-pytorch"))
    with pytest.raises(SettingsError, match=r"sigma_rels must be those of the training"):
        replace(small, sigma_rels=())
    with pytest.raises(ProfileError, match=r"0\.28867"):
        replace(small, sigma_rels=(0.05, 0.4))
    with pytest.raises(SettingsError, match=r"must be the folder with the \.pt files"):
        replace(small, path=small.path / "no")

    other = small.path / "model.pt"
    other.write_bytes(b"")
    refused(r"it also has model\.pt")
    other.unlink()
    (small.path / ".DS_Store").write_bytes(b"")  # as systems leave behind

    lost = small.path / "1.40.pt"
    content = lost.read_bytes()
    lost.unlink()
    refused(r"1\.40\.pt is missing")
    lost.write_bytes(content[:-300])
    refused(r"1\.40\.pt must be a file of torch\.save")
    lost.write_bytes(b"")
    refused(r"1\.40\.pt must be a file of torch\.save")
    state = torch.load(small.path / "0.40.pt", weights_only=True)
    torch.save({**state, "weight": torch.zeros(7, 1)}, lost)
    refused(r"1\.40\.pt must hold the same tensors as 0\.20\.pt; weight is F32 \[7, 1\] instead of F32 \[1, 30\]")
    torch.save({"weight": state["weight"]}, lost)
    refused(r"1\.40\.pt must be a snapshot of posthoc-ema")
    torch.save({**state, "step": torch.tensor(39)}, lost)
    refused(r"1\.40\.pt must hold the averages after 40 calls")
    torch.save({**state, "evil": Path("x")}, lost)
    refused(r"1\.40\.pt must be a file of torch\.save, with tensors only")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_all_in_the_file_are_refused_before_there_is_a_run(small: Folder, tmp_path: Path) -> None:
    paths = sorted(small.path.iterdir())
    states = {path: torch.load(path, weights_only=True) for path in paths}

    def refused(match: str, **changed: object) -> None:
        for path, state in states.items():
            mixed = {**state, **changed}
            torch.save({name: value for name, value in mixed.items() if value is not None}, path)
        with pytest.raises(SnapshotError, match=match):
            copy(small, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    dense = "weight must be a dense CPU tensor, all of it in the file"
    refused(dense, weight=torch.zeros(5, device="meta"))
    refused(dense, weight=torch.ones(5).to_sparse())
    refused(dense, weight=torch.zeros(1).as_strided((10**7, 10**5), (0, 0)))
    refused("dense CPU tensor|must be a file of torch.save", weight=torch.nested.nested_tensor([torch.ones(5)]))
    refused("count of steps, one number", step=torch.tensor([20]).to_sparse())
    refused("count of steps, one number", step=torch.tensor(20, device="meta"))
    refused("at least one average, of floats; found none", weight=None)
    refused("at least one average, of floats; found none", weight=torch.arange(5))
    refused("whose averages are all finite; it has none, as .*weight is not finite", weight=torch.full((5,), torch.nan))


@pytest.mark.parametrize("below", ["", "run/deep"])
def test_a_run_in_the_folder_itself_is_refused(small: Folder, below: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small.path)
    before = sorted(small.path.rglob("*"))
    for out in (small.path / below, tmp_path / "link" / below):
        with pytest.raises(SettingsError, match=r"must not be in .*Choose another --out"):
            copy(small, out)
    assert sorted(small.path.rglob("*")) == before


def test_which_averages_of_an_imported_run_are_best_is_not_guessed(
    small: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(small, tmp_path / "run")
    command = ["gc", str(tmp_path / "run"), "--keep", "2"]
    assert main(command) == 1
    assert "retention must be last; got best. Give --retention last" in capsys.readouterr().err
    assert main([*command, "--retention", "last"]) == 0
    assert [s.t for s in open_run(open_store(tmp_path / "run")).complete] == [39, 59]


def test_what_is_not_finite_is_left_out_by_name(
    small: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = small.path / "1.40.pt"
    state = torch.load(path, weights_only=True)
    state["weight"][0, 3] = torch.inf
    torch.save(state, path)
    assert [c.step for c in copy(small, tmp_path / "run")] == [20, 60]
    assert "left out step 40: 1.40.pt: weight is not finite" in caplog.text


def test_files_without_an_update_between_them_are_one_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = train(tmp_path / "ema", "ema-pytorch", 60, 30, 20, torch.float32)
    assert [(c.t, c.step) for c in copy(trained.folder, tmp_path / "run")] == [(1, 20), (31, 40)]
    assert "the files of step 60 hold what those of step 40 do" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from phema_dist.migration import Folder, copy_folder
from phema_dist.storage import store as stores
from phema_dist.storage.run import open_run

folder = Folder(Path(sys.argv[1]), "posthoc-ema", (0.05, 0.28), 2)
put = stores.LocalStore.put
for last in range(1, 9):
    store = stores.open_store(f"{sys.argv[2]}/{last}")
    if os.fork() == 0:
        puts = 0
        def counted(self, key, data):
            global puts
            puts += 1
            if puts == last:
                os.kill(os.getpid(), signal.SIGKILL)
            put(self, key, data)
        stores.LocalStore.put = counted
        for _ in copy_folder(folder, store):
            pass
        os._exit(0)
    _, status = os.wait()
    before = [s.t for s in open_run(store).complete] if last > 1 else []
    copied = list(copy_folder(folder, store))
    run = open_run(store)
    print(os.WTERMSIG(status), before, [c.t for c in copied if c.num_bytes], [s.t for s in run.complete])
"""


def test_a_kill_at_any_put_leaves_nothing_wrong_and_the_same_call_finishes(small: Folder, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(small.path), str(tmp_path / "runs")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    # A run, an attempt, and for each of three snapshots two files and a manifest.
    assert [line.split(" ", 1)[0] for line in lines] == ["9"] * 8
    for number, line in enumerate(lines):
        there = [19, 39, 59][: max(0, number - 2) // 3]
        left = [t for t in (19, 39, 59) if t not in there]
        assert line == f"9 {there} {left} [19, 39, 59]"
    whole = [made.state_dict["weight"] for made in synthesize(tmp_path / "runs/1", [0.1])]
    for number in range(2, 9):
        (made,) = synthesize(tmp_path / f"runs/{number}", [0.1])
        assert torch.equal(made.state_dict["weight"], whole[0])
        assert main(["verify", str(tmp_path / f"runs/{number}")]) == 0


def test_a_folder_that_has_grown_is_gone_on_with_and_another_run_is_not_touched(tmp_path: Path) -> None:
    first = train(tmp_path / "ema", "posthoc-ema", 40, 2, 20).folder
    copy(first, tmp_path / "run")
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for path in first.path.iterdir():
        path.unlink()
    grown = train(tmp_path / "ema", "posthoc-ema", 60, 2, 20).folder
    with pytest.raises(RunError, match="it holds a run with other tensors"):  # one-hots of 30 updates, not 20
        copy(grown, tmp_path / "run")
    with pytest.raises(RunError, match=r"other imported: .*update_every=2.* instead of .*update_every=4"):
        copy(replace(grown, update_every=4), tmp_path / "run")
    (first.path / "0.60.pt").rename(tmp_path / "0")
    (first.path / "1.60.pt").rename(tmp_path / "1")
    copy(grown, tmp_path / "other")
    (tmp_path / "0").rename(first.path / "0.60.pt")
    (tmp_path / "1").rename(first.path / "1.60.pt")
    copied = copy(grown, tmp_path / "other")
    assert [(c.t, c.num_bytes > 0) for c in copied] == [(19, False), (39, False), (59, True)]
    assert [c.num_bytes for c in copy(grown, tmp_path / "other")] == [0, 0, 0]
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == kept

    with PostHocEMA.from_model(nn.Linear(30, 1, bias=False), tmp_path / "ours", update_every=1) as ema:
        ema.update_()
    with pytest.raises(RunError, match="other imported: None"):
        copy(grown, tmp_path / "ours")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("library", "dtype", "store"),
    [
        ("posthoc-ema", None, "local"),
        ("ema-pytorch", torch.float16, "local"),
        pytest.param("posthoc-ema", torch.float16, "s3", marks=pytest.mark.s3),
    ],
)
def test_an_imported_run_is_read_everywhere_and_gone_on_with_nowhere(
    library: str,
    dtype: torch.dtype | None,
    store: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local: tuple[str, dict[str, str]] = (str(tmp_path / "run"), {})
    model, (url, options) = net(), request.getfixturevalue("s3_url") if store == "s3" else local
    if library == "posthoc-ema":
        theirs = posthoc_ema.PostHocEMA.from_model(model, tmp_path / "ema", 99, None, 2, 10, dtype, update_after_step=1)
    else:
        theirs = ema_pytorch.PostHocEMA(
            model, sigma_rels=(0.05, 0.28), update_every=2, checkpoint_every_num_steps=10,
            checkpoint_folder=str(tmp_path / "ema"),
        )  # fmt: skip
    for _ in range(40):
        with torch.no_grad():
            model(torch.randn(8, 3))
            model[0].weight.add_(torch.randn(4, 3))
        theirs.update_(model) if library == "posthoc-ema" else theirs.update()
    given = ["--storage-options", json.dumps(options)] if options else []
    command = ["import", str(tmp_path / "ema"), "--from", library, "--out", url, *given]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--sigma-rels must say what the training tracked" in error
    assert "posthoc-ema is --sigma-rels 0.05,0.28; ema-pytorch has none" in error
    assert main([*command, "--sigma-rels", "0.05,0.28", "--update-every", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told[:4]] == [f"step {t + 1} -> t={t}" for t in (9, 19, 29, 39)]
    assert told[4].startswith(f"imported from {library}, update_every 2: at t=39 0.05 is 0.0")
    assert told[5].startswith("sigma_rel=0.05 at t=39: profile error ")

    assert main(["ls", url, *given]) == 0
    assert told[4] in capsys.readouterr().out.splitlines()
    assert main(["verify", url, *given]) == 0
    (made,) = synthesize(url, [0.15], storage_options=options)
    names = set(net().state_dict())
    assert made.state_dict.keys() == names
    assert made.state_dict["1.num_batches_tracked"].dtype == torch.int64
    with PostHocEMA.from_path(url, storage_options=options).model(net(), sigma_rel=0.15) as averaged:
        for name, tensor in averaged.state_dict().items():
            torch.testing.assert_close(tensor, made.state_dict[name])
    state = {name: torch.zeros_like(tensor) for name, tensor in made.state_dict.items()}
    dcp.load(state, storage_reader=SynthesisReader(url, sigma_rel=0.15, storage_options=options), no_dist=True)
    assert all(torch.equal(state[name], made.state_dict[name]) for name in names)

    for resume in (True, 20, False):
        with pytest.raises(RunError, match=f"was imported from {library}, .* nothing can go on with it"):
            PostHocEMA.from_model(net(), url, resume=resume, storage_options=options)
    with pytest.raises(RunError, match="was imported from"):
        PostHocEMA.from_path(url, net(), storage_options=options).update_()
    assert PostHocEMA.from_path(url, storage_options=options).reconstruction_error().size == (700, 480)
    picture = str(tmp_path / "x.svg")
    assert main(["plot", url, "--picture", "profiles", "--sigma-rel", "0.1", "--out", picture, *given]) == 0


def test_the_example_in_the_help_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "posthoc-ema", "posthoc-ema", 60, 10, 20)
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    example = " ".join(capsys.readouterr().out.split()).partition("example: phema ")[2].split()
    ours = {"posthoc-ema", "runs/old"}
    folders = [i for i, word in enumerate(example) if word in ours and example[i - 1] != "--from"]
    assert main([str(tmp_path / word) if i in folders else word for i, word in enumerate(example)]) == 0
    assert len(open_run(open_store(tmp_path / "runs/old")).complete) == 3
