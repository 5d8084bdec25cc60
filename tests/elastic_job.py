"""A training job as people run it with torchrun: it saves what it needs, is killed now and then, and goes on.

    torchrun --nproc-per-node 2 --max-restarts 2 tests/elastic_job.py RUN TRAINING STEPS WRAPPER CRASH_AT...

The script is the same every time. It dies at step CRASH_AT[i] of its i-th life, in the middle of a step, on one rank.
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import SIGMA_RELS, set_values, wrapped

from phema_dist import PostHocEMA

if __name__ == "__main__":
    run, training, last, wrapper, *crash_at = sys.argv[1:]
    dist.init_process_group("gloo")
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dies_at = int(crash_at[life]) if life < len(crash_at) else -1
    model = wrapped(wrapper)
    ema = PostHocEMA.from_model(model, run, sigma_rels=SIGMA_RELS, update_every=2, checkpoint_every=10, resume=True)
    saved = sorted(Path(training).glob("*/.metadata"))
    if saved:
        dcp.load({"ema": ema.training_state}, checkpoint_id=saved[-1].parent)
    # One write with its end, or lines of two ranks may run together; the test reads it.
    print(f"life {life} of {dist.get_world_size()} ranks goes on at {ema.t}\n", end="", flush=True)  # noqa: T201
    for step in range(ema.t + 1, int(last) + 1):
        set_values(model, step)  # what a step of an optimizer would bring
        if step == dies_at and dist.get_rank() == 1:
            os._exit(17)
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]  these steps take no time
        if step % 7 == 0:
            dcp.save({"ema": ema.training_state}, checkpoint_id=f"{training}/{step:06d}")
    ema.close()
    dist.barrier()
    dist.destroy_process_group()
