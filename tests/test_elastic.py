"""torchrun kills and restarts a job, and its number of ranks changes: the averages do not notice."""

import os
import subprocess
import sys
from pathlib import Path

import ranks
from test_distributed import SIGMA_RELS, Net, assert_same, set_values

from phema_dist import PostHocEMA, synthesize
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

JOB = Path(__file__).with_name("elastic_job.py")


def torchrun(num_ranks: int, *arguments: object) -> str:
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"),
        *("--nproc-per-node", str(num_ranks), "--monitor-interval", "0.1", str(JOB), *map(str, arguments)),
    ]
    # torchrun keeps one store for all lives of a job, and gloo would find the addresses of the dead one in it.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_torchrun_restarts_and_resizes_a_job_and_every_average_is_exact(tmp_path: Path) -> None:
    run, training, alone = tmp_path / "run", tmp_path / "training", tmp_path / "alone"
    said = torchrun(2, run, training, 33, "ddp", 12)
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("life")] == ["0", "0", "7", "7"]
    said = ranks.launch(
        4, str(JOB), str(run), str(training), "51", "fsdp", folder=tmp_path, TORCHELASTIC_RESTART_COUNT="0"
    )
    assert said.count("of 4 ranks goes on at 28") == 4

    model = Net()
    with PostHocEMA.from_model(model, alone, sigma_rels=SIGMA_RELS, update_every=2, checkpoint_every=10) as ema:
        for step in range(1, 52):
            set_values(model, step)
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    stored = open_run(open_store(run))
    assert [s.t for s in stored.complete] == [10, 20, 30, 40, 50]
    assert {len(s.manifests) for s in stored.complete} == {2, 4}
    for sigma_rel in (0.05, 0.1, 0.2, 0.28):
        (one,), (other,) = synthesize(run, [sigma_rel]), synthesize(alone, [sigma_rel])
        assert_same(one.state_dict, other.state_dict)
