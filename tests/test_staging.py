"""Staging: what is copied is what training had at the update, however late an accelerator copies it."""

import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_accelerator import DEVICE, HOST, UNTOUCHED, Event, FakeAccelerator, Stream
from torch import nn

from phema_dist import BackgroundError, LayoutError, PostHocEMA, SettingsError
from phema_dist.shard import Box
from phema_dist.training import device
from phema_dist.training.device import SideStream
from phema_dist.training.layout import Piece, read_layout
from phema_dist.training.staging import NUM_SLOTS, Segment, Staging, segments
from phema_dist.training.writer import Worker

Pieces = list[tuple[Piece, ...]]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccelerator]:
    """Training's stream is a thread: kernels are launched."""
    fake = FakeAccelerator(monkeypatch, this_thread=False)
    yield fake
    fake.close()


def pieces_of(model: nn.Module) -> Pieces:
    tensors = read_layout(model).tensors
    return [segment.pieces for segment in segments(Piece(tensor, tensor.box) for tensor in tensors)]


def staging_of(pieces: Pieces) -> Staging:
    return Staging([Segment(of_segment) for of_segment in pieces])


def net() -> nn.Module:
    """Two parameters and three buffers, of two dtypes."""
    return nn.BatchNorm1d(6)


@torch.no_grad()
def set_all(model: nn.Module, value: float) -> None:
    for tensor in model.state_dict().values():
        tensor.fill_(value)


@torch.no_grad()
def set_buffers(model: nn.Module, value: float) -> None:
    for tensor in model.buffers():
        tensor.fill_(value)


def values_in(staging: Staging, slot: int) -> set[float]:
    return {value for flat in staging.slots[slot] for value in flat.tolist()}


# Memory


@pytest.mark.parametrize(("width", "dtype"), [(2048, torch.float32), (1024, torch.bfloat16), (5120, torch.float16)])
def test_little_is_lost_where_pinned_memory_is_rounded_up_to_powers_of_two(width: int, dtype: torch.dtype) -> None:
    """PyTorch does that; in one buffer the first of these models would take 1.9 times its bytes."""
    shapes = [
        (32768, width),
        *[(width, 4 * width), (4 * width, width), (width, 4 * width), (width,)] * 20,
        (32768, width),
    ]
    model = nn.ParameterList(torch.empty(1, dtype=dtype).expand(shape) for shape in shapes)  # without their memory
    pieces = [Piece(tensor, tensor.box) for tensor in read_layout(model).tensors]
    made = segments(pieces)
    assert [piece for segment in made for piece in segment.pieces] == pieces
    sizes = [segment.numel * segment.dtype.itemsize for segment in made]
    assert sum(sizes) == dtype.itemsize * sum(math.prod(shape) for shape in shapes)
    assert sum(2 ** math.ceil(math.log2(size)) for size in sizes) < 1.1 * sum(sizes)
    assert len(made) < 10


def test_a_small_model_is_one_buffer_for_each_dtype_and_kind() -> None:
    assert len(segments(Piece(tensor, tensor.box) for tensor in read_layout(nn.Linear(4096, 2048)).tensors)) == 1


# Memory order


def with_holes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize(
    "arrange",
    [
        torch.clone,
        partial(torch.Tensor.to, memory_format=torch.channels_last),
        lambda tensor: tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        with_holes,
        lambda tensor: tensor[:, :1].expand(-1, 4, -1, -1),
    ],
    ids=["row-major", "channels_last", "permuted", "holes", "expanded"],
)
def test_a_copy_has_the_values_and_if_dense_the_strides_of_the_model(
    arrange: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = nn.Conv2d(4, 3, (5, 7))
    weight = arrange(torch.randn(3, 4, 5, 7))
    model.weight = nn.Parameter(weight)
    (segment,) = segments(Piece(tensor, tensor.box) for tensor in read_layout(model).tensors)
    staging = Staging([segment])
    staging.fill(0, [segment.pieces])
    staging.wait(0)

    views = dict(zip((piece.info.fqn for piece in segment.pieces), segment.views(staging.slots[0][0]), strict=True))
    assert torch.equal(views["weight"], weight)
    assert torch.equal(views["bias"], model.bias)
    is_dense = weight.clone().stride() == weight.stride()
    assert views["weight"].stride() == (weight.stride() if is_dense else (140, 35, 7, 1))


def test_views_lie_end_to_end_without_gaps() -> None:
    model = nn.ParameterDict(
        {
            "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(1.0),
            "empty": torch.empty(0, 4),
            "row": torch.randn(5, 1),
            "transposed": torch.randn(3, 8).T,
        }
    )
    tensors = read_layout(model).tensors
    segment = Segment(tuple(Piece(tensor, tensor.box) for tensor in tensors))
    flat = torch.zeros(segment.numel)
    torch._foreach_add_(segment.views(flat), 1)
    assert torch.equal(flat, torch.ones(120 + 1 + 0 + 5 + 24))


def test_rows_of_a_channels_last_tensor_keep_its_order() -> None:
    model = nn.ParameterDict({"image": torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)})
    (tensor,) = read_layout(model).tensors
    piece = Piece(tensor, Box((2, 0, 0, 0), (3, 3, 4, 5)))
    (view,) = Segment((piece,)).views(torch.zeros(180))
    assert view.stride() == model["image"].stride()


@pytest.mark.parametrize("then", [torch.channels_last, torch.contiguous_format])
def test_memory_order_changes_no_bit_of_an_average(tmp_path: Path, then: torch.memory_format) -> None:
    """Channels last from the beginning, and in one case no more after the first updates."""

    def averaged(folder: str, *formats: torch.memory_format) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=formats[0])
        with PostHocEMA.from_model(model, tmp_path / folder, update_every=1, checkpoint_every=4) as ema:
            for step in range(8):
                model.to(memory_format=formats[step // 4])
                for parameter in model.parameters():
                    values = torch.randn(parameter.shape)
                    parameter.data.copy_(values)
                ema.update_(model)
        with ema.state_dict(sigma_rel=0.1) as state:
            return state

    wanted = averaged("plain", torch.contiguous_format, torch.contiguous_format)
    found = averaged("other", torch.channels_last, then)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# Without an accelerator


def test_on_the_cpu_a_copy_is_done_when_fill_returns() -> None:
    model = net()
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    set_all(model, 1)
    staging.fill(0, pieces)
    set_all(model, 2)
    assert values_in(staging, 0) == {1}
    assert not staging._side_streams
    assert not any(flat.is_pinned() for slot in staging.slots for flat in slot)


# With one


def copied_and_changed(accelerator: FakeAccelerator) -> set[float]:
    """What is copied of parameters that are 1, and that training sets to 2 behind the fence."""
    model = net()
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    accelerator.launch(partial(set_all, model, 1))
    staging.fill(0, pieces)
    staging.fence()
    accelerator.launch(partial(set_all, model, 2))
    accelerator.synchronize()
    staging.wait(0)
    return values_in(staging, 0)


def test_parameters_that_change_after_the_fence_are_copied_as_they_were(accelerator: FakeAccelerator) -> None:
    assert copied_and_changed(accelerator) == {1}


def test_without_the_fence_they_would_not(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(SideStream, "fence", lambda _: None)
    assert copied_and_changed(accelerator) == {2}


def test_a_copy_waits_for_what_training_asked_of_the_device_before(accelerator: FakeAccelerator) -> None:
    model = net()
    set_all(model, 1)
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    slow = threading.Event()
    accelerator.launch(slow.wait)
    accelerator.launch(partial(set_all, model, 2))
    staging.fill(0, pieces)  # returns, although the device is busy
    staging.fence()
    slow.set()
    staging.wait(0)
    assert values_in(staging, 0) == {2}


def test_without_waiting_a_slot_has_not_arrived(accelerator: FakeAccelerator) -> None:
    model = nn.Linear(3, 3)
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    set_all(model, 1)
    staging.fill(0, pieces)
    assert values_in(staging, 0) == {UNTOUCHED}
    staging.wait(0)
    assert values_in(staging, 0) == {1}


def test_the_next_forward_overlaps_with_the_copy_of_parameters_and_may_change_buffers(
    accelerator: FakeAccelerator,
) -> None:
    """Until `fence`, as with `attach`: buffers are fenced by `fill` itself, parameters are not copied yet."""
    model = net()
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    set_all(model, 1)
    staging.fill(0, pieces)
    accelerator.launch(partial(set_buffers, model, 2))
    accelerator.synchronize()  # a forward has run, and no parameter was copied
    parameters, *buffers = staging.slots[0]
    assert set(parameters.tolist()) == {UNTOUCHED}
    staging.fence()
    accelerator.launch(partial(set_all, model, 3))
    accelerator.synchronize()
    staging.wait(0)
    assert set(parameters.tolist()) == {1}
    assert {value for flat in buffers for value in flat.tolist()} == {1}


def test_host_buffers_are_pinned_made_once_and_reused(accelerator: FakeAccelerator) -> None:
    model = net()
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    made = len(accelerator.pinned)
    assert made == NUM_SLOTS * (len(pieces) + 1)  # and the number of skipped steps
    assert {flat.data_ptr() for slot in staging.slots for flat in slot} <= {b.data_ptr() for b in accelerator.pinned}
    for update in range(6):
        set_all(model, update)
        staging.fill(update % NUM_SLOTS, pieces, torch.zeros(2, dtype=torch.int64))
        staging.fence()
        accelerator.synchronize()
        staging.wait(update % NUM_SLOTS)
        assert values_in(staging, update % NUM_SLOTS) == {update}
    assert len(accelerator.pinned) == made
    assert len(accelerator.side) == 1


def test_memory_freed_during_a_copy_is_kept_from_others_until_it_is_done(accelerator: FakeAccelerator) -> None:
    model = net()
    pieces = pieces_of(model)
    staging_of(pieces).fill(0, pieces)
    (side,) = accelerator.side
    assert accelerator.recorded == {(tensor.data_ptr(), side) for tensor in model.state_dict().values()}


def test_host_and_device_tensors_of_one_rank_are_all_copied(accelerator: FakeAccelerator) -> None:
    """As with CPU offload, or a model on several devices."""
    model = nn.ModuleList([nn.BatchNorm1d(6) for _ in range(3)])
    other = torch.device(DEVICE.type, 1)
    places = {
        tensor.data_ptr(): place
        for module, place in zip(model, (HOST, DEVICE, other), strict=True)
        for tensor in module.state_dict().values()
    }
    accelerator.place = lambda tensor: places[tensor.data_ptr()]
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    set_all(model, 1)
    staging.fill(0, pieces)
    set_all(model[0], 2)  # on the CPU, the copy is done
    staging.fence()
    for module, place in zip(model[1:], (DEVICE, other), strict=True):
        accelerator.training[place].launch(partial(set_all, module, 2))
        accelerator.training[place].synchronize()
    staging.wait(0)
    assert values_in(staging, 0) == {1}
    assert len(accelerator.side) == 2


def test_storage_may_move_between_updates(accelerator: FakeAccelerator) -> None:
    model = net()
    accelerator.place = lambda _: HOST
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    for update, place in enumerate([HOST, DEVICE, HOST, DEVICE]):
        accelerator.place = lambda _, place=place: place  # type: ignore[misc]
        set_all(model, update)
        staging.fill(update % NUM_SLOTS, pieces)
        staging.fence()
        accelerator.launch(partial(set_all, model, UNTOUCHED))
        accelerator.synchronize()
        staging.wait(update % NUM_SLOTS)
        assert values_in(staging, update % NUM_SLOTS) == {update}


def test_skipped_steps_arrive_with_the_parameters(accelerator: FakeAccelerator) -> None:
    pieces = pieces_of(net())
    staging = staging_of(pieces)
    skips = torch.tensor([3, 1])
    staging.fill(0, pieces, skips)
    accelerator.launch(lambda: skips.copy_(torch.tensor([4, 0])))  # the next round, fenced as buffers are
    accelerator.synchronize()
    staging.fill(1, pieces, skips)
    staging.wait(0)
    assert staging.skips(0) == (3, True)
    staging.wait(1)
    assert staging.skips(1) == (4, False)
    staging.fill(1, pieces)
    staging.wait(1)
    assert staging.skips(1) == (0, False)


def test_an_update_in_a_graph_capture_is_refused(accelerator: FakeAccelerator) -> None:
    pieces = pieces_of(net())
    staging = staging_of(pieces)
    accelerator.capturing = True
    with pytest.raises(SettingsError, match="call update_ after each replay"):
        staging.fill(0, pieces)
    accelerator.capturing = False
    staging.fill(0, pieces)
    accelerator.capturing = True
    with pytest.raises(SettingsError, match="captured"):
        staging.fence()


def test_a_model_that_does_not_fit_begins_no_copy(accelerator: FakeAccelerator) -> None:
    model = net()
    pieces = pieces_of(model)
    staging = staging_of(pieces)
    model.register_buffer("running_var", torch.zeros(7))
    with pytest.raises(LayoutError, match="running_var"):
        staging.fill(0, pieces)
    assert accelerator.side[0].num_launched() == 0
    model.register_buffer("running_var", torch.zeros(6))
    set_all(model, 5)
    staging.fill(0, pieces)
    staging.wait(0)
    assert values_in(staging, 0) == {5}


def test_the_fake_has_nothing_that_torch_has_not() -> None:
    for fake, real in ((Stream, torch.Stream), (Event, torch.Event)):
        used = {name for name in ("__enter__", "__exit__", "wait_stream", "record", "query") if name in vars(fake)}
        assert used <= set(dir(real))
    assert torch.Event(HOST, enable_timing=False).query


# A whole PostHocEMA


class Net(nn.Module):
    """Parameters on the host, as with CPU offload, and on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.offloaded, self.resident = nn.Linear(5, 3), nn.BatchNorm1d(6)

    def place(self, tensor: torch.Tensor) -> torch.device:
        return HOST if tensor.data_ptr() in {t.data_ptr() for t in self.offloaded.parameters()} else DEVICE


@pytest.fixture
def ema(tmp_path: Path, accelerator: FakeAccelerator) -> Iterator[PostHocEMA]:
    """Of a new `Net` (which `train` gets from it), updated by each call."""
    model = Net()
    accelerator.place = model.place
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1) as ema:
        yield ema


Averages = list[torch.Tensor]


def averages_of(ema: PostHocEMA) -> Averages:
    assert ema._session is not None
    ema._session.writer.settle()
    return [flat.clone() for averages in ema._session.tracker.averages for flat in averages]


def wanted(folder: Path, num_updates: int) -> Averages:
    """Averages of a `Net` of ones, twos, ..., all of it on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "of", lambda _: HOST)
        model = Net()
        ema = PostHocEMA.from_model(model, folder, update_every=1)
        for update in range(1, num_updates + 1):
            set_all(model, update)
            ema.update_(model)
        return averages_of(ema)


def train(ema: PostHocEMA, accelerator: FakeAccelerator, num_updates: int, *, after_step: Callable[[], object]) -> None:
    """Make updates of ones, twos, ..., each followed at once by the step that overwrites them."""
    model = ema._session._model

    def step(value: int) -> None:
        set_all(model.offloaded, value)
        accelerator.launch(partial(set_all, model.resident, value))

    step(1)
    for update in range(1, num_updates + 1):
        ema.update_(model)
        step(update + 1)
        accelerator.launch(after_step)


@pytest.mark.parametrize("fenced", [True, False])
def test_averages_are_exact_although_training_goes_on_at_once_and_only_because_of_the_fence(
    ema: PostHocEMA, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fenced: bool
) -> None:
    expected = wanted(tmp_path / "cpu", 5)
    if not fenced:
        monkeypatch.setattr(SideStream, "fence", lambda _: None)
    stepped = threading.Semaphore(0)
    wait = SideStream.wait

    def wait_late(side_stream: SideStream, slot: int) -> None:
        """Nobody asks for the copy before the parameters have changed, unless the fence does."""
        stepped.acquire()
        wait(side_stream, slot)

    monkeypatch.setattr(SideStream, "wait", wait_late)
    train(ema, accelerator, 5, after_step=stepped.release)
    found = averages_of(ema)
    stepped.release()  # for the last snapshot
    assert all(map(torch.equal, found, expected)) is fenced


@pytest.mark.parametrize("waits", [True, False])
def test_averages_are_exact_although_copies_arrive_late_and_only_because_their_thread_waits(
    ema: PostHocEMA, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: bool
) -> None:
    expected = wanted(tmp_path / "cpu", 1)
    is_free = threading.Event()
    set_all(ema._session._model, 1)
    accelerator.launch(is_free.wait)  # the device is busy, and begins no copy
    if waits:
        ema.update_()
        is_free.set()
    else:
        monkeypatch.setattr(SideStream, "wait", lambda *_: None)
        ema.update_()
        averages_of(ema)
        is_free.set()
    assert all(map(torch.equal, averages_of(ema), expected)) is waits


@pytest.mark.parametrize("waits", [True, False])
def test_averages_are_exact_although_updates_come_faster_and_only_because_the_third_waits_for_a_slot(
    ema: PostHocEMA, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: bool
) -> None:
    expected = wanted(tmp_path / "cpu", 3)
    go_on = threading.Event()
    wait, wait_until_fewer = SideStream.wait, Worker.wait_until_fewer

    def wait_late(side_stream: SideStream, slot: int) -> None:
        """No slot is taken in before training needs one, or is done."""
        go_on.wait()
        wait(side_stream, slot)

    def wait_for_slot(worker: Worker[object], num_pending: int, timeout: float | None = None) -> bool:
        if num_pending == NUM_SLOTS and not waits:
            return True
        if worker.num_pending >= num_pending:
            go_on.set()
        return wait_until_fewer(worker, num_pending, timeout)

    monkeypatch.setattr(SideStream, "wait", wait_late)
    monkeypatch.setattr(Worker, "wait_until_fewer", wait_for_slot)
    train(ema, accelerator, 3, after_step=int)
    accelerator.synchronize()
    assert go_on.is_set() is waits
    assert all(map(torch.equal, averages_of(ema), expected)) is waits


def test_update_does_not_wait_for_the_device(ema: PostHocEMA, accelerator: FakeAccelerator, tmp_path: Path) -> None:
    expected = wanted(tmp_path / "cpu", NUM_SLOTS)
    is_free = threading.Event()
    accelerator.launch(is_free.wait)
    train(ema, accelerator, NUM_SLOTS, after_step=int)  # returns
    is_free.set()
    assert all(map(torch.equal, averages_of(ema), expected))


def test_a_copy_that_fails_on_the_device_is_told_at_the_next_update(
    tmp_path: Path, accelerator: FakeAccelerator
) -> None:
    model = nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1)
    accelerator.fail = True
    ema.update_(model)
    with pytest.raises(BackgroundError, match="illegal memory access") as caught:
        averages_of(ema)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(BackgroundError, match="illegal memory access"):
        ema.update_(model)


# On a real one


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_averages_are_exact_and_cost_neither_its_memory_nor_a_wait(
    tmp_path: Path, cuda: torch.device, memory_format: torch.memory_format
) -> None:
    """8 M parameters, so that the copy takes longer than the launch of what would spoil it."""

    def averaged(folder: str, where: torch.device) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(512, 1024, 4), nn.BatchNorm2d(1024))
        change = [torch.randn_like(parameter).to(where) for parameter in model.parameters()]
        model = model.to(where, memory_format=memory_format)
        with PostHocEMA.from_model(model, tmp_path / folder, update_every=1, checkpoint_every=50) as ema:
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error")  # wherever training would wait for the device
            for _ in range(20):
                ema.update_(model)
                with torch.no_grad():
                    torch._foreach_add_(list(model.parameters()), change)
                model[1].running_mean.add_(1)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.cuda.memory_allocated() == before
        with ema.state_dict(sigma_rel=0.1) as state:
            return state

    found, expected = averaged("gpu", cuda), averaged("cpu", HOST)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_a_gpu_an_update_in_a_graph_capture_is_refused(tmp_path: Path, cuda: torch.device) -> None:
    model = nn.Linear(8, 8).to(cuda)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1) as ema:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.weight.data.mul_(2)
            with pytest.raises(SettingsError, match="call update_ after each replay"):
                ema.update_(model)
        graph.replay()
        ema.update_(model)
