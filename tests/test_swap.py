"""Other values in a live model for a while: the same object in eval mode inside, and its own bits afterwards."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from phema_dist import PostHocEMA, synthesize
from phema_dist.errors import LayoutError
from phema_dist.ranks import ALONE
from phema_dist.training.layout import read_layout
from phema_dist.training.swap import swapped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.low = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.out = nn.Linear(4, 3)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.linear.weight
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = self.cache + 1  # a forward that replaces a buffer, as some do
        self.calls.add_(1)  # and one that changes it in place
        x = self.norm(self.linear(x) + self.tied(x))
        return self.out(self.dropout(self.low(x.bfloat16()).float())) * self.scale


def trained(folder: Path, model: nn.Module | None = None) -> tuple[nn.Module, PostHocEMA]:
    model = model or Net()
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(16, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        ema.update_(model)
        ema._session.writer.drain()
    return model, ema


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, also those that no state dict has: their bits."""
    return {
        name: tensor.detach().clone().reshape(-1).view(torch.uint8)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = everything(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def leave_quietly(_: nn.Module) -> None:
    pass


def leave_by_an_error(model: nn.Module) -> None:
    model.train()
    model(torch.ones(5, 3))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    raise ZeroDivisionError


@pytest.mark.parametrize("leave", [leave_quietly, leave_by_an_error])
@pytest.mark.parametrize("around", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compile"])
def test_parameters_buffers_and_flags_come_back_bit_for_bit(
    leave: Callable[[nn.Module], None], around: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    bare, ema = trained(tmp_path)
    model = around(bare)
    model.train()
    bare.norm.eval()  # as in fine-tuning: not all modules have one flag
    with torch.no_grad():
        bare.linear.bias[0], bare.low.bias[0] = torch.nan, -0.0  # bits, not numbers
    before, flags = everything(model), [module.training for module in model.modules()]
    objects = [id(t) for t in (*model.parameters(), *model.buffers())]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ended = False
    try:
        with ema.model(model, 0.15) as averaged:
            assert averaged is model
            assert not any(module.training for module in model.modules())
            inside = everything(model)
            (wanted,) = synthesize(tmp_path, [0.15])
            plain = Net().eval()
            plain.load_state_dict(wanted.state_dict, strict=True)
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(99))
            with torch.no_grad():
                assert torch.equal(bare(x), plain(x))
            leave(model)
    except ZeroDivisionError:
        ended = True
    assert ended == (leave is leave_by_an_error)
    assert_same_bits(model, before)
    assert [module.training for module in model.modules()] == flags
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == objects  # an optimizer holds them
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(grads, (p for p in model.parameters() if p.grad is not None), strict=True)
    )
    assert not torch.equal(inside[next(iter(inside))], before[next(iter(before))])
    ema.close()


def test_an_error_while_it_is_filled_brings_back_what_was_there(tmp_path: Path) -> None:
    model, ema = trained(tmp_path)
    ema.close()
    for data in tmp_path.glob("snapshots/*/sigma_rel-*/*.safetensors"):  # one that is whole would do
        stored = bytearray(data.read_bytes())
        stored[-1] ^= 1
        data.write_bytes(stored)
    before = everything(model)
    with pytest.raises(ValueError, match="is damaged"), ema.model(model, 0.28):
        raise AssertionError
    assert_same_bits(model, before)
    assert model.training


def test_blocks_may_be_nested_and_repeated(tmp_path: Path) -> None:
    model, ema = trained(tmp_path)
    before = everything(model)
    with ema.model(model, 0.28):
        long = everything(model)
        with ema.model(model, 0.05):
            assert not torch.equal(everything(model)["linear.weight"], long["linear.weight"])
        assert_same_bits(model, long)
    assert_same_bits(model, before)
    ema.close()


def test_blocks_that_are_left_in_another_order_leave_no_trace_either(tmp_path: Path) -> None:
    model, ema = trained(tmp_path)
    before = everything(model)

    def losses(sigma_rel: float) -> Iterator[float]:
        with ema.model(model, sigma_rel):
            for x in torch.ones(3, 5, 3):
                yield model(x).sum().item()

    assert len(list(zip(losses(0.28), losses(0.05), losses(0.1), strict=False))) == 3  # the first is left first
    assert_same_bits(model, before)
    assert all(module.training for module in model.modules())
    ema.update_(model)
    ema.close()


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double])
def test_a_model_that_is_cast_in_the_block_comes_back_as_it_was(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, ema = trained(tmp_path)
    before, parameters = everything(model), list(model.parameters())
    with ema.model(model, 0.28):
        change(model)
    assert_same_bits(model, before)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    ema.update_(model)
    ema.close()


class Merging(nn.Linear):
    """Merges its two factors into its weight in eval mode, as LoRA does."""

    def __init__(self) -> None:
        super().__init__(3, 3, bias=False)
        self.a, self.b = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(3, 1))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


@pytest.mark.parametrize("only_save_diff", [True, False])
@pytest.mark.parametrize("evaluating", [True, False])
def test_what_a_module_merges_to_evaluate_is_the_average(
    only_save_diff: bool, evaluating: bool, tmp_path: Path
) -> None:
    model, x = nn.Sequential(Merging()), torch.ones(1, 3)
    model[0].weight.requires_grad_(not only_save_diff)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(9).view(3, 3))  # all sums are exact
    with PostHocEMA.from_model(model, tmp_path, update_every=1, only_save_diff=only_save_diff) as ema:
        ema.update_(model)
        average = model(x).detach()
        with torch.no_grad():
            model[0].a.add_(2)
        model.train(not evaluating)
        before, own = everything(model), model(x).detach()
        for _ in range(2):
            with ema.model(model, 0.28), torch.no_grad():
                assert model[0].merged
                assert torch.equal(model(x), average)
            assert_same_bits(model, before)
            assert torch.equal(model(x), own)
            assert model[0].merged == evaluating
        model.train()
        assert torch.equal(model(x), own)


def test_a_fresh_model_of_the_same_architecture_is_filled_from_a_run_that_is_only_read(tmp_path: Path) -> None:
    _, ema = trained(tmp_path)
    ema.close()
    model = Net()
    with PostHocEMA.from_path(tmp_path).model(model, 0.1):
        (wanted,) = synthesize(tmp_path, [0.1])
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted.state_dict[name].to(tensor.dtype)), name


def test_frozen_parameters_stay_what_they_are_where_only_the_difference_is_stored(tmp_path: Path) -> None:
    model = Net()
    model.out.requires_grad_(requires_grad=False)
    ema = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1, only_save_diff=True)
    ema.update_(model)
    with ema.state_dict(0.28) as state:
        assert set(model.state_dict()) - set(state) == {"out.weight", "out.bias"}
    own = model.out.weight.clone()
    model.requires_grad_(requires_grad=False)  # as some do to evaluate
    with ema.model(model, 0.28):
        assert torch.equal(model.out.weight, own)
    ema.close()


def test_a_frozen_float8_parameter_does_not_stand_in_the_way(tmp_path: Path) -> None:
    model = Net()
    model.codes = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1, only_save_diff=True) as ema:
        ema.update_(model)
        with ema.model(model, 0.28):
            pass


def test_another_model_is_refused_untouched(tmp_path: Path) -> None:
    _, ema = trained(tmp_path)
    other = nn.Linear(3, 4)
    before = everything(other)
    with pytest.raises(LayoutError, match=r"weight is not in the run and \(4, 3\) in the model"):  # noqa: SIM117
        with ema.model(other, 0.1):
            pass
    assert_same_bits(other, before)
    assert other.training
    ema.close()


def test_a_write_reaches_one_box_and_no_gradient() -> None:
    model = nn.Linear(3, 4)
    layout = read_layout(model)
    weight = next(t for t in layout.tensors if t.info.fqn == "weight")
    before = model.weight.detach().clone()
    with swapped(model, layout, ALONE) as write:
        write("weight", weight.box.rows(1, 3), torch.full((2, 3), 7.0))
        assert torch.equal(model.weight[[0, 3]], before[[0, 3]])
        assert bool((model.weight[1:3] == 7).all())
        assert model.weight.grad_fn is None
    assert torch.equal(model.weight, before)


def test_buffers_that_cannot_be_written_do_not_stand_in_the_way(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("scale", torch.tensor(0.5).expand(3, 1), persistent=False)
    with torch.inference_mode():
        cache = torch.ones(4)
    model.register_buffer("cache", cache, persistent=False)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        with torch.no_grad():
            model[0].weight.add_(1)
        own = model[0].weight.clone()
        with pytest.raises(ZeroDivisionError), ema.model(model, sigma_rel=0.1):
            assert not torch.equal(model[0].weight, own)
            raise ZeroDivisionError
    assert torch.equal(model[0].weight, own)
    assert model.training
    assert model.cache is cache


def test_a_parameter_that_cannot_be_written_is_named_before_anything_is_changed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        model[0].weight = nn.Parameter(torch.zeros(1, 3).expand(3, 3))
        with pytest.raises(LayoutError, match=r"0\.weight must be writable"), ema.model(model, sigma_rel=0.1):
            pass
    assert model.training


class Growing(nn.Module):
    """Its forward puts a larger buffer in place of a persistent one, as a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x])
        return self.linear(x)


def test_a_buffer_that_a_forward_replaces_comes_back(tmp_path: Path) -> None:
    model = Growing()
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
        with torch.no_grad():
            model.linear.weight.add_(1)
        own, seen = model.linear.weight.clone(), model.seen
        with ema.model(model, sigma_rel=0.1):
            model(torch.ones(2, 3))
            assert model.seen.shape == (2, 3)
        assert model.seen is seen
        assert torch.equal(model.linear.weight, own)
