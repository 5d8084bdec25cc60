"""examples/train_llm.py: its averages are right, cost eight lines and no bit, and it stops and goes on when told."""

import faulthandler
import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from test_launch import assert_same, read_checkpoint

from phema_dist import synthesize

SCRIPT = Path(__file__).parents[1] / "examples/train_llm.py"
SIGMA_RELS = (0.05, 0.28)
STEPS = 12
WORDS = (
    *("--steps", str(STEPS), "--warmup", "3", "--batch-size", "4", "--length", "16", "--width", "16"),
    *("--blocks", "2", "--save-every", "1000", "--log-every", "5"),
)


@contextmanager
def handlers_of_signals() -> Iterator[None]:
    """Give back the handlers that the script takes: these processes live on."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        faulthandler.register(signal.SIGUSR1)


def script(*, averaged: bool) -> types.ModuleType:
    """The script as a module, or what is left of it without the lines of the averages."""
    lines = SCRIPT.read_text().splitlines()
    module = types.ModuleType("train_llm")
    exec("\n".join(line for line in lines if averaged or not line.endswith("# EMA")), vars(module))  # noqa: S102
    return module


def train(folder: Path, *, averaged: bool = True, signalled: dict[int, int] | None = None) -> list[dict[str, Any]]:
    """Run the script. What its parameters were after each step; `signalled`: at which step a rank gets SIGTERM."""
    module, seen = script(averaged=averaged), []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: Any = None) -> None:
        step(self, closure)
        if self.param_groups[0]["lr"]:  # else it is get_state_dict's, which changes nothing
            seen.append([p.detach().full_tensor().clone() for p in self.param_groups[0]["params"]])  # type: ignore[attr-defined]
            if (signalled or {}).get(dist.get_rank()) == len(seen):
                os.kill(os.getpid(), signal.SIGTERM)

    where = ["--checkpoints", str(folder / "training"), *(["--averages", str(folder / "run")] if averaged else [])]
    torch.optim.AdamW.step = watched  # type: ignore[method-assign,assignment]
    try:
        with handlers_of_signals():
            module.train(module.arguments([*WORDS, *where]), torch.device("cpu"))
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    names = [name for name, _ in module.Transformer(16, 2, 4, 16).named_parameters()]
    return [dict(zip(names, values, strict=True)) for values in seen]


def train_and_return(folder: Path) -> list[dict[str, Any]]:
    return train(folder) if dist.get_rank() == 0 else train(folder)[:0]


def train_without_averages(folder: Path) -> None:
    train(folder, averaged=False)


def train_until_a_signal(folder: Path) -> int:
    return len(train(folder, signalled={1: 5}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """A folder, and the parameters after each step."""
    folder = tmp_path_factory.mktemp("llm")
    return folder, ranks.run(2, train_and_return, folder)[0]


def test_the_averages_are_those_of_the_profile(trained: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, seen = trained
    assert len(seen) == STEPS
    for sigma_rel, average in zip(SIGMA_RELS, synthesize(folder / "run", SIGMA_RELS), strict=True):
        # sigma_rel^2 (gamma+2)^2 (gamma+3) = gamma+1, and the profile's integral over each step.
        cubic = np.polymul(np.polymul([1, 2], [1, 2]), [1, 3]) * sigma_rel**2
        gamma = max(root.real for root in np.roots(np.polysub(cubic, [1, 1])) if abs(root.imag) < 1e-9)
        weights = np.diff((np.arange(STEPS + 1) / STEPS) ** (gamma + 1))
        assert average.state_dict.keys() == seen[0].keys()
        for name, found in average.state_dict.items():
            wanted = sum(weight * parameters[name].double() for weight, parameters in zip(weights, seen, strict=True))
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
            assert sigma_rel == 0.05 or float((found - seen[-1][name]).abs().max()) > 1e-4  # no average of equals


def test_without_the_eight_lines_the_same_training_is_left(
    trained: tuple[Path, list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    marked = [line for line in SCRIPT.read_text().splitlines() if line.endswith("# EMA")]
    assert len(marked) <= 8
    ranks.run(2, train_without_averages, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training"]
    plain = read_checkpoint(tmp_path / f"training/{STEPS:08d}")
    averaged = read_checkpoint(trained[0] / f"training/{STEPS:08d}")
    assert_same(plain, {name: tensor for name, tensor in averaged.items() if not name.startswith("ema.")})


def test_a_signal_to_one_rank_stops_all_and_one_rank_alone_goes_on(
    trained: tuple[Path, list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    assert ranks.run(2, train_until_a_signal, tmp_path) == [5, 5]
    (seen,) = ranks.run(1, train_and_return, tmp_path)
    assert len(seen) == STEPS - 5
    for now, before in zip(seen, trained[1][5:], strict=True):  # summed in another order: almost the same
        torch.testing.assert_close(now, before, rtol=0, atol=2e-4)
    folders = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert folders == [f"{step:08d}" for step in (5, STEPS)]
    found, wanted = (synthesize(folder / "run", SIGMA_RELS) for folder in (tmp_path, trained[0]))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.state_dict, other.state_dict, rtol=0, atol=2e-4)
