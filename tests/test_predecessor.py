"""Every snippet of the predecessor's document runs with only the import changed."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from phema_dist import PostHocEMA


def test_the_snippets_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(512, 512)
    posthoc_ema = PostHocEMA.from_model(model, "posthoc-ema")

    for _ in range(1000):
        # mutate your network, normally with an optimizer
        with torch.no_grad():
            model.weight.copy_(torch.randn_like(model.weight))
            model.bias.copy_(torch.randn_like(model.bias))
        posthoc_ema.update_(model)

    data = torch.randn(1, 512)
    predictions = model(data)
    own = model.weight.clone()

    # use the helper
    with posthoc_ema.model(model, sigma_rel=0.15) as ema_model:
        ema_predictions = ema_model(data)
        assert ema_model is model
    assert not torch.allclose(ema_predictions, predictions)
    assert torch.equal(own, model.weight)

    # With model
    posthoc_ema = PostHocEMA.from_path("posthoc-ema", model)
    with posthoc_ema.model(model, sigma_rel=0.15) as ema_model:
        assert torch.equal(ema_model(data), ema_predictions)

    # Without model
    posthoc_ema = PostHocEMA.from_path("posthoc-ema")
    with posthoc_ema.state_dict(sigma_rel=0.15) as state_dict:
        model.load_state_dict(state_dict, strict=False)
        assert torch.equal(model(data), ema_predictions)
    with posthoc_ema.state_dict(sigma_rel=0.15) as state_dict:
        model.load_state_dict(state_dict, strict=True)

    assert isinstance(posthoc_ema.reconstruction_error(), Image.Image)


def test_the_constructor_takes_the_arguments_it_took(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    posthoc_ema = PostHocEMA.from_model(
        model,
        checkpoint_dir=str(tmp_path / "path/to/checkpoints"),
        max_checkpoints=20,
        sigma_rels=(0.05, 0.28),
        update_every=10,
        checkpoint_every=1000,
        checkpoint_dtype=torch.float16,
    )
    picture = posthoc_ema.reconstruction_error(target_sigma_rel_range=(0.05, 0.28))  # before training
    assert picture.size[0] > 300
    posthoc_ema.close()


def test_the_picture_is_of_the_snapshots_there_are(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=10) as posthoc_ema:
        before = posthoc_ema.reconstruction_error()
        for _ in range(30):
            posthoc_ema.update_(model)
            posthoc_ema._session.writer.drain()
        after = posthoc_ema.reconstruction_error()
    assert before.tobytes() != after.tobytes()
    assert after.tobytes() == PostHocEMA.from_path(tmp_path / "run").reconstruction_error().tobytes()
