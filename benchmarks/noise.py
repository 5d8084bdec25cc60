"""What rounded snapshots cost a synthesis, and what noise-aware coefficients save: parameters of a real training.

    python benchmarks/noise.py                     1 000 steps of the digits example, a snapshot each 50
    python benchmarks/noise.py --steps 3000 --every 25 --learning-rate 3e-4

One process trains the denoiser of examples/digits.py and stores float32, float16 and bfloat16 snapshots of
(0.05, 0.28), and float32 ones of the targets themselves, which synthesized averages are compared with. All errors are
root mean squares by that of the parameters, in %, as measured / as the certificate promises. Movement is what the
average differs from the parameters by. Coefficients are those of profiles alone ("profile"), noise-aware ones, and
("best V") those that minimise V |profile error|^2 + s^2 |coefficients|^2 for the V that proved best afterwards, which
nobody can know. The limit is the directly tracked average, itself stored in that dtype: what somebody gets who knew its
length before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from phema_dist import PostHocEMA
from phema_dist.profile import Array, PowerProfile, constrained_least_squares, fit, inner_products
from phema_dist.storage.run import Run, open_run
from phema_dist.storage.store import open_store
from phema_dist.synthesis.consolidate import empty_state, fill_states
from phema_dist.synthesis.noise import noise_of
from phema_dist.synthesis.recipe import plan, stored_recipe
from phema_dist.synthesis.stream import stream

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import Denoiser, denoising_loss, load_digits

TRACKED, TARGETS = (0.05, 0.28), (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.20)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FACTORS = 10.0 ** np.arange(-9, 1.1, 0.25)  # of V, by v t^2


def train(folder: Path, steps: int, every: int, learning_rate: float) -> Array:
    """Train once, store all runs, return the last parameters."""
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    images, labels = load_digits("train")
    with ExitStack() as stack:
        emas = [
            stack.enter_context(
                PostHocEMA.from_model(
                    model, folder / name, max_checkpoints=10**6, sigma_rels=sigma_rels, checkpoint_every=every,
                    checkpoint_dtype=dtype,
                )
            )
            for name, sigma_rels, dtype in [
                *((name, TRACKED, dtype) for name, dtype in DTYPES.items()), ("direct", TARGETS, torch.float32),
            ]
        ]  # fmt: skip
        for step in range(1, steps + 1):
            batch = torch.randint(len(images), (32,))
            optimizer.zero_grad()
            denoising_loss(model, images[batch], labels[batch]).backward()
            optimizer.step()
            for ema in emas:
                ema.update_(model)
                if step % every == 0:
                    ema._session.writer.drain()  # type: ignore[union-attr]  # noqa: SLF001
    return flat(dict(model.named_parameters()))


def flat(state: Mapping[str, torch.Tensor]) -> Array:
    """All parameters in one."""
    return torch.cat([state[name].detach().flatten() for name in sorted(state)]).double().numpy()


def stored_averages(run: Run) -> list[Array]:
    """Those of the first sigma_rel by t, then those of the next."""
    found = []
    for sigma_rel in run.info.sigma_rels:
        for snapshot in run.complete:
            state = empty_state(run.info)
            stream(run.store, run.info, [stored_recipe(snapshot, sigma_rel)], fill_states([state]))
            found.append(flat(state))
    return found


def report(folder: Path, last: Array) -> None:
    """Print the table."""
    direct = open_run(open_store(folder / "direct"))
    newest = replace(direct, snapshots=direct.complete[-1:])
    wanted = dict(zip(newest.info.sigma_rels, stored_averages(newest), strict=True))
    print("| stored as | sigma_rel | movement | profile | noise-aware | best V | limit |")
    print("|---|---|---|---|---|---|---|")
    for name, dtype in DTYPES.items():
        run = open_run(open_store(folder / name))
        held = np.array(stored_averages(run))
        profiles = [PowerProfile(sigma_rel, s.t) for sigma_rel in run.info.sigma_rels for s in run.complete]
        noise = noise_of(run, run.complete[-1].t)
        assert noise is not None
        for target in TARGETS:
            exact, aim = wanted[target], PowerProfile(target, run.complete[-1].t)
            size = np.sqrt(np.mean(exact**2))

            def off(x: Array, exact: Array = exact, size: float = size, held: Array = held) -> float:
                return float(100 * np.sqrt(np.mean((x @ held - exact) ** 2)) / size)

            plain = fit(profiles, [aim])[0]
            gram, cross = inner_products(profiles, profiles), inner_products(profiles, [aim])
            ridges = [np.diag(noise.roundings**2 / noise.steps.sum() / factor) for factor in FACTORS]
            best = min(off(constrained_least_squares(gram * aim.t + ridge, cross * aim.t)[:, 0]) for ridge in ridges)
            (recipe,) = plan(run, [target])
            chosen = np.zeros(len(profiles))
            for term in recipe.terms:
                chosen[profiles.index(PowerProfile(term.sigma_rel, term.snapshot.t))] = term.coefficient
            rounded = torch.tensor(exact).to(dtype).double().numpy()
            moved, certified = 100 * np.sqrt(np.mean((last - exact) ** 2)) / size, recipe.certificate
            promised = 100 * noise.judge(plain, [aim])[0][0]
            print(
                f"| {name} | {target:.2f} | {moved:.2f} / {100 * (certified.movement or 0):.2f} "
                f"| {off(plain[:, 0]):.2g} / {promised:.2g} "
                f"| {off(chosen):.2g} / {100 * (certified.parameter_error or 0):.2g} | {best:.2g} "
                f"| {100 * np.sqrt(np.mean((rounded - exact) ** 2)) / size:.2g} |"
            )


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="steps between snapshots")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="phema-bench-") as folder:
        last = train(Path(folder), arguments.steps, arguments.every, arguments.learning_rate)
        report(Path(folder), last)


if __name__ == "__main__":
    main()
