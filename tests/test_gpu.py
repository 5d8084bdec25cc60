"""On a real accelerator: the bits of the CPU, none of the device's memory, and no wait of the training thread.

Several ranks share the one device over gloo; NCCL, which refuses that, has a world of one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from test_distributed import SIGMA_RELS, Net, inputs
from test_matrix import NO_FLAT, STEPS, assert_same_averages, average, net_without, take_values
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

from phema_dist import PostHocEMA, SettingsError, SynthesisReader, synthesize
from phema_dist.training.device import SideStream
from phema_dist.training.layout import read_layout

WHERE = torch.device("cuda", 0)
NEVER = 10**9
OVERFLOWS = {0, 3, 4, 8}  # steps whose gradients are infinite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # What torch says of its own: no process group, debug modes that are prototypes, tf32.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


# The same bits under every wrapper


def mesh_of(*sizes: int) -> object:
    return init_device_mesh(WHERE.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def fsdp2(net: nn.Module, **settings: object) -> nn.Module:
    settings = {"mesh": mesh_of(dist.get_world_size())} | settings
    for unit in (net.low, net.conv, net):  # one dtype per unit
        fully_shard(unit, **settings)
    return net


def fsdp1(net: nn.Module, *, orig: bool) -> nn.Module:
    units = CustomPolicy(lambda m: isinstance(m, nn.Conv2d | nn.BatchNorm1d) or m is net.low)
    return FullyShardedDataParallel(net, auto_wrap_policy=units, use_orig_params=orig, device_id=WHERE)


KINDS: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {
    "plain": (1, lambda net: net.to(WHERE)),
    "ddp": (2, lambda net: nn.parallel.DistributedDataParallel(net.to(WHERE))),
    "fsdp2": (2, lambda net: fsdp2(net.to(WHERE))),
    "fsdp2-mixed": (2, lambda net: fsdp2(net.to(WHERE), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))),
    "fsdp2-offload": (2, lambda net: fsdp2(net.to(WHERE), offload_policy=CPUOffloadPolicy())),
    "hsdp": (4, lambda net: fsdp2(net.to(WHERE), mesh=mesh_of(2, 2))),
    "fsdp1": (2, partial(fsdp1, orig=True)),
    "fsdp1-flat": (2, partial(fsdp1, orig=False)),
}


def without(kind: str) -> tuple[str, ...]:
    return NO_FLAT if kind == "fsdp1-flat" else ()


def held(model: nn.Module) -> list[torch.Tensor]:
    """Copies on the host of what this rank holds."""
    return [tensor.local().detach().to("cpu", copy=True) for tensor in read_layout(model).tensors]


def same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(*(each.to(WHERE) for each in inputs())).cpu()


@contextmanager
def no_more_memory() -> Iterator[None]:
    """Nothing is allocated on the device inside that was not there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


def average_and_evaluate(kind: str, folder: str) -> None:
    """Updates and snapshots of `average`; then an average in the live model, beside one that DCP loads."""
    torch.cuda.set_device(WHERE)
    wrap = KINDS[kind][1]
    model = wrap(net_without(without(kind)))
    evaluates = kind not in {"fsdp2-mixed", "fsdp1-flat"}  # the one casts no input, the other lacks a parameter
    ema = PostHocEMA.from_model(model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10)
    for step in range(1, STEPS + 1):
        take_values(model, step)
        ema.update_(model)
        ema._session.writer.drain()
    if evaluates:
        outputs(model)  # after this the root of an FSDP model stays gathered
    before, flags = held(model), [module.training for module in model.modules()]
    with ema.model(model, SIGMA_RELS[1], exchange=True):
        live = held(model)
    ema.close()
    with ema.model(model, SIGMA_RELS[1]):
        assert same(held(model), live)  # as the last snapshot has them
    with ema.model(model, 0.25):
        inside = held(model)
        found = outputs(model) if evaluates else None
    assert [module.training for module in model.modules()] == flags
    assert same(held(model), before)
    assert not same(inside, before)

    twin = wrap(net_without(without(kind)))
    state = get_model_state_dict(twin)
    dcp.load(state, storage_reader=SynthesisReader(folder, 0.25), no_dist=not dist.is_initialized())
    set_model_state_dict(twin, state)
    twin.eval()
    assert same(inside, held(twin))
    if evaluates:
        assert torch.equal(found, outputs(twin))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The same run on the CPU, by one process."""
    made: dict[tuple[str, ...], Path] = {}

    def find(names: tuple[str, ...]) -> Path:
        if names not in made:
            made[names] = tmp_path_factory.mktemp("alone")
            average(net_without(names), str(made[names]))
        return made[names]

    return find


@pytest.mark.parametrize("kind", KINDS)
def test_averages_have_the_bits_of_the_cpu_and_evaluate_as_dcp_loads_them(
    kind: str, alone: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    run(KINDS[kind][0], average_and_evaluate, kind, str(tmp_path))
    assert_same_averages(tmp_path, alone(without(kind)))


# The copy beside training


@torch.no_grad()
def overwrite(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def constant_average(sigma_rel: float, num_updates: int) -> float:
    """The average after updates at t = 1, 2, … of parameters that are t: one-hot recursion in float64."""
    gamma = max(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real)
    found = 0.0
    for t in range(1, num_updates + 1):
        beta = ((t - 1) / t) ** (gamma + 1)
        found = beta * found + (1 - beta) * t
    return found


@pytest.mark.parametrize("attached", [False, True], ids=["update_", "attach"])
@pytest.mark.parametrize("stream", ["default", "own"])
@pytest.mark.parametrize("missing", [None, "fence", "wait"])
def test_averages_are_exact_although_parameters_are_overwritten_at_once_and_only_because_of_fence_and_wait(
    missing: str | None, stream: str, attached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 MB, which take 10 ms to copy and 0.2 ms to overwrite."""
    if missing:
        monkeypatch.setattr(SideStream, missing, lambda *_: None)
    model = nn.Linear(1 << 14, 1 << 13, bias=False, device=WHERE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.full_like(model.weight, -1.0)
    ema = PostHocEMA.from_model(model, tmp_path, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER)
    if attached:
        ema.attach(optimizer)
    with torch.cuda.stream(torch.cuda.Stream()) if stream == "own" else nullcontext():
        overwrite(model, 0.0)
        torch.cuda._sleep(500_000_000)  # cycles: copies begin late
        for _ in range(5):
            optimizer.step()  # adds one
            if not attached:
                ema.update_(model)
    ema._session.writer.settle()
    exact = True
    for sigma_rel, (flat,) in zip(SIGMA_RELS, ema._session.tracker.averages, strict=True):
        wanted = constant_average(sigma_rel, 5)
        exact &= all(math.isclose(float(end), wanted, rel_tol=1e-6) for end in torch.aminmax(flat))
    assert exact is (missing is None)
    torch.cuda.synchronize()
    ema._session.writer.abandon(1.0)


def test_update_returns_while_the_device_still_computes_and_takes_no_memory_there(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(WHERE)
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=NEVER)
    computed = torch.cuda.Event()
    with no_more_memory():
        torch.cuda._sleep(2_000_000_000)  # cycles: a second
        computed.record()
        ema.update_(model)
        ema.update_(model)
        assert not computed.query()
    ema._session.writer.abandon(10.0)


# Real steps


class Recorded:
    """A training whose parameters after each step are copied on the device, which nobody waits for."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.states = model, []

    def take(self) -> None:
        self.states.append([p.detach().clone() for p in self.model.parameters()])

    def averages_on_the_cpu(self, folder: Path, bare: nn.Module, kept: Sequence[int]) -> list[list[torch.Tensor]]:
        """Of a run that was given the same parameters."""
        ema = PostHocEMA.from_model(bare, folder, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER)
        for i in kept:
            with torch.no_grad():
                for parameter, value in zip(bare.parameters(), self.states[i], strict=True):
                    parameter.copy_(value)
            ema.update_(bare)
        return averages_of(ema)


def averages_of(ema: PostHocEMA) -> list[list[torch.Tensor]]:
    ema._session.writer.settle()
    found = [[flat.clone() for flat in averages] for averages in ema._session.tracker.averages]
    ema._session.writer.abandon(10.0)
    return found


def assert_equal_averages(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    assert len(found) == len(wanted)
    for some, others in zip(found, wanted, strict=True):
        assert same(some, others)


def layers(width: int = 2048, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).to(dtype)


def batch(step: int, width: int = 2048) -> torch.Tensor:
    return torch.randn(16, width, generator=torch.Generator().manual_seed(step)).to(WHERE)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_attached_steps_under_autocast_and_a_scaler_that_skips_some_are_averaged_exactly(
    fused: bool, tmp_path: Path
) -> None:
    model = layers().to(WHERE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler(WHERE.type, init_scale=16.0)
    ema = PostHocEMA.from_model(model, tmp_path / "gpu", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER)
    ema.attach(optimizer)
    recorded = Recorded(model)
    for i in range(12):
        with torch.autocast(WHERE.type, torch.float16):
            loss = model(batch(i)).float().square().mean() * (math.inf if i in OVERFLOWS else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        recorded.take()
    kept = [i for i in range(12) if i not in OVERFLOWS]
    found = averages_of(ema)
    assert ema.t == len(kept)
    assert_equal_averages(found, recorded.averages_on_the_cpu(tmp_path / "cpu", layers(), kept))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its compiler
def test_a_compiled_model_is_averaged_and_evaluated_like_one_that_loads_the_average(mode: str, tmp_path: Path) -> None:
    """`reduce-overhead` replays graphs, which look for parameters where they were."""
    bare = layers(256).to(WHERE)
    model = torch.compile(bare, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema = PostHocEMA.from_model(model, tmp_path / "gpu", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=4)
    recorded = Recorded(bare)
    for i in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        model(batch(i, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_(model)
        recorded.take()

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            return model(batch(99, 256)).cpu()

    own = evaluate(), evaluate(), evaluate()  # warmed up and recorded
    with ema.model(model, 0.15):
        found = evaluate()
    assert same([evaluate()], [own[-1]])
    found_averages = averages_of(ema)
    (wanted,) = synthesize(tmp_path / "gpu", [0.15])
    bare.load_state_dict(wanted.state_dict)
    assert torch.equal(found, evaluate())
    assert not torch.equal(found, own[-1])
    assert_equal_averages(found_averages, recorded.averages_on_the_cpu(tmp_path / "cpu", layers(256), range(8)))


def test_updates_after_replays_of_a_captured_step_are_exact_and_in_the_capture_refused(tmp_path: Path) -> None:
    model = layers().to(WHERE)
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    data = batch(0)

    def step() -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    ema = PostHocEMA.from_model(model, tmp_path / "gpu", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER)
    recorded = Recorded(model)
    for i in range(10):
        data.copy_(batch(i))
        graph.replay()
        ema.update_(model)
        recorded.take()
    assert_equal_averages(averages_of(ema), recorded.averages_on_the_cpu(tmp_path / "cpu", layers(), range(10)))

    other = PostHocEMA.from_model(model, tmp_path / "other", update_every=1)
    other.attach(optimizer)
    with pytest.raises(SettingsError, match="call update_ after each replay"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
    other._session.writer.abandon(10.0)


# Averages in the live model


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_the_live_model_takes_no_memory_of_the_device(
    dtype: torch.dtype, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(256, 512, 4), nn.BatchNorm2d(512)).to(WHERE, dtype, memory_format=memory_format)
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1)
    ema.update_(model)
    overwrite(model, 1.0)
    before = held(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    with suppress(ZeroDivisionError), no_more_memory(), ema.model(model, 0.15) as averaged:
        assert averaged is model
        assert [p.data_ptr() for p in model.parameters()] == addresses  # what optimizers and graphs hold
        inside = held(model)
        raise ZeroDivisionError
    (wanted,) = synthesize(tmp_path, [0.15])
    full = dict(zip(read_layout(model).infos, inside, strict=True))
    assert all(torch.equal(full[name], wanted.state_dict[name].to(full[name].dtype)) for name in full)
    assert same(held(model), before)
    ema._session.writer.abandon(10.0)


@pytest.mark.parametrize("attached", [False, True], ids=["update_", "attach"])
def test_live_averages_are_those_of_the_last_update_and_training_goes_on_as_if_nothing_was_evaluated(
    attached: bool, tmp_path: Path
) -> None:
    def train(folder: str, *, evaluates: bool) -> list[torch.Tensor]:
        model = layers().to(WHERE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ema = PostHocEMA.from_model(
            model, tmp_path / folder, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER
        )
        if attached:
            ema.attach(optimizer)
        for i in range(6):
            model(batch(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if not attached:
                ema.update_(model)
            if evaluates:
                with no_more_memory(), ema.model(model, SIGMA_RELS[1]):
                    (wanted,) = ema._session.tracker.averages[1]
                    assert torch.equal(torch.cat([value.reshape(-1) for value in held(model)]), wanted)
        ema._session.writer.abandon(10.0)
        return held(model)

    assert same(train("one", evaluates=True), train("other", evaluates=False))


def test_training_goes_on_from_an_average_that_is_written_into_parameters_and_masters(tmp_path: Path) -> None:
    model = layers(dtype=torch.bfloat16).to(WHERE)
    masters = {p: p.detach().float() for p in model.parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1)
    ema = PostHocEMA.from_model(model, tmp_path, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER)
    resets = []
    for i in range(8):
        model(batch(i).bfloat16()).square().mean().backward()
        for parameter, master in masters.items():
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(masters), list(masters.values()))
        ema.update_(model)
        with no_more_memory():
            if ema.reset_hare_(model, every=4, optimizer=optimizer, masters=masters):
                resets.append(i)
                (average,) = ema._session.tracker.averages[0]
                assert torch.equal(torch.cat([m.cpu().reshape(-1) for m in masters.values()]), average)
                assert torch.equal(torch.cat([p.reshape(-1) for p in held(model)]), average.bfloat16())
    assert resets == [3, 7]
    ema._session.writer.abandon(10.0)


# NCCL


def with_nccl(job: Callable[..., None], *args: object) -> None:
    """Call `job` where NCCL is the default backend, and give the pool its gloo group back."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    torch.cuda.set_device(WHERE)
    dist.init_process_group("nccl", store=dist.PrefixStore("nccl", store), rank=rank, world_size=size)
    try:
        job(*args)
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=size)


NCCL_KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": lambda net: nn.parallel.DistributedDataParallel(net.to(WHERE)),
    "fsdp2": lambda net: fully_shard(
        net.to(WHERE), mesh=mesh_of(1), mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=True)
    ),
    "fsdp1": lambda net: FullyShardedDataParallel(net, use_orig_params=True, device_id=WHERE),
}


def train_with_nccl(kind: str, folder: str) -> None:
    """Attached steps, a checkpoint in the middle, and a job that goes on from it as if nothing had happened."""
    model = NCCL_KINDS[kind](layers(256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ema = PostHocEMA.from_model(
        model, f"{folder}/run", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=5, resume=True
    )
    ema.attach(optimizer)
    states = []

    def steps(begin: int, end: int) -> None:
        for i in range(begin, end):
            model(batch(i, 256)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            states.append([tensor.local().detach().clone() for tensor in read_layout(model).tensors])

    steps(0, 6)
    dcp.save({"ema": ema.training_state}, checkpoint_id=f"{folder}/training")
    at_six = [[flat.clone() for flat in averages] for averages in ema._session.tracker.averages]
    steps(6, 9)
    ema._session.writer.settle()
    for sigma_rel, (flat,) in zip(SIGMA_RELS, ema._session.tracker.averages, strict=True):
        gamma = max(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real)
        wanted = torch.zeros(flat.numel(), dtype=torch.float64)
        for t, state in enumerate(states, start=1):
            wanted.lerp_(torch.cat([p.reshape(-1).double().cpu() for p in state]), 1 - ((t - 1) / t) ** (gamma + 1))
        assert torch.allclose(flat.double(), wanted, rtol=1e-5, atol=1e-7)
    before = held(model)
    with ema.model(model, 0.2), torch.no_grad():
        assert not same(held(model), before)
        model(batch(0, 256))
    assert same(held(model), before)
    ema.close()

    again = PostHocEMA.from_model(model, f"{folder}/run", sigma_rels=SIGMA_RELS, update_every=1, resume=True)
    assert again.t == 9
    dcp.load({"ema": again.training_state}, checkpoint_id=f"{folder}/training")
    assert again.t == 6
    for some, others in zip(again._session.tracker.averages, at_six, strict=True):
        assert same(some, others)
    again.close()


@pytest.mark.parametrize("kind", NCCL_KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_job_on_nccl_trains_evaluates_and_resumes(kind: str, tmp_path: Path) -> None:
    run(1, with_nccl, train_with_nccl, kind, str(tmp_path))


def two_ranks_whose_default_group_is_nccl(folder: str) -> None:
    """We talk over a gloo twin of the default group: on NCCL these ranks, on one device, could not."""
    model = nn.parallel.DistributedDataParallel(Net().to(WHERE), process_group=dist.new_group(backend="gloo"))
    average(model, folder)


def test_ranks_talk_over_gloo_where_the_default_group_is_nccl(
    alone: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    run(2, with_nccl, two_ranks_whose_default_group_is_nccl, str(tmp_path))
    assert_same_averages(tmp_path, alone(()))
