"""What a rank holds: names of the bare model, each tensor once, and refusals instead of wrong averages."""

import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from phema_dist.errors import LayoutError
from phema_dist.ranks import ALONE
from phema_dist.shard import whole
from phema_dist.storage.manifest import BUFFER, PARAMETER
from phema_dist.training.layout import read_layout, select
from phema_dist.training.ownership import agree
from phema_dist.training.wrappers import is_sharded


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def inner_wrapped(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.ModuleList([wrap(Block()), Block()])


@pytest.mark.parametrize(
    "model",
    [
        inner_wrapped(lambda block: block),
        inner_wrapped(checkpoint_wrapper),
        inner_wrapped(compiled),
        inner_wrapped(lambda block: compiled(checkpoint_wrapper(block))),
        compiled(inner_wrapped(checkpoint_wrapper)),
    ],
    ids=["plain", "checkpoint", "compile", "both", "around"],
)
def test_wrappers_leave_the_names_of_the_bare_model(model: nn.Module) -> None:
    bare = inner_wrapped(lambda block: block)
    found = [(t.info.fqn, t.info.shape, t.info.dtype) for t in read_layout(model).tensors]
    assert sorted(found) == sorted((name, tuple(t.shape), t.dtype) for name, t in bare.state_dict().items())


def test_a_child_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})
    assert [t.info.fqn for t in read_layout(model).tensors] == ["module.weight"]


def test_tied_tensors_are_held_once_and_known_under_each_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["c"].weight = model["a"].weight
    model["c"].register_buffer("table", torch.zeros(2))
    model["b"].register_buffer("table", model["c"].table)
    layout = read_layout(model)
    assert layout.aliases == {"b.weight": "a.weight", "c.weight": "a.weight", "c.table": "b.table"}
    assert {t.info.fqn for t in layout.tensors} | set(layout.aliases) == set(model.state_dict())


def test_persistent_buffers_are_stored_and_integers_are_never_averaged() -> None:
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("forgotten", torch.zeros(2), persistent=False)
    model.register_buffer("absent", None)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    model.weight = nn.Parameter(torch.zeros(()))
    model.wave = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    found = {t.info.fqn: (t.info.kind, t.info.average_dtype) for t in read_layout(model).tensors}
    assert found == {
        "kept": (BUFFER, torch.float32),
        "codes": (BUFFER, torch.int64),
        "weight": (PARAMETER, torch.float32),
        "wave": (PARAMETER, torch.complex64),
    }


def test_only_save_diff_leaves_out_frozen_parameters_and_keeps_buffers() -> None:
    model = Block()
    model.linear.weight.requires_grad_(requires_grad=False)
    layout = read_layout(model, only_save_diff=True)
    names = {t.info.fqn for t in layout.tensors}
    assert names == set(model.state_dict()) - {"linear.weight"}
    # A fresh model, with nothing frozen, is read for the tensors of such a run.
    shapes = {t.info.fqn: t.info.shape for t in layout.tensors}
    assert {t.info.fqn for t in select(read_layout(Block()), shapes, partial=True).tensors} == names
    with pytest.raises(LayoutError, match=r"linear.weight is not in the run"):
        select(read_layout(Block()), shapes, partial=False)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight": (4, 3), "bias": (5,)}, r"bias is \(5,\) in the run and \(4,\) in the model"),
        ({"weight": (4, 3), "bias": (4,), "gain": ()}, r"gain is \(\) in the run and not in the model"),
        ({"weight": (4, 3)}, r"bias is not in the run and \(4,\) in the model"),
    ],
)
def test_a_model_that_is_not_the_runs_is_refused_by_the_first_difference(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        select(read_layout(nn.Linear(3, 4)), shapes, partial=False)


def test_ranks_may_hold_different_modules_if_together_they_hold_the_runs() -> None:
    shapes = {"a.weight": (4, 3), "b.weight": (2, 2)}
    mine, other = (read_layout(nn.Linear(3, 4, bias=False), prefix=prefix) for prefix in ("a.", "c."))
    assert set(select(mine, shapes, set(shapes), partial=False).infos) == {"a.weight"}
    with pytest.raises(LayoutError, match=r"b.weight is \(2, 2\) in the run and not in the model"):
        select(mine, shapes, {"a.weight"}, partial=False)
    with pytest.raises(LayoutError, match=r"c.weight is not in the run and \(4, 3\) in the model"):
        select(other, shapes, set(shapes), partial=False)
    assert select(other, shapes, set(shapes), partial=True).infos == {}
    with pytest.raises(LayoutError, match=r"a.weight is \(4, 4\) in the run and \(4, 3\) in the model"):
        select(mine, {"a.weight": (4, 4)}, {"a.weight"}, partial=True)


def test_a_prefix_comes_before_every_name_and_counts_for_the_choice_of_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    layout = read_layout(model, prefix="stage1.")
    assert list(layout.infos) == ["stage1.a.weight"]
    assert layout.aliases == {"stage1.b.weight": "stage1.a.weight"}
    assert [t.info.fqn for t in layout.tensors] == ["stage1.a.weight"]
    assert read_layout(model, prefix="stage1.", among={"a.weight"}).infos == {}
    assert list(read_layout(model, prefix="stage1.", among={"stage1.b.weight"}).infos) == ["stage1.b.weight"]


def test_one_name_for_two_tensors_is_refused() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3))
    model._orig_mod = nn.Linear(2, 2, bias=False)
    with pytest.raises(LayoutError, match=r"weight must be one tensor; .* the second of shape \(2, 2\)"):
        read_layout(model)


def with_parameter(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.odd = nn.Parameter(tensor, requires_grad=False)
    return model


class Strange(torch.Tensor):
    """What a quantizing library puts in place of a parameter."""


class StrangeParameter(nn.Parameter):
    """What a library puts in place of a parameter."""


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_buffer("odd", tensor)
    return model


def with_strange_parameter() -> nn.Module:
    model = nn.Module()
    model.odd = StrangeParameter(torch.zeros(2))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: with_parameter(torch.zeros(2).to(torch.float8_e4m3fn)),
            "odd must be one of float32, .*float8_e4m3fn",
        ),
        (lambda: with_parameter(torch.zeros(2, dtype=torch.complex128)), "odd must be one of .*complex128"),
        (lambda: with_parameter(torch.zeros(2, device="meta")), "odd must have storage"),
        (lambda: with_parameter(torch.zeros(2, 2).to_sparse()), r"odd of shape \(2, 2\) must be a plain .*sparse_coo"),
        (lambda: with_buffer(torch.zeros(2).as_subclass(Strange)), r"odd of shape \(2,\) must be a plain .* Strange"),
        (with_strange_parameter, r"odd of shape \(2,\) must be a plain tensor .* StrangeParameter"),
        (lambda: nn.LazyLinear(3), "weight must have a shape"),
        (lambda: with_buffer(torch.zeros(2, dtype=torch.complex128)), "odd must have a dtype .*complex128"),
    ],
    ids=[
        "float8",
        "complex128",
        "meta",
        "sparse",
        "buffer subclass",
        "parameter subclass",
        "lazy",
        "complex128 buffer",
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_averaged_is_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_layout(make())


def test_a_frozen_float8_parameter_may_be_left_out() -> None:
    model = with_parameter(torch.zeros(2).to(torch.float8_e4m3fn))
    model.weight = nn.Parameter(torch.zeros(2))
    assert [t.info.fqn for t in read_layout(model, only_save_diff=True).tensors] == ["weight"]


def test_a_tensor_that_changed_its_shape_dtype_or_existence_is_named() -> None:
    for change in (
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2, 3))),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.register_parameter("weight", None),
    ):
        model = nn.Linear(3, 4, bias=False)
        (weight,) = read_layout(model).tensors
        change(model)
        with pytest.raises(LayoutError, match=r"weight must stay as it was .* torch.float32 \(4, 3\)"):
            weight.local()


def test_a_float_buffer_may_be_cast_but_never_become_another_kind_of_number() -> None:
    model = nn.BatchNorm1d(3, affine=False)
    layout = read_layout(model)
    model.running_mean.data = model.running_mean.bfloat16()  # as FSDP1 does at the first forward
    assert layout.tensors[0].local().dtype == torch.bfloat16
    model.running_var = model.running_var.int()
    with pytest.raises(LayoutError, match=r"running_var must stay .*found Tensor torch.int32 \(3,\)"):
        layout.tensors[1].local()
    model.num_batches_tracked = model.num_batches_tracked.float()
    with pytest.raises(LayoutError, match=r"num_batches_tracked must stay as it was .* torch.int64"):
        layout.tensors[2].local()


def test_what_becomes_of_a_tensor_that_is_replaced_by_something_else_is_named() -> None:
    model = nn.Linear(3, 4, bias=False)
    (weight,) = read_layout(model).tensors
    model._parameters["weight"] = model.weight.as_subclass(Strange)
    with pytest.raises(LayoutError, match=r"weight must stay .* found Strange torch.float32 \(4, 3\)"):
        weight.local()


Change = Callable[[nn.Module], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[1].linear.register_parameter("gain", nn.Parameter(torch.ones(4))), r"1.linear.gain .* was added"),
        (lambda m: m[1].linear.add_module("adapter", nn.Linear(2, 2)), r"1.linear.adapter.weight .*\(2, 2\) was added"),
        (lambda m: m.append(Block()), "2.linear.weight of shape .* was added"),
        (lambda m: m[0].register_parameter("late", nn.Parameter(torch.ones(1))), "0.late .* was added"),
        (lambda m: m.insert(0, Block()), r"0.linear.weight of shape \(4, 3\) is in another module"),
        (lambda m: setattr(m[0], "linear", nn.Linear(3, 4)), r"0.linear.weight .* is in another module"),
    ],
    ids=["parameter", "submodule", "last", "in place of None", "moved", "replaced"],
)
def test_what_is_added_or_replaced_later_is_named(change: Change, message: str) -> None:
    model = nn.ModuleList([Block(), Block()])
    model[0].register_parameter("late", None)
    layout = read_layout(model)
    layout.check_unchanged()
    change(model)
    for _ in range(2):
        with pytest.raises(LayoutError, match=message):
            layout.check_unchanged()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__(0, checkpoint_wrapper(m[0])),
        lambda m: m.__setitem__(0, compiled(m[0])),
        lambda m: m[0].compile(backend="eager"),
        lambda m: m[0].register_buffer("cache", torch.zeros(2)),
        lambda m: m[0].add_module("act", nn.ReLU()),
        lambda m: m[0].register_parameter("frozen", nn.Parameter(torch.ones(1), requires_grad=False)),
        lambda m: setattr(m[0].linear, "weight", nn.Parameter(torch.zeros(4, 3))),
    ],
    ids=["checkpointed", "compiled", "compiled in place", "buffer", "without parameters", "left out", "reassigned"],
)
def test_what_leaves_the_averaged_tensors_as_they_were_is_no_change(change: Change) -> None:
    model = nn.ModuleList([Block(), Block()])
    layout = read_layout(model, only_save_diff=True)
    change(model)
    for _ in range(2):
        layout.check_unchanged()
    for tensor in layout.tensors:
        tensor.local()


def test_looking_for_changes_costs_far_less_than_an_update() -> None:
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(2500)])
    layout = read_layout(model)
    seconds = min(timeit.repeat(layout.check_unchanged, number=1, repeat=50))
    assert seconds < 4e-3, f"{seconds * 1e3:.2f} ms for 5 000 parameters"


def test_the_storage_is_looked_up_anew_and_never_kept() -> None:
    model = nn.Linear(3, 4, bias=False)
    (weight,) = read_layout(model).tensors
    model.weight = nn.Parameter(torch.ones(4, 3))
    assert weight.local() is model.weight
    model.weight.data = torch.full((4, 3), 2.0)
    assert bool((weight.local() == 2).all())


def test_one_process_owns_all_of_a_plain_model_in_its_order() -> None:
    model = Block()
    owned = agree(read_layout(model), ALONE)
    assert [p.info.fqn for p in owned.pieces] == [t.fqn for t in owned.tensors]
    assert all(p.box == whole(p.info.shape) for p in owned.pieces)
    assert {p.info.fqn for p in owned.pieces} == set(model.state_dict())
    assert not is_sharded(model)


def test_tensors_without_elements_are_tensors_of_the_run() -> None:
    model: Any = nn.Module()
    model.none, model.one = nn.Parameter(torch.zeros(0, 7)), nn.Parameter(torch.zeros(1))
    assert [p.box for p in agree(read_layout(model), ALONE).pieces] == [whole((0, 7)), whole((1,))]


def test_a_model_with_nothing_to_average_is_refused() -> None:
    frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
    emptied = nn.Linear(3, 3, bias=False)
    emptied.weight.data = torch.empty(0)  # as DeepSpeed's ZeRO-3 does
    for layout in (
        read_layout(nn.BatchNorm1d(3, affine=False)), read_layout(frozen, only_save_diff=True), read_layout(emptied)
    ):  # fmt: skip
        with pytest.raises(LayoutError, match="must have parameters to average"):
            agree(layout, ALONE)


def test_a_tie_that_is_broken_later_is_named() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    layout = read_layout(model)
    layout.check_unchanged()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(LayoutError, match=r"head.weight was tied to another parameter"):
        layout.check_unchanged()
