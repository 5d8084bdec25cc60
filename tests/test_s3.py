"""A run on a real S3 server, seen by real ranks."""

import re
from typing import Any

import pytest
import ranks
import torch
from conftest import Target
from s3_server import READER, S3Server, User
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phema_dist import PostHocEMA, synthesize
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

pytestmark = pytest.mark.s3


def begin(url: str, options: dict[str, Any]) -> str:
    return ranks.outcome(lambda: PostHocEMA.from_model(nn.Linear(4, 4), url, storage_options=options))


@pytest.mark.parametrize(
    ("bucket", "changes", "message"),
    [
        ("", {"secret": "wrong-secret-123"}, r"AccessError: .*refused"),
        ("", {"key": READER.key, "secret": READER.secret}, r"AccessError: .*refused"),
        ("no-such-bucket", {}, r"KeyMissingError: .*no-such-bucket"),
        ("", {"endpoint_url": "http://127.0.0.1:9"}, r"StorageError: .*"),
        ("", {"endpoint_url": "no-such-scheme"}, r"SettingsError: .*"),
    ],
    ids=["wrong secret", "may only read", "missing bucket", "unreachable", "nonsense"],
)
def test_storage_that_cannot_work_is_one_error_on_every_rank_before_training(
    s3_url: Target, bucket: str, changes: dict[str, str], message: str
) -> None:
    url, options = s3_url
    url = f"s3://{bucket}/run" if bucket else url
    errors = ranks.run(2, begin, url, options | changes, timeout=30)
    for error in errors:
        assert re.match(message, error), error
        assert "secret" not in error.lower()
        assert len(error.splitlines()) == 1
    assert errors[1].partition(": ")[2] in {errors[0].partition(": ")[2], f"rank 0: {errors[0].partition(': ')[2]}"}


def train(url: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(700, 700))
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=5, storage_options=options) as ema:
        for step in range(20):
            with torch.no_grad():
                torch.manual_seed(step)
                model.module.weight.add_(torch.randn(700, 700))
            ema.update_(model)
            ema._session.writer.drain()
        with ema.state_dict(sigma_rel=0.15) as state:
            return {name: tensor.clone() for name, tensor in state.items()}


def test_a_run_on_s3_equals_one_on_disk(s3_url: Target, tmp_path: Any, s3_server: S3Server) -> None:
    url, options = s3_url
    on_s3 = ranks.run(2, train, url, options)
    on_disk = ranks.run(2, train, str(tmp_path / "run"), {})
    offline = synthesize(url, [0.15], storage_options=options)[0].state_dict
    for name, tensor in on_disk[0].items():
        assert all(torch.equal(tensor, other[name]) for other in (*on_disk, *on_s3, offline))
    run = open_run(open_store(url, options))
    assert [s.t for s in run.complete] == [5, 10, 15, 20]
    reader: User = READER  # who may only read can still make averages
    again = synthesize(url, [0.15], storage_options=s3_server.options(reader))[0].state_dict
    assert torch.equal(again["weight"], offline["weight"])
