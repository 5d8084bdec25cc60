"""Several real processes: what they average together is what one process would have averaged, to the last bit.

Values are set, not trained: each rank copies its part of a tensor that every rank can make from a seed. torch's own
`distribute_tensor` says which part that is, so nothing here trusts phema_dist's idea of a shard.
"""

import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from phema_dist import PostHocEMA, synthesize
from phema_dist.ranks import join
from phema_dist.storage.run import open_run
from phema_dist.storage.store import LocalStore, open_store

SIGMA_RELS = (0.05, 0.28)
State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Everything that can go wrong: rows that do not divide, 4-D, buffers, ties, frozen and 16-bit parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 5)
        self.first = nn.Linear(5, 7)  # on 4 ranks: 2, 2, 2 and 1 rows
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 1)  # one rank holds all of it, the others nothing
        self.conv = nn.Conv2d(3, 6, 3)
        self.low = nn.Linear(6, 3, dtype=torch.bfloat16)
        self.tied = nn.Linear(5, 9, bias=False)
        self.tied.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(image).mean((2, 3))
        seen = self.low(pooled.bfloat16()).float()
        seen = seen @ self.frozen if hasattr(self, "frozen") else seen[:, :2]  # see test_matrix.NO_FLAT
        read = self.tied(self.embed(tokens)).sum(1, keepdim=True)
        return seen + read + self.scale * self.last(self.norm(self.first(self.embed(tokens))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 3, 5, 5, generator=generator), torch.randint(9, (4,), generator=generator)


def wrapped(kind: str, net: Callable[[], nn.Module] = Net) -> nn.Module:
    model = net()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "plain":
        return model
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")) if kind in {"hsdp", "tp"} else None
    if kind == "tp":
        plan = {"first": ColwiseParallel(), "last": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        mesh = mesh["dp"]
    if hasattr(model, "low"):
        fully_shard(model.low, mesh=mesh)  # one dtype per unit
        fully_shard(model.conv, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def names(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, under the bare model's name."""
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    yield from bare.named_parameters()
    yield from bare.named_buffers()


@torch.no_grad()
def put(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of a full tensor; no communication."""
    if isinstance(tensor, DTensor):
        full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(full)


def set_values(model: nn.Module, step: int) -> None:
    """The model after `step`: random numbers that move slowly, the same ones on any number of ranks."""
    for name, tensor in names(model):
        if name.endswith("frozen"):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) + step / 10
            put(tensor, values.square() if name.endswith("var") else values)
        else:
            tensor.fill_(step)


def full_state(model: nn.Module) -> State:
    """Collective for sharded models: all values as they are now, by torch's own means."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in names(model)}


def train(ema: PostHocEMA, model: nn.Module, steps: Iterable[int], t_per_step: int | None = None) -> None:
    """Let the model take its values at each step, and update."""
    for step in steps:
        set_values(model, step)
        ema.update_(model, None if t_per_step is None else t_per_step * step)
        ema._session.writer.drain()  # these steps take no time: storage could not keep up, and would skip snapshots


def assert_same(found: State, wanted: State) -> None:
    """Equal names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


# -- collectives


COLLECTIVES = [
    *("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "all_gather_single"),
    *("allreduce", "allreduce_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "barrier", "broadcast"),
    *("gather", "monitored_barrier", "recv", "recv_anysource", "reduce", "reduce_scatter", "_reduce_scatter_base"),
    *("reduce_scatter_single", "reduce_scatter_tensor_coalesced", "scatter", "send", "split_group"),
]


def collective_counts() -> dict[str, int]:
    """How many collectives each group has begun, from any thread, also from C++."""
    groups = dist.distributed_c10d._world.pg_map
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


@contextmanager
def no_collectives() -> Iterator[None]:
    """Nothing inside may communicate, on any thread: neither by gloo's count, nor through any method of a group."""
    seen: list[str] = []
    originals = {name: vars(dist.ProcessGroup)[name] for name in COLLECTIVES if name in vars(dist.ProcessGroup)}

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(f"{name} on {threading.current_thread().name}")
            return original.__get__(args[0])(*args[1:], **kwargs)

        return call

    before = collective_counts()
    for name, original in originals.items():
        setattr(dist.ProcessGroup, name, watched(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)
    assert not seen, f"collectives: {seen}"
    assert collective_counts() == before, f"collectives by gloo's count: {collective_counts()}, {before} before"


def provoke_collectives() -> None:
    def all_gather() -> None:
        dist.all_gather_object([None, None], 1)

    with pytest.raises(AssertionError, match="allgather on MainThread"), no_collectives():
        all_gather()
    thread = ThreadPoolExecutor(1, "phema-imposter")
    with pytest.raises(AssertionError, match="allgather on phema-imposter"), no_collectives():
        thread.submit(all_gather).result()
    thread.shutdown()
    tensor = torch.ones(2)
    with (
        pytest.raises(AssertionError, match="gloo's count"),
        no_collectives(),
    ):  # past Python: only gloo's count sees it
        torch.ops._c10d_functional.all_reduce(tensor, "sum", dist.group.WORLD.group_name)


def test_the_watch_over_collectives_sees_each_from_any_thread() -> None:
    run(2, provoke_collectives)


# -- the same averages


STEPS = 33


def averaged_run(kind: str, folder: str) -> None:
    """A run of 33 updates, 5 of time each, with snapshots after 10, 20, 30 and at the end."""
    model = wrapped(kind)
    ema = PostHocEMA.from_model(
        model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, update_after_step=8
    )
    with no_collectives():
        train(ema, model, range(1, STEPS + 1), t_per_step=5)
        ema.close()
    dist.barrier()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of one process."""
    folder = str(tmp_path_factory.mktemp("alone") / "run")
    model = Net()
    with PostHocEMA.from_model(
        model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, update_after_step=8
    ) as ema:
        train(ema, model, range(1, STEPS + 1), t_per_step=5)
    return folder


KINDS = [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("ddp", 4), ("hsdp", 4), ("tp", 4)]


@pytest.mark.parametrize(("kind", "world_size"), KINDS)
def test_any_sharding_gives_the_same_bits_and_never_communicates(
    kind: str, world_size: int, alone: str, tmp_path: Path
) -> None:
    run(world_size, averaged_run, kind, str(tmp_path))
    for t in (None, 100, 133, 5 * STEPS):
        wanted = synthesize(alone, [0.05, 0.1, 0.15, 0.28], t=t)
        found = synthesize(tmp_path, [0.05, 0.1, 0.15, 0.28], t=t)
        for one, other in zip(found, wanted, strict=True):
            assert one.t == other.t
            assert_same(one.state_dict, other.state_dict)


def test_the_run_has_the_names_of_the_bare_model_and_float32_parameters(alone: str) -> None:
    (found,) = synthesize(alone, [0.13])
    model = Net()
    assert found.state_dict.keys() == model.state_dict().keys()
    model.load_state_dict(found.state_dict, strict=True)
    assert {found.state_dict[name].dtype for name, _ in model.named_parameters()} == {torch.float32}
    assert found.state_dict["norm.num_batches_tracked"] == STEPS
    assert found.state_dict["scale"].shape == ()
    assert found.state_dict["tied.weight"] is found.state_dict["embed.weight"]


def test_a_stored_average_is_the_power_profile_over_the_updates_made(alone: str) -> None:
    # float64, from the paper's equation 127, by hand; time counts from update_after_step.
    exact = torch.zeros(7, 5, dtype=torch.float64)
    (found,) = synthesize(alone, [0.28])
    gamma = find_gamma(0.28)
    t_before = 0
    model = Net()
    for step in [s for s in range(1, STEPS + 1) if (s % 3 == 0 or s % 10 == 0) and 5 * s > 8]:
        set_values(model, step)
        t = 5 * step - 8
        beta = (t_before / t) ** (gamma + 1)
        exact = beta * exact + (1 - beta) * model.first.weight.detach().double()
        t_before = t
    torch.testing.assert_close(found.state_dict["first.weight"].double(), exact, rtol=1e-5, atol=1e-6)


def find_gamma(sigma_rel: float) -> float:
    low, high = 0.0, 1000.0
    for _ in range(100):
        gamma = (low + high) / 2
        wide = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > sigma_rel**2
        low, high = (gamma, high) if wide else (low, gamma)
    return low


# -- what each rank holds and writes


class Mixed(nn.Module):
    """Half of the elements in 16 bits, the rest in 32, all of it first or last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early = nn.Linear(64, 400, dtype=torch.bfloat16)
        self.table = nn.Embedding(500, 32)
        self.late = nn.Linear(64, 150)
        self.norm = nn.BatchNorm1d(40)


def ddp_sizes(folder: str) -> int:
    model = wrapped("ddp", Mixed)
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=2)
    ema.update_()
    ema.update_(model.module)  # wrapped or not: the same parameters
    ema.close()
    return sum(flat.nbytes for averages in ema._session.tracker.averages for flat in averages)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ddp_ranks_hold_and_write_equal_parts_and_each_element_once(world_size: int, tmp_path: Path) -> None:
    held = run(world_size, ddp_sizes, str(tmp_path))
    written = [sum(f.stat().st_size for f in tmp_path.rglob(f"rank-{r:05d}.safetensors")) for r in range(world_size)]
    for sizes in (held, written):
        mean, row = sum(sizes) / world_size, 2 * 4 * 64
        assert max(sizes) <= max(1.05 * mean, mean + row)
        assert min(sizes) >= min(0.95 * mean, mean - row)
    assert sum(held) == 2 * 4 * sum(p.numel() for p in Mixed().parameters())

    for folder in tmp_path.glob("snapshots/*/sigma_rel-*"):
        count = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in Mixed().state_dict().items()}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for name in file.keys():  # noqa: SIM118  not a mapping
                    shape, start = file.get_slice(name).get_shape(), offsets[name]["saved_offsets"]
                    count[name][tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] += 1
        for name, found in count.items():
            assert (found == 1).all(), name


# -- torch's own reader


def load_as_shards(folder: str) -> State:
    """On 2 ranks: what torch's reader puts into float32 DTensors of another sharding, joined again."""
    mesh = init_device_mesh("cpu", (2,))
    state = {
        name: distribute_tensor(torch.full(t.shape, -1.0), mesh, [Shard(0)], src_data_rank=None)
        for name, t in Net().named_parameters()
    }
    dcp_load(state, storage_reader=HuggingFaceStorageReader(folder))
    return {name: tensor.full_tensor() for name, tensor in state.items()}


# dcp.load says so whenever there is no process group, although no_dist=True asked for just that.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("kind", "world_size"), [("ddp", 2), ("fsdp", 4)])
def test_a_stored_profile_opens_with_torchs_own_reader_in_another_world(
    kind: str, world_size: int, tmp_path: Path
) -> None:
    run(world_size, averaged_run, kind, str(tmp_path))
    (snapshot,) = tmp_path.glob(f"snapshots/*{5 * STEPS}-a0")
    for sigma_rel in SIGMA_RELS:
        folder = str(snapshot / f"sigma_rel-{sigma_rel}")
        (wanted,) = synthesize(tmp_path, [sigma_rel])
        stored = {name: tensor for name, tensor in wanted.state_dict.items() if name != "tied.weight"}
        found = {name: torch.full_like(tensor, 99) for name, tensor in stored.items()}
        dcp_load(found, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
        assert_same(found, stored)
        for sharded in run(2, load_as_shards, folder):
            assert_same(sharded, {name: stored[name] for name in sharded})


# -- evaluation in place


class Watched:
    """A model, and what of it must never change because of an evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.flags = [module.training for module in model.modules()]
        self.bits = self.local_bits()
        self.own = self.evaluate()

    def local_bits(self) -> list[torch.Tensor]:
        local = (t._local_tensor if isinstance(t, DTensor) else t for _, t in names(self.model))
        return [t.detach().clone() for t in local]

    def forward(self) -> torch.Tensor:
        with torch.no_grad():  # after this the root of an FSDP2 model stays gathered
            return self.model(*inputs())

    def evaluate(self) -> torch.Tensor:
        self.model.eval()
        found = self.forward()
        for module, flag in zip(self.model.modules(), self.flags, strict=True):
            module.training = flag
        return found

    def assert_unchanged(self) -> None:
        assert [module.training for module in self.model.modules()] == self.flags
        assert torch.equal(self.evaluate(), self.own), "a forward must see the model's own parameters"
        full_state(self.model)  # reshards
        assert all(torch.equal(a, b) for a, b in zip(self.local_bits(), self.bits, strict=True))
        self.evaluate()


def assert_evaluates_as(watched: Watched, wanted: State) -> None:
    """The model has, here and now, the values of this state dict."""
    plain = Net()
    plain.load_state_dict(wanted, strict=True)
    found = watched.forward()
    with torch.no_grad():
        torch.testing.assert_close(found, plain.eval()(*inputs()), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, watched.own, rtol=1e-3)
    assert_same(full_state(watched.model), dict(names(plain)))


def evaluate(kind: str, folder: str) -> None:
    model, twin = wrapped(kind), wrapped(kind)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    ema = PostHocEMA.from_model(model, folder, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=4)
    train(ema, model, range(1, 10))
    set_values(twin, 9)
    next(module for name, module in model.named_modules() if name.endswith("conv")).eval()
    watched = Watched(model)

    for sigma_rel, step in ((0.05, 8), (0.13, None)):
        with ema.model(model, sigma_rel, step) as averaged:
            assert averaged is model
            assert not any(module.training for module in model.modules())
            (wanted,) = synthesize(folder, [sigma_rel], t=8)
            assert_evaluates_as(watched, wanted.state_dict)
            watched.forward()
        watched.assert_unchanged()

    def fail() -> None:
        with ema.model(model, 0.2):
            watched.forward()
            for _, tensor in names(model):
                tensor.detach().zero_()
            model.train()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    watched.assert_unchanged()

    with ema.state_dict(0.13) as state:
        Net().load_state_dict(state, strict=True)
        (wanted,) = synthesize(folder, [0.13], t=8)
        assert_same(state, wanted.state_dict)

    for each, optimizer in zip((model, twin), optimizers, strict=True):  # training goes on as if nothing had happened
        each.train()
        for _ in range(2):
            optimizer.zero_grad()
            each(*inputs()).square().mean().backward()
            optimizer.step()
    assert_same(full_state(model), full_state(twin))
    train(ema, model, range(10, 12))
    ema.close()
    dist.barrier()


@pytest.mark.parametrize(("kind", "world_size"), [("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_an_average_is_evaluated_in_place_and_leaves_no_trace(kind: str, world_size: int, tmp_path: Path) -> None:
    run(world_size, evaluate, kind, str(tmp_path))


def evaluate_without_resharding(folder: str) -> bool:
    model = wrapped("fsdp", Small)
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1)
    train(ema, model, range(1, 3))
    with torch.no_grad():
        own = model(torch.ones(3, 5))
        with pytest.MonkeyPatch.context() as patch, ema.model(model, 0.28):
            patch.setattr("phema_dist.training.swap.reshard", lambda _: None)
            averaged = model(torch.ones(3, 5))
            assert not torch.equal(own, averaged)
            patch.undo()
            patch.setattr(FSDPModule, "reshard", lambda _: None)
        stale = model(torch.ones(3, 5))
    ema.close()
    dist.barrier()
    return torch.equal(stale, averaged)


def test_without_resharding_training_would_go_on_with_the_average(tmp_path: Path) -> None:
    # If this fails, torch has mended it: the root of an FSDP2 model looks at its shards again.
    assert run(2, evaluate_without_resharding, str(tmp_path)) == [True, True]


def read_sharded(folder: str) -> None:
    """A sharded model takes an average of a run that is only read, right after a forward: it does not look sharded."""
    model = wrapped("fsdp", Small)
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1) as ema:
        train(ema, model, range(1, 3))
    dist.barrier()
    with torch.no_grad():
        model(torch.ones(3, 5))
    before = collective_counts()
    with PostHocEMA.from_path(folder).model(model, 0.1):
        assert collective_counts() != before, "ranks must agree on the snapshots, and share errors"
        values = full_state(model)
    (wanted,) = synthesize(folder, [0.1])
    assert_same(values, wanted.state_dict)


def test_a_run_that_is_only_read_fills_a_sharded_model(tmp_path: Path) -> None:
    run(2, read_sharded, str(tmp_path))


# -- going on


def part_of_a_run(kind: str, folder: str, resume: bool | int, last: int, close: bool) -> int:
    model = wrapped(kind)
    ema = PostHocEMA.from_model(
        model, folder, sigma_rels=None if resume else SIGMA_RELS, update_every=3, checkpoint_every=10, resume=resume
    )
    begun_at = ema.t
    with no_collectives():
        train(ema, model, range(begun_at + 1, last + 1))
        if close:
            ema.close()
        else:
            ema._session.writer.drain()
    dist.barrier()
    return begun_at


def test_a_run_goes_on_in_another_world_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    model = Net()
    with PostHocEMA.from_model(model, one, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10) as ema:
        train(ema, model, range(1, 41))

    assert run(2, part_of_a_run, "ddp", other, False, 25, False) == [0, 0]  # snapshots at 10 and 20, then killed
    assert run(2, part_of_a_run, "ddp", other, 10, 10, True) == [10, 10]  # from 10, and nothing more
    hidden = open_run(open_store(other))
    assert [s.t for s in hidden.complete] == [10]
    assert [s.t for s in hidden.abandoned] == [20]
    assert run(4, part_of_a_run, "fsdp", other, 10, 30, True) == [10] * 4

    model = Net()
    with PostHocEMA.from_model(model, other, update_every=3, checkpoint_every=10, resume=True) as ema:
        assert ema.t == 30
        train(ema, model, range(31, 41))
    assert [s.t for s in open_run(open_store(other)).complete] == [10, 20, 30, 40]
    for t in (10, 20, 30, 40):
        for found, wanted in zip(
            synthesize(other, [0.05, 0.1, 0.28], t=t), synthesize(one, [0.05, 0.1, 0.28], t=t), strict=True
        ):
            assert_same(found.state_dict, wanted.state_dict)


# -- one rank fails, all know


def every_mistake(folder: str) -> dict[str, str]:
    """Mistakes that one rank makes; what each rank is told."""
    rank = dist.get_rank()
    said: dict[str, str] = {}

    def attempt(name: str, model: nn.Module, url: str | None = None, **settings: Any) -> None:
        started = time.monotonic()
        said[name] = outcome(lambda: PostHocEMA.from_model(model, url or f"{folder}/{name}", **settings).close())
        assert time.monotonic() - started < 10, name

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(7, 1 + rank)

    attempt("shape", Other())
    different = Net()
    set_values(different, rank)
    attempt("values", different)
    ddp = wrapped("ddp")
    set_values(ddp, rank)
    attempt("replicas", ddp)
    attempt("folder", Net(), f"{folder}/local-to-{rank}")
    attempt("setting", Net(), update_every=1 - rank)
    attempt("profile", Net(), sigma_rels=(0.05, 0.28 + rank))
    attempt("cadence", Net(), checkpoint_every=10 + rank)
    attempt("tracked", Net(), sigma_rels=(0.05, 0.25 + rank / 100))
    attempt("protocol", Net(), None if rank == 0 else "nonsense://run")
    attempt("meta", Net() if rank == 0 else Net().to("meta"))
    attempt("stored", Net(), f"{folder}/stored")
    attempt("stored again", Net(), f"{folder}/stored")

    model = wrapped("fsdp")
    ema = PostHocEMA.from_model(model, f"{folder}/thread", update_every=1, checkpoint_every=1)
    train(ema, model, range(1, 3))
    ema._session.writer.drain()
    if rank == 1:
        ema._session.writer._averages._handle = None  # so that it stops
    ema.update_(model)

    def averaged() -> None:
        with ema.model(model, 0.1):
            pass

    said["dead thread, model"] = outcome(averaged)
    return said


def test_what_goes_wrong_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    said = run(2, every_mistake, str(tmp_path))
    expected = {
        "shape": "LayoutError.*last.weight must be the same tensor on all ranks",
        "values": "LayoutError.*must be equal on all ranks.*give each a prefix",
        "replicas": r"LayoutError.*must be equal on ranks \[0, 1\]",
        "folder": "StorageError.*every rank must see the same checkpoint_dir",
        "setting": "SettingsError.*update_every must be an integer of at least 1; got 0",
        "profile": "ProfileError.*sigma_rel must",
        "cadence": "SettingsError.*checkpoint_every",
        "tracked": "SettingsError.*sigma_rels",
        "protocol": "SettingsError.*nonsense",
        "meta": "LayoutError.*meta device",
        "stored": "",
        "stored again": "RunError.*resume",
        "dead thread, model": "BackgroundError.*phema-averages stopped",
    }
    for rank, texts in enumerate(said):
        for name, pattern in expected.items():
            assert re.search(pattern, texts[name]), (rank, name, texts[name])
            assert bool(texts[name]) == bool(pattern), (rank, name, texts[name])


def stages(folder: str) -> tuple[str, str]:
    """Two pipeline stages of two ranks: with the same names, and with names of their own."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank // 2)
    stage = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 4)), process_group=groups[rank // 2])
    same_names = outcome(lambda: PostHocEMA.from_model(stage, f"{folder}/same"))

    named = nn.ModuleDict({f"stage{rank // 2}": stage})
    ema = PostHocEMA.from_model(named, f"{folder}/own", update_every=1, checkpoint_every=1)
    ema.update_(named)
    with ema.state_dict(0.28) as state:
        found = ",".join(sorted(state))
        for name, tensor in stage.module.state_dict().items():
            assert torch.equal(state[f"stage{rank // 2}.{name}"], tensor)
    ema.close()
    return same_names, found


def test_pipeline_stages_need_names_of_their_own(tmp_path: Path) -> None:
    for same_names, found in run(4, stages, str(tmp_path)):
        assert "0.weight (4, 3) is the same part of a tensor on ranks [0, 1, 2, 3]" in same_names
        assert found == "stage0.0.bias,stage0.0.weight,stage1.0.bias,stage1.0.weight"


# -- groups


def twins_of_a_group_without_gloo() -> None:
    """Nothing here is NCCL; but the groups say that they are."""
    groups = [None, dist.group.WORLD, dist.new_group([0, 1])]
    num_groups = len(dist.distributed_c10d._world.pg_map)
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        for _ in range(3):
            found = [join(group) for group in groups]
            assert all(ranks.gather(ranks.rank) == [0, 1] for ranks in found)
            assert found[0].group is found[1].group is not found[2].group
            assert not {ranks.group for ranks in found} & set(groups)
            assert len(dist.distributed_c10d._world.pg_map) == num_groups + 2


def test_a_group_that_cannot_carry_objects_gets_one_twin() -> None:
    run(2, twins_of_a_group_without_gloo)


def two_of_four(folder: str) -> str:
    group = dist.new_group([1, 3])
    if dist.get_rank() in {0, 2}:
        return outcome(lambda: PostHocEMA.from_model(Net(), folder, process_group=group))
    model = nn.parallel.DistributedDataParallel(Net(), process_group=group)
    ema = PostHocEMA.from_model(
        model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, update_after_step=8,
        process_group=group,
    )  # fmt: skip
    with no_collectives():
        train(ema, model, range(1, STEPS + 1), t_per_step=5)
    with ema.state_dict(0.1):
        pass
    ema.close()
    return ""


def test_some_of_the_ranks_average_a_model_of_their_own(alone: str, tmp_path: Path) -> None:
    outside, inside, *_ = run(4, two_of_four, str(tmp_path))
    assert inside == ""
    assert re.search("SettingsError.*process_group", outside)
    for found, wanted in zip(synthesize(tmp_path, [0.05, 0.1]), synthesize(alone, [0.05, 0.1]), strict=True):
        assert_same(found.state_dict, wanted.state_dict)


# -- what training does to a sharded model


def update_while_gathered(kind: str, folder: str) -> State:
    """One optimizer step while the parameters stay gathered, as for gradient accumulation."""
    model = wrapped(kind, Small)
    model.set_reshard_after_backward(False)
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(3, 5)).square().sum().backward()
    optimizer.step()
    gathered = {name: tensor.detach() for name, tensor in model.named_parameters()}
    assert not any(
        isinstance(tensor, DTensor) and tensor.device_mesh.mesh_dim_names == ("dp",) for tensor in gathered.values()
    )
    stale = {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in gathered.items()}
    ema.update_(model)
    ema.close()
    current = full_state(model)
    assert not any(torch.equal(stale[name], current[name]) for name in current)  # or this would prove nothing
    return current


@pytest.mark.parametrize(("kind", "world_size"), [("fsdp", 2), ("tp", 4)])
def test_current_shards_are_averaged_although_gathered_ones_are_in_their_place(
    kind: str, world_size: int, tmp_path: Path
) -> None:
    current = run(world_size, update_while_gathered, kind, str(tmp_path))[0]
    (found,) = synthesize(tmp_path, [0.28])
    assert_same(found.state_dict, current)


def one_rank_diverges(folder: str) -> int:
    model = wrapped("fsdp")
    ema = PostHocEMA.from_model(model, folder, sigma_rels=SIGMA_RELS, update_every=5, checkpoint_every=10)
    for step in range(1, 31):
        set_values(model, step)
        if step in {5, 20} and dist.get_rank() == 1:
            model.first.weight._local_tensor[0, 0] = torch.nan
        ema.update_(model)
        ema._session.writer.drain()
    ema.close()
    dist.barrier()
    return ema._session.tracker.num_refused


def test_a_rank_that_is_not_finite_costs_that_snapshot_only(tmp_path: Path) -> None:
    assert run(2, one_rank_diverges, str(tmp_path)) == [0, 2]
    stored = open_run(open_store(str(tmp_path)))
    assert [s.t for s in stored.complete] == [10, 30]
    (broken,) = (s for s in stored.snapshots if s.problem)
    assert (broken.t, broken.problem) == (20, "rank 1 had nothing to give: its parameters are not finite")
    (found,) = synthesize(tmp_path, [0.12])
    assert all(bool(tensor.isfinite().all()) for tensor in found.state_dict.values())
    assert found.certificate.left_out == (f"t=20: {broken.problem}",)


# -- a slow rank


def close_in_disorder(folder: str) -> int:
    """Rank 0 closes and asks at once; rank 1 is still writing its part of the last snapshot."""
    model = wrapped("ddp", Small)
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=5)
    if dist.get_rank() == 1:
        put_at_once = LocalStore.put

        def put_slowly(store: LocalStore, key: str, data: bytes | bytearray) -> None:
            time.sleep(0.3)
            put_at_once(store, key, data)

        LocalStore.put = put_slowly  # type: ignore[method-assign]
    try:
        train(ema, model, range(1, 8))
        ema.close()
        with ema.state_dict(0.28) as state:
            (newest,) = synthesize(folder, [0.28], t=7)
            assert_same(state, newest.state_dict)
    finally:
        if dist.get_rank() == 1:
            LocalStore.put = put_at_once  # type: ignore[method-assign]
    return ema.t


def test_after_close_all_ranks_wait_for_the_slowest_before_they_look(tmp_path: Path) -> None:
    assert run(2, close_in_disorder, str(tmp_path)) == [7, 7]
