"""Fixtures: an S3 server for the session, a fresh bucket for a test, and one test run on every kind of storage."""

import os
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import ranks  # before anybody begins a forkserver
from s3_server import S3Server

# Before anything imports numpy or torch, and for every process that a test starts: two workers of two threads each
# on two cores spin while they wait for each other. Tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Show an accelerator only to those who want it, `pytest -m gpu`: the others compare with a CPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


Target = tuple[str, dict[str, Any]]  # a url and its storage_options


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def nothing_is_synced() -> Iterator[None]:
    """Tests of what a disk answers bring their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", ranks.without_waiting)
        yield


@pytest.fixture
def s3_url(s3_server: S3Server) -> Target:
    """A folder in a bucket that only this test uses."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.filesystem().mkdir(bucket)
    return f"s3://{bucket}/run", s3_server.options()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def any_store_url(request: pytest.FixtureRequest) -> Target:
    """The same test, once on a local disk and once on S3."""
    if request.param == "s3":
        target: Target = request.getfixturevalue("s3_url")
        return target
    return str(request.getfixturevalue("tmp_path") / "run"), {}


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """Close what a test left open, or it would be stored, and told, when the tests end."""
    yield
    ends = sys.modules.get("phema_dist.training.ends")
    for left in list(ends._open) if ends else ():
        left.abandon(1, "a test ended")
