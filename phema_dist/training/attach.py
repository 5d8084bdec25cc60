"""Updates without calls: hooks on optimizers that tell when all of them have really stepped.

A step that GradScaler skips must not count. A plain optimizer is then not even called. A fused one is called and leaves
the parameters alone if `found_inf` is set, which on an accelerator only the device knows. Asking it would stop the
training thread; so it is counted there, and the count travels with the parameters to a thread that has time to read.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from phema_dist.errors import SettingsError
from phema_dist.training import device

_log = logging.getLogger("phema_dist")
_MANY_STEPS = 100


class Attachment:
    """Hooks on optimizers; in the order in which they are given, each stepping once after the other makes a round.

    The first one begins a round whenever it steps; another one that steps out of turn spoils it. So with (D, G) the
    steps D D D G are one round, and D D without G are none.

    On the training thread, `fence()` is called before every step and `stepped(skips)` after a round. `skips` is None
    unless steps may have been skipped on a device; then it is `DeviceRounds.skips`.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        stepped: Callable[[torch.Tensor | None], None],
        fence: Callable[[], None],
    ) -> None:
        """Raises SettingsError if there is no optimizer, if one comes twice, or if one is something else."""
        _check(optimizers)
        self._stepped, self._fence = stepped, fence
        self._num_optimizers = len(optimizers)
        self._progress = 0  # how many have stepped in turn, or fewer if a device skipped some
        self._num_in_vain = 0  # steps since the last round
        self.num_rounds = 0
        self._on_device: DeviceRounds | None = None
        self._handles = [
            handle
            for position, optimizer in enumerate(optimizers)
            for handle in (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(partial(self._after_step, position)),
            )
        ]

    def remove(self) -> None:
        """Take the hooks off; what they would have fenced is fenced now."""
        for handle in self._handles:
            handle.remove()
        self._fence()

    def _before_step(self, *_: object) -> None:
        self._fence()

    def _after_step(self, position: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if _only_initialises():
            return
        found_inf: Any = getattr(optimizer, "found_inf", None)  # GradScaler takes it away after the hooks
        if isinstance(found_inf, torch.Tensor) and device.of(found_inf).type != "cpu":
            if self._on_device is None:
                self._on_device = DeviceRounds(found_inf.device, self._num_optimizers, self._progress)
        elif found_inf:
            return  # as if it had not been called
        else:
            found_inf = None
        self._progress = position + 1 if position in (0, self._progress) else 0
        told = self._progress == self._num_optimizers
        self.num_rounds += told
        self._num_in_vain = 0 if told else self._num_in_vain + 1
        if self._num_in_vain == _MANY_STEPS:
            _log.warning(
                "no update in the last %d steps of the attached optimizers: number %d of %d has not stepped in turn. "
                "Attach those that step in every round, in the order of their steps.",
                _MANY_STEPS, self._progress + 1, self._num_optimizers,
            )  # fmt: skip
        if self._on_device is not None:
            self._on_device.step(position, found_inf, told=told)
        if told:
            self._stepped(None if self._on_device is None else self._on_device.skips)


class DeviceRounds:
    """The same rounds on a device, which knows the steps that it skipped. It is asked nothing.

    `skips` is a tensor there, of two int64: how many of the rounds told so far were none, and whether the latest was.
    It is changed in place.
    """

    def __init__(self, where: torch.device, num_optimizers: int, progress: int) -> None:
        self.skips = torch.zeros(2, dtype=torch.int64, device=where)
        self._num_optimizers = num_optimizers
        self._progress = torch.full((), progress, device=where)

    @torch.no_grad()
    def step(self, position: int, found_inf: torch.Tensor | None, *, told: bool) -> None:
        """An optimizer was called, and skipped its step if `found_inf` is not 0; None if it certainly did not."""
        found_inf = torch.zeros_like(self._progress) if found_inf is None else found_inf
        skipped = found_inf.to(self.skips.device, non_blocking=True) != 0
        progress = ((self._progress == position) | (position == 0)) * (position + 1)
        if told:
            none = skipped | (progress != self._num_optimizers)
            self.skips[0] += none
            self.skips[1] = none
        self._progress = torch.where(skipped, self._progress, progress)


def _only_initialises() -> bool:
    """Whether this is the step without gradients by which torch's get_state_dict makes an optimizer's state."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None


def _check(optimizers: Sequence[object]) -> None:
    if not optimizers:
        raise SettingsError("attach needs the optimizers whose steps make an update, as in ema.attach(optimizer).")
    for position, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise SettingsError(
                f"attach takes objects of torch.optim.Optimizer; got {type(optimizer).__name__}. Pass the optimizer "
                "that a wrapper holds, or call update_ after each step."
            )
        if any(optimizer is other for other in optimizers[:position]):
            raise SettingsError("an optimizer can be attached once; pass each one once, in the order of their steps.")
