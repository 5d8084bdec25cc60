"""Averages put where ranks hold them: into the trackers of a job that goes on, into a live model, into a state dict.

Here the two rooms meet: what `synthesis` streams, or what a tracker holds, is put where `training` says it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch

from phema_dist.errors import DamagedError, LayoutError, SettingsError
from phema_dist.memory import empty
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import PARAMETER
from phema_dist.synthesis.consolidate import empty_state, fill_boxes, fill_states
from phema_dist.synthesis.recipe import Recipe, stored_recipe
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.synthesis.stream import stream
from phema_dist.target import Power
from phema_dist.training.exchange import Owned, exchange
from phema_dist.training.layout import Layout, read_layout, select
from phema_dist.training.masters import find_masters
from phema_dist.training.ownership import Shared, share, tell_apart
from phema_dist.training.session import require_same_t
from phema_dist.training.swap import check_writable, in_model, into, swapped

if TYPE_CHECKING:
    from torch import nn

    from phema_dist.ranks import Ranks
    from phema_dist.shard import Box
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.stream import Sink
    from phema_dist.training.session import Session
    from phema_dist.training.swap import Place

_PLACE = "ema.model or ema.switch_: all ranks must enter together, if the model is sharded or exchange=True"


@dataclass(frozen=True)
class Average:
    """An average that these ranks make: of a run in storage, or of the session that trains, as it is now.

    They are all ranks of the session, or one of them alone, which then sees storage only.
    """

    store: Store
    ranks: Ranks
    request: Request
    session: Session | None
    is_alone: bool  # other ranks of the session are not here
    prefix: str

    @contextmanager
    def in_place(self, model: nn.Module, *, shares: bool) -> Iterator[None]:
        """Collective on the way in: in a live model, each rank filling what it holds.

        `shares`: what several ranks hold is read once, and given to the others.
        """
        self._agree()
        layout = self._layout(model)
        parts = self._present(layout) or (self._read_parts(layout) if shares and self.ranks.size > 1 else None)
        if parts is None:
            self._wait()
        with swapped(model, layout, self.ranks) as write:
            if parts is not None:
                exchange(self.ranks, *parts, write)
            else:
                boxes: dict[str, list[Box]] = {}
                for tensor in layout.tensors:
                    boxes.setdefault(tensor.info.fqn, []).append(tensor.box)
                self._read(lambda _, fqn, box, values: write(fqn, box, values), boxes)
            model.eval()
            torch.clear_autocast_cache()  # or a forward would go on with what it cast before
            yield

    def switch(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        masters: Mapping[torch.Tensor, torch.Tensor],
    ) -> None:
        """Collective: into the parameters of a live model, and their masters, for good; buffers stay.

        All of it has been read before anything is changed.
        """
        self._agree()
        layout = self._layout(model)

        def begin() -> list[Place]:
            check_writable(layout)
            return find_masters(layout, optimizers, masters)

        also = self.ranks.each(begin)
        if self.session is not None:
            self.ranks.each(self.session.take_in)  # or the steps since the last update would be lost
        shared, owned = self._present(layout) or self._read_parts(layout)
        parameters = [place for place in in_model(layout) if place[0].info.kind == PARAMETER]
        exchange(self.ranks, shared, owned, into([*parameters, *also]))
        torch.clear_autocast_cache()

    def full_state(self) -> dict[str, torch.Tensor]:
        """Collective: as full CPU tensors, on every rank; of storage."""
        self._wait()
        info = self.ranks.on_first(lambda: runs.read_info(self.store))
        state = self.ranks.each(lambda: empty_state(info))
        self._read(fill_states([state]), None)
        return state

    def _agree(self) -> None:
        """Collective: all ranks are here, and ask for the same."""
        self.ranks.meet(_PLACE)
        target, t, dtype = self.request.targets[0].name, self.request.t, self.request.calculation_dtype
        first, *others = self.ranks.gather((target, t, str(dtype)))
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise SettingsError(
                    f"all ranks must ask for the same average; rank 0 asks for {first} and rank {rank} for {other}."
                )

    def _layout(self, model: nn.Module) -> Layout:
        """Collective: where the tensors of the run lie in a model, which holds its shards from now on."""
        session = self.session
        info = self.ranks.on_first(lambda: runs.read_info(self.store)) if session is None else session.info
        shapes = {fqn: facts.shape for fqn, facts in info.tensors.items()}
        names = shapes if info.only_save_diff else None

        def look() -> Layout:
            found = read_layout(model, among=names, prefix=self.prefix)
            return select(found, shapes, shapes, partial=info.only_save_diff)

        layout = self.ranks.each(look)
        alone = session if self.is_alone else None
        _check_all_are_held(
            self.ranks, layout, [name for name in shapes if alone is None or alone.has(name)], self.prefix
        )
        return layout

    def _present(self, layout: Layout) -> tuple[Sequence[Shared], Owned] | None:
        """Collective: this rank's part of the average as it is now, what was queued included.

        None if it is not tracked, or if not all ranks have it, as of one t: then it comes from storage.
        """
        session, (target,) = self.session, self.request.targets
        sigma_rel = target.sigma_rel if isinstance(target, Power) and target.t is None else None
        if session is None or self.is_alone or self.request.t is not None or sigma_rel not in session.info.sigma_rels:
            return None

        def look() -> tuple[int, int | None]:
            if session.writer.has_ended:
                return session.t, None
            session.settle()
            return session.t, session.present_time(layout)

        found = self.ranks.together(look)
        require_same_t([t for t, _ in found])
        tell_apart(session.assumed, self.ranks)
        if found[0][1] is None or len({of for _, of in found}) > 1:
            return None
        return session.shared, session.average(sigma_rel)

    def _read_parts(self, layout: Layout) -> tuple[Sequence[Shared], Owned]:
        """Collective: read, of what several ranks hold, a part on each."""
        self._wait()
        shared = share(layout, self.ranks)
        owned: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        for each in shared:
            for i, box, _ in each.owned_by(self.ranks.rank):
                info = each.tensors[i]
                values = empty(box.sizes, info.average_dtype)
                owned.setdefault(info.fqn, []).append((box, values))
        self._read(fill_boxes([owned]), {fqn: [box for box, _ in parts] for fqn, parts in owned.items()})
        return shared, owned

    def _wait(self) -> None:
        """Collective: wait until what ranks have queued is stored."""
        if self.session is None:
            return
        if not self.is_alone:
            _check_same_t(self.ranks, self.session)
            return
        if not self.session.writer.has_ended:
            self.session.writer.drain()
        self.session.writer.wait_for_others()

    def _read(self, sink: Sink, boxes: Mapping[str, Sequence[Box]] | None) -> None:
        """Collective: stream rank 0's view of the run on every rank."""

        def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
            self.request.stream(self.store, info, recipes, sink, boxes)

        fulfil(self.store, self.ranks, self.request, make)


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


def _check_same_t(ranks: Ranks, session: Session) -> None:
    """Collective: wait until each rank has stored what it queued, and compare their clocks."""

    def settle() -> int:
        if not session.writer.has_ended:
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
