"""The launch scripts, run for real: two ranks here stand for a machine, and for two nodes of a cluster."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from s3_server import S3Server
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phema_dist import synthesize
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

ROOT = Path(__file__).parents[1]
LAUNCH, SLURM = ROOT / "launch", Path(__file__).with_name("slurm")
SCRIPTS = ("local.sh", "slurm.sbatch", "consolidate.sh")
STEPS = 40
WORDS = (
    *("--steps", str(STEPS), "--log-every", "1", "--save-every", "1000", "--warmup", "5", "--batch-size", "2"),
    *("--length", "16", "--width", "16", "--blocks", "1"),
)


def environment(**changes: object) -> dict[str, str]:
    """As of this process, with our programs found first, and without what a Slurm job around us would say."""
    path = os.pathsep.join([str(SLURM), str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    ours = {"PATH": path, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "NPROC": "2"}
    return inherited | ours | {name: str(value) for name, value in changes.items()}


@contextmanager
def started(*command: object, **changes: object) -> Iterator["subprocess.Popen[str]"]:
    """A process with its own process group, as a terminal gives it; nothing of the group is left at the end."""
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=environment(**changes), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_take_ctrl_c,  # noqa: PLW1509  no threads here
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _take_ctrl_c() -> None:
    """A shell cannot trap what it began with ignoring, as in the background of another one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*command: object, **changes: object) -> str:
    """What a command printed that ended well."""
    with started(*command, **changes) as process:
        printed, _ = process.communicate(timeout=160)
    assert process.returncode == 0, printed[-4000:]
    return printed


def read_until(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if words in line:
            return
    raise AssertionError("".join(read)[-4000:])


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a training checkpoint: of the model, the optimizer and the averages."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.full(tuple(info.size), torch.nan, dtype=info.properties.dtype)
        for name, info in metadata.items()
        if isinstance(info, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that local.sh ran from its beginning to its end, and of its average."""
    folder = tmp_path_factory.mktemp("local")
    wanted = {"SIGMA_RELS": "0.1 0.15", "OUT": folder / "averages"}
    run(LAUNCH / "local.sh", *WORDS, RUN=folder / "run", CHECKPOINTS=folder / "training", **wanted)
    return folder


@pytest.mark.timeout(400)  # up to 12 processes import torch, perhaps on a busy machine
def test_local_trains_and_makes_the_averages(uninterrupted: Path) -> None:
    for average in synthesize(uninterrupted / "run", [0.1, 0.15]):
        made = load_file(uninterrupted / "averages" / average.target.name / "model.safetensors")
        assert_same(made, average.state_dict)
    assert [path.name for path in (uninterrupted / "training").iterdir()] == [f"{STEPS:08d}"]


@pytest.mark.timeout(400)  # up to 12 processes import torch, perhaps on a busy machine
def test_a_slurm_job_that_is_signalled_requeued_and_resumed_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    script = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # Slurm runs a copy elsewhere
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {
        "RUN": tmp_path / "run", "CHECKPOINTS": tmp_path / "training", "NPROC": 1, "PORT": port,
        "SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_NOTES": notes,
    }  # fmt: skip
    with started(script, *WORDS, **where) as job:
        read_until(job, "step 3: loss")
        job.send_signal(signal.SIGUSR1)
        printed, _ = job.communicate(timeout=100)
    assert job.returncode == 0, printed[-4000:]
    assert notes.read_text() == "scontrol requeue 4711\n"
    (saved,) = (tmp_path / "training").glob("*/.metadata")
    stopped_at = int(saved.parent.name)
    assert 3 <= stopped_at < STEPS
    assert f"stopped and saved at step {stopped_at}" in printed

    printed = run(script, *WORDS, **where, SLURM_RESTART_COUNT=1)
    assert f"on 2 ranks, from step {stopped_at}" in printed
    assert notes.read_text().splitlines()[1:] == ["sbatch --dependency=afterok:4711 launch/consolidate.sh"]
    ended = read_checkpoint(tmp_path / f"training/{STEPS:08d}")
    assert sum(name.startswith("ema.averages.") for name in ended) > 2 * 10
    assert_same(ended, read_checkpoint(uninterrupted / f"training/{STEPS:08d}"))

    tracked = open_run(open_store(tmp_path / "run")).info.sigma_rels  # whose averages at the end are stored as they are
    made, wanted = (synthesize(folder / "run", tracked) for folder in (tmp_path, uninterrupted))
    for one, other in zip(made, wanted, strict=True):
        assert_same(one.state_dict, other.state_dict)


PATIENT = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--checkpoints") + 1])
signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), (folder / f"saved-{os.environ['RANK']}").touch(), exit()))
(folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
print("ready " * (len(list(folder.glob("pid-*"))) == 2), flush=True)
time.sleep(60)
"""


@pytest.fixture
def patient(tmp_path: Path) -> dict[str, object]:
    """A training script that takes half a second to save when it is signalled, and needs no torch."""
    (tmp_path / "patient.py").write_text(PATIENT)
    return {"SCRIPT": tmp_path / "patient.py", "RUN": tmp_path / "run", "CHECKPOINTS": tmp_path}


def test_ctrl_c_and_a_second_one_let_a_local_training_save(patient: dict[str, object], tmp_path: Path) -> None:
    with started(LAUNCH / "local.sh", **patient) as job:
        read_until(job, "ready")
        for _ in range(2):
            os.killpg(job.pid, signal.SIGINT)
            time.sleep(0.2)
        printed, _ = job.communicate(timeout=120)
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}, printed
    assert job.returncode == 130
    assert "the same command goes on" in printed


def test_a_script_gets_any_options_and_a_linked_local_sh_finds_what_makes_the_averages(tmp_path: Path) -> None:
    (tmp_path / "link.sh").symlink_to(shutil.copytree(LAUNCH, tmp_path / "launch") / "local.sh")
    (tmp_path / "launch/consolidate.sh").write_text("#!/bin/sh\necho averages\n")
    (tmp_path / "words.py").write_text("import sys; print(sys.argv[1:], flush=True)")
    where = {"SCRIPT": tmp_path / "words.py", "RUN": "run", "CHECKPOINTS": "training", "NPROC": 1}
    printed = run(tmp_path / "link.sh", "--run", "x", "--ev", "1", "--", "y", **where).splitlines()
    words = ["--averages", "run", "--checkpoints", "training", "--run", "x", "--ev", "1", "--", "y"]
    assert printed[-2:] == [str(words), "averages"]


@pytest.mark.parametrize("cpus", [{}, {"SLURM_CPUS_PER_TASK": 7}])
def test_a_step_has_the_cores_of_its_job_and_an_array_is_refused(cpus: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    where = {"RUN": "run", "CHECKPOINTS": "x", "SLURM_JOB_ID": 1, "SLURM_JOB_NODELIST": "a,b", **cpus}
    where |= {"SLURM_NOTES": tmp_path / "notes", "PATH": f"{tmp_path}{os.pathsep}{environment()['PATH']}"}
    said = "--cpus-per-task=7 " if cpus else ""
    assert run(LAUNCH / "slurm.sbatch", **where).startswith(f"--kill-on-bad-exit=1 {said}torchrun --nnodes 2 ")
    with started(LAUNCH / "slurm.sbatch", **where, SLURM_ARRAY_JOB_ID=1) as process:
        assert "an array would share one RUN" in process.communicate(timeout=10)[0]
    assert process.returncode == 2


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of Linux")
def test_kill_9_leaves_nothing_running(patient: dict[str, object], tmp_path: Path) -> None:
    with started(LAUNCH / "local.sh", **patient) as job:
        read_until(job, "ready")
        os.kill(job.pid, signal.SIGKILL)
        pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
        end = time.monotonic() + 20
        while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
    assert len(pids) == 2
    assert left == []


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # dead, and waited for by nobody yet
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_needs_and_does_not_get_is_an_error_that_names_it(script: str) -> None:
    needed = {
        "local.sh": ["RUN", "CHECKPOINTS"],
        "slurm.sbatch": ["RUN", "CHECKPOINTS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"],
        "consolidate.sh": ["RUN", "OUT"],
    }[script]
    given: dict[str, object] = {}
    for name in needed:
        with started(LAUNCH / script, **given) as process:
            printed, _ = process.communicate(timeout=10)
        assert process.returncode == 1
        assert re.search(rf"{script}: line \d+: {name}: (must|is missing)", printed), printed
        given[name] = "1"


def test_shellcheck_has_nothing_to_say() -> None:
    (inside,) = (container["args"][0] for container in containers() if "args" in container)
    scripts = [LAUNCH / name for name in SCRIPTS]
    program = Path(sys.executable).with_name("shellcheck")
    for words in ("#!/bin/bash\n" + inside, *(path.read_text() for path in (*scripts, *SLURM.iterdir()))):
        done = subprocess.run([program, "-"], input=words, text=True, capture_output=True, check=False)
        assert done.stdout + done.stderr == ""
    for script in scripts:
        assert "set -euo pipefail\n" in script.read_text()
        assert os.access(script, os.X_OK)


def containers() -> list[dict[str, Any]]:
    """The containers of kubernetes.yaml: the one that trains, and the one that synthesizes."""
    (jobs,) = (document["spec"]["replicatedJobs"] for document in documents())
    return [job["template"]["spec"]["template"]["spec"]["containers"][0] for job in jobs]


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_the_jobset_trains_on_all_nodes_and_then_synthesizes() -> None:
    (jobset,) = documents()
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    train, synthesis = jobset["spec"]["replicatedJobs"]
    assert synthesis["dependsOn"] == [{"name": "train", "status": "Complete"}]
    nodes, pod = train["template"]["spec"], train["template"]["spec"]["template"]["spec"]
    assert nodes["parallelism"] == nodes["completions"] == 2
    assert nodes["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # or the controller refuses the podFailurePolicy
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    trainer, synthesizer = containers()
    for container in (trainer, synthesizer):
        assert container["envFrom"] == [{"secretRef": {"name": "phema-s3"}}]
        assert not [each for each in container["env"] if "KEY" in each["name"] or "SECRET" in each["name"]]
        claims = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= claims
    grace = next(each["value"] for each in trainer["env"] if each["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert int(grace) < pod["terminationGracePeriodSeconds"]
    assert "nvidia.com/gpu" not in json.dumps(synthesizer["resources"])
    (command,) = trainer["args"]
    name = f"{jobset['metadata']['name']}-{train['name']}"
    assert f"--nnodes {nodes['completions']} " in command
    assert f"--master-addr {name}-0-0.{jobset['metadata']['name']} " in command
    assert os.access(ROOT / synthesizer["command"][0], os.X_OK)
    used = {name for name in re.findall(r"\$(\w+)", command) if name != "JOB_COMPLETION_INDEX"}
    assert used <= {each["name"] for each in trainer["env"]}


def test_torchrun_understands_what_the_jobset_says() -> None:
    from torch.distributed.run import parse_args  # noqa: PLC0415  one test needs it

    words = containers()[0]["args"][0].replace('"$JOB_COMPLETION_INDEX"', "1").split()
    assert words[:2] == ["exec", "torchrun"]
    said = parse_args(words[2:])
    assert (said.node_rank, said.nnodes, said.training_script) == (1, "2", "examples/train_llm.py")
    assert said.training_script_args[0] == "--averages"


@pytest.mark.s3
def test_a_server_takes_the_lifecycle_rule(s3_server: S3Server) -> None:
    from botocore.session import get_session  # noqa: PLC0415  of s3fs

    rules = json.loads((LAUNCH / "s3-lifecycle.json").read_text())
    options = s3_server.options()
    client = get_session().create_client(
        "s3", endpoint_url=options["endpoint_url"], aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"], region_name=options["client_kwargs"]["region_name"],
    )  # fmt: skip
    client.create_bucket(Bucket="lifecycle")
    client.put_bucket_lifecycle_configuration(Bucket="lifecycle", LifecycleConfiguration=rules)  # checks the schema
    (found,) = client.get_bucket_lifecycle_configuration(Bucket="lifecycle")["Rules"]
    assert found["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    client.close()
