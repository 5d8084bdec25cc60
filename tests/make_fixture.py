"""Make a tiny run for tests/fixtures, by whatever version of the library is imported: 2 ranks, 2 attempts, a pin.

    python tests/make_fixture.py tests/fixtures/format-1                       # with this version
    git archive COMMIT | tar x -C /tmp/old                                     # with an older one
    PYTHONPATH=/tmp/old python tests/make_fixture.py tests/fixtures/format-1-old

A folder that is there already is never touched: what it holds is what its version wrote, and must load for ever. Make
one for each version of the format, and for each way of writing it that a later version could misread.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phema_dist import PostHocEMA

STEPS, EVERY = (4, 6), 2  # the last step of each attempt; from one snapshot to the next
TRACKED, OTHERS = (0.05, 0.28), (0.10, 0.20)


class Model(nn.Module):
    """Something of everything: tied, bfloat16, a scalar, empty, and buffers that are not averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
        self.head.weight = self.body.weight
        self.scale = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.gain = nn.Parameter(torch.ones(()))
        self.none = nn.Parameter(torch.ones(0, 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(3, dtype=torch.bfloat16))

    def set_to(self, step: int) -> None:
        """Be as it is after a step: values that are exact in bfloat16 too."""
        with torch.no_grad():
            for number, values in enumerate((*self.parameters(), *self.buffers())):
                ramp = torch.arange(values.numel()).view(values.shape) + number
                values.copy_((ramp % 7) * step if values.dtype == torch.int64 else (ramp % 7 - 3) * step / 4)


def work(rank: int, folder: str) -> None:
    """On each rank: two starts of a job."""
    for attempt, last in enumerate(STEPS):
        store = dist.FileStore(f"{folder}/store-{attempt}", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        model = Model()
        ema = PostHocEMA.from_model(
            DistributedDataParallel(model), f"{folder}/run", 20, TRACKED, 1, EVERY, resume=bool(attempt)
        )
        for step in range(ema.t + 1, last + 1):
            model.set_to(step)
            ema.update_()
        ema.close()
        dist.barrier()
        dist.destroy_process_group()


def make(folder: Path) -> None:
    """Make the run, and write down what this version reads from it."""
    folder.mkdir(parents=True)
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    for path in folder.glob("store-*"):
        path.unlink()
    pin = folder / f"run/pins/{STEPS[0]}"
    pin.parent.mkdir()
    pin.touch()
    expected = {}
    for sigma_rel in (*TRACKED, *OTHERS):
        with PostHocEMA.from_path(folder / "run").state_dict(sigma_rel) as state:
            expected[str(sigma_rel)] = {name: values.tolist() for name, values in state.items()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
