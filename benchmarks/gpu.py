"""What training on a GPU pays: a transformer of 1.1 B float32 parameters, computing in bfloat16, with fused AdamW.

    python benchmarks/gpu.py                  one GPU of 80 GB and 80 GB of host memory; about 5 minutes
    python benchmarks/gpu.py --threads 1      the averages have one core, as torchrun gives each of several ranks
    python benchmarks/gpu.py --quick          a small model, on the CPU if there is no GPU, to see that it runs

phema_dist runs under FSDP2, on a world of one over NCCL. The others cannot, and get the same model without a wrapper.
Two averages each. Turns of ten steps with and without take turns; in each turn there is one update, after step 5, so
"every 10 steps", or ten. The limits: a raw copy of the parameters into pinned memory, and for the averages a copy on
the host that moves as many bytes.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import ema_pytorch
import posthoc_ema
import timing
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from phema_dist.ema import PostHocEMA

SIGMA_RELS = (0.05, 0.28)
NEVER = 10**9
STEPS = 10  # of a turn
ON_GPU = torch.cuda.is_available()
WHERE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, tokens, width) to the same."""
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, tokens, 3, -1, min(128, width)).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(read.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """A language model: 12 depth width^2 + 2 vocabulary width parameters."""

    def __init__(self, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next tokens."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Size:
    """Of the model and of the benchmark."""

    width: int
    depth: int
    vocabulary: int
    batch: tuple[int, int]
    num_rounds: int


class Training:
    """A model and its steps."""

    def __init__(self, size: Size, *, sharded: bool) -> None:
        torch.manual_seed(0)
        with WHERE:
            self.model: nn.Module = Transformer(size.width, size.depth, size.vocabulary)
        self.num_bytes = sum(4 * p.numel() for p in self.model.parameters())
        if sharded:
            mesh = init_device_mesh(WHERE.type, (1,))
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for unit in (*self.model.blocks, self.model):  # type: ignore[misc]
                fully_shard(unit, mesh=mesh, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.tokens = torch.randint(size.vocabulary, size.batch, device=WHERE)
        self._autocast = not sharded

    def step(self) -> None:
        """Forward, backward, step."""
        with torch.autocast(WHERE.type, torch.bfloat16, enabled=self._autocast):
            logits = self.model(self.tokens)
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Contestant:
    """What is done around the steps: `update` after step 5 of a turn, or after each."""

    update: Callable[[], object] | None = None
    each: bool = False
    begin: Callable[[], object] = int
    end: Callable[[], object] = int  # not timed: what is left goes on beside nobody's steps


def synchronize() -> None:
    """Wait for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def turns(training: Training, contestants: dict[str, Contestant], num_rounds: int) -> tuple[timing.Times, timing.Times]:
    """Seconds of a step in each round, and seconds inside each `update`."""
    times: timing.Times = {name: [] for name in contestants}
    blocked: timing.Times = {name: [] for name in contestants}
    for r in range(num_rounds + 1):
        for name, contestant in contestants.items():
            contestant.begin()
            synchronize()
            begin = time.perf_counter()
            for i in range(STEPS):
                training.step()
                if contestant.update is not None and (contestant.each or i == STEPS // 2 - 1):
                    before = time.perf_counter()
                    contestant.update()
                    if r:
                        blocked[name].append(time.perf_counter() - before)
            synchronize()
            if r:
                times[name].append((time.perf_counter() - begin) / STEPS)
            contestant.end()
    return times, blocked


def report(title: str, times: timing.Times, blocked: timing.Times) -> None:
    """Print both tables."""
    timing.table(f"{title}, a step", times, ["without"])
    rows = [
        [name, f"{1e3 * median(found):.3g} ms", f"{1e3 * max(found):.3g} ms"]
        for name, found in blocked.items()
        if found
    ]
    print()
    timing.print_rows(["training thread inside an update", "median", "longest"], rows)


def available_bytes() -> int:
    """Memory of the host that is free or could be."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


@contextmanager
def memory(name: str) -> Iterator[None]:
    """Print what making something took, on the device and on the host."""
    gc.collect()
    synchronize()
    device = torch.cuda.memory_allocated() if ON_GPU else 0
    host, begin = available_bytes(), time.perf_counter()
    yield
    synchronize()
    seconds = time.perf_counter() - begin
    device = (torch.cuda.memory_allocated() if ON_GPU else 0) - device
    host -= available_bytes()
    print(f"{name}: {device / 1e9:.2f} GB of the GPU, {host / 1e9:.1f} GB of the host, {seconds:.1f} s")


def limits(num_bytes: int, num_rounds: int) -> None:
    """Copies of as many bytes as the parameters have, and as two averages move."""
    source = torch.empty(num_bytes // 4, device=WHERE).normal_()
    pinned = torch.empty(num_bytes // 4, pin_memory=ON_GPU)
    pageable = torch.empty(num_bytes // 4)

    def copy(target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        synchronize()

    times = timing.in_turns(
        {"to pinned memory": lambda: copy(pinned), "to pageable memory": lambda: copy(pageable)}, num_rounds
    )
    timing.table(f"raw copies of {num_bytes / 1e9:.2f} GB to the host", times, ["to pinned memory"])


def averaging(ema: PostHocEMA, num_rounds: int) -> None:
    """The averages thread's work alone, beside a copy of as many bytes."""
    session = ema._session  # noqa: SLF001
    assert session is not None
    tracker = session.tracker
    staged = [f for s, f in zip(session.segments, session.writer._staging.slots[0], strict=True) if s.averaged]  # noqa: SLF001
    num_bytes = sum(f.nbytes + 2 * len(SIGMA_RELS) * a.nbytes for f, a in zip(staged, tracker.averages[0], strict=True))
    source, target = torch.zeros(num_bytes // 8), torch.zeros(num_bytes // 8)
    limit = "copy of the same bytes"
    times = timing.in_turns(
        {limit: lambda: target.copy_(source), "two averages": lambda: tracker.update(staged, tracker.t + 1)}, num_rounds
    )
    timing.table(f"averaging alone, {num_bytes / 1e9:.1f} GB moved, {torch.get_num_threads()} core(s)", times, [limit])


def ours(size: Size, folder: Path) -> None:
    """Steps under FSDP2 with and without phema_dist, a snapshot, an average in the live model."""
    training = Training(size, sharded=True)
    for _ in range(3):
        training.step()
    print(f"\n{training.num_bytes / 4e9:.2f} B parameters, {training.num_bytes / 1e9:.2f} GB")
    with memory("phema_dist, made"):
        ema = PostHocEMA.from_model(
            training.model, folder / "run", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER
        )
    session = ema._session  # noqa: SLF001
    assert session is not None
    settings = session._settings  # noqa: SLF001

    def attach() -> None:
        session._settings = replace(settings, update_every=STEPS)  # noqa: SLF001
        session._calls = STEPS // 2  # noqa: SLF001  so that its update is in the middle of the turn
        ema.attach(training.optimizer)

    def detach() -> None:
        assert ema._attachment is not None  # noqa: SLF001
        ema._attachment.remove()  # noqa: SLF001
        ema._attachment = None  # noqa: SLF001
        session._settings = settings  # noqa: SLF001
        session.writer.settle()

    def update() -> None:
        ema.update_(training.model)

    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    contestants = {
        "without": Contestant(),
        "attach, an update every 10": Contestant(begin=attach, end=detach),
        "update_, every 10": Contestant(update, end=session.writer.settle),
        "update_, every step": Contestant(update, each=True, end=session.writer.settle),
    }
    times, blocked = turns(training, contestants, size.num_rounds)
    report("FSDP2, phema_dist", times, blocked)
    print(f"\nstatus: {ema.status()}")
    if ON_GPU:
        print(f"peak of the GPU: {peak / 1e9:.3f} GB without, {torch.cuda.max_memory_allocated() / 1e9:.3f} GB with")
    snapshot(training, ema, folder, median(times["without"]))
    session.writer.abandon(60.0)
    averaging(ema, size.num_rounds)


def snapshot(training: Training, ema: PostHocEMA, folder: Path, step_seconds: float) -> None:
    """Steps while a snapshot is written, how long that takes, and an average in the live model."""
    session = ema._session  # noqa: SLF001
    assert session is not None
    settings = session._settings  # noqa: SLF001
    session._settings = replace(settings, checkpoint_every=1)  # noqa: SLF001
    begin = time.perf_counter()
    ema.update_(training.model)
    session._settings = settings  # noqa: SLF001
    num_steps = 0
    while ema.status()["snapshots_written"] == 0 and time.perf_counter() - begin < 60:
        training.step()
        synchronize()
        num_steps += 1
    seconds = time.perf_counter() - begin
    with (folder / "raw").open("wb", buffering=0) as file:
        block = memoryview(bytearray(1 << 26))
        begin = time.perf_counter()
        for _ in range(2 * training.num_bytes >> 26):
            file.write(block)
        raw = time.perf_counter() - begin
    print(
        f"\na snapshot of {2 * training.num_bytes / 1e9:.1f} GB was stored in {seconds:.1f} s (a raw write without "
        f"fsync: {raw:.1f} s, ratio {seconds / max(raw, 1e-3):.2f}), beside {num_steps} steps that took "
        f"{seconds / num_steps / step_seconds:.2f} of what they take without"
    )
    (folder / "raw").unlink()
    for name, t in (("live", None), ("from storage", ema.t)):
        evaluate(training, ema, name, t)


def evaluate(training: Training, ema: PostHocEMA, name: str, t: int | None) -> None:
    """Enter and leave `ema.model`."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    begin = time.perf_counter()
    with ema.model(training.model, SIGMA_RELS[0], step=t):
        synchronize()
        middle = time.perf_counter()
    synchronize()
    end = time.perf_counter()
    more = (torch.cuda.max_memory_allocated() - before) / 1e6 if ON_GPU else 0.0
    print(
        f"ema.model, {name}: {middle - begin:.2f} s to enter, {end - middle:.2f} s to leave, {more:.1f} MB of the GPU"
    )


def others(size: Size, folder: Path) -> None:
    """Steps of the same model without a wrapper, with what a user would pick instead."""
    training = Training(size, sharded=False)
    for _ in range(3):
        training.step()

    def averaged_model() -> Callable[[], object]:
        made = [AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.999)) for _ in SIGMA_RELS]
        return lambda: [each.update_parameters(training.model) for each in made]

    def pytorch() -> Callable[[], object]:
        return ema_pytorch.PostHocEMA(
            training.model, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every_num_steps="manual",
            checkpoint_folder=str(folder / "ema_pytorch"),
        ).update  # fmt: skip

    def before() -> Callable[[], object]:
        made = posthoc_ema.PostHocEMA.from_model(
            training.model, folder / "posthoc_ema", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER,
            update_after_step=0,
        )  # fmt: skip
        return lambda: made.update_(training.model)

    for name, make in {"AveragedModel": averaged_model, "ema_pytorch": pytorch, "posthoc_ema": before}.items():
        print()
        with memory(f"{name}, made"):
            update = make()
        contestants = {
            "without": Contestant(),
            f"{name}, every 10": Contestant(update),
            f"{name}, every step": Contestant(update, each=True),
        }
        if name == "posthoc_ema":
            del contestants[f"{name}, every step"]  # minutes
        report(f"no wrapper, {name}", *turns(training, contestants, max(1, size.num_rounds // 2)))
        del update, contestants
        gc.collect()


def main() -> None:
    """Measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--threads", type=int, help="cores of an operation on the host (default: all)")
    parser.add_argument("--ours", action="store_true", help="only phema_dist")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = Size(64, 2, 128, (2, 32), 1) if arguments.quick else Size(2048, 20, 32768, (8, 2048), 5)
    store = dist.HashStore()
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1)
    with timing.shared_folder(distributed=False) as (folder, _):
        print(f"{torch.cuda.get_device_name() if ON_GPU else 'no GPU'}; {timing.machine()}")
        ours(size, folder)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
        limits(4 * (12 * size.depth * size.width**2 + 2 * size.vocabulary * size.width), size.num_rounds)
        if not arguments.ours:
            others(size, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
