"""The resharding matrix: an average that any wrapper wrote, on any number of ranks, is loaded into any other, on any.

All of them are sub-groups of launches of four ranks. Each run has values of its own, so what a load leaves as it was,
or takes from another run, is noticed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from test_distributed import SIGMA_RELS, Net, State, names
from test_matrix import fsdp1, fsdp2, take_values, tensor_parallel
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from phema_dist import PostHocEMA, synthesize
from phema_dist.synthesis.reader import SynthesisReader

PARTITIONS = ([[0], [1, 2, 3]], [[0, 1]], [[0, 1, 2, 3]])  # of one launch
SIGMA_REL = 0.15


def mesh_of(members: list[int], num_rows: int) -> DeviceMesh:
    """Collective for the whole launch: members or not, all make its groups."""
    return DeviceMesh("cpu", torch.tensor(members).view(num_rows, -1), mesh_dim_names=("across", "in"))


Wrap = Callable[[nn.Module], nn.Module]


def wrappers(members: list[int]) -> tuple[dist.ProcessGroup, dict[str, Wrap]]:
    """Collective for the whole launch: the group of these ranks, and ways to wrap a model over it."""
    group = dist.new_group(members)
    one, two = (mesh_of(members, num_rows) for num_rows in (1, 2 - len(members) % 2))
    kinds: dict[str, Wrap] = {  # only members may cut a mesh
        "ddp": partial(nn.parallel.DistributedDataParallel, process_group=group),
        "fsdp2": lambda net: fsdp2(net, mesh=one["in"]),
        "hsdp": partial(fsdp2, mesh=two),
        "fsdp1": partial(fsdp1, strategy="FULL_SHARD", orig=True, process_group=group),  # in ShardedTensors
        "tp": lambda net: tensor_parallel(net, one["in"]),
    }
    if len(members) == 4:
        kinds["fsdp1-hybrid"] = partial(fsdp1, strategy="HYBRID_SHARD", orig=True)  # in DTensors
        kinds["fsdp2-tp"] = lambda net: fsdp2(tensor_parallel(net, two["in"]), mesh=two["across"])
    return group, kinds


WRITERS = ("ddp", "fsdp2", "hsdp", "fsdp1")


def folders(root: str, members: list[int]) -> list[str]:
    return [f"{root}/{kind}-{len(members)}" for kind in WRITERS]


def my_part(partition: list[list[int]]) -> tuple[list[int], dist.ProcessGroup, dict[str, Wrap]] | None:
    mine = None
    for members in partition:
        found = members, *wrappers(members)
        if dist.get_rank() in members:
            mine = found
    return mine


def write_runs(partition: list[list[int]], root: str) -> None:
    """Updates at 3, 6, 9, 10, 12; snapshots at 10 and 12."""
    if (mine := my_part(partition)) is None:
        return
    members, group, kinds = mine
    for number, (kind, folder) in enumerate(zip(WRITERS, folders(root, members), strict=True)):
        model = kinds[kind](Net())
        with PostHocEMA.from_model(
            model, folder, sigma_rels=SIGMA_RELS, update_every=3, checkpoint_every=10, process_group=group
        ) as ema:
            for step in range(1, 13):
                take_values(model, step + 100 * (number + 10 * len(members)))
                ema.update_(model)
                ema._session.writer.drain()  # type: ignore[union-attr]  these steps take no time
        dist.barrier(group)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all writers, and beside each what one process makes of it."""
    root = tmp_path_factory.mktemp("runs")
    for partition in PARTITIONS:
        run(4, write_runs, partition, str(root))
    for folder in sorted(root.iterdir()):
        (wanted,) = synthesize(folder, [SIGMA_REL])
        torch.save(wanted.state_dict, f"{folder}.pt")
    return root


def live(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What the model computes with, whole under FSDP1, else this rank's part."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield from ((name.replace("_fsdp_wrapped_module.", ""), tensor) for name, tensor in names(model))
    else:
        yield from names(model)


def assert_holds(model: nn.Module, wanted: State) -> None:
    seen = set()
    for name, tensor in live(model):
        full = wanted[name].to(tensor.dtype)
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            assert torch.equal(tensor.to_local(), full), name
        else:
            assert torch.equal(tensor, full), name
        seen.add(name)
    assert seen | {"tied.weight"} == wanted.keys()


def read_runs(partition: list[list[int]], root: str) -> int:
    if (mine := my_part(partition)) is None:
        return 0
    _, group, kinds = mine
    paths = sorted(path for path in Path(root).iterdir() if path.is_dir())
    wanted = [torch.load(f"{path}.pt") for path in paths]
    num_loads = 0
    for wrap in kinds.values():
        model = wrap(Net())
        for path, state in zip(paths, wanted, strict=True):
            into = get_model_state_dict(model)
            dcp.load(into, storage_reader=SynthesisReader(path, SIGMA_REL), process_group=group)
            if isinstance(model, FullyShardedDataParallel):  # others are filled in place
                set_model_state_dict(model, into)
            assert_holds(model, state)
            num_loads += 1
    return num_loads


@pytest.mark.parametrize("partition", PARTITIONS, ids=["1 and 3", "2", "4"])
def test_any_wrapper_loads_what_any_other_wrote_as_one_process_would_make_it(
    partition: list[list[int]], runs: Path
) -> None:
    found = run(4, read_runs, partition, str(runs))
    for members in partition:
        assert {found[rank] for rank in members} == {16 * (7 if len(members) == 4 else 5)}
