"""The power profile for `torch.optim.swa_utils.AveragedModel`, and for all that takes a `multi_avg_fn` as it does.

    averaged = AveragedModel(model, multi_avg_fn=get_power_multi_avg_fn(sigma_rel=0.10))

One length, chosen before training, for one process or DDP; no snapshots. Its counter is t: `update_parameters` must be
called at equal distances, from the beginning of training. To go on from an average of a run of ours at t,

    averaged.module.load_state_dict(average)
    averaged.n_averaged.fill_(t)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from phema_dist.errors import SettingsError
from phema_dist.profile import sigma_rel_to_gamma, update_weight

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]
MultiAverage = Callable[[Tensors, Tensors, torch.Tensor | int], None]


def get_power_multi_avg_fn(sigma_rel: float) -> MultiAverage:
    """The twin of torch's `get_ema_multi_avg_fn`: an update that makes the averages those of a power profile.

    The first call of `update_parameters` copies the parameters, as the profile does. Tensors of integers (counters,
    with `use_buffers`) are copied each time.

    Raises:
        ProfileError: there is no such profile.
        SettingsError: from the update, if averages are 16-bit: they would stop moving.
    """
    gamma = sigma_rel_to_gamma(sigma_rel)

    @torch.no_grad()
    def update(averages: Tensors, parameters: Tensors, num_averaged: torch.Tensor | int) -> None:
        dtype = averages[0].dtype  # AveragedModel groups them by it
        if not (dtype.is_floating_point or dtype.is_complex):
            torch._foreach_copy_(averages, parameters)
        elif dtype.itemsize < torch.float32.itemsize:
            raise SettingsError(
                f"averages must be float32 or finer; got {dtype}, in which they would stop moving. Keep the model in "
                "float32 (with autocast), or use PostHocEMA, which averages any model in float32."
            )
        else:
            t = int(num_averaged) + 1
            torch._foreach_lerp_(averages, parameters, update_weight(gamma, t, 1))

    return update
