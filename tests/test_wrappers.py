"""Where torch's wrappers put a model: each rank's boxes, compared with what torch itself says the whole tensors are."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_distributed import no_collectives
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
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
from torch.distributed.tensor import DTensor

from phema_dist.errors import LayoutError
from phema_dist.ranks import ALONE
from phema_dist.shard import Box, check_exact_cover
from phema_dist.storage.manifest import BUFFER, PARAMETER
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
    *((f"NO_SHARD{flat}", 2) for flat in ("", " flat", " mixed", " flat mixed")),
    *((f"FULL_SHARD{flat} {setting}", 2) for flat in ("", " flat") for setting in ("mixed", "offload")),
    *((f"SHARD_GRAD_OP{flat} offload", 2) for flat in ("", " flat")),
]
FSDP2 = [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("zero2", 2), ("half", 4), ("offload", 2), ("mixed", 2)]


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
    with ExitStack() as stack:
        write = stack.enter_context(swapped(model, layout, ALONE))
        for tensor in layout.tensors:
            box = tensor.box
            write(tensor.info.fqn, box, torch.zeros(box.sizes))
            for row in range(box.num_rows):  # as it comes from storage: in pieces
                part = box.rows(row, row + 1)
                write(tensor.info.fqn, part, cut(state[tensor.info.fqn], part))
        with torch.no_grad():
            found, exact = model(TOKENS), wanted(TOKENS)
        assert (found - exact).norm() < (0.03 if found.dtype == torch.bfloat16 else 1e-6) * exact.norm()
        if aborted:
            handle = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(abort)
            with pytest.raises(AbortError):
                model(TOKENS)
            handle.remove()
        stack.enter_context(no_collectives())
        yield


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


@pytest.mark.parametrize(("kind", "world_size"), FSDP1 + FSDP2)
def test_a_model_takes_an_average_at_any_moment_and_trains_on_as_if_nothing_had_happened(
    kind: str, world_size: int
) -> None:
    run(world_size, swap_while_training, kind)
