"""Averages that training goes on from: Switch EMA and Hare & Tortoise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from phema_dist.errors import SettingsError
from phema_dist.evaluation import StoredAverages

if TYPE_CHECKING:
    import torch
    from torch import nn

    from phema_dist.training.session import Session


class SwitchingAverages(StoredAverages):
    """Averages that may be written into the parameters that train. PostHocEMA is one."""

    _reset_at: tuple[int, int] | None = None  # attempt and call: what steps after a reset keeps its step

    def switch_(
        self,
        model: nn.Module | None = None,
        sigma_rel: float | None = None,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        masters: Mapping[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Write an average into the live parameters, for good: Switch EMA (arXiv 2402.09240), at epoch ends say.

        Call it on every rank, after `update_`; training goes on from there. Collective. A tracked length is the average
        as of now: what was stepped since the last update is taken in before. Others end at the newest complete
        snapshot. Only parameters change: buffers, the clock and the optimizer's moments stay as they are (to forget
        these, `optimizer.state.clear()` where it keeps no masters). Nothing is changed if it fails.

        Args:
            model: as in `update_`.
            sigma_rel: length of the average, in (0, 0.28867]; None: the shortest that is tracked.
            optimizer: needed where it keeps float32 masters of 16-bit parameters: it, or several. Masters in its state
                (`state[p]["master_param"]`) or in its `param_groups_master` get the average before it is rounded.
                Without it they keep their values, and the next step undoes the switch.
            masters: needed where an optimizer steps on masters instead of the model's parameters: the master of each,
                `dict(zip(model.parameters(), masters, strict=True))`, of its shape on this rank.

        Raises:
            SettingsError: `optimizer` may step on masters that are not named; something named is none; parameters that
                are an average, inside `ema.model(...)`.
            ProfileError, RunError, StorageError: as `synthesize`; there is no snapshot yet, for a length that is not
                tracked, or no update.
            LayoutError: the model does not have the run's tensors.
        """
        session = self._training(model)
        length = min(session.info.sigma_rels) if sigma_rel is None else sigma_rel
        optimizers = (optimizer,) if not isinstance(optimizer, Sequence) else optimizer
        average = self._average(self._ranks, length, None, None)
        average.switch(session.model if model is None else model, optimizers, masters or {})

    def reset_hare_(
        self,
        model: nn.Module | None = None,
        *,
        every: int,
        sigma_rel: float | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        masters: Mapping[torch.Tensor, torch.Tensor] | None = None,
    ) -> bool:
        """Reset the fast parameters to a slow average now and then: Hare & Tortoise (arXiv 2406.02596).

        Call it on every rank after every `update_` (or step, with `attach`). At each call of `update_` number `every`,
        2 `every`, ... it does what `switch_` does, collectively; else nothing. The count goes on in a resumed run.

        Args:
            model: as in `update_`.
            every: calls of `update_` from one reset to the next.
            sigma_rel: length of the slow average; None: the shortest that is tracked.
            optimizer: as in `switch_`.
            masters: as in `switch_`.

        Returns:
            Whether the parameters were reset.

        Raises:
            SettingsError: `every` is no positive integer; else as `switch_`.
        """
        if not isinstance(every, int) or every < 1:
            raise SettingsError(f"every must be a positive number of calls of update_; got {every!r}.")
        session = self._training(model)
        turn = session.place.attempt.number, session.calls
        due = session.calls > 0 and session.calls % every == 0 and turn != self._reset_at
        if due:
            self.switch_(model, sigma_rel, optimizer=optimizer, masters=masters)
            self._reset_at = turn
        return due

    @abstractmethod
    def _training(self, model: nn.Module | None) -> Session:
        """The session, to train in; collective if there is none yet."""
