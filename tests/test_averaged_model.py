"""torch's AveragedModel with our profile: the weights it really gives, and the same averages as ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from phema_dist import PostHocEMA, ProfileError, SettingsError, synthesize
from phema_dist.integrations.averaged_model import get_power_multi_avg_fn

STEPS = 40


def masses(sigma_rel: float, t: int) -> torch.Tensor:
    """The power profile over each of t steps: the integral of (g + 1) tau^g / t^(g + 1), with g by numpy."""
    s = sigma_rel**2
    # s (g + 2)^2 (g + 3) = g + 1
    (gamma,) = (
        root.real for root in np.roots([s, 7 * s, 16 * s - 1, 12 * s - 1]) if root.real > -1e-9 and not root.imag
    )
    return torch.from_numpy(np.diff((np.arange(t + 1) / t) ** (gamma + 1)))


def take(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.fill_(step)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.28])
def test_the_average_is_the_power_profile_over_the_steps(sigma_rel: float) -> None:
    model = nn.Linear(STEPS, 1, bias=False, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_power_multi_avg_fn(sigma_rel))
    for step in range(STEPS):
        model.weight.data = torch.eye(STEPS, dtype=torch.float64)[step : step + 1]
        averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.weight[0], masses(sigma_rel, STEPS), rtol=1e-12, atol=1e-15)


def test_it_is_what_a_run_tracks_and_goes_on_from_there(tmp_path: Path) -> None:
    """A run that is updated at every step, up to rounding; then AveragedModel alone, from its average."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    averaged = AveragedModel(model, multi_avg_fn=get_power_multi_avg_fn(0.1))
    later = AveragedModel(model, multi_avg_fn=get_power_multi_avg_fn(0.1))
    with PostHocEMA.from_model(model, tmp_path, sigma_rels=(0.1,), update_every=1, checkpoint_every=10) as ema:
        for step in range(20):
            take(model, step)
            averaged.update_parameters(model)
            ema.update_(model)
    (average,) = synthesize(tmp_path, [0.1])
    torch.testing.assert_close(averaged.module.state_dict(), average.state_dict, rtol=1e-6, atol=1e-6)

    later.module.load_state_dict(average.state_dict)
    later.n_averaged.fill_(20)
    for step in range(20, STEPS):
        take(model, step)
        averaged.update_parameters(model)
        later.update_parameters(model)
    torch.testing.assert_close(later.state_dict(), averaged.state_dict(), rtol=1e-6, atol=1e-6)


def test_counters_are_copied_and_buffers_are_averaged_if_asked_for() -> None:
    model = nn.BatchNorm1d(3, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_power_multi_avg_fn(0.1), use_buffers=True)
    means = []
    for step in range(1, 11):
        take(model, step)
        means.append(model.running_mean.clone())
        averaged.update_parameters(model)
    assert averaged.module.num_batches_tracked == 10
    torch.testing.assert_close(averaged.module.running_mean, masses(0.1, 10) @ torch.stack(means))


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(ProfileError, match="sigma_rel must lie in"):
        get_power_multi_avg_fn(0.4)
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    averaged = AveragedModel(model, multi_avg_fn=get_power_multi_avg_fn(0.1))
    averaged.update_parameters(model)
    with pytest.raises(SettingsError, match=r"float32 or finer; got torch\.bfloat16"):
        averaged.update_parameters(model)
