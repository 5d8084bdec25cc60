"""What comes of another library's snapshots: read by that library, and imported.

    python benchmarks/imported.py            all rows, about a minute
    python benchmarks/imported.py --quick    short runs, as a smoke test

Needs pytorch-posthoc-ema==1.0.10 and ema-pytorch==0.8.3 (`pip install '.[bench]'`). Their own classes train two
tensors: one is e_i from update i to the next, so that its average shows the share that it has of each; the other is
N(0, 1) and a random walk that adds a third of that over the run. Each average is compared with that of its sigma_rel
tracked directly, in float64, over the same updates:

* profile: the relative error of the shares, in L2 over time. In float32 only: shares are too small for float16.
* walk: the error of the random walk, as a share of what averaging changes at all (the distance of the right average to
  the last parameters). No averaging is 1, the limit is 0.

`certificate` is what `phema synthesize` says without knowing that: the profile error, and the rounding noise as a share
of the parameters; `!` marks a warning. `really` are the two tracked averages, asked for as 0.05 and 0.28.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ema_pytorch
import numpy as np
import numpy.typing as npt
import posthoc_ema
import torch
from torch import nn

from phema_dist import synthesize
from phema_dist.legacy import OneStepProfile, spread
from phema_dist.migration import Folder, copy_folder
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.storage.store import open_store

SIGMA_RELS = (0.05, 0.28)
TARGETS = (0.05, 0.10, 0.15, 0.20)
NUM_SNAPSHOTS = 20
WALK = 2_000  # elements
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A run of theirs."""

    library: str
    update_every: int
    dtype: str
    num_steps: int


CASES = [
    Case("posthoc-ema", 10, "fp32", 20_000),
    Case("posthoc-ema", 10, "fp16", 20_000),
    Case("posthoc-ema", 10, "bf16", 20_000),
    Case("posthoc-ema", 1, "fp32", 5_000),
    Case("ema-pytorch", 10, "fp32", 20_000),
    Case("ema-pytorch", 10, "fp16", 20_000),
    Case("ema-pytorch", 100, "fp16", 20_000),
    Case("ema-pytorch", 100, "fp32", 20_000),
]


@dataclass(frozen=True)
class Trained:
    """Times of updates since averaging began, the walk at each [updates, elements], and how they synthesize."""

    times: Array
    walk: Array
    own: Callable[[float], dict[str, torch.Tensor]]


class Tensors(nn.Module):
    """What is trained."""

    def __init__(self, num_updates: int) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.zeros(num_updates))
        self.walk = nn.Parameter(torch.randn(WALK))


def train(case: Case, path: Path) -> Trained:
    """Train in their way."""
    torch.manual_seed(0)
    first = 100 if case.library == "posthoc-ema" else 1
    every, snapshot_every = case.update_every, case.num_steps // NUM_SNAPSHOTS
    times = np.arange(0, case.num_steps - first + 1, every) + 1.0
    model = Tensors(len(times))
    dtype = DTYPES[case.dtype]
    if case.library == "posthoc-ema":
        mine = posthoc_ema.PostHocEMA.from_model(model, path, NUM_SNAPSHOTS, SIGMA_RELS, every, snapshot_every, dtype)

        def update() -> None:
            mine.update_(model)

        def own(sigma_rel: float) -> dict[str, torch.Tensor]:
            with mine.state_dict(sigma_rel) as state:
                return dict(state)
    else:
        theirs = ema_pytorch.PostHocEMA(
            model, sigma_rels=SIGMA_RELS, update_every=every, checkpoint_every_num_steps=snapshot_every,
            checkpoint_folder=str(path), checkpoint_dtype=dtype,
        )  # fmt: skip
        update = theirs.update

        def own(sigma_rel: float) -> dict[str, torch.Tensor]:
            return dict(theirs.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.state_dict())

    walks = np.empty((len(times), WALK))
    with torch.no_grad():
        for step in range(1, case.num_steps + 1):
            if step >= first and (step - first) % every == 0:
                i = (step - first) // every
                model.shares.zero_()[i] = 1
                model.walk.add_(torch.randn(WALK), alpha=len(times) ** -0.5 / 3)
                walks[i] = model.walk.numpy()
            update()
    return Trained(times, walks, own)


def tracked(sigma_rel: float, times: Array) -> Array:
    """The share of each update in an average that is tracked directly."""
    shares, gamma = np.zeros(len(times)), sigma_rel_to_gamma(sigma_rel)
    for i, t in enumerate(times):
        beta = (times[i - 1] / t) ** (gamma + 1) if i else 0.0
        shares *= beta
        shares[i] = 1 - beta
    return shares


def error(found: Array, wanted: Array, times: Array) -> float:
    """Relative, in L2 over time."""
    widths = np.diff(times, prepend=0.0)
    return float(np.sqrt(np.sum((found - wanted) ** 2 / widths) / np.sum(wanted**2 / widths)))


def rows(case: Case) -> Iterator[str]:
    """The table's rows for one run."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train(case, Path(folder) / "ema")
        times, out = trained.times, Path(folder) / "run"
        came = Folder(Path(folder) / "ema", case.library, SIGMA_RELS, case.update_every)
        for _ in copy_folder(came, open_store(out)):
            pass
        really = [spread(OneStepProfile(asked, times[-1]).masses(times), times) for asked in SIGMA_RELS]
        for made, sigma_rel in zip(synthesize(out, TARGETS), TARGETS, strict=True):
            wanted = tracked(sigma_rel, times)
            right = wanted @ trained.walk
            errors = []
            for state in (trained.own(sigma_rel), made.state_dict):
                shares, walk = (state[name].double().numpy() for name in ("shares", "walk"))
                changed = np.linalg.norm(walk - right) / np.linalg.norm(right - trained.walk[-1])
                in_profile = f"{error(shares, wanted, times):.4f}" if case.dtype == "fp32" else "-"
                errors.append(f"{in_profile} / {changed:.3f}")
            certificate = made.certificate
            said = (
                f"{certificate.recorded_error:.4f} / {certificate.rounding_noise:.2%}{'' if certificate.good else ' !'}"
            )
            yield (
                f"| {case.library} | {case.update_every} | {case.dtype} | {sigma_rel:.2f} | {errors[0]} | {errors[1]} "
                f"| {said} | {really[0]:.3f}, {really[1]:.3f} |"
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs")
    quick = parser.parse_args().quick
    logging.getLogger("phema_dist").setLevel(logging.ERROR)  # the table has the warnings as marks
    lengths = "4 000 steps" if quick else "20 000 steps (update_every 1: 5 000)"
    print(f"{NUM_SNAPSHOTS} snapshots of sigma_rels {SIGMA_RELS}, {lengths}; errors are profile / walk")
    print("| library | update_every | dtype | target | its own | ours | certificate | really |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        case_here = Case(case.library, case.update_every, case.dtype, 4_000) if quick else case
        for row in rows(case_here):
            print(row, flush=True)


if __name__ == "__main__":
    main()
