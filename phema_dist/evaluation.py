"""The averages of a run, of any length: in a live model, as tensors, as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from phema_dist.filling import Average
from phema_dist.ranks import ALONE, Ranks, join
from phema_dist.storage import run as runs
from phema_dist.synthesis.request import Request
from phema_dist.target import as_target
from phema_dist.training.settings import DEFAULT_SIGMA_RELS, Settings, sum_dtype
from phema_dist.training.wrappers import is_sharded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn
    from torch.distributed import ProcessGroup

    from phema_dist.storage.store import Store
    from phema_dist.training.session import Session


class StoredAverages:
    """The averages of a run, of any length: in a live model, as tensors, as a picture.

    PostHocEMA is one that may train as well. Then it has a session.
    """

    def __init__(self, store: Store, settings: Settings, calculation_dtype: torch.dtype = torch.float32) -> None:
        self._store, self._settings, self._calculation_dtype = store, settings, calculation_dtype
        self._session: Session | None = None
        self._ranks = ALONE  # that train together
        self._group: ProcessGroup | None = None
        self._closed = False

    @contextmanager
    def model(
        self,
        model: nn.Module,
        sigma_rel: float,
        step: int | None = None,
        calculation_dtype: torch.dtype | None = None,
        *,
        exchange: bool = False,
    ) -> Iterator[nn.Module]:
        """Evaluate an average in place: the same object, in eval mode, with other parameters inside the block.

        Each rank fills the part that it holds, and takes no accelerator memory: the model's own values wait in that of
        the host. Parameters, buffers and training flags come back bit for bit on any exit. While training, a tracked
        length is the average as of the last update; others, and any length if it is closed or only read, end at the
        newest complete snapshot and come from storage.

        Sharded models: collective on the way in, the way back never communicates. Others (plain, DDP): not collective,
        any rank may enter alone. It reads all of the model from storage, tracked lengths too, once the newest snapshot
        that it has stored is complete.

        Args:
            model: the model that was averaged, wrapped or not; also a fresh one of the same architecture.
            sigma_rel: length of the average, in (0, 0.28867].
            step: its end, from storage; None: as above.
            calculation_dtype: of the sums, float32 or float64.
            exchange: all ranks enter together, and those that hold the same parameters share the reading. Under DDP,
                tracked lengths are those of the last update then, too. Collective for any model.

        Raises:
            ProfileError, RunError, StorageError: as `synthesize`.
            LayoutError: the model does not have the run's tensors.
            SettingsError: `update_` was not called with the same t on every rank.
        """
        together = exchange or self._group is not None or is_sharded(model)
        ranks = (self._ranks if self._session else join(self._group)) if together else ALONE
        with self._average(ranks, sigma_rel, step, calculation_dtype).in_place(model, shares=exchange):
            yield model

    @contextmanager
    def state_dict(
        self, sigma_rel: float, step: int | None = None, calculation_dtype: torch.dtype | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Make an average as full CPU tensors: float32 parameters, and buffers, under the bare model's names.

        Not collective: any rank may do it alone, and reads all of it from storage. On an object that trains it waits
        until the newest snapshot that this rank has stored is complete.

        Args:
            sigma_rel: length of the average, in (0, 0.28867].
            step: its end; None: the newest complete snapshot.
            calculation_dtype: of the sums, float32 or float64.

        Raises:
            ProfileError, RunError, StorageError: as `synthesize`.
        """
        yield self._average(ALONE, sigma_rel, step, calculation_dtype).full_state()

    def reconstruction_error(self, target_sigma_rel_range: tuple[float, float] | None = None) -> Image:
        """Draw how exactly each sigma_rel can be made: of the stored snapshots, or of those to come if there are none.

        Before training this assumes `max_checkpoints` evenly spread snapshots. Not collective.

        Args:
            target_sigma_rel_range: from which sigma_rel to which; None: half the smallest tracked one to 0.28867.

        Raises:
            ImportError: matplotlib is missing: pip install "phema-dist[plot]".
        """
        from phema_dist import plot  # noqa: PLC0415  matplotlib only where a picture is wanted

        run = runs.find_run(self._store)
        if run and run.complete:
            snapshots = plot.snapshots_of(run)
        else:
            sigma_rels = run.info.sigma_rels if run else self._settings.sigma_rels or DEFAULT_SIGMA_RELS
            every = self._settings.checkpoint_every
            ts = [every * (i + 1) for i in range(self._settings.max_checkpoints)]
            snapshots = plot.Snapshots(ts, sigma_rels)
        figure = plot.reconstruction_error_figure(snapshots, target_sigma_rel_range=target_sigma_rel_range)
        return plot.figure_to_image(figure)

    def _average(self, ranks: Ranks, sigma_rel: float, t: int | None, dtype: torch.dtype | None) -> Average:
        """What these ranks ask for together. Parameters may change from now on."""
        dtype = self._calculation_dtype if dtype is None else sum_dtype(dtype)
        session = self._session
        if session is not None:
            session.writer.fence()
        request = Request((as_target(sigma_rel),), t, dtype)
        is_alone = session is not None and ranks.size < self._ranks.size
        return Average(self._store, ranks, request, session, is_alone, self._settings.prefix)
