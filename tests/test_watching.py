"""What a person sees of a job and of a command: status for a logger, what is logged, progress, how commands end."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

from phema_dist import PostHocEMA, planning
from phema_dist.cli import main

EXAMPLE = ["--steps", "40", "--parameters", "1000", "--sigma-rel", "0.1:0.2", "--snapshots", "16"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(tmp_path / "run", nn.Linear(4, 4))
    return tmp_path / "run"


def train(url: Path, model: nn.Module, calls: int = 40, **settings: Any) -> dict[str, Any]:
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=10, **settings) as ema:
        for _ in range(calls):
            with torch.no_grad():
                next(model.parameters()).add_(0.01)
            ema.update_(model)
            ema._session.writer.drain()
            if dist.is_initialized():
                dist.barrier()  # as gradients hold ranks together
    return ema.status()


# Loggers of training.


class StrictWriter:
    """Refuses what TensorBoard's add_scalar and MLflow's log_metrics do: all that is no number."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if isinstance(value, str) or value is None:
            raise NotImplementedError(f"Got {type(value)}, but numpy array or torch tensor are expected.")
        self.seen.setdefault(tag, []).append((step, float(value)))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.add_scalar(name, value, step)


def test_the_numbers_of_status_go_to_any_logger_in_a_line(tmp_path: Path) -> None:
    model, writer = nn.Linear(4, 4), StrictWriter()
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as ema:
        for step in range(1, 31):
            ema.update_(model)
            if step % 10 == 0:
                ema._session.writer.drain()
                writer.log_metrics({k: v for k, v in ema.status().items() if isinstance(v, int | float)}, step)
                assert json.loads(json.dumps(ema.status())) == ema.status()  # flat, for W&B
    assert writer.seen["updates"] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert writer.seen["snapshots_written"] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert writer.seen["last_complete_snapshot"][-1] == (30, 30.0)
    assert "last_error" not in writer.seen
    with pytest.raises(NotImplementedError):
        writer.log_metrics(PostHocEMA.from_path(tmp_path / "run").status(), 0)  # the whole has None and text


# Log messages.


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelname, record.getMessage()))


def heard(url: Path, calls: int, level: int, resume: bool = False) -> list[tuple[str, str]]:
    """On each rank: what a run logs."""
    logger, kept = logging.getLogger("phema_dist"), Kept()
    before = logger.level
    logger.addHandler(kept)
    logger.setLevel(level)
    try:
        model = nn.Linear(8, 8)
        torch.manual_seed(0)
        nn.init.normal_(model.weight)
        nn.init.zeros_(model.bias)
        train(url, nn.parallel.DistributedDataParallel(model), calls, max_checkpoints=4, resume=resume)
    finally:
        logger.removeHandler(kept)
        logger.setLevel(before)
    return kept.told


def test_the_library_sets_nothing_up() -> None:
    logger = logging.getLogger("phema_dist")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)


def test_a_normal_run_warns_of_nothing(tmp_path: Path) -> None:
    told = ranks.run(2, heard, tmp_path / "run", 60, logging.WARNING)
    assert told == [[], []]


def test_at_info_rank_0_tells_the_story_of_a_run_and_the_others_are_silent(tmp_path: Path) -> None:
    first, second = ranks.run(2, heard, tmp_path / "run", 60, logging.INFO)
    assert second == []
    assert {level for level, _ in first} == {"INFO"}
    texts = [text.removeprefix(str(tmp_path / "run")) for _, text in first]
    assert texts[0] == ": attempt 0 begins at t=0 on 2 ranks; 2 tensors, sigma_rels 0.05, 0.28"
    assert texts[1] == ", rank 0 averages 40 elements in 960 B of host memory"  # 24 bytes each
    complete = [text for text in texts if text.endswith("the snapshot is complete, of all ranks")]
    assert complete[0].startswith(", rank 0, t=10: ")
    assert any(text.endswith("the snapshot is deleted: not one of the 4 to keep") for text in texts)
    assert texts[-1].startswith(", rank 0, t=60: closed; updates: 60, snapshots: 6, ")

    (first, second) = ranks.run(2, heard, tmp_path / "run", 10, logging.DEBUG, True)
    assert "going on from t=60 of attempt 0" in first[0][1]
    assert ("DEBUG", f"{tmp_path / 'run'}, rank 1, t=70: its part is stored") in second


# Progress of commands.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


COMMANDS = {
    "ls": (["ls", "RUN"], "phema: reading the table of contents of"),
    "verify": (["verify", "RUN"], "reading: "),
    "gc": (["gc", "RUN", "--keep", "2", "--dry-run"], "phema: looking through "),
    "pin": (["pin", "RUN", "--t", "10"], "phema: reading the table of contents of"),
    "plan": (["plan", *EXAMPLE], "phema: planning "),
    "synthesize": (["synthesize", "RUN", "--sigma-rel", "0.2", "--out", "OUT"], "reading: "),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_long_command_shows_on_a_terminal_what_it_does_and_wipes_it_away(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, doing = COMMANDS[command]
    words = [{"RUN": str(run), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
    monkeypatch.setattr(planning, "alternatives", lambda chosen: {})  # they take time
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert main(words) == 0
    shown = terminal.getvalue().split("\r")
    assert shown[1].startswith(doing)
    assert not shown[-1].strip()
    assert not shown[-2].strip()
    said = capsys.readouterr()
    assert said.err == ""
    assert doing not in said.out
    assert main([*words, *["--force"] * (command == "synthesize")]) == 0
    again = capsys.readouterr()
    assert doing not in again.err  # no terminal
    assert again.out == said.out


@pytest.mark.parametrize("command", ["ls", "verify", "plan"])
def test_json_comes_without_progress(command: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "alternatives", lambda chosen: {})  # they take time
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([command, *(EXAMPLE if command == "plan" else [str(run)]), "--json"]) == 0
    assert "\r" not in terminal.getvalue()


# How commands begin and end.


def test_the_overview_names_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    overview = text.partition("before training\n")[2].partition("\n\n")[0].splitlines()
    named = [line.split()[0] for line in overview if line.startswith("  ")]
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    choices = capsys.readouterr().err.partition("choose from ")[2].strip(" )\n").replace("'", "").split(", ")
    assert sorted(named) == sorted(choices)
    assert named.index("plan") < named.index("ls") < named.index("synthesize")
    assert all(len(line) <= 80 for line in text.splitlines())


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "plan", interrupted)
    assert main(["plan", *EXAMPLE]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "phema_dist", "convert", "--sigma-rel", "0.1"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("given", [None, "3"])
def test_numpy_is_loaded_with_one_thread_which_is_not_left_to_what_a_sweep_starts(given: str | None) -> None:
    script = (
        "import builtins, os, sys\n"
        "seen, load = [], builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    if name == 'numpy' and name not in sys.modules: seen.append(os.environ['OPENBLAS_NUM_THREADS'])\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = watched\n"
        "from phema_dist.cli import main\n"
        "main(['convert', '--sigma-rel', '0.1', '--json'])\n"
        "print(*seen[:1], os.environ.get('OPENBLAS_NUM_THREADS'), file=sys.stderr)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    env |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.split() == [given or "1", str(given)]


def test_errors_speak_of_flags_and_leave_paths_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EXAMPLE, "--seconds-per-step", "-1"]) == 2
    assert "phema: --seconds-per-step must be above 0" in capsys.readouterr().err
    assert main(["plan", *EXAMPLE, "--checkpoint-every", "41"]) == 2
    assert "Make it longer, or --update-every and --checkpoint-every smaller." in capsys.readouterr().err
    assert main(["ls", "s3://"]) == 2
    assert "RUN must name a bucket" in capsys.readouterr().err
    path = str(tmp_path / "checkpoint_dir")
    assert main(["ls", path]) == 1
    assert path in capsys.readouterr().err
