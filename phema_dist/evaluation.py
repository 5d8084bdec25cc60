"""Averages on the ranks that train: into the trackers of a job that goes on, into a live model, into a state dict.

Here the two rooms meet: what `synthesis` streams is put where `training` says that it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch

from phema_dist.errors import DamagedError, LayoutError
from phema_dist.ranks import ALONE, Ranks, join
from phema_dist.storage import run as runs
from phema_dist.synthesis.consolidate import empty_state, fill_boxes, fill_states
from phema_dist.synthesis.recipe import Recipe, stored_recipe
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.synthesis.stream import stream
from phema_dist.target import as_target
from phema_dist.training.layout import Layout, read_layout, select
from phema_dist.training.ownership import tell_apart
from phema_dist.training.session import require_same_t
from phema_dist.training.settings import DEFAULT_SIGMA_RELS, Settings, sum_dtype
from phema_dist.training.swap import swapped
from phema_dist.training.wrappers import is_sharded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn
    from torch.distributed import ProcessGroup

    from phema_dist.shard import Box
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.stream import Sink
    from phema_dist.training.session import Session


class StoredAverages:
    """The averages of a run in storage, of any length: in a live model, as tensors, as a picture.

    PostHocEMA is one that may train as well. Then it has a session, and its ranks look together, when each has stored
    what it queued.
    """

    def __init__(self, store: Store, settings: Settings, calculation_dtype: torch.dtype = torch.float32) -> None:
        self._store, self._settings, self._calculation_dtype = store, settings, calculation_dtype
        self._session: Session | None = None
        self._ranks = ALONE  # that train together
        self._group: ProcessGroup | None = None
        self._borrowed = 0  # how many `model` blocks hold an average in the live model
        self._closed = False

    @contextmanager
    def model(
        self, model: nn.Module, sigma_rel: float, step: int | None = None, calculation_dtype: torch.dtype | None = None
    ) -> Iterator[nn.Module]:
        """Evaluate an average in place: the same object, in eval mode, with other parameters inside the block.

        Each rank fills the part that it holds, straight from storage, and takes no accelerator memory for it.
        Parameters, buffers and training flags come back bit for bit on any exit. Collective on an object that trains,
        and for sharded models; the way back never communicates.

        Args:
            model: the model that was averaged, wrapped or not; also a fresh one of the same architecture.
            sigma_rel: length of the average, in (0, 0.28867].
            step: its end; None: the newest complete snapshot.
            calculation_dtype: of the sums, float32 or float64.

        Raises:
            ProfileError, RunError, StorageError: as `synthesize`.
            LayoutError: the model does not have the run's tensors.
        """
        together = self._group is not None or is_sharded(model)
        ranks = self._ranks if self._session else join(self._group) if together else ALONE
        wanted = self._wanted(ranks, sigma_rel, step, calculation_dtype)
        with in_place(self._store, ranks, wanted, model, self._settings.prefix):
            self._borrowed += 1
            try:
                yield model
            finally:
                self._borrowed -= 1

    @contextmanager
    def state_dict(
        self, sigma_rel: float, step: int | None = None, calculation_dtype: torch.dtype | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Make an average as full CPU tensors: float32 parameters, and buffers, under the bare model's names.

        Every rank that enters gets all of it, and reads all of it. Collective on an object that trains, not on one
        from `from_path`.

        Args:
            sigma_rel: length of the average, in (0, 0.28867].
            step: its end; None: the newest complete snapshot.
            calculation_dtype: of the sums, float32 or float64.

        Raises:
            ProfileError, RunError, StorageError: as `synthesize`.
        """
        wanted = self._wanted(self._ranks, sigma_rel, step, calculation_dtype)
        yield full_state(self._store, self._ranks, wanted)

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

    def _wanted(self, ranks: Ranks, sigma_rel: float, t: int | None, dtype: torch.dtype | None) -> Request:
        """Collective on an object that trains: what is asked for, once all that was queued is stored."""
        dtype = self._calculation_dtype if dtype is None else sum_dtype(dtype)
        if self._session is not None:
            self._session.writer.fence()
            check_same_t(ranks, self._session, closed=self._closed)
        return Request((as_target(sigma_rel),), t, dtype)


def restore(store: Store, session: Session) -> None:
    """Fill the averages of what this rank owns from the snapshot that the session goes on from."""
    assert session.parent is not None  # noqa: S101
    targets = session.tracker.boxes()
    recipes = [stored_recipe(session.parent, sigma_rel) for sigma_rel in session.info.sigma_rels]
    boxes = {fqn: [box for box, _ in held] for fqn, held in targets[0].items()}
    try:
        stream(store, session.info, recipes, fill_boxes(targets), wanted=boxes)
    except DamagedError as error:
        older = f"Pass resume=<t> with a t before {session.parent.t} to go on from an older snapshot."
        raise DamagedError(f"{error} {older}", error.folder) from error


def full_state(store: Store, ranks: Ranks, request: Request) -> dict[str, torch.Tensor]:
    """Collective: an average as full CPU tensors, on every rank."""
    info = ranks.on_first(lambda: runs.read_info(store))
    state = ranks.each(lambda: empty_state(info))
    _read(store, ranks, request, fill_states([state]), None)
    return state


@contextmanager
def in_place(store: Store, ranks: Ranks, request: Request, model: nn.Module, prefix: str) -> Iterator[None]:
    """Collective on the way in: an average in a live model, each rank filling what it holds."""
    info = ranks.on_first(lambda: runs.read_info(store))
    shapes = {fqn: facts.shape for fqn, facts in info.tensors.items()}
    names = shapes if info.only_save_diff else None
    layout = ranks.each(
        lambda: select(read_layout(model, among=names, prefix=prefix), shapes, shapes, partial=info.only_save_diff)
    )
    _check_all_are_held(ranks, layout, list(shapes), prefix)
    boxes: dict[str, list[Box]] = {}
    for tensor in layout.tensors:
        boxes.setdefault(tensor.info.fqn, []).append(tensor.box)
    with swapped(model, layout, ranks) as write:
        _read(store, ranks, request, lambda _, fqn, box, values: write(fqn, box, values), boxes)
        yield


def check_same_t(ranks: Ranks, session: Session, *, closed: bool) -> None:
    """Collective: wait until each rank has stored what it queued, and compare their clocks."""

    def settle() -> int:
        if not closed:
            session.writer.drain()
        return session.t

    require_same_t(ranks.together(settle))
    tell_apart(session.assumed, ranks)


def _check_all_are_held(ranks: Ranks, layout: Layout, names: Sequence[str], prefix: str) -> None:
    """Collective: ranks may hold different parts of the model, but together all of the run's."""
    mine = sum(1 << i for i, name in enumerate(names) if name in layout.infos)  # a bit each: names are many and long
    held = reduce(or_, ranks.gather(mine))
    for i, name in enumerate(names):
        if not held >> i & 1 and (ranks.size > 1 or name.startswith(prefix)):
            raise LayoutError(
                f"the model must have the tensors of the run; {name} is missing. Pass the model that was averaged, "
                "wrapped or not; one of a run whose ranks hold different modules needs all these ranks, or a prefix."
            )


def _read(store: Store, ranks: Ranks, request: Request, sink: Sink, boxes: Mapping[str, Sequence[Box]] | None) -> None:
    """Collective: stream rank 0's view of the run on every rank."""

    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        request.stream(store, info, recipes, sink, boxes)

    fulfil(store, ranks, request, make)
