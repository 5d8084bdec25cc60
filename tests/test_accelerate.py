"""The Accelerate recipe: examples/train_accelerate.py, started as users start it, and sharded on ranks of ours."""

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from ranks import launch, run
from test_examples import EXAMPLES
from test_transformers import assert_same, launched

from phema_dist import synthesize
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

SCRIPT = EXAMPLES / "train_accelerate.py"


def job(folder: Path, *arguments: str) -> str:
    """Run the example on this rank; what it printed."""
    words = [str(SCRIPT), "--state-dir", str(folder / "state"), *arguments]
    printed = StringIO()
    path = [str(EXAMPLES), *sys.path]
    with launched("fsdp2"), mock.patch.object(sys, "argv", words), mock.patch.object(sys, "path", path):
        with mock.patch.object(dist, "destroy_process_group"), redirect_stdout(printed):  # ranks.py will
            runpy.run_path(str(SCRIPT), run_name="__main__")
        dist.barrier()
    return printed.getvalue()


def test_sharded_by_accelerate_and_resumed_the_averages_are_the_same_bits(tmp_path: Path) -> None:
    words = ("--steps", "70", "--save-every", "35", "--checkpoint-dir", str(tmp_path / "run"))
    printed, _ = run(2, job, tmp_path, *words, timeout=150)
    assert re.search(r"^FSDP\w+: held-out loss 0\.\d+ with the average", printed, re.MULTILINE)
    before = synthesize(tmp_path / "run", [0.05, 0.28])

    again, _ = run(2, job, tmp_path, *words, "--resume-from", "35", timeout=150)
    assert again == printed
    after = synthesize(tmp_path / "run", [0.05, 0.28])
    later = {snapshot.t: snapshot.attempt for snapshot in open_run(open_store(tmp_path / "run")).complete}
    assert later[70] == 2  # what was loaded is a new attempt; the last snapshot is that of `close`
    for mine, theirs in zip(after, before, strict=True):
        assert_same(mine.state_dict, theirs.state_dict)


def test_it_starts_as_users_start_it(tmp_path: Path) -> None:
    """As torchrun does; on a CPU that is DDP."""
    words = ("--steps", "40", "--save-every", "20", "--checkpoint-dir", "run")
    printed = launch(2, str(SCRIPT), *words, folder=tmp_path)
    assert printed.count("DistributedDataParallel: held-out loss") == printed.count("held-out loss") == 1
    assert (tmp_path / "state/40/ema/.metadata").exists()


def test_the_averages_are_few_lines_of_it() -> None:
    lines = SCRIPT.read_text().splitlines()
    ours = [
        line for line in lines if re.search(r"\bema\b|PostHocEMA|\bdcp\b|args.checkpoint_dir, checkpoint_every", line)
    ]
    assert len(ours) <= 10
