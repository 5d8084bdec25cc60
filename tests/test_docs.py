"""What docs/ says is true: blocks run, a second reader reads the format, tests that are named exist."""

import dataclasses
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from conftest import Target
from documented_reader import average, complete
from documents import PAGES, blocks, run_page
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import phema_dist
from phema_dist import PostHocEMA, synthesize
from phema_dist.cli import main
from phema_dist.storage import manifest
from phema_dist.storage.run import open_run
from phema_dist.storage.s3 import S3Store
from phema_dist.storage.store import open_store

ROOT = Path(__file__).parents[1]
FIXTURES = sorted((ROOT / "tests/fixtures").iterdir())


class Net(torch.nn.Module):
    """Uneven shards, buffers, and a tensor of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(5, 7)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x)) + self.last(x)  # type: ignore[no-any-return]


def train_twice(folder: str, wrapper: str, dtype: torch.dtype | None) -> None:
    """To t = 50; then again from t = 20 to 35, which hides what was later."""
    for resume, stop in ((False, 50), (20, 35)):
        torch.manual_seed(0)
        net = Net()
        model = fully_shard(net) if wrapper == "fsdp2" else FullyShardedDataParallel(net, device_id=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = PostHocEMA.from_model(
            model, folder, update_every=2, checkpoint_every=10, checkpoint_dtype=dtype, resume=resume
        )
        while ema.t < stop:
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update_(model)
        ema.close()


def compare_all(run: Path) -> list[int]:
    """Every visible average by both readers; the t of the snapshots."""
    found, ours = complete(run), open_run(open_store(str(run)))
    assert list(found) == [snapshot.t for snapshot in ours.complete]
    for t, whole in found.items():
        for sigma_rel in ours.info.sigma_rels:
            state = synthesize(str(run), [sigma_rel], t=t)[0].state_dict
            documented = average(run, whole, sigma_rel)
            assert state.keys() == documented.keys()
            for name, tensor in state.items():
                assert np.array_equal(tensor.double().numpy(), documented[name]), (t, sigma_rel, name)
    return list(found)


@pytest.mark.parametrize(("wrapper", "dtype"), [("fsdp2", None), ("fsdp1", torch.bfloat16)])
def test_the_documented_format_is_enough_to_read_a_run(tmp_path: Path, wrapper: str, dtype: torch.dtype | None) -> None:
    ranks.run(2, train_twice, str(tmp_path / "run"), wrapper, dtype)
    assert compare_all(tmp_path / "run") == [10, 20, 30, 34]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_the_documented_format_is_that_of_runs_of_every_version(fixture: Path) -> None:
    assert compare_all(fixture / "run")


def test_each_field_of_each_document_is_documented() -> None:
    text = (ROOT / "docs/storage-format.md").read_text()
    kinds = (vars(manifest)[name] for name in vars(manifest) if dataclasses.is_dataclass(vars(manifest)[name]))
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert len(names) > 40
    assert {name for name in names if f"`{name}`" not in rows and f'"{name}"' not in text} == set()


def test_each_module_stands_on_the_page_about_the_code() -> None:
    text = (ROOT / "docs/code.md").read_text()
    paths = (path.relative_to(ROOT / "phema_dist").with_suffix("") for path in (ROOT / "phema_dist").rglob("*.py"))
    packages = {"cli", "integrations", "plot", "selection"}  # of which the page says what they are for
    names = {path.name for path in paths if path.parts[0] not in packages and not path.name.startswith("__")}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def recorded_actions(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What S3 will be asked for from now on, as the actions that IAM knows."""
    from aiobotocore.client import AioBaseClient  # noqa: PLC0415  only where there is the extra

    found: set[str] = set()
    ask, sign = AioBaseClient._make_api_call, S3Store._signed

    async def asked(client: Any, operation: str, arguments: Any) -> Any:
        found.add(f"s3:{ACTIONS.get(operation, operation)}")
        return await ask(client, operation, arguments)

    async def signed(store: S3Store, filesystem: Any, method: str, **arguments: Any) -> str:  # obstore makes these
        operation = "".join(word.title() for word in method.split("_"))
        found.add(f"s3:{ACTIONS.get(operation, operation)}")
        return await sign(store, filesystem, method, **arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", asked)
    monkeypatch.setattr(S3Store, "_signed", signed)
    return found


# Operations whose permission has another name, by the service authorization reference of S3.
ACTIONS = {
    "HeadObject": "GetObject",
    "ListObjectsV2": "ListBucket",
    "ListObjects": "ListBucket",
    "HeadBucket": "ListBucket",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "DeleteObjects": "DeleteObject",
    "ListMultipartUploads": "ListBucketMultipartUploads",
}


@pytest.mark.s3
def test_the_policies_allow_what_is_asked_for_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_url: Target
) -> None:
    text = (ROOT / "docs/s3.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(\{\n.*?)```", text, re.DOTALL)]
    for_a_job, for_readers = ({action for part in p["Statement"] for action in part["Action"]} for p in policies)
    url, options = s3_url
    words = ("--storage-options", json.dumps(options))
    found = recorded_actions(monkeypatch)

    model = torch.nn.Linear(1100, 1100)  # of which averages go up in parts
    store = open_store(url, options)
    for resume in (False, True):
        # A put that was cut off, which the next start or gc aborts.
        bucket = url.removeprefix("s3://").partition("/")[0]
        key = f"run/snapshots/{5:012d}-a0/sigma_rel-0.05/rank-00001.safetensors"
        store._client().call(60, "call_s3", "create_multipart_upload", Bucket=bucket, Key=key)  # type: ignore[attr-defined]
        with PostHocEMA.from_model(
            model, url, 2, update_every=1, checkpoint_every=5, resume=resume, storage_options=options
        ) as ema:
            for _ in range(20):
                ema.update_(model)
    assert main(["pin", url, "--t", "40", *words]) == 0
    assert main(["gc", url, "--keep", "1", *words]) == 0
    assert store.unfinished() == {}
    assert found == for_a_job

    found.clear()
    out = str(tmp_path / "ema.safetensors")
    for command in (["ls", url], ["verify", url], ["synthesize", url, "--sigma-rel", "0.1", "--out", out]):
        assert main([*command, *words]) == 0
    with PostHocEMA.from_path(url, storage_options=options).model(model, sigma_rel=0.2):
        pass
    assert found == for_readers


def test_each_guarantee_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/guarantees.md").read_text()
    named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 40
    assert [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / file).read_text()] == []
    promises = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert [line for line in promises if "::test_" not in line] == []


class Writer:
    """As of TensorBoard."""

    def add_scalar(self, *_: object) -> None:
        pass


def a_model() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def train(model: torch.nn.Module, url: str, steps: int, checkpoint_every: int, **settings: Any) -> PostHocEMA:
    ema = PostHocEMA.from_model(model, url, checkpoint_every=checkpoint_every, **settings)
    with torch.no_grad():
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
            ema.update_(model)
    return ema


def training() -> dict[str, Any]:
    return {**a_model(), "loader": [torch.randn(100, 4)] * 20, "images_seen": 0, "writer": Writer()}


def resuming() -> dict[str, Any]:
    names = a_model()
    return {**names, "ema": train(names["model"], "runs/mine", 450, 100)}


def evaluating() -> dict[str, Any]:
    names = a_model()
    ema = train(names["model"], "runs/mine", 60, 20, update_every=1)
    return {**names, "ema": ema, "batches": [torch.randn(8, 4) for _ in range(40)]}


def after_training() -> dict[str, Any]:
    names = a_model()
    for url in ("runs/digits", "runs/bucket"):
        train(names["model"], url, 400, 20).close()
    Path("eval.py").write_text("import sys; print(f'loss: {len(sys.argv[1]) / 8:.2f}')")
    return names


def integrating() -> dict[str, Any]:
    from lightning.pytorch import LightningModule  # noqa: PLC0415  only where there is the extra
    from transformers import BertConfig, BertForMaskedLM  # noqa: PLC0415

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 4)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.net(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    tokens = torch.randint(32, (64, 8))
    return {
        **a_model(),
        "module": Module(),
        "loader": torch.utils.data.DataLoader(torch.randn(800, 4), batch_size=8),  # type: ignore[arg-type]
        "language_model": BertForMaskedLM(config),
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
    }


# What a page takes for granted. A page that is not here has no blocks, or needs nothing.
SET_UPS = {
    "docs/training.md": training,
    "docs/resuming.md": resuming,
    "docs/evaluation.md": evaluating,
    "docs/afterwards.md": after_training,
    "docs/integrations.md": integrating,
}
# How many blocks of a page are left alone, each with its reason in front of it.
NOT_RUN = {"docs/migration.md": 1}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page)])
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
def test_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    names = SET_UPS[page]() if page in SET_UPS else {}
    short = {
        "500_000": "5_000",
        "--steps 500000": "--steps 5000",  # a plan takes 10 s
        "s3://bucket/run": "runs/bucket",
        "Trainer(max_steps=100": 'Trainer(max_steps=100, accelerator="cpu", logger=False, enable_progress_bar=False',
        'TrainingArguments("training"': 'TrainingArguments("training", use_cpu=True, disable_tqdm=True, report_to=[]',
        "Accelerator()": "Accelerator(cpu=True)",
    }
    if page == "docs/training.md":  # which shows the settings of a bucket
        url, options = request.getfixturevalue("s3_url")
        short |= {"s3://bucket/run": url, '{"endpoint_url": "https://..."}': repr(options)}

    def prepare(text: str) -> str:
        for long, instead in short.items():
            text = text.replace(long, instead)
        return text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once more: Lightning and Transformers change it when they are imported
        assert run_page(page, names, prepare) == len(blocks(page)) - NOT_RUN.get(page, 0)


def test_blocks_that_no_test_runs_are_known() -> None:
    left = {page: sum(bool(block.why_not) for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in left.items() if count} == NOT_RUN


def test_each_public_name_and_page_is_in_the_reference() -> None:
    reference = (ROOT / "docs/api.md").read_text()
    assert set(re.findall(r"^::: phema_dist\.([A-Za-z_]+)$", reference, re.MULTILINE)) >= set(phema_dist.__all__)
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES[1:] if f": {page.removeprefix('docs/')}" not in nav] == []
    for page in PAGES:  # one width everywhere
        lines = enumerate((ROOT / page).read_text().splitlines(), 1)
        assert [n for n, line in lines if len(line) > 120 and not line.startswith("|")] == [], page
