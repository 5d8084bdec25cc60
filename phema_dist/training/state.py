"""The averages in the user's own training checkpoint: what torch.distributed.checkpoint saves and loads of them.

A snapshot is for synthesis. To go on as if nothing had happened, a job stores its averages beside its optimizer, at the
same moment and in full precision; they come back on any number of ranks, any mesh and any wrapper, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.stateful import Stateful

from phema_dist.errors import RunError
from phema_dist.memory import copied
from phema_dist.storage.manifest import from_json, to_json
from phema_dist.training.session import Clock, require_same_t

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.shard import Box
    from phema_dist.training.session import Session

_log = logging.getLogger("phema_dist")
Boxes = Sequence[tuple["Box", torch.Tensor]]


class TrainingState(Stateful):
    """`ema.training_state`: the float32 averages of this rank and the clock, for `dcp.save` and `dcp.load`."""

    def __init__(self, session: Session, ranks: Ranks) -> None:
        self._session, self._ranks = session, ranks

    def state_dict(self) -> dict[str, Any]:
        """A copy of the averages as they are after the last `update_`, and the clock. Collective, as `dcp.save` is.

        Waits until the averages have taken in what is queued, not for storage. The copy is the caller's: it may be
        written while training goes on (`dcp.async_save`).

        Raises:
            SettingsError: `update_` was not called with the same t on every rank.
        """
        clock = self._settle_together()
        shapes = {piece.info.fqn: piece.info.shape for s in self._session.segments for piece in s.pieces}
        averages = {
            _entry(sigma_rel): {
                fqn: _boxed(shapes[fqn], [(box, copied(view)) for box, view in boxes]) for fqn, boxes in held.items()
            }
            for sigma_rel, held in self._held()
        }
        return {"averages": averages, "clock": to_json(clock).decode()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from these averages instead of those that the job began with; all ranks do, or none. Collective.

        What this rank owns is in `state_dict` after `dcp.load`. The run gets a new attempt: snapshots later than the
        state are hidden from now on.

        Raises:
            RunError: the state was saved by a run with other sigma_rels or another origin of t, or by the run of
                another folder while this one has snapshots, or it was not filled by `dcp.load`.
        """
        clock, copies = self._ranks.each(lambda: self._check(state_dict))
        attempt = self._session.begin_from(clock, self._ranks)
        for view, values in copies:  # nothing can fail any more
            view.copy_(values)
        self._session.go_on_from(clock, attempt)

    def _settle_together(self) -> Clock:
        """Collective: wait for the averages, and compare where they stand."""
        found: list[Clock] = []

        def settle() -> tuple[int, int]:
            found.append(self._session.settle())
            return found[0].t, self._session.tracker.t

        times = self._ranks.together(settle)
        require_same_t([t for t, _ in times])
        if len({updated for _, updated in times}) > 1 and self._ranks.rank == 0:
            _log.warning(
                "training_state at t=%d is not exact: parameters are not finite on some ranks, whose averages end at "
                "an earlier update", found[0].t,
            )  # fmt: skip
        return found[0]

    def _check(self, state: Mapping[str, Any]) -> tuple[Clock, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Where the state stands, and what goes where; all that can be wrong with it is found here."""
        info = self._session.info
        if not isinstance(state, Mapping) or not {"clock", "averages"} <= state.keys():
            raise RunError("training_state must be loaded from what its state_dict() made; this is something else.")
        clock = from_json(Clock, str(state["clock"]).encode(), "the clock of training_state")
        if (clock.sigma_rels, clock.origin) != (info.sigma_rels, info.origin):
            raise RunError(
                f"training_state must come from a run with sigma_rels {info.sigma_rels} and update_after_step "
                f"{info.origin}; it has {clock.sigma_rels} and {clock.origin}. Load the checkpoint without its `ema` "
                "entry, or begin a new run with the settings of the old one."
            )
        self._session.writer.drain()
        copies = []
        for sigma_rel, held in self._held():
            loaded = state["averages"].get(_entry(sigma_rel), {})
            for fqn, boxes in held.items():
                found = getattr(loaded.get(fqn), "boxes", ())
                if [(box, view.dtype) for box, view in boxes] != [(box, values.dtype) for box, values in found]:
                    raise RunError(
                        f"training_state must be filled by dcp.load on this rank; its {fqn} holds other parts than "
                        "this rank owns. A state_dict that another rank, or another job, saved without DCP cannot be "
                        "loaded."
                    )
                copies += [(view, values) for (_, view), (_, values) in zip(boxes, found, strict=True)]
        return clock, copies

    def __reduce__(self) -> Any:
        """Refuse: torch pickles what it does not know how to save in shards."""
        raise TypeError(
            "training_state must be an entry of the dict that dcp.save and dcp.load are given. Inside of another "
            "object or dict, save ema.training_state.state_dict(), and call ema.training_state.load_state_dict(...) "
            "after loading into such a dict."
        )

    def _held(self) -> Iterator[tuple[float, Mapping[str, Boxes]]]:
        """Each profile of what this rank owns: its sigma_rel, and for each tensor the boxes with their averages."""
        return zip(self._session.info.sigma_rels, self._session.tracker.boxes(), strict=True)


def _entry(sigma_rel: float) -> str:
    return f"sigma_rel-{sigma_rel!r}"


class BoxedTensor(torch.Tensor):
    """Some boxes of a tensor of this shape, as torch.distributed.checkpoint wants to be told; the rest has no data.

    DCP asks any tensor that has these three methods, as DTensor does; no mesh and no process group is needed, and a
    rank may hold several boxes, or none.
    """

    boxes: Boxes

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in self.boxes]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets, i),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(values), self.size()),
            )
            for i, (chunk, (_, values)) in enumerate(zip(self.__create_chunk_list__(), self.boxes, strict=True))
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(values for box, values in self.boxes if torch.Size(box.offsets) == index.offset)


def _boxed(shape: tuple[int, ...], boxes: Boxes) -> BoxedTensor:
    # One element that is seen everywhere: the right shape and dtype, and a storage that may be copied.
    tensor = torch.zeros((), dtype=boxes[0][1].dtype).expand(shape).as_subclass(BoxedTensor)
    tensor.boxes = boxes
    return tensor
