"""Averages on the ranks that train: into the trackers of a job that goes on, into a live model, into a state dict.

Here the two rooms meet: what `synthesis` streams is put where `training` says that it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from phema_dist.errors import DamagedError, LayoutError
from phema_dist.storage import run as runs
from phema_dist.synthesis.consolidate import empty_state, fill_boxes, fill_states
from phema_dist.synthesis.recipe import Recipe, stored_recipe
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.synthesis.stream import stream
from phema_dist.training.layout import Layout, read_layout, select
from phema_dist.training.ownership import tell_apart
from phema_dist.training.session import require_same_t
from phema_dist.training.swap import swapped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from phema_dist.ranks import Ranks
    from phema_dist.shard import Box
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.stream import Sink
    from phema_dist.training.session import Session


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
