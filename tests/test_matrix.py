"""The matrix: whoever shards the model, and on however many ranks, the averages are those of one process, bit for bit.

Each wrapper holds as much of `Net` as torch lets it: what is left out, and why, stands in KINDS.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_distributed import SIGMA_RELS, Net, assert_same, no_collectives, put, set_values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from phema_dist import PostHocEMA, synthesize
from phema_dist.training.layout import read_layout

STEPS = 24


class Stages(nn.Module):
    """What a rank of a pipeline holds: its own layers, under names that another rank uses for others."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.layers = nn.Sequential(nn.Linear(4 + stage, 3), nn.BatchNorm1d(3))


class AllStages(nn.Module):
    """The same pipeline in one process."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        for stage in range(num_stages):
            self.add_module(f"stage{stage}", Stages(stage))


def fsdp2(net: nn.Module, **settings: object) -> nn.Module:
    fully_shard(net.low, **settings)  # one dtype per unit
    fully_shard(net.conv, **settings)
    return fully_shard(net, **settings)


def hsdp(net: nn.Module) -> nn.Module:
    return fsdp2(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def meta(net: nn.Module) -> nn.Module:
    """Wrapped without storage, as people do with models that are too large for one rank."""
    with torch.device("meta"):
        empty = type(net)()
    fsdp2(empty)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in empty.state_dict().items():
            put(tensor, net.state_dict()[name])
    return empty


def columns(net: nn.Module) -> nn.Module:
    """Some parameters sharded along their second dim, which torch allows where it divides evenly."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % dist.get_world_size() == 0 else None

    return fsdp2(net, shard_placement_fn=placement)


def tensor_parallel(net: nn.Module, mesh: object = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(net, mesh, {"first": ColwiseParallel(), "last": RowwiseParallel()})  # type: ignore[arg-type]
    return net


def fsdp2_and_tp(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp2(tensor_parallel(net, mesh["tp"]), mesh=mesh["dp"])


def fsdp1(net: nn.Module, strategy: str, *, orig: bool, **settings: object) -> nn.Module:
    if strategy == "HYBRID_SHARD":
        settings["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return FullyShardedDataParallel(
        net,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=CustomPolicy(
            lambda m: isinstance(m, nn.Conv2d | nn.BatchNorm1d) or m is getattr(net, "low", None)
        ),
        use_orig_params=orig,
        device_id=torch.device("cpu"),
        **settings,
    )


def fsdp1_offloaded(net: nn.Module) -> nn.Module:
    """On the CPU as on a GPU, but for pinned memory, which needs one."""
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign]
    return fsdp1(net, "FULL_SHARD", orig=True, cpu_offload=CPUOffload(offload_params=True))


@dataclass(frozen=True)
class Kind:
    wrap: Callable[[nn.Module], nn.Module]
    worlds: tuple[int, ...]
    without: tuple[str, ...] = ()  # modules and parameters of Net that torch does not let it hold


# Without use_orig_params, FSDP1 makes one parameter of a unit, which cannot be frozen in part.
NO_FLAT = ("frozen",)
KINDS = {
    "plain": Kind(lambda net: net, (2, 4)),
    "ddp": Kind(nn.parallel.DistributedDataParallel, (2, 4)),
    "fsdp2": Kind(fsdp2, (2, 4)),
    "fsdp2-offload": Kind(partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)), (2,)),
    "fsdp2-mixed": Kind(partial(fsdp2, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), (2,)),
    "fsdp2-meta": Kind(meta, (2, 4)),
    "fsdp2-columns": Kind(columns, (2,)),
    "hsdp": Kind(hsdp, (4,)),
    "tp": Kind(tensor_parallel, (2, 4)),
    "fsdp2-tp": Kind(fsdp2_and_tp, (4,)),
    **{
        f"fsdp1-{strategy.lower()}-{'orig' if orig else 'flat'}": Kind(
            partial(fsdp1, strategy=strategy, orig=orig),
            (4,) if strategy == "HYBRID_SHARD" else (2, 4),
            () if orig else NO_FLAT,
        )
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
        for orig in (True, False)
    },
    "fsdp1-offload": Kind(fsdp1_offloaded, (2,)),
}


def net_without(names: tuple[str, ...]) -> nn.Module:
    net = Net()
    for name in names:
        delattr(net, name)
    return net


def take_values(model: nn.Module, step: int) -> None:
    """Collective for FSDP1, which alone knows where it keeps what."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=True):
            bare = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
            bare |= {n.replace("_fsdp_wrapped_module.", ""): b for n, b in model.named_buffers()}
            twin = net_without(() if "frozen" in bare else NO_FLAT)
            set_values(twin, step)
            with torch.no_grad():
                for name, values in [*twin.named_parameters(), *twin.named_buffers()]:
                    bare[name].copy_(values)
    else:
        set_values(model, step)


def average(model: nn.Module, folder: str, prefix: str = "") -> None:
    """Updates at 3, 6, 9, 10, 12, …; snapshots at 10, 20 and 24."""
    ema = PostHocEMA.from_model(
        model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, prefix=prefix
    )
    for step in range(1, STEPS + 1):
        take_values(model, step)
        with no_collectives() if dist.is_initialized() else torch.no_grad():
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]  these steps take no time
    with no_collectives() if dist.is_initialized() else torch.no_grad():
        ema.close()


def average_as(kind: str, folder: str) -> bool:
    model = KINDS[kind].wrap(net_without(KINDS[kind].without))
    average(model, folder)
    return any(isinstance(p, DTensor) for p in model.parameters())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The run of one process that holds Net without some of its parts."""
    made: dict[tuple[str, ...], Path] = {}

    def find(without: tuple[str, ...]) -> Path:
        if without not in made:
            made[without] = tmp_path_factory.mktemp("alone")
            average(net_without(without), str(made[without]))
        return made[without]

    return find


def assert_same_averages(found: Path, wanted: Path) -> None:
    for t in (10, 20, STEPS):
        targets = [0.05, 0.1, 0.2, 0.28]
        for one, other in zip(synthesize(found, targets, t=t), synthesize(wanted, targets, t=t), strict=True):
            assert one.t == other.t == t
            assert_same(one.state_dict, other.state_dict)


@pytest.mark.parametrize(
    ("kind", "world_size"), [(kind, world_size) for kind in KINDS for world_size in KINDS[kind].worlds]
)
@pytest.mark.filterwarnings("ignore")
def test_any_wrapper_gives_the_same_bits_and_never_communicates(
    kind: str, world_size: int, alone: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    run(world_size, average_as, kind, str(tmp_path))
    assert_same_averages(tmp_path, alone(KINDS[kind].without))


def average_stage(folder: str) -> None:
    stage = dist.get_rank()
    model = Stages(stage)
    twin = AllStages(dist.get_world_size())
    ema = PostHocEMA.from_model(
        model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, prefix=f"stage{stage}."
    )
    for step in range(1, STEPS + 1):
        set_values(twin, step)
        model.load_state_dict(twin.get_submodule(f"stage{stage}").state_dict())
        with no_collectives():
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    ema.close()
    dist.barrier()
    (wanted,) = synthesize(folder, [0.13])
    with ema.model(model, 0.13):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted.state_dict[f"stage{stage}.{name}"])
    assert torch.equal(model.layers[0].weight, twin.get_submodule(f"stage{stage}").layers[0].weight)


def test_stages_of_a_pipeline_are_told_apart_by_a_prefix(tmp_path: Path) -> None:
    run(4, average_stage, str(tmp_path / "four"))
    average(AllStages(4), str(tmp_path / "one"))
    assert_same_averages(tmp_path / "four", tmp_path / "one")


class Seeded(nn.Module):
    """Built with the same seed on every rank, as stages and experts are by mistake."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)


def begin_equal(kind: str, folder: str) -> tuple[str, list[str]]:
    model: nn.Module = Seeded()
    if kind != "experts":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
        if kind == "stages":
            fully_shard(model, mesh=mesh)
        else:
            model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("phema_dist").addHandler(handler)
    said = outcome(lambda: use(model, folder))
    logging.getLogger("phema_dist").removeHandler(handler)
    return said, logged


def use(model: nn.Module, folder: str) -> None:
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1)
    with torch.no_grad():
        getattr(model, "module", model).layer.weight.add_(dist.get_rank())
    ema.update_(model)
    with ema.model(model, 0.28, exchange=True):
        pass
    ema.close()


@pytest.mark.parametrize("kind", ["stages", "ddp stages"])
def test_stages_that_begin_equal_are_no_replicas_because_no_wrapper_says_so(kind: str, tmp_path: Path) -> None:
    for said, _ in run(4, begin_equal, kind, str(tmp_path)):
        assert "no DDP or mesh calls them replicas" in said
        assert "prefix" in said


def test_plain_modules_that_begin_equal_are_taken_for_replicas_with_a_warning_and_told_apart_later(
    tmp_path: Path,
) -> None:
    (said, logged), *others = run(2, begin_equal, "experts", str(tmp_path))
    assert said == ""
    assert "2 plain tensors, the first is layer.weight, are equal on all ranks and taken for replicas" in logged[0]
    assert any("are not any more; the first is layer.weight" in text for text in logged)
    assert others[0][0] == ""


def submodule_of_a_unit(orig: bool) -> str:
    inner = nn.Sequential(nn.Linear(3, 3), fsdp1(nn.Sequential(nn.Linear(3, 3)), "FULL_SHARD", orig=orig))
    model = FullyShardedDataParallel(
        nn.ModuleDict({"unet": inner}), use_orig_params=orig, device_id=torch.device("cpu")
    )
    return outcome(lambda: read_layout(model.module["unet"]))


@pytest.mark.parametrize("orig", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_part_of_an_fsdp1_model_whose_parameters_lie_around_it_is_refused(orig: bool) -> None:
    for said in run(2, submodule_of_a_unit, orig):
        assert re.search(r"LayoutError: 0\.(weight|bias) must belong to an FSDP1 module", said), said
