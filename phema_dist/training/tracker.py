"""The averages: one power profile each, updated together, block by block.

An update at t keeps beta = ((t - dt)/t)^(gamma + 1) of the old average, with dt measured since the last update that
was really applied. So skipped updates, another cadence and a resume are exact without being known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from phema_dist import profile
from phema_dist.memory import empty

if TYPE_CHECKING:
    from phema_dist.shard import Box
    from phema_dist.training.staging import Segment

# Elements, for each core that an operation uses. Large enough that taking the interpreter lock again after each block
# does not matter beside a busy training thread (blocks of 256 K elements take three times as long there), small enough
# for a block to stay in the caches of the cores.
_BLOCK = 1 << 20
_MOST_CORES = 16  # or the block that bfloat16 is cast into would be large


class Tracker:
    """Averages of a rank's segments: `averages[k][s]` is the flat average of profile k, segment s.

    Times are counted from the origin of the run's clock. Not thread-safe: one thread updates, and reads in between.
    """

    def __init__(self, segments: Sequence[Segment], sigma_rels: Sequence[float]) -> None:
        self.segments = tuple(s for s in segments if s.averaged)
        self.gammas = tuple(map(profile.sigma_rel_to_gamma, sigma_rels))
        self.averages = [[empty((s.numel,), s.average_dtype).zero_() for s in self.segments] for _ in self.gammas]
        self.history = profile.UpdateHistory()
        self.num_refused = 0
        self._block = _BLOCK * min(torch.get_num_threads(), _MOST_CORES)
        upcast = any(s.dtype != s.average_dtype for s in self.segments)
        self._scratch = torch.empty(self._block, dtype=torch.float32, device="cpu") if upcast else None

    @property
    def t(self) -> int:
        """Time of the last update that was applied, 0 before the first."""
        return self.history.last

    def boxes(self) -> list[dict[str, list[tuple[Box, torch.Tensor]]]]:
        """For each profile, the averages of each tensor: its boxes here, and views of them to read or to fill."""
        found: list[dict[str, list[tuple[Box, torch.Tensor]]]] = [{} for _ in self.averages]
        for held, averages in zip(found, self.averages, strict=True):
            for segment, flat in zip(self.segments, averages, strict=True):
                for piece, view in zip(segment.pieces, segment.views(flat), strict=True):
                    held.setdefault(piece.info.fqn, []).append((piece.box, view))
        return found

    def restore(self, history: profile.UpdateHistory) -> None:
        """Continue from averages that were written into `boxes`."""
        self.history = history

    @torch.no_grad()
    def update(self, staged: Sequence[torch.Tensor], t: int) -> bool:
        """Take the staged parameters into all averages at time t; one flat tensor per segment.

        If any of them is not finite nothing is changed, and the next update covers the time of this one too.

        Returns:
            Whether the averages now include the parameters at t.
        """
        size = self._block
        blocks = [(s, flat[i : i + size], i) for s, flat in enumerate(staged) for i in range(0, flat.numel(), size)]
        if not all(_is_finite(block) for _, block, _ in blocks):
            self.num_refused += 1
            return False
        weights = [profile.update_weight(gamma, t, t - self.t) for gamma in self.gammas]
        for s, block, start in blocks:
            source = block
            if block.dtype != self.segments[s].average_dtype and self._scratch is not None:
                source = self._scratch[: block.numel()].copy_(block)
            for averages, weight in zip(self.averages, weights, strict=True):
                averages[s][start : start + block.numel()].lerp_(source, weight)
        self.history.append(t)
        return True


def _is_finite(block: torch.Tensor) -> bool:
    # A sum is one pass at the speed of memory, isfinite() several; a sum can also overflow without a single infinity.
    return bool(block.sum().isfinite()) or bool(block.isfinite().all())
