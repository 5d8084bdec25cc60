"""Where torch's wrappers put a model: each rank's boxes, compared with what torch itself says the whole tensors are."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_distributed import no_collectives
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from phema_dist.ranks import ALONE
from phema_dist.shard import Box, check_exact_cover
from phema_dist.storage.manifest import BUFFER
from phema_dist.training import wrappers
from phema_dist.training.layout import Layout, read_layout
from phema_dist.training.swap import swapped
from phema_dist.training.wrappers import is_sharded, reshard

State = dict[str, torch.Tensor]
Boxes = dict[str, set[Box]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 7)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(self.up(x).relu())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7).requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Net(nn.Module):
    """Rows that do not divide, ties, 4-D, another memory order, frozen parameters, buffers, a part without wrapper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = Frozen()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.plain = nn.Linear(7, 5)
        self.out = nn.Linear(5, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(self.embed(tokens)))
        for block in self.blocks:
            x = block(x)
        image = torch.ones(1, 3, 3, 3, dtype=x.dtype, device=x.device)
        return self.out(self.plain(self.frozen(x).to(self.plain.weight.dtype)).to(x.dtype) + self.conv(image).view(5))


TOKENS = torch.arange(8)


# -- what torch says


def clean(name: str) -> str:
    return ".".join(
        p for p in name.split(".") if p not in {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
    )


def truth(model: nn.Module) -> State:
    """Collective: all whole tensors, gathered by torch's own means."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
        return {clean(n): (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors}


def cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))]


def assert_true(layout: Layout, values: list[torch.Tensor], whole: State) -> None:
    """Every local value is the slice of the whole tensor that its box says."""
    assert layout.infos.keys() | layout.aliases.keys() == whole.keys()
    for tensor, found in zip(layout.tensors, values, strict=True):
        wanted = whole[tensor.info.fqn]
        assert tensor.info.shape == wanted.shape
        assert torch.equal(found, cut(wanted, tensor.box).to(found.dtype)), (tensor.info.fqn, tensor.box)


@torch.no_grad()
def values(layout: Layout) -> list[torch.Tensor]:
    return [tensor.local().clone() for tensor in layout.tensors]


def boxes(layout: Layout) -> Boxes:
    found: Boxes = {fqn: set() for fqn in layout.infos}
    for tensor in layout.tensors:
        assert tensor.box not in found[tensor.info.fqn]
        found[tensor.info.fqn].add(tensor.box)
    return found


# -- models in wrappers


def fsdp1(strategy: str, *settings: str, net: nn.Module | None = None) -> nn.Module:
    """`settings`: flat (without original parameters), mixed, offload."""
    net = net or Net()
    hybrid = {"device_mesh": init_device_mesh("cpu", (2, 2))} if strategy == "HYBRID_SHARD" else {}
    bf16 = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    flat = "flat" in settings
    return FullyShardedDataParallel(
        net,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=not flat,
        auto_wrap_policy=ModuleWrapPolicy(
            {Block, Frozen} if flat else {Block}
        ),  # flat: all of a unit is frozen, or none
        ignored_modules=[net.plain],
        mixed_precision=bf16 if "mixed" in settings else None,
        cpu_offload=CPUOffload("offload" in settings),
        **hybrid,
    )


def fsdp2(name: str) -> nn.Module:
    net = Net().to(memory_format=torch.contiguous_format)  # fully_shard takes nothing else
    hybrid = name == "hsdp"
    shape = (2, 2) if hybrid else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("across", "in")[not hybrid :])
    if name == "mixed":
        fully_shard(net.norm, mesh=mesh)  # its statistics are not cast
    settings: dict[str, dict[str, Any]] = {
        "zero2": {"reshard_after_forward": False},
        "half": {"reshard_after_forward": 2},  # to two of four ranks
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "mixed": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    }
    for module in (*net.blocks, net.frozen, net):
        fully_shard(module, mesh=mesh, ignored_params=set(net.plain.parameters()), **settings.get(name, {}))
    if name == "prefetch":
        net.blocks[0].set_modules_to_forward_prefetch([net.blocks[1]])
    return net


def sharded(kind: str) -> nn.Module:
    return fsdp1(*kind.split()) if kind.partition(" ")[0].isupper() else fsdp2(kind)


@contextmanager
def offload_without_accelerator() -> Iterator[None]:
    """FSDP1 pins what it offloads, and waits for a stream; the CPU has neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
        patch.setattr(torch.cpu.Stream, "synchronize", lambda _: None, raising=False)
        yield


def accumulate(model: nn.Module) -> None:
    """A backward whose gradients stay where they are."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        model(TOKENS).square().mean().backward()
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync():
            model(TOKENS).square().mean().backward()


FSDP1 = [
    *((f"FULL_SHARD{flat}", world_size) for flat in ("", " flat") for world_size in (2, 4)),
    *((f"SHARD_GRAD_OP{flat}", 2) for flat in ("", " flat", " mixed")),
    *((f"HYBRID_SHARD{flat}", 4) for flat in ("", " flat")),
    *(
        (f"NO_SHARD{flat}", 2) for flat in ("", " flat", " flat mixed")
    ),  # mixed alone: torch cannot accumulate gradients
    *((f"FULL_SHARD{flat} {setting}", 2) for flat in ("", " flat") for setting in ("mixed", "offload")),
    *((f"SHARD_GRAD_OP{flat} offload", 2) for flat in ("", " flat")),
]
FSDP2 = [
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("zero2", 2),
    ("half", 4),
    ("offload", 2),
    ("mixed", 2),
    ("prefetch", 2),
]


# -- reading


@offload_without_accelerator()
def through_a_training(kind: str) -> Boxes:
    model, twin = sharded(kind), sharded(kind)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, twin)]
    with no_collectives():
        first = read_layout(model)
    assert is_sharded(model) == (not kind.startswith("NO_SHARD"))

    def look(*, now: State | None = None) -> None:
        with no_collectives():
            local = values(first)
            layout = read_layout(model)
            first.check_unchanged()
        assert boxes(layout) == boxes(first)
        now = truth(model)
        assert_true(first, local, now)
        assert_true(layout, values(layout), now)

    look()
    losses: list[torch.Tensor] = []
    for _ in range(2):
        for each, optimizer, seen in zip((twin, model), optimizers[::-1], (lambda: None, look), strict=True):
            with torch.no_grad():
                each(TOKENS)
            seen()
            optimizer.zero_grad()
            accumulate(each)
            seen()
            loss = each(TOKENS).square().mean()
            seen()
            loss.backward()
            seen()
            optimizer.step()
            seen()
            losses.append(loss.detach())
        assert torch.equal(losses[-1], losses[-2])
    whole, other = truth(model), truth(twin)
    assert [name for name in other if not torch.equal(whole[name], other[name])] == []
    assert not torch.equal(whole["first.weight"], Net().first.weight)  # or this would prove nothing
    assert torch.equal(whole["frozen.inner.weight"], Net().frozen.inner.weight)

    kinds = {info.fqn: info.kind for info in first.infos.values()}
    assert {name for name, kind in kinds.items() if kind == BUFFER} == {name for name, _ in Net().named_buffers()}
    assert first.aliases == {"out.weight": "embed.weight"}
    trained = read_layout(model, only_save_diff=True)
    assert kinds.keys() - trained.infos.keys() == {"frozen.inner.weight", "frozen.inner.bias"}
    return boxes(first)


@pytest.mark.parametrize(("kind", "world_size"), FSDP1 + FSDP2)
def test_a_model_is_read_at_every_moment_of_a_training_and_never_disturbed(kind: str, world_size: int) -> None:
    found = run(world_size, through_a_training, kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in Net().state_dict().items() if name != "out.weight"}
    for held in found:
        assert held.keys() == shapes.keys()
    for name, shape in shapes.items():  # replicas hold the same boxes
        check_exact_cover(name, shape, set().union(*(held[name] for held in found)))
    if kind in {"FULL_SHARD", "FULL_SHARD flat"}:
        assert any(len(held) > 1 for rank in found for held in rank.values())
        assert any(not held for rank in found for held in rank.values())


# -- other values for a while


def averaged() -> nn.Module:
    """A plain model with other values than Net(), in eval mode."""
    model = Net()
    with torch.no_grad():
        for tensor in [*model.parameters(), model.norm.running_mean]:
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) / 4)
    return model.eval()


class AbortError(Exception):
    pass


def abort(*_: Any) -> None:
    raise AbortError


@contextmanager
def evaluation(model: nn.Module, *, aborted: bool) -> Iterator[None]:
    """An average in the model, as PostHocEMA.model puts it there; the way out must not communicate."""
    layout, wanted = read_layout(model), averaged()
    state = wanted.state_dict()
    if isinstance(model, FSDPModule):
        model.unshard(async_op=True)  # gathers the model's own, ahead of the next forward
    with ExitStack() as stack:
        write = stack.enter_context(swapped(model, layout, ALONE))
        for tensor in layout.tensors:
            box = tensor.box
            write(tensor.info.fqn, box, torch.zeros(box.sizes))
            for row in range(box.num_rows):  # as it comes from storage: in pieces
                part = box.rows(row, row + 1)
                write(tensor.info.fqn, part, cut(state[tensor.info.fqn], part))
        model.eval()
        with torch.no_grad():
            found, exact = model(TOKENS), wanted(TOKENS)
        assert (found - exact).norm() < (0.03 if found.dtype == torch.bfloat16 else 1e-6) * exact.norm()
        if aborted:
            block = next(module for module in model.modules() if isinstance(module, Block))
            handle = block.down.register_forward_pre_hook(abort)
            with torch.no_grad(), pytest.raises(AbortError):
                model(TOKENS)
            handle.remove()
        stack.enter_context(no_collectives())
        yield
    if hasattr(model, "reset_iter_state"):  # the next forward must not take itself for a part of the one that was left
        assert model._get_fsdp_state()._state_ctx.iter_forward_root is None


@offload_without_accelerator()
def swap_while_training(kind: str) -> None:
    model, twin = sharded(kind), sharded(kind)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, twin)]

    def step(each: nn.Module, optimizer: torch.optim.Optimizer, evaluate: Callable[[], None]) -> None:
        each.train()
        optimizer.zero_grad()
        evaluate()
        accumulate(each)
        evaluate()
        each(TOKENS).square().mean().backward()
        evaluate()
        optimizer.step()
        evaluate()

    for aborted in (False, True, False):

        def evaluate(aborted: bool = aborted) -> None:
            with evaluation(model, aborted=aborted):
                pass

        step(model, optimizers[0], evaluate)
        step(twin, optimizers[1], lambda: None)
        with torch.no_grad():  # a forward right afterwards must not see the average
            assert torch.equal(model(TOKENS), twin(TOKENS))
    found, wanted = truth(model), truth(twin)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# Under the one that is left out, any forward between zero_grad and the next backward changes gradients, torch 2.13 too.
@pytest.mark.parametrize(("kind", "world_size"), [case for case in FSDP1 + FSDP2 if case[0] != "SHARD_GRAD_OP offload"])
def test_a_model_takes_an_average_at_any_moment_and_trains_on_as_if_nothing_had_happened(
    kind: str, world_size: int
) -> None:
    run(world_size, swap_while_training, kind)


# -- FSDP1 in particular


def in_other_wrappers() -> list[str]:
    """Activation checkpoints and torch.compile, inside and around; ties between units; units without elements."""
    for orig in (True, False):
        net = Net()
        net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
        model = fsdp1("FULL_SHARD", *([] if orig else ["flat"]), net=net)
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        model = torch.compile(model, backend="eager")
        layout = read_layout(model)
        assert_true(layout, values(layout), truth(model))
        assert is_sharded(model)
        layout.check_unchanged()

    net = nn.Sequential(Block(), Block())
    net.up = net[1].up.weight = net[0].up.weight  # held by the first unit; the second one and the root refer to it
    model = FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Block})
    )
    layout = read_layout(model)
    assert layout.aliases == {"0.up.weight": "up", "1.up.weight": "up"}
    assert {info.shape for info in layout.infos.values()} == {tuple(p.shape) for p in Block().state_dict().values()}
    tied = [(tensor.box, tensor.local().clone()) for tensor in layout.tensors if tensor.info.fqn == "up"]
    with FullyShardedDataParallel.summon_full_params(model[0], writeback=False):
        assert all(torch.equal(cut(model[0].up.weight, box), found) for box, found in tied)

    net = nn.Linear(3, 4)
    net.none = nn.Parameter(torch.zeros(0, 7))
    for orig in (True, False):
        model = FullyShardedDataParallel(copy.deepcopy(net), device_id=torch.device("cpu"), use_orig_params=orig)
        layout = read_layout(model)
        assert boxes(layout)["none"] == {Box((0, 0), (0, 7))}
        values(layout)

    # What belongs to units that are not there.
    inner = FullyShardedDataParallel(Block(), device_id=torch.device("cpu"), use_orig_params=True).module
    flat = FullyShardedDataParallel(Block(), device_id=torch.device("cpu")).module
    return [outcome(lambda: read_layout(inner)), outcome(lambda: read_layout(flat))]


def test_fsdp1_keeps_the_bare_models_names_in_other_wrappers_and_ties_between_units() -> None:
    for inner, flat in run(2, in_other_wrappers):
        assert re.search(r"up.weight must belong to an FSDP1 module .* a part \(.*Pass the model that", inner)
        assert "_flat_param must belong to an FSDP1 module" in flat


def set_from_outside() -> None:
    """Somebody gives parameters other data, which FSDP1 takes in at the next forward, and not before."""
    for kind in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        for forward_before, swap_before in ((False, False), (True, False), (True, True)):
            model = fsdp1(kind)
            layout = read_layout(model)
            if forward_before:
                model(TOKENS).sum().backward()
            wanted = {}
            for tensor, found in zip(layout.tensors, values(layout), strict=True):
                wanted[tensor] = found + (tensor.is_parameter and tensor.info.fqn != "conv.weight")
            for name, parameter in model.named_parameters():
                if parameter.numel() and "conv.weight" not in name:  # FSDP1 would put it in another order
                    parameter.data = parameter.data + 1
            if swap_before:
                with swapped(model, layout, ALONE) as write:
                    for tensor in layout.tensors:
                        write(tensor.info.fqn, tensor.box, torch.zeros(tensor.box.sizes))
            assert all(torch.equal(tensor.local(), wanted[tensor]) for tensor in layout.tensors)
            now = truth(model)
            assert all(torch.equal(cut(now[t.info.fqn], t.box), found) for t, found in wanted.items())


def test_data_that_somebody_set_is_read_before_fsdp1_takes_it_in_and_is_not_lost_by_an_evaluation() -> None:
    run(2, set_from_outside)


def what_fsdp1_cannot_hold() -> list[str]:
    scalar, gaps = nn.Linear(3, 4), nn.Linear(3, 4)
    scalar.gain = nn.Parameter(torch.ones(()))
    gaps.weight = nn.Parameter(torch.ones(4, 7)[:, :3])
    models = [scalar, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, dtype=torch.bfloat16)), gaps]
    said = [
        outcome(lambda m=model: read_layout(FullyShardedDataParallel(m, device_id=torch.device("cpu"))))
        for model in models
    ]
    model = fsdp1("FULL_SHARD")
    del model._handle.flat_param._shard_param_infos
    said.append(outcome(lambda: read_layout(model)))
    with FullyShardedDataParallel.summon_full_params(model := fsdp1("FULL_SHARD"), writeback=False):
        said.append(outcome(lambda: reshard(model)))
    return said


def test_what_fsdp1_cannot_hold_is_refused_by_torch_or_by_us() -> None:
    scalar, dtypes, gaps, unknown, summoned = run(2, what_fsdp1_cannot_hold)[0]
    assert "FSDP doesn't support scalar parameters. Change gain to a 1D tensor" in scalar
    assert "Must flatten tensors with uniform dtype but got torch.float32 and torch.bfloat16" in dtypes
    assert "setStorage: sizes [4, 3], strides [7, 1]" in gaps
    assert re.search(r"LayoutError: FSDP1 must keep its shards .* torch 2.* does not. .*fully_shard instead", unknown)
    assert "leave summon_full_params before" in summoned


# -- DTensors


def with_weight(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(tensor)
    return model


def distribute_in_every_way() -> list[tuple[tuple[int, ...], Boxes]]:
    """Uneven, empty and scalar tensors, on meshes of one to three axes, by torch's own distribute_tensor."""
    found = []
    for mesh_shape in [(4,), (2, 2), (1, 4), (2, 1, 2), (2, 2, 1)]:
        mesh = init_device_mesh("cpu", mesh_shape)
        for shape in [(7, 5), (3, 9), (1, 6), (8, 4), (0, 3), (5,), ()]:
            whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
            ways = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
            for placements in product(ways, repeat=len(mesh_shape)):
                layout = read_layout(
                    with_weight(distribute_tensor(whole, mesh, placements, src_data_rank=None)), prefix=f"{placements} "
                )
                for tensor in layout.tensors:
                    assert torch.equal(tensor.local(), cut(whole, tensor.box)), (mesh, shape, placements)
                found.append((shape, boxes(layout)))
    return found


def test_boxes_of_dtensors_are_what_distribute_tensor_puts_there() -> None:
    by_rank = run(4, distribute_in_every_way)
    assert len(by_rank[0]) > 300
    for cases in zip(*by_rank, strict=True):
        (shape,) = {shape for shape, _ in cases}
        (name,) = cases[0][1]
        check_exact_cover(name, shape, set().union(*(held[name] for _, held in cases)))


FEATURES = torch.arange(36.0).view(4, 9).sin()


class TensorParallel(nn.Module):
    """Rows and columns that one, two and four ranks divide unevenly; norms and a gain that are not divided."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(9, width), nn.Linear(width, 9), nn.LayerNorm(9)
        self.gain = nn.Parameter(torch.rand(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x)))


def tensor_parallel(kind: str, width: int) -> nn.Module:
    net = TensorParallel(width)
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    plan: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(net, mesh["tp"], plan | ({"norm": SequenceParallel()} if kind == "sequence" else {}))
    if kind == "hsdp":
        return fully_shard(net, mesh=mesh["replicate", "shard"])
    if kind == "fsdp2":
        return fully_shard(net, mesh=mesh["replicate"])
    if kind.startswith("fsdp1"):
        return FullyShardedDataParallel(
            net, device_mesh=mesh["replicate"], device_id=torch.device("cpu"), use_orig_params=kind == "fsdp1"
        )
    return net


def tensor_parallel_boxes(kind: str, width: int) -> Boxes:
    model, layout = tensor_parallel(kind, width), None
    whole = {name: tensor.detach() for name, tensor in TensorParallel(width).named_parameters()}
    for step in range(3 if width == 8 and kind != "sequence" else 1):  # torch's own forward takes even parts only
        if step:
            with torch.no_grad():
                model(FEATURES)
        with no_collectives():
            layout = layout or read_layout(model)
            for tensor in layout.tensors:
                assert torch.equal(tensor.local(), cut(whole[tensor.info.fqn], tensor.box)), tensor.info.fqn
            layout.check_unchanged()
    assert is_sharded(model)
    return boxes(layout)


@pytest.mark.parametrize("kind", ["tp", "sequence", "fsdp2", "hsdp", "fsdp1", "fsdp1 flat"])
def test_tensor_parallelism_alone_and_below_fsdp(kind: str) -> None:
    for width in (8,) if kind.startswith("fsdp1") else (7, 8):  # FSDP1 takes parts for even ones
        found = run(4, tensor_parallel_boxes, kind, width)
        for name, tensor in TensorParallel(width).named_parameters():
            check_exact_cover(name, tuple(tensor.shape), set().union(*(held[name] for held in found)))


def refused_dtensors() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    def local(rows: int, placement: Placement, all_rows: int = 8) -> nn.Module:
        tensor = DTensor.from_local(
            torch.zeros(rows, 3), mesh, [placement], run_check=False, shape=torch.Size((all_rows, 3)), stride=(3, 1)
        )
        return with_weight(tensor)

    strange = local(4, Shard(0))
    strange.weight._local_tensor = nn.Parameter(torch.zeros(4, 3)).as_subclass(Strange)
    tp = parallelize_module(TensorParallel(8), mesh, {"up": ColwiseParallel()})
    mesh_2d = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    below_ddp = parallelize_module(
        TensorParallel(8), mesh_2d["tp"], {"down": RowwiseParallel(), "up": ColwiseParallel()}
    )
    below_ddp = nn.Sequential(nn.parallel.DistributedDataParallel(below_ddp, device_mesh=mesh_2d["dp"]))
    models = [
        local(4, _StridedShard(0, split_factor=2)),
        local(4, Partial()),
        local(3, Shard(0), 9),
        strange,
        below_ddp,
    ]
    said = [outcome(lambda model=model: read_layout(model)) for model in models]
    below_ddp(FEATURES)
    said.append(outcome(lambda: read_layout(below_ddp)))

    layout = read_layout(tp)
    tp.up.weight = nn.Parameter(tp.up.weight.redistribute(placements=[Shard(1)]))
    tp.up.bias = nn.Parameter(torch.zeros(8))
    said.extend(outcome(tensor.local) for tensor in layout.tensors if tensor.info.fqn.startswith("up"))
    plain = nn.Linear(3, 4)
    layout = read_layout(plain)
    fully_shard(plain)
    said.extend(outcome(tensor.local) for tensor in layout.tensors)
    return said


class Strange(torch.Tensor):
    """What a quantizing library puts in place of a tensor."""


def test_what_is_no_block_of_plain_numbers_is_refused_with_name_shape_and_placement() -> None:
    said = run(2, refused_dtensors)[0]
    for text, pattern in zip(
        said,
        [
            r"weight of shape \(8, 3\) with placements \(_StridedShard\(.*\),\) must lie in one block .* interleaves",
            r"weight of shape \(8, 3\) with placements \(Partial\(.*\),\) must be sharded or replicated .* Redistr",
            r"weight of shape \(9, 3\) with placements \(Shard\(.*\),\) must hold \(5, 3\) .* found \(3, 3\). Give",
            r"weight of shape \(8, 3\) must be a plain tensor or a DTensor of one; found Strange",
            r"0.up.weight of shape \(8, 9\) with placements \(Shard\(.*\),\) must not be wrapped by DDP",
            r"0.up.weight of shape \(8, 9\) with placements \(Shard\(.*\),\) must not be wrapped by DDP",
            r"up.weight must stay as it was when PostHocEMA was made, .*\(4, 9\) on this rank; found DTensor",
            r"up.bias must stay as it was when PostHocEMA was made, .*\(4,\) on this rank; found Parameter .*\(8,\)",
            r"weight must stay as it was when PostHocEMA was made, .*found DTensor .*\(4, 3\)",
            r"bias must stay as it was when PostHocEMA was made, .*found DTensor .*\(4,\)",
        ],
        strict=True,
    ):
        assert re.match(f"LayoutError: {pattern}", text), text


def some_ranks_only() -> tuple[Boxes, bool]:
    """A mesh of ranks 0 and 1 of four, and DDP over one axis of a mesh."""
    tensor = distribute_tensor(torch.arange(6.0), DeviceMesh("cpu", [0, 1]), [Shard(0)], src_data_rank=None)
    found = boxes(read_layout(with_weight(tensor)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "other"))
    ddp = nn.parallel.DistributedDataParallel(TensorParallel(), device_mesh=mesh["dp"])
    layout = read_layout(ddp)
    assert layout.infos.keys() == dict(TensorParallel().named_parameters()).keys()
    assert not is_sharded(ddp)
    return found, all(tensor.replicated for tensor in layout.tensors)


def test_a_rank_outside_of_a_mesh_knows_the_tensor_and_holds_nothing_of_it() -> None:
    found = run(4, some_ranks_only)
    assert [held["weight"] for held, _ in found] == [{Box((0,), (3,))}, {Box((3,), (3,))}, set(), set()]
    assert all(replicated for _, replicated in found)


# -- FSDP2 in particular


def replaced_shards(readable: bool) -> None:
    """load_state_dict(assign=True), to_empty and the like replace a DTensor; then the root stays gathered."""
    with pytest.MonkeyPatch.context() as patch:
        if not readable:  # as in a version of torch that keeps its books in another way
            patch.setattr(wrappers, "_fsdp2_parameters", lambda _: None)
        for forward_before in (False, True):
            model = fsdp2("fsdp2")
            layout = read_layout(model)
            values(layout)
            if forward_before:
                model(TOKENS).sum().backward()
            loaded = {
                name: tensor + 1 if tensor.is_floating_point() else tensor
                for name, tensor in model.state_dict().items()
            }
            model.load_state_dict(loaded, assign=True)
            if not readable:
                values(layout)  # sees the new ones
            with torch.no_grad():
                model(TOKENS)
            assert not isinstance(model.first.weight, DTensor)
            local = values(layout)
            layout.check_unchanged()
            now = truth(model)
            assert_true(layout, local, now)
            assert torch.equal(now["first.weight"], loaded["first.weight"].full_tensor())
            model.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(3.0)
            assert all(bool((t.local() == 3).all()) for t in layout.tensors if t.is_parameter)
            model.to(torch.float64)
            assert "must stay as it was" in outcome(lambda layout=layout: values(layout))


@pytest.mark.parametrize("readable", [True, False], ids=["by its books", "by what was seen"])
def test_fsdp2s_current_shards_are_read_although_they_were_replaced_and_others_are_gathered(readable: bool) -> None:
    run(2, replaced_shards, readable)


def from_meta() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model = fully_shard(net)
    assert "0.weight must have storage; it is on the meta device" in outcome(lambda: read_layout(model))
    model.to_empty(device="cpu")
    layout = read_layout(model)
    with torch.no_grad():
        for tensor in layout.tensors:
            tensor.local().copy_(torch.arange(tensor.box.numel).view(tensor.box.sizes) + dist.get_rank())
    written = values(layout)
    with torch.no_grad():
        model(torch.ones(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(values(layout), written, strict=True))
    assert_true(layout, written, truth(model))


def test_a_model_that_was_made_without_storage_is_read_once_it_has_some() -> None:
    run(2, from_meta)


def other_ways_to_shard() -> list[Boxes]:
    """By another dim; several modules as one unit; not at all (replicate); gathered for good."""
    net = TensorParallel(8)
    whole = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    columns = fully_shard(
        copy.deepcopy(net), shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 and p.size(1) % 2 == 0 else Shard(0)
    )
    together = copy.deepcopy(net)
    fully_shard([together.up, together.down])
    fully_shard(together)
    replicas = replicate(copy.deepcopy(net))
    gathered = fully_shard(copy.deepcopy(net))
    gathered.set_reshard_after_backward(reshard_after_backward=False)
    found = []
    for model in (columns, together, replicas, gathered):
        layout = read_layout(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(FEATURES).square().sum().backward()
        for tensor in layout.tensors:
            assert torch.equal(tensor.local(), cut(whole[tensor.info.fqn], tensor.box))
        optimizer.step()
        local = values(layout)
        layout.check_unchanged()
        assert_true(layout, local, truth(model))
        assert not torch.equal(truth(model)["up.weight"], whole["up.weight"])
        found.append(boxes(layout))
    return found


def test_other_ways_to_shard() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TensorParallel(8).named_parameters()}
    for by_rank in zip(*run(2, other_ways_to_shard), strict=True):
        for name, shape in shapes.items():
            check_exact_cover(name, shape, set().union(*(held[name] for held in by_rank)))
