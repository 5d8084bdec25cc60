"""Averages in a live model, for a while or for good: under any wrapper they have the bits of the checkpoint.

From storage or from the averages as they are, by every rank for itself or shared among replicas, and training goes on
from its own parameters, or from the average, as if nothing else had happened.
"""

import logging
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import outcome, run
from test_distributed import SIGMA_RELS, State, inputs, names, no_collectives
from test_matrix import KINDS, net_without, take_values, tensor_parallel
from test_resharding import assert_holds, live
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import phema_dist.ranks
from phema_dist import PostHocEMA, SynthesisReader, synthesize
from phema_dist.errors import LayoutError, SettingsError, SnapshotError
from phema_dist.storage.store import LocalStore
from phema_dist.training import exchange as exchanging
from phema_dist.training import policy

TRACKED, OTHER = SIGMA_RELS[0], 0.13
# A forward of these needs more than Net has: inputs that are sharded, too, or one dtype. See FORWARDS.
SILENT = {"tp", "fsdp2-tp", "fsdp2-mixed"}
UNTRAINED = SILENT | {"fsdp1-offload"}  # whose backward asks the device for streams, and a CPU has none


def forward(kind: str, model: nn.Module) -> torch.Tensor | None:
    """After this without gradients, FSDP's root stays gathered: it would not look at its shards again."""
    if kind in SILENT:
        return None
    flags = [(module, module.training) for module in model.modules()]
    model.eval()  # or BatchNorm would take note
    with torch.no_grad():
        found = model(*inputs())
    for module, flag in flags:
        module.training = flag
    return found


def bits(model: nn.Module) -> State:
    """All that this rank holds, cloned."""
    if isinstance(model, FullyShardedDataParallel):
        return {name: tensor.detach().clone() for name, tensor in live(model)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    local = ((name, t._local_tensor if isinstance(t, DTensor) else t) for name, t in names(model))
    return {name: tensor.detach().clone() for name, tensor in local}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def made(kind: str, folder: str, **settings: Any) -> tuple[nn.Module, PostHocEMA]:
    model = KINDS[kind].wrap(net_without(KINDS[kind].without))
    cadence = {"update_every": 1, "checkpoint_every": 5} | settings
    return model, PostHocEMA.from_model(model, folder, sigma_rels=SIGMA_RELS, **cadence)


@contextmanager
def patched(target: object, name: str, value: object) -> Iterator[None]:
    """For a while only: the processes of the ranks live on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def train(ema: PostHocEMA, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last + 1):
        take_values(model, step)
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]  these steps take no time


def learn(model: nn.Module, kind: str) -> State:
    """Two steps of an optimizer."""
    if kind in UNTRAINED:
        return {}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        model(*inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return bits(model)


def evaluate_as(kind: str, folder: str) -> None:
    model, ema = made(kind, folder)
    twin, loaded = (KINDS[kind].wrap(net_without(KINDS[kind].without)) for _ in range(2))
    train(ema, model, 1, 11)  # snapshots at 5 and 10
    take_values(twin, 11)
    dist.barrier()
    stored = {s.sigma_rel: s.state_dict for s in synthesize(folder, [TRACKED, OTHER], t=10)}
    assert forward(kind, model) is None or kind not in SILENT
    own, flags = bits(model), [module.training for module in model.modules()]

    for sigma_rel, settings in [(TRACKED, {"step": 10}), (OTHER, {}), (OTHER, {"exchange": True})]:
        forward(kind, model)
        with ema.model(model, sigma_rel, **settings):
            assert_holds(model, stored[sigma_rel])
            averaged = forward(kind, model)
        assert same(bits(model), own)
        assert [module.training for module in model.modules()] == flags
    if averaged is not None:
        state = get_model_state_dict(loaded)
        dcp.load(state, storage_reader=SynthesisReader(folder, OTHER))
        set_model_state_dict(loaded, state)
        loaded.eval()
        expected = forward(kind, loaded)
        assert expected is not None
        assert torch.equal(averaged, expected)

    inside = []
    for _ in range(2):
        forward(kind, model)
        with ema.model(model, TRACKED, exchange=True):  # as it is now: there is no snapshot at 11
            inside.append(bits(model))
    assert same(bits(model), own)
    assert same(learn(model, kind), learn(twin, kind))
    take_values(model, 11)
    ema.close()  # a snapshot at 11
    dist.barrier()
    (now,) = synthesize(folder, [TRACKED])
    assert now.t == 11
    with PostHocEMA.from_path(folder).model(model, TRACKED):
        assert_holds(model, now.state_dict)
        assert all(same(each, bits(model)) for each in inside)


def cases() -> list[tuple[str, int]]:
    return [(kind, world_size) for kind in KINDS for world_size in KINDS[kind].worlds[:1]]


@pytest.mark.parametrize(("kind", "world_size"), cases())
@pytest.mark.filterwarnings("ignore")
def test_any_wrapper_evaluates_the_bits_of_the_checkpoint_and_trains_on_as_if_it_had_not(
    kind: str, world_size: int, tmp_path: Path
) -> None:
    run(world_size, evaluate_as, kind, str(tmp_path))


def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])


# Those of SILENT, with a model that they can run.
FORWARDS: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {
    "tp": (2, tensor_parallel),
    "fsdp2-tp": (4, lambda net: fully_shard(tensor_parallel(net, mesh(2, 2)["tp"]), mesh=mesh(2, 2)["dp"])),
    "fsdp2-mixed": (2, lambda net: fully_shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))),
}


def perceptron(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), middle=nn.ReLU(), last=nn.Linear(8, 4)))
    return FORWARDS[kind][1](net)


def evaluate_forwards(kind: str, folder: str) -> None:
    model, twin, loaded = (perceptron(kind) for _ in range(3))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(dist.get_rank() // 2))  # the same in a group of TP

    def train(model: nn.Module, ema: PostHocEMA | None = None) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(10):
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update_(model)

    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=5) as ema:
        train(model, ema)
        with torch.no_grad():
            own = model(x)
        ema._session.writer.drain()  # type: ignore[union-attr]
        dist.barrier()  # all have stored their parts
        with ema.model(model, OTHER), torch.no_grad():
            averaged = model(x)
        state = get_model_state_dict(loaded)
        dcp.load(state, storage_reader=SynthesisReader(folder, OTHER))
        set_model_state_dict(loaded, state)
        with torch.no_grad():
            assert torch.equal(averaged, loaded(x))
        assert not torch.equal(averaged, own)
        train(model)  # torch itself may lose a gradient here if the root is still gathered
    train(twin)
    train(twin)
    assert same(bits(model), bits(twin))


@pytest.mark.parametrize("kind", FORWARDS)
@pytest.mark.filterwarnings("ignore")
def test_outputs_are_those_of_a_model_that_loads_the_average(kind: str, tmp_path: Path) -> None:
    run(FORWARDS[kind][0], evaluate_forwards, kind, str(tmp_path))


def with_own_buffers(model: nn.Module, state: State) -> State:
    return state | {name: buffer for name, buffer in bits(model).items() if name in buffers_of(model)}


def buffers_of(model: nn.Module) -> set[str]:
    return {name.replace("_fsdp_wrapped_module.", "").removeprefix("module.") for name, _ in model.named_buffers()}


def switch_as(kind: str, folder: str) -> None:
    model, ema = made(kind, folder)
    train(ema, model, 1, 11)
    dist.barrier()
    (stored,) = synthesize(folder, [OTHER], t=10)
    forward(kind, model)
    ema.switch_(model, OTHER)
    assert_holds(model, with_own_buffers(model, stored.state_dict))
    assert model.training
    forward(kind, model)
    ema.switch_(model)  # the shortest, as it is now
    switched = bits(model)
    resets = [ema.reset_hare_(model, every=every, sigma_rel=SIGMA_RELS[1]) for every in (5, 11)]
    assert resets == [False, True]
    slow = bits(model)
    ema.close()
    dist.barrier()
    for found, s in zip((switched, slow), synthesize(folder, SIGMA_RELS), strict=True):
        assert s.t == 11
        with PostHocEMA.from_path(folder).model(model, s.sigma_rel):
            inside = bits(model)
        assert all(torch.equal(found[name], inside[name]) for name in found.keys() - buffers_of(model))


@pytest.mark.parametrize(("kind", "world_size"), cases())
@pytest.mark.filterwarnings("ignore")
def test_any_wrapper_goes_on_from_the_bits_of_the_checkpoint(kind: str, world_size: int, tmp_path: Path) -> None:
    run(world_size, switch_as, kind, str(tmp_path))


def enter_alone(folder: str) -> tuple[int, bool]:
    """Under DDP, one rank enters; what it waits for happens behind the other's main thread."""
    model, ema = made("ddp", folder)
    writer = ema._session.writer  # type: ignore[union-attr]
    put = writer._storing.store

    def slow(manifest: Any) -> None:
        time.sleep(1.0 if dist.get_rank() == 1 else 0)
        put(manifest)

    writer._storing.store = slow  # type: ignore[method-assign]
    for step in range(1, 6):
        take_values(model, step)
        ema.update_(model)
    found = 0
    if dist.get_rank() == 0:
        with no_collectives(), ema.model(model, OTHER):
            (stored,) = synthesize(folder, [OTHER], t=5)
            assert_holds(model, stored.state_dict)
        with no_collectives(), ema.state_dict(OTHER) as state:
            assert all(torch.equal(state[name], stored.state_dict[name]) for name in state)
        found = stored.t
    dist.barrier()
    ema.close()
    return found, writer.counts.skipped == 0


def test_a_rank_of_ddp_may_enter_alone_and_finds_its_newest_snapshot_complete(tmp_path: Path) -> None:
    assert run(2, enter_alone, str(tmp_path)) == [(5, True), (0, True)]


def give_up_waiting(folder: str) -> tuple[list[str], int]:
    model, ema = made("ddp", folder, checkpoint_every=1)
    train(ema, model, 1, 1)
    dist.barrier()
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    found = 0
    if dist.get_rank() == 0:
        train(ema, model, 2, 2)  # the other rank has none at 2
        logging.getLogger("phema_dist").addHandler(handler)
        with patched(policy.wait_until_complete, "__defaults__", (0.3,)), ema.model(model, SIGMA_RELS[1]):
            (stored,) = synthesize(folder, [SIGMA_RELS[1]])
            assert_holds(model, stored.state_dict)
        logging.getLogger("phema_dist").removeHandler(handler)
        found = stored.t
    dist.barrier()
    return logged, found


def test_a_rank_that_waits_in_vain_says_so_and_takes_an_older_snapshot(tmp_path: Path) -> None:
    (logged, found), _ = run(2, give_up_waiting, str(tmp_path))
    assert found == 1
    assert any("t=2: other ranks have not stored their parts so far" in text for text in logged)


def read_counted(folder: str) -> list[int]:
    """Bytes that this rank reads to fill a model of 8 MiB by itself, and together with the others."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(2048, 1024))
    num_read, counts = 0, []
    original = LocalStore.read_into

    def counted(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        nonlocal num_read
        num_read += len(buffer)
        original(self, key, start, buffer)

    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStore, "read_into", counted)
            for exchange in (False, True):
                num_read = 0
                with ema.model(model, 0.28, step=1, exchange=exchange):
                    counts.append(num_read)
    return counts


def test_replicas_share_the_reading(tmp_path: Path) -> None:
    num_bytes = 4 * (2048 * 1024 + 1024)
    for alone, shared in run(2, read_counted, str(tmp_path)):
        assert num_bytes <= alone < 1.1 * num_bytes
        assert 0.49 * num_bytes <= shared < 0.55 * num_bytes + 4 * 1024 * 1024  # and a block


class Wide(nn.Module):
    """Parameters of several messages, in dtypes of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.row = nn.Parameter(torch.randn(61, 7)), nn.Parameter(torch.randn(1, 400))
        self.low, self.fine = nn.Parameter(torch.randn(5).half()), nn.Parameter(torch.randn(3).double())
        self.nothing, self.scalar = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("flag", torch.tensor([True, False, True]))


def exchange_in_small_messages(folder: str) -> None:
    model = nn.parallel.DistributedDataParallel(Wide())
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=3) as ema:
        for _ in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            ema.update_(model)
        with patched(exchanging, "_MESSAGE_BYTES", 100), ema.model(model, 0.05, exchange=True):
            found = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    dist.barrier()
    (wanted,) = synthesize(folder, [0.05])
    assert all(torch.equal(found[name], wanted.state_dict[name].to(found[name].dtype)) for name in found)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_averages_are_exchanged_in_messages_of_any_size(world_size: int, tmp_path: Path) -> None:
    run(world_size, exchange_in_small_messages, str(tmp_path))


def fail_while_writing(folder: str) -> str:
    """A rank that fails in the exchange does not leave the others waiting."""
    model, ema = made("ddp", folder)
    train(ema, model, 1, 5)
    own = bits(model)

    def use() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr("phema_dist.training.swap.intersect", None)
            with ema.model(model, TRACKED, exchange=True):
                raise AssertionError

    said = outcome(use)
    assert same(bits(model), own)
    return said


def test_what_fails_on_one_rank_in_an_exchange_is_raised_on_all(tmp_path: Path) -> None:
    for said in run(2, fail_while_writing, str(tmp_path)):
        assert "'NoneType' object is not callable" in said


# -- on one process


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(model: nn.Module, ema: PostHocEMA, number: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(number):
        model(torch.ones(5, 3, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_(model)


def test_a_tracked_length_is_there_before_the_first_snapshot_and_others_are_not(tmp_path: Path) -> None:
    model = line()
    with PostHocEMA.from_model(model, tmp_path, update_every=2, checkpoint_every=100) as ema:
        with pytest.raises(SnapshotError), ema.model(model, 0.05):
            raise AssertionError
        stepped(model, ema, 3)
        with pytest.raises(SnapshotError, match="The first is written"), ema.model(model, 0.1):
            raise AssertionError
        with ema.model(model, 0.05):
            inside = [p.detach().clone() for p in model.parameters()]
    (stored,) = synthesize(tmp_path, [0.05])
    assert stored.t == 2  # the last update: there was none at 3
    assert all(map(torch.equal, inside, stored.state_dict.values()))


def test_entering_changes_neither_the_averages_nor_the_snapshots(tmp_path: Path) -> None:
    def trained(folder: str, enter: Callable[[PostHocEMA, nn.Module], None]) -> State:
        model = line()
        with PostHocEMA.from_model(model, tmp_path / folder, update_every=3, checkpoint_every=7) as ema:
            for _ in range(5):
                stepped(model, ema, 4)
                ema._session.writer.drain()  # these steps take no time
                enter(ema, model)
        (found,) = synthesize(tmp_path / folder, [0.1])
        return found.state_dict

    def enter(ema: PostHocEMA, model: nn.Module) -> None:
        with ema.model(model, 0.05), ema.model(model, 0.28):
            pass

    assert same(trained("entered", enter), trained("not", lambda *_: None))


def test_a_refused_update_is_not_evaluated(tmp_path: Path) -> None:
    model = line()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=2) as ema:
        stepped(model, ema, 2)
        ema._session.writer.drain()
        own = model[0].bias.detach().clone()
        with torch.no_grad():
            model[0].bias.fill_(torch.nan)
        ema.update_(model)
        with ema.model(model, 0.05):  # the newest snapshot
            assert model[0].bias.isfinite().all()
        with torch.no_grad():
            model[0].bias.copy_(own)
        ema.update_(model)


def test_inside_a_block_the_model_is_not_switched_and_after_close_neither(tmp_path: Path) -> None:
    model = line()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1) as ema:
        stepped(model, ema, 2)
        with ema.model(model, 0.05), pytest.raises(SettingsError, match="switch outside"):
            ema.switch_(model)
    with pytest.raises(SettingsError, match="closed"):
        ema.switch_(model)


@pytest.mark.parametrize("every", [0, -1, 2.5, None])
def test_hares_are_reset_every_so_many_calls(every: Any, tmp_path: Path) -> None:
    with PostHocEMA.from_model(line(), tmp_path) as ema, pytest.raises(SettingsError, match="every must be"):
        ema.reset_hare_(every=every)


def test_a_switch_changes_parameters_only_and_training_goes_on_from_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=50) as ema:
        assert not ema.reset_hare_(every=3)  # before the first call
        resets = []
        for _ in range(7):
            stepped(model, ema, 1, optimizer)
            moments = {p: state["exp_avg"].clone() for p, state in optimizer.state.items()}
            buffers = [buffer.clone() for buffer in model.buffers()]
            with ema.model(model, 0.28):
                average = [p.detach().clone() for p in model.parameters()]
            resets.append(ema.reset_hare_(model, every=3, sigma_rel=0.28))
            if resets[-1]:
                assert all(map(torch.equal, average, model.parameters()))
            assert all(torch.equal(state["exp_avg"], moments[p]) for p, state in optimizer.state.items())
            assert all(map(torch.equal, buffers, model.buffers()))
        assert resets == [False, False, True, False, False, True, False]
        assert ema.t == 7
        assert model.training


def test_a_reset_of_every_call_leaves_nothing_but_the_average(tmp_path: Path) -> None:
    """By hand: a hare that is reset at each step moves by what its average moves."""
    model, sigma_rel = nn.Linear(1, 1, bias=False), 0.28
    gamma = next(g / 1000 for g in range(10000) if _sigma_rel(g / 1000) <= sigma_rel)
    with torch.no_grad():
        model.weight.zero_()
    slow = 0.0
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        for t in range(1, 30):
            with torch.no_grad():
                model.weight.add_(1)
            slow += (1 - ((t - 1) / t) ** (gamma + 1)) * (slow + 1 - slow)
            ema.update_(model)
            assert ema.reset_hare_(model, every=1, sigma_rel=sigma_rel)
            assert model.weight.item() == pytest.approx(slow, rel=2e-3)


def _sigma_rel(gamma: float) -> float:
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


# -- what must not go wrong


def ones(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def counted(folder: Path, within: Callable[[PostHocEMA, nn.Module], None]) -> float:
    """A tracked average of a parameter that counts the steps, with something done in between; updates are skipped."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    with PostHocEMA.from_model(model, folder, update_every=10, checkpoint_every=10, on_busy="skip") as ema:
        for _ in range(13):
            ones(model)
            ema.update_(model)
        ema._session.writer.drain()
        within(ema, model)
    (stored,) = synthesize(folder, [0.05])
    assert stored.t == 13
    return stored.state_dict["weight"].item()


def nested(ema: PostHocEMA, model: nn.Module) -> None:
    with ema.model(model, 0.13), ema.model(model, 0.05):
        pass


def state_in_a_block(ema: PostHocEMA, model: nn.Module) -> None:
    state = ema.training_state
    with ema.model(model, 0.13):
        state.state_dict()


@pytest.mark.parametrize("within", [nested, state_in_a_block])
def test_what_is_borrowed_is_never_averaged(within: Callable[[PostHocEMA, nn.Module], None], tmp_path: Path) -> None:
    assert counted(tmp_path / "found", within) == counted(tmp_path / "wanted", lambda *_: None)


def test_an_update_inside_the_block_of_another_object_is_refused(tmp_path: Path) -> None:
    model = line()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1) as ema:
        stepped(model, ema, 2)
        ema._session.writer.drain()
        reader = PostHocEMA.from_path(tmp_path)
        with reader.model(model, 0.28), pytest.raises(SettingsError, match="the parameters are an average"):
            ema.update_(model)
        ema.update_(model)


def test_autocast_sees_the_average_inside_and_the_parameters_outside(tmp_path: Path) -> None:
    model, x = line(), torch.ones(5, 3)
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        for _ in range(3):
            ones(model)
            ema.update_(model)
        with ema.model(model, 0.28), torch.autocast("cpu", torch.bfloat16):
            wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):  # keeps what it has cast, of what requires gradients
            own = model(x)
            with ema.model(model, 0.28):
                assert torch.equal(model(x), wanted)
            assert torch.equal(model(x), own)
            ema.switch_(model, 0.28)
            assert torch.equal(model(x), wanted)
    assert not torch.equal(own, wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
def test_after_a_training_checkpoint_the_averages_are_those_that_it_brought(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=3, checkpoint_every=5) as ema:
        for _ in range(7):
            stepped(model, ema, 1)
            ema._session.writer.drain()
        with ema.model(model, 0.05):
            wanted = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("weight")}
        dcp.save({"ema": ema.training_state}, checkpoint_id=tmp_path / "saved", no_dist=True)
        stepped(model, ema, 4)
    with PostHocEMA.from_model(model, tmp_path / "run", resume=True, update_every=3, checkpoint_every=5) as ema:
        assert ema.t == 10  # of the last snapshot
        dcp.load({"ema": ema.training_state}, checkpoint_id=tmp_path / "saved", no_dist=True)
        ema._store = None  # type: ignore[assignment]  it needs no storage
        buffers = [buffer.clone() for buffer in model.buffers()]
        with ema.model(model, 0.05):
            assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)
            assert all(map(torch.equal, model.buffers(), buffers))


@pytest.mark.parametrize(("first", "cadence"), [(0, {"update_every": 50}), (400_000, {})])
def test_a_reset_keeps_the_steps_that_no_update_has_seen(first: int, cadence: dict[str, int], tmp_path: Path) -> None:
    """Updates are rarer than resets here: by their cadence, or since the run is long."""
    found = []
    for name, settings in (("often", {"update_every": 1}), ("rarely", cadence)):
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        with PostHocEMA.from_model(model, tmp_path / name, sigma_rels=(0.001, 0.28), **settings) as ema:
            for number in range(1, 101):
                with torch.no_grad():
                    model.weight.add_(1)
                ema.update_(model, t=first + number)
                before = model.weight.item()
                if ema.reset_hare_(model, every=20):
                    found.append(model.weight.item() - before)
    often, rarely = found[:5], found[5:]
    assert len(rarely) == 5
    assert all(0 >= lost > -19.5 for lost in rarely)
    assert first or often[0] == pytest.approx(rarely[0], abs=0.2)


def test_resets_go_on_counting_in_a_resumed_run(tmp_path: Path) -> None:
    resets = []
    for last in (4, 12):
        model = line()
        with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=2, resume=True) as ema:
            while ema.t < last:
                stepped(model, ema, 1)
                ema._session.writer.drain()
                if ema.reset_hare_(model, every=5):
                    resets.append(ema.t)
    assert resets == [5, 10]


def test_a_reset_is_not_repeated_before_the_next_update(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    optimizers = [torch.optim.SGD(part.parameters(), lr=1.0) for part in model]
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        ema.attach(*optimizers)
        for number in range(6):
            before = model[0].weight.item()
            for part, optimizer in zip(model, optimizers, strict=True):
                part.weight.grad = -torch.ones(1, 1)
                optimizer.step()
                due = optimizer is optimizers[1] and number % 2 == 1
                assert ema.reset_hare_(model, every=2, sigma_rel=0.05) is due
                if part is model[0]:
                    assert part.weight.item() > before + 0.5


def test_what_is_tracked_needs_no_storage(tmp_path: Path) -> None:
    model = line()
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=100)
    stepped(model, ema, 3)
    shutil.rmtree(tmp_path / "run")
    with ema.model(model, 0.05):
        inside = [p.detach().clone() for p in model.parameters()]
    ema.switch_(model)
    assert all(map(torch.equal, inside, model.parameters()))
    ema._session.writer.abandon(1.0)


def test_a_copy_on_its_way_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, an attached update is still being copied when a block begins to write."""
    fenced = []
    model = line()
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        stepped(model, ema, 2)
        fence = ema._session.writer.fence
        monkeypatch.setattr(ema._session.writer, "fence", lambda: (fenced.append(model[0].bias.clone()), fence()))
        own = model[0].bias.detach().clone()
        with ema.model(model, 0.05):
            assert torch.equal(fenced[0], own)
        fenced.clear()
        ema.switch_(model)
        assert torch.equal(fenced[0], own)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_buffers_of_any_kind_and_changes_in_the_block_do_not_keep_the_rest_from_coming_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    odd = {
        "sparse": torch.eye(2).to_sparse(), "rows": torch.eye(2).to_sparse_csr(), "meta": torch.zeros(2, device="meta"),
        "turned": torch.view_as_complex(torch.ones(2, 2)).conj(), "later": torch.ones(2),
    }  # fmt: skip
    for name, buffer in odd.items():
        model.register_buffer(name, buffer, persistent=False)
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        for _ in range(2):
            ones(model)
            ema.update_(model)
        own = [p.detach().clone() for p in model.parameters()]
        with ema.model(model, 0.28):
            model.later.zero_()
        assert all(map(torch.equal, own, model.parameters()))
        assert torch.equal(model.later, torch.ones(2))

        def break_it() -> None:
            with ema.model(model, 0.28):
                model[0].weight = nn.Parameter(torch.zeros(9, 9))

        with pytest.raises(LayoutError, match=r"0\.weight must stay as it was"):
            break_it()
        assert all(map(torch.equal, own[1:], list(model.parameters())[1:]))


def ask_for_different_things(folder: str) -> dict[str, tuple[str, bool]]:
    """What each rank is told, and whether its parameters are as before."""
    said = {}
    rank = dist.get_rank()
    model, ema = made("ddp", folder)
    train(ema, model, 1, 5)

    def attempt(name: str, call: Callable[[], None]) -> None:
        own = bits(model)
        text = outcome(call)
        said[name] = (text, same(bits(model), own))

    def enter(sigma_rel: float, step: int | None = None) -> None:
        with ema.model(model, sigma_rel, step, exchange=True):
            pass

    attempt("tracked", lambda: enter((0.05, 0.28)[rank]))
    attempt("one of them tracked", lambda: enter((0.05, 0.2)[rank]))
    attempt("neither", lambda: enter((0.1, 0.2)[rank]))
    attempt("step", lambda: enter(0.05, (None, 5)[rank]))
    attempt("switch", lambda: ema.switch_(model, (0.05, 0.28)[rank]))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("phema_dist.filling.check_writable", lambda _: 1 / 0)
        attempt("not writable", lambda: ema.switch_(model, 0.05))
    ema._session.t += rank  # type: ignore[union-attr]
    attempt("clocks", lambda: enter(0.05))
    attempt("clocks, from storage", lambda: enter(0.1))
    ema._session.t -= rank  # type: ignore[union-attr]
    ema.close()
    return said


def test_ranks_that_ask_for_different_things_are_told_and_nothing_is_changed(tmp_path: Path) -> None:
    for said in run(2, ask_for_different_things, str(tmp_path)):
        for name in ("tracked", "one of them tracked", "neither", "step", "switch"):
            assert re.search("all ranks must ask for the same average; rank 0 asks for", said[name][0]), name
        assert "division by zero" in said["not writable"][0]
        for name in ("clocks", "clocks, from storage"):
            assert "update_ must be called on every rank with the same t" in said[name][0]
        assert all(unchanged for _, unchanged in said.values())


def refuse_on_one_rank(folder: str) -> int:
    """Parameters that are not finite on one rank: ends differ, so all take the snapshot before."""
    model, ema = made("fsdp2", folder)
    train(ema, model, 1, 5)
    take_values(model, 6)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.first.bias._local_tensor.fill_(torch.nan)
    ema.update_(model)
    ema._session.writer.drain()  # type: ignore[union-attr]
    dist.barrier()
    (stored,) = synthesize(folder, [TRACKED], t=5)
    with ema.model(model, TRACKED):
        assert_holds(model, stored.state_dict)
    take_values(model, 7)
    ema.update_(model)
    ema.close()
    return stored.t


def test_averages_that_end_at_different_times_are_not_mixed(tmp_path: Path) -> None:
    assert run(2, refuse_on_one_rank, str(tmp_path)) == [5, 5]


def wait_once_only(folder: str) -> list[float]:
    """Rank 1 has lost its part of the newest snapshot, and after a load there is none of this start."""
    model, ema = made("ddp", folder)
    train(ema, model, 1, 5)
    state = {"ema": ema.training_state}
    dcp.save(state, checkpoint_id=f"{folder}-saved")
    if dist.get_rank() == 1:
        ema._session.writer._storing.store = lambda _: None  # type: ignore[method-assign, union-attr]
    train(ema, model, 6, 10)
    seconds = []

    def enter() -> None:
        begin = time.monotonic()
        with patched(policy.wait_until_complete, "__defaults__", (1.0,)), ema.model(model, OTHER):
            seconds.append(time.monotonic() - begin)

    if dist.get_rank() == 0:
        enter()
        enter()
    dist.barrier()
    dcp.load({"ema": ema.training_state}, checkpoint_id=f"{folder}-saved")
    if dist.get_rank() == 0:
        enter()
    dist.barrier()
    ema._session.writer.abandon(5.0)  # type: ignore[union-attr]
    return seconds


def test_a_rank_waits_for_a_snapshot_once(tmp_path: Path) -> None:
    (first, second, after_load), _ = run(2, wait_once_only, str(tmp_path / "run"))
    assert first > 1.0 > max(second, after_load)


def wait_for_a_rank_that_never_comes(folder: str) -> list[str]:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("phema_dist").addHandler(handler)
    model, ema = made("fsdp2", folder)
    train(ema, model, 1, 5)
    if dist.get_rank() == 1:
        time.sleep(1.0)
    with patched(phema_dist.ranks, "_SECONDS_TO_MEET", 0.2), ema.model(model, TRACKED):
        pass
    ema.close()
    logging.getLogger("phema_dist").removeHandler(handler)
    return logged


def test_who_waits_for_others_says_where(tmp_path: Path) -> None:
    first, _ = run(2, wait_for_a_rank_that_never_comes, str(tmp_path))
    assert any("rank 0 waits for the other ranks in ema.model" in text for text in first)


# -- masters


def low() -> nn.Module:
    return line().bfloat16()


def masters_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().float().clone().requires_grad_() for p in model.parameters()]


def by_parameter(model: nn.Module) -> dict[torch.Tensor, torch.Tensor]:
    return dict(zip(model.parameters(), masters_of(model), strict=True))


def averaged(model: nn.Module, ema: PostHocEMA) -> None:
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        ema.update_(model)


def switched(model: nn.Module, folder: Path, optimizer: Any = (), **settings: Any) -> list[torch.Tensor]:
    """Switch, and the average before rounding."""
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=100) as ema:
        averaged(model, ema)
        ema.switch_(model, 0.05, optimizer=optimizer, **settings)
    (stored,) = synthesize(folder, [0.05])
    return [stored.state_dict[name] for name, _ in model.named_parameters()]


def test_masters_that_an_optimizer_steps_on_get_the_average_before_it_is_rounded(tmp_path: Path) -> None:
    model = low()
    model[0].weight.requires_grad_(False)  # no master of it
    masters = {p: m for p, m in by_parameter(model).items() if p.requires_grad}
    temperature = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([*list(masters.values())[::-1], temperature], lr=0.1)
    average = switched(model, tmp_path, optimizer, masters=masters)
    assert all(map(torch.equal, masters.values(), average[1:]))
    assert all(torch.equal(p, a.bfloat16()) for p, a in zip(model.parameters(), average, strict=True))
    assert not torch.equal(average[1], average[1].bfloat16().float())
    assert temperature == 1


def test_masters_in_the_state_of_an_optimizer_get_it_too(tmp_path: Path) -> None:
    model = low()
    model[1].float()  # and may be of float32, and of nothing
    model.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([*list(model.parameters())[::-1], nn.Parameter(torch.ones(()))], lr=0.1)
    for parameter, master in by_parameter(model).items():
        optimizer.state[parameter] = {"master_param": master, "exp_avg": torch.zeros(1), "is_master": True}
    average = switched(model, tmp_path, [optimizer])
    masters = [optimizer.state[parameter]["master_param"] for parameter in model.parameters()]
    assert all(map(torch.equal, masters, average))


def test_copies_that_an_optimizer_keeps_on_the_host_get_it_rounded(tmp_path: Path) -> None:
    model = low()
    copies = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    average = switched(model, tmp_path, masters=copies)
    assert all(torch.equal(m, a.bfloat16()) for m, a in zip(copies.values(), average, strict=True))


class WithMasters(torch.optim.SGD):
    """Has them where apex's FusedAdam(master_weights=True) has them."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__([{"params": list(model.parameters())} for model in models], lr=0.1)
        self.param_groups_master = [
            {"params": [p.detach().float() if p.dtype == torch.bfloat16 else None for p in group["params"]]}
            for group in self.param_groups
        ]


def test_masters_beside_the_groups_of_an_optimizer_get_it_too_and_those_of_another_model_stay(tmp_path: Path) -> None:
    model, other = low(), low()
    optimizer = WithMasters(other, model, line())
    for parameter in other.parameters():
        optimizer.state[parameter] = {"master_param": parameter.detach().float()}
    mine, theirs = (optimizer.param_groups_master[i]["params"] for i in (1, 0))
    average = switched(model, tmp_path, optimizer)
    assert all(map(torch.equal, mine, average))
    assert all(torch.equal(m, p.float()) for m, p in zip(theirs, other.parameters(), strict=True))


def test_an_optimizer_of_the_models_own_parameters_needs_nothing(tmp_path: Path) -> None:
    for i, model in enumerate((line(), low())):
        other = nn.Linear(2, 2)
        optimizers = [torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)]
        average = switched(model, tmp_path / str(i), optimizers)
        assert all(torch.equal(p, a.to(p.dtype)) for p, a in zip(model.parameters(), average, strict=True))


@pytest.mark.parametrize("given", [True, False])
def test_the_next_step_goes_on_from_the_average_only_if_the_masters_were_given(given: bool, tmp_path: Path) -> None:
    model = low()
    masters = by_parameter(model)
    optimizer = torch.optim.SGD(masters.values(), lr=0.5)

    def step() -> None:
        for master in masters.values():
            master.grad = torch.ones_like(master)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)

    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        for _ in range(3):
            step()
            ema.update_(model)
        own = [master.detach().clone() for master in masters.values()]
        assert ema.reset_hare_(model, every=3, sigma_rel=0.05, masters=masters if given else None)
        step()
    (stored,) = synthesize(tmp_path, [0.05])
    start = [stored.state_dict[name] for name, _ in model.named_parameters()] if given else own
    assert all(torch.equal(m, s - 0.5) for m, s in zip(masters.values(), start, strict=True))
    assert all(torch.equal(p, (s - 0.5).bfloat16()) for p, s in zip(model.parameters(), start, strict=True))


def test_a_model_that_is_no_longer_finite_gets_its_average_back(tmp_path: Path) -> None:
    model = low()
    masters = by_parameter(model)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        own = [master.detach().clone() for master in masters.values()]
        with torch.no_grad():
            for tensor in (*masters, *masters.values()):
                tensor.fill_(torch.nan)
        ema.switch_(model, masters=masters)
        assert all(map(torch.equal, masters.values(), own))


def shard_masters(folder: str, in_state: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1)).bfloat16()
    fully_shard(model)  # a rank holds nothing of the last layer
    with PostHocEMA.from_model(model, folder, update_every=1) as ema:
        averaged(model, ema)
        masters = {parameter: parameter.detach().float() for parameter in model.parameters()}
        optimizer = torch.optim.SGD(masters if in_state else masters.values(), lr=0.1)
        if in_state:
            for parameter, master in masters.items():
                optimizer.state[parameter] = {"master_param": master}
        lacks = any(isinstance(m, DTensor) and not m._local_tensor.numel() for m in masters.values())
        assert lacks == (dist.get_rank() == 1)
        ema.switch_(model, 0.05, optimizer=optimizer, masters=None if in_state else masters)
    dist.barrier()  # each rank stores its part
    (stored,) = synthesize(folder, [0.05])
    for (name, parameter), master in zip(model.named_parameters(), masters.values(), strict=True):
        assert torch.equal(master.full_tensor(), stored.state_dict[name])  # type: ignore[attr-defined]
        assert torch.equal(parameter.full_tensor(), stored.state_dict[name].bfloat16())  # type: ignore[attr-defined]


@pytest.mark.parametrize("in_state", [True, False])
def test_masters_of_shards_get_their_part(in_state: bool, tmp_path: Path) -> None:
    run(2, shard_masters, str(tmp_path), in_state)


def flat_masters(folder: str, in_state: bool, use_orig_params: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1)).bfloat16()
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with PostHocEMA.from_model(model, folder, update_every=1) as ema:
        averaged(model, ema)
        masters = by_parameter(model)
        optimizer = torch.optim.SGD(masters if in_state else masters.values(), lr=0.1)
        if in_state:
            for parameter, master in masters.items():
                optimizer.state[parameter] = {"master_param": master}
        ema.switch_(model, 0.05, optimizer=optimizer, masters=None if in_state else masters)
    dist.barrier()
    (stored,) = synthesize(folder, [0.05])
    wanted = torch.cat([stored.state_dict[name].flatten() for name in stored.state_dict])
    for mine, of in ((list(masters.values()), wanted), (list(masters), wanted.bfloat16())):
        parts: list[Any] = [None] * dist.get_world_size()  # end to end, and padded at the end
        dist.all_gather_object(parts, torch.cat([tensor.detach() for tensor in mine]))
        assert torch.equal(torch.cat(parts)[: of.numel()], of)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("in_state", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_masters_of_a_flat_parameter_get_their_parts(in_state: bool, use_orig_params: bool, tmp_path: Path) -> None:
    run(2, flat_masters, str(tmp_path), in_state, use_orig_params)


def in_state(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].bias] = {"master_param": change(model[0].bias.detach().float())}
    return {"optimizer": optimizer}


def named(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {"masters": {model[0].bias: change(model[0].bias.detach().float())}}


def stepping_on(model: nn.Module, masters: dict[torch.Tensor, torch.Tensor], num_named: int = 0) -> dict[str, Any]:
    optimizer = torch.optim.SGD(masters.values(), lr=0.1)
    return {"optimizer": optimizer, "masters": dict(list(masters.items())[:num_named])}


def made_in_inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


WRONG: dict[str, tuple[str, Callable[[nn.Module], dict[str, Any]]]] = {
    "of another shape": ("of its shape", lambda model: named(model, lambda m: m[:1])),
    "of another dtype": ("found .*float16", lambda model: named(model, torch.Tensor.half)),
    "of another model": ("another parameter", lambda _: {"masters": by_parameter(low())}),
    "in its state, of another shape": ("'master_param'.* of its shape", lambda model: in_state(model, lambda m: m[:1])),
    "none is named": (r"and not on 0\.weight, of bfloat16", lambda model: stepping_on(model, by_parameter(model))),
    "one is not named": (r"and not on 1\.bias, of", lambda model: stepping_on(model, by_parameter(model), 3)),
    "one is missing": (
        r"has masters of other parameters, and none of 1\.bias, of",  # as zip may leave it
        lambda model: {"masters": dict(list(by_parameter(model).items())[:3])},
    ),
    "a flat one": (
        "1 float32 tensors that are not the model's",
        lambda model: stepping_on(model, {model[0].bias: torch.cat([m.detach().flatten() for m in masters_of(model)])}),
    ),
    "no optimizer": ("takes a torch.optim.Optimizer", lambda _: {"optimizer": object()}),
    "expanded": ("cannot be written", lambda model: named(model, lambda m: m[:1].expand(len(m)))),
    "inference": ("cannot be written", lambda model: in_state(model, made_in_inference)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_masters_that_cannot_be_written_are_refused_and_nothing_is_changed(kind: str, tmp_path: Path) -> None:
    model = low()
    with PostHocEMA.from_model(model, tmp_path, update_every=1) as ema:
        averaged(model, ema)
        before = [p.detach().clone() for p in model.parameters()]
        said, make = WRONG[kind]
        with pytest.raises(SettingsError, match=said):
            ema.switch_(model, **make(model))
    assert all(map(torch.equal, before, model.parameters()))


def test_snapshots_and_updates_follow_each_other_as_before(tmp_path: Path) -> None:
    model = line()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=4) as ema:
        for _ in range(3):
            stepped(model, ema, 4)
            ema.switch_(model)
            ema._session.writer.drain()
        status = ema.status()
    assert (status["updates"], status["snapshots_written"]) == (12, 3)
