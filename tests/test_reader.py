"""The reader: what a state dict may ask for, which bytes that costs, and what is said when it cannot be had."""

import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import Target
from ranks import run
from test_distributed import Net, assert_same, set_values, wrapped
from test_matrix import tensor_parallel
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from phema_dist import PostHocEMA, synthesize
from phema_dist.errors import DamagedError, KeyMissingError, ProfileError, RunError, SettingsError
from phema_dist.storage.store import LocalStore
from phema_dist.synthesis import reader as readers
from phema_dist.synthesis.reader import SynthesisReader
from phema_dist.synthesis.tiles import cast
from phema_dist.target import Power

pytestmark = [
    # dcp says so whenever there is no process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning"),
]
State = dict[str, torch.Tensor]


def write(model: nn.Module, url: str, options: dict[str, Any] | None = None) -> None:
    """Snapshots at 2, 4 and 6."""
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=2, storage_options=options) as ema:
        for step in range(1, 7):
            set_values(model, step)
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]  these steps take no time


class Odd(Net):
    """Also a tensor without elements, and one of higher precision."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.exact = nn.Parameter(torch.zeros(3, dtype=torch.float64))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    write(Odd(), str(path))
    return path


def average(path: Path, t: int | None = None) -> State:
    (found,) = synthesize(path, [0.15], t=t)
    return found.state_dict


def empty() -> State:
    return {name: torch.full_like(tensor, 77) for name, tensor in Odd().state_dict().items()}


def failure(state: dict[str, Any], path: Path, planner: DefaultLoadPlanner | None = None, **settings: Any) -> Exception:
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=SynthesisReader(path, **settings), planner=planner)
    assert str(caught.value.failures[0][0]) in str(caught.value)
    return caught.value.failures[0][0]  # type: ignore[no-any-return]


# -- what it fills


@pytest.mark.parametrize("t", [None, 4, 5])
@pytest.mark.parametrize("nested", [True, False])
def test_tensors_are_filled_with_what_one_process_makes_cast_to_their_dtype(
    written: Path, t: int | None, nested: bool
) -> None:
    state, wanted = empty(), average(written, t)
    assert {name: wanted[name].dtype for name in ("low.weight", "exact", "norm.num_batches_tracked")} == {
        "low.weight": torch.float32, "exact": torch.float64, "norm.num_batches_tracked": torch.int64
    }  # fmt: skip
    held = dict(state)
    reader = SynthesisReader(written, 0.15, t, prefix="model." if nested else "")
    dcp.load({"model": state} if nested else state, storage_reader=reader)
    assert_same(state, {name: tensor.to(held[name].dtype) for name, tensor in wanted.items()})
    assert all(state[name] is held[name] for name in state)  # in place


def test_a_target_says_its_own_t_and_checkpoint_id_another_url(written: Path, tmp_path: Path) -> None:
    state = empty()
    reader = SynthesisReader(tmp_path, Power(0.15, t=4), 6)
    dcp.load(state, storage_reader=reader, checkpoint_id=written)
    wanted = average(written, 4)
    assert torch.equal(state["first.weight"], wanted["first.weight"])
    assert not torch.equal(state["first.weight"], average(written)["first.weight"])


def test_tensors_may_be_views_leaves_or_made_for_inference(written: Path) -> None:
    state, wanted = empty(), average(written)
    state["first.weight"] = torch.zeros(5, 7).T
    state["first.bias"] = nn.Parameter(torch.zeros(7))
    state["conv.weight"] = torch.zeros(6, 3, 3, 3).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        state["conv.bias"] = torch.zeros(6)
        dcp.load(state, storage_reader=SynthesisReader(written))
    for name in ("first.weight", "first.bias", "conv.weight", "conv.bias"):
        assert torch.equal(state[name], wanted[name])


def test_names_of_a_tied_tensor_are_filled_each_and_either_is_enough(written: Path) -> None:
    wanted = average(written)["embed.weight"]
    for names in (["embed.weight"], ["tied.weight"], ["embed.weight", "tied.weight"]):
        state = {n: x for n, x in empty().items() if n not in {"embed.weight", "tied.weight"}}
        state |= {name: torch.zeros(9, 5) for name in names}
        dcp.load(state, storage_reader=SynthesisReader(written))
        assert all(torch.equal(state[name], wanted) for name in names)


class Boxed(torch.Tensor):
    """Some rows of a tensor, as DCP lets a tensor be described: boxes may overlap those of another name."""

    rows: torch.Tensor
    first: int

    def __create_chunk_list__(self) -> list[dcp.metadata.ChunkStorageMetadata]:
        sizes = torch.Size(self.rows.shape)
        return [dcp.metadata.ChunkStorageMetadata(torch.Size([self.first, 0]), sizes)]

    def __get_tensor_shard__(self, _: object) -> torch.Tensor:
        return self.rows


def boxed(shape: tuple[int, int], first: int, last: int) -> Boxed:
    tensor = torch.zeros(()).expand(shape).as_subclass(Boxed)
    tensor.rows, tensor.first = torch.zeros(last - first, shape[1]), first
    return tensor


@pytest.mark.parametrize(("first", "last"), [(4, 9), (1, 6), (2, 4)])
def test_boxes_of_tied_names_may_overlap(written: Path, first: int, last: int) -> None:
    wanted = average(written)["embed.weight"]
    one, other = boxed((9, 5), 1, 6), boxed((9, 5), first, last)
    dcp.load(empty() | {"embed.weight": one, "tied.weight": other}, storage_reader=SynthesisReader(written))
    assert torch.equal(one.rows, wanted[1:6])
    assert torch.equal(other.rows, wanted[first:last])


def load_live(folder: str, alone: bool) -> None:
    """The parameters that the model computes with are filled, with requires_grad as it is."""
    model = wrapped("fsdp2")
    (wanted,) = synthesize(folder, [0.15])
    state = get_model_state_dict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": state}, storage_reader=SynthesisReader(folder, prefix="model."), no_dist=alone)
    for name, parameter in model.named_parameters():
        full = wanted.state_dict[name].to(parameter.dtype)
        assert isinstance(parameter, DTensor)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        assert torch.equal(parameter.to_local(), full.to_local()), name


@pytest.mark.parametrize("alone", [True, False])
def test_a_live_sharded_model_is_filled_in_place(tmp_path: Path, alone: bool) -> None:
    write(Net(), str(tmp_path))
    run(4, load_live, str(tmp_path), alone)


def write_and_load(url: str, options: dict[str, Any]) -> State:
    model = wrapped("fsdp2")
    write(model, url, options=options)
    state = get_model_state_dict(model)
    dcp.load(state, storage_reader=SynthesisReader(url, storage_options=options))
    return {n: (x.full_tensor() if isinstance(x, DTensor) else x) for n, x in state.items()}


def test_from_any_store(any_store_url: Target) -> None:
    url, options = any_store_url
    found = run(2, write_and_load, url, options)
    (wanted,) = synthesize(url, [0.15], storage_options=options)
    for state in found:
        assert_same(state, {name: x.to(state[name].dtype) for name, x in wanted.state_dict.items()})


# -- what is refused


def test_a_name_that_is_not_there_is_refused_with_those_that_are_near(
    written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = failure(empty() | {"frist.weight": torch.zeros(7, 5)}, written)
    assert "frist.weight" in str(error)
    assert re.search(rf"frist.weight is not in {written}. .* names are first.weight", caplog.text)
    caplog.clear()
    error = failure({"model": empty()}, written)
    assert "Missing key in checkpoint state_dict: model." in str(error)
    assert re.search(r"model\.\S+ is not in .*prefix='model\.'", caplog.text)
    caplog.clear()
    state = empty() | {"step": 5}
    dcp.load(state, storage_reader=SynthesisReader(written), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert state["step"] == 5
    assert torch.equal(state["exact"], average(written)["exact"])
    assert "step is not in" in caplog.text


def test_a_tensor_that_nobody_asks_for_is_refused(written: Path) -> None:
    state = empty()
    del state["first.weight"], state["nothing"]
    error = failure(state, written)
    assert isinstance(error, RunError)
    assert f"every tensor of {written}; first.weight is not in it. Pass partial=True" in str(error)
    assert (state["last.weight"] == 77).all()  # nothing was read yet
    del state["embed.weight"], state["tied.weight"]
    assert "embed.weight is not in it, nor are 1 others" in str(failure(state, written))
    dcp.load(state, storage_reader=SynthesisReader(written, partial=True))
    assert_same({"last.weight": state["last.weight"]}, {"last.weight": average(written)["last.weight"]})
    dcp.load({}, storage_reader=SynthesisReader(written, partial=True))


def test_another_shape_or_kind_is_refused(written: Path) -> None:
    assert "first.weight" in str(failure(empty() | {"first.weight": torch.zeros(8, 5)}, written))
    assert "first.weight" in str(failure(empty() | {"first.weight": 5}, written))
    assert "first.weight" in str(failure(empty() | {"first.weight": b"bytes"}, written))
    assert "first.weight must be of a dtype that holds float32; it is int64" in str(
        failure(empty() | {"first.weight": torch.zeros(7, 5, dtype=torch.int64)}, written)
    )


def test_values_beyond_the_range_of_a_tensor_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1)
    nn.init.constant_(model.weight, 1e6)
    with ema:
        ema.update_(model)
    error = failure({"weight": torch.zeros(2, 2, dtype=torch.float16)}, tmp_path)
    assert isinstance(error, SettingsError)
    assert "weight exceeds the range of float16" in str(error)
    state = {"weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    dcp.load(state, storage_reader=SynthesisReader(tmp_path))
    assert (state["weight"] == torch.tensor(1e6).bfloat16()).all()


def test_a_run_or_an_average_that_does_not_exist_is_told_as_it_is(written: Path, tmp_path: Path) -> None:
    error = failure(empty(), tmp_path)
    assert isinstance(error, RunError)
    assert "there is no run.json" in str(error)
    with pytest.raises(ProfileError, match=r"sigma_rel must lie in"):
        SynthesisReader(written, sigma_rel=0.4)
    assert "t=1000" in str(failure(empty(), written, t=1000))
    assert "snapshots of the run, at t=[2, 4, 6]; got 3" in str(failure(empty(), written, exclude=[3]))
    assert SynthesisReader.validate_checkpoint_id(tmp_path)
    assert not SynthesisReader.validate_checkpoint_id("nosuch://bucket/run")


def ask_for_different_things(folder: str) -> tuple[str, list[str]]:
    state = {name: torch.zeros_like(x) for name, x in Net().state_dict().items()}
    mine = {n: x for i, (n, x) in enumerate(state.items()) if i % 2 == dist.get_rank()}
    dcp.load(mine, storage_reader=SynthesisReader(folder))
    if dist.get_rank() == 1:
        del mine["conv.bias" if "conv.bias" in mine else "conv.weight"]
    try:
        dcp.load(mine, storage_reader=SynthesisReader(folder))
    except CheckpointException as error:
        return str(error), [type(each).__name__ for each, _ in error.failures.values()]
    return "", []


def test_ranks_together_must_ask_for_everything(tmp_path: Path) -> None:
    write(Net(), str(tmp_path))
    for text, kinds in run(2, ask_for_different_things, str(tmp_path)):
        assert kinds == ["RunError"]
        assert re.search(r"conv.(bias|weight) is not in it", text)


# -- damage


def flip_a_byte(path: Path, t: int) -> Path:
    (folder,) = (path / "snapshots").glob(f"{t:012d}-*")
    file = next(folder.glob("sigma_rel-0.28/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def load_damaged(folder: str) -> tuple[str, list[tuple[str, str | None]]]:
    state = get_model_state_dict(wrapped("ddp"))
    try:
        dcp.load(state, storage_reader=SynthesisReader(folder))
    except CheckpointException as error:
        return str(error), [(type(e).__name__, getattr(e, "folder", None)) for e, _ in error.failures.values()]
    return "", []


def test_damage_is_raised_on_every_rank_and_says_how_to_go_on(tmp_path: Path) -> None:
    write(Net(), str(tmp_path))
    file = flip_a_byte(tmp_path, 4)
    for text, failures in run(2, load_damaged, str(tmp_path)):
        assert failures == [("DamagedError", file.parent.parent.relative_to(tmp_path).as_posix())] * 2
        assert str(file) in text
        assert "Pass exclude=(4,) to go on without that snapshot." in text
    state = {name: torch.zeros_like(x) for name, x in Net().state_dict().items()}
    dcp.load(state, storage_reader=SynthesisReader(tmp_path, exclude=[4]))
    assert isinstance(failure(state, tmp_path, exclude=[2]), DamagedError)


def test_a_snapshot_that_goes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Net(), str(tmp_path))
    original = LocalStore.read_into

    def read(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        if start:
            (tmp_path / key).unlink(missing_ok=True)
        original(self, key, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", read)
    error = failure(get_model_state_dict(Net()), tmp_path)
    assert isinstance(error, KeyMissingError)
    assert "load again" in str(error)


# -- what it costs


def test_ranks_are_told_the_recipe_and_no_manifests(written: Path) -> None:
    reader = SynthesisReader(written, partial=True)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    one, other = reader.prepare_global_plan([LoadPlan([]), LoadPlan([])])
    assert one.storage_data == other.storage_data
    assert len(one.storage_data.terms) > 3
    assert not any(term.snapshot.manifests for term in one.storage_data.terms)
    assert len(pickle.dumps(one)) < 300 * len(one.storage_data.terms) + 2000


class Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(256, 1001), nn.Linear(1001, 256)


BLOCK = 4096


def wrap_big(kind: str) -> nn.Module:
    model = Big()
    return tensor_parallel(model) if kind == "tp" else fully_shard(model) if kind == "fsdp2" else model


def read_counted(kind: str, folder: str) -> tuple[int, int, set[str]]:
    """Bytes read by this rank, bytes of its boxes, and the folders of snapshots that it read of."""
    state = get_model_state_dict(wrap_big(kind))
    local = {n: x.to_local() if isinstance(x, DTensor) else x for n, x in state.items()}
    num_read, keys = 0, set()
    original = LocalStore.read_into

    def counted(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        nonlocal num_read
        num_read += len(buffer)
        keys.add(key)
        original(self, key, start, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "read_into", counted)
        dcp.load(state, storage_reader=SynthesisReader(folder, t=4))
    return num_read, sum(4 * x.numel() for x in local.values()), {key.split("/")[1] for key in keys}


@pytest.mark.parametrize(
    ("writers", "kind", "readers"), [(1, "fsdp2", 2), (2, "fsdp2", 3), (3, "plain", 2), (2, "tp", 2)]
)
def test_a_rank_reads_the_bytes_of_its_boxes(writers: int, kind: str, readers: int, tmp_path: Path) -> None:
    run(writers, write_big, str(tmp_path))
    files = [path for path in tmp_path.rglob("*.safetensors") if "000000000006-" not in str(path)]
    all_of_them = sum(path.stat().st_size for path in files)
    for num_read, num_wanted, folders in run(readers, read_counted, kind, str(tmp_path)):
        assert folders == {"000000000002-a0", "000000000004-a0"}
        touched = num_wanted + (4 * 1001 * 256 // 2 if kind == "tp" else 0)  # half of the columns: all blocks
        assert 4 * num_wanted <= num_read <= 1.1 * 4 * touched + 2 * BLOCK * len(files)  # 2 snapshots, 2 profiles
        assert num_read < 0.9 * all_of_them or kind == "plain"


def write_big(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phema_dist.training.writer.BLOCK_BYTES", BLOCK)
        patch.setattr("phema_dist.storage.snapshot.BLOCK_BYTES", BLOCK)
        write(wrap_big("fsdp2"), folder)


MEMORY = """
import json, sys, warnings
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from phema_dist.synthesis.reader import SynthesisReader
from phema_dist.synthesis.tiles import cast

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

warnings.simplefilter("ignore")
folder, numel, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = {"weight": torch.ones(numel // 1024, 1024), "bias": torch.ones(1024)}
reader = SynthesisReader(folder, memory_bytes=memory)
before = resident("VmRSS:")
dcp.load(state, storage_reader=reader)
print(json.dumps([resident("VmHWM:") - before, state["weight"][0, 0].item()]))
"""


def test_the_memory_that_may_be_used_is_passed_on(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(readers, "stream", lambda *_, memory_bytes, **__: told.append(memory_bytes))
    dcp.load(empty(), storage_reader=SynthesisReader(written, memory_bytes=100 << 20))
    assert told == [100 << 20]


def test_loading_uses_bounded_memory_beside_the_state_dict(tmp_path: Path) -> None:
    numel, memory = 24 << 20, 64 << 20  # 96 MiB of parameters
    model = nn.Linear(1024, numel // 1024)
    del model.bias
    model.bias = nn.Parameter(torch.zeros(1024))
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1, checkpoint_dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(3)
    with ema:
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]
        ema.update_(model)

    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(numel), str(memory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used, value = json.loads(done.stdout.splitlines()[-1])
    assert value == pytest.approx(3, rel=1e-2)
    assert used < memory + (24 << 20)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([304]), torch.uint8),
        (torch.tensor([1e6]), torch.float16),
        (torch.tensor([1e6]), torch.float8_e5m2),
    ],
)
def test_values_that_a_dtype_cannot_hold_are_refused(value: torch.Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(SettingsError, match=f"a.b exceeds the range of {str(dtype)[6:]}"):
        cast(value, dtype, "a.b")
    fine = torch.ones_like(value)
    assert torch.equal(cast(fine, dtype, "a.b").to(fine.dtype), fine)


def test_an_average_that_is_not_finite_stays_what_it_is() -> None:
    odd = torch.tensor([torch.inf, torch.nan, 1.0])
    assert torch.equal(cast(odd, torch.float16, "a").float().nan_to_num(), odd.to(torch.float16).float().nan_to_num())
