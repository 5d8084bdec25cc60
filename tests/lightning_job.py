"""What test_lightning.py trains, with Lightning and in a plain loop; apart, as importing lightning takes seconds."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import consolidate_checkpoint
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from phema_dist import PostHocEMA
from phema_dist.integrations.lightning import PostHocEMACallback

SETTINGS: dict[str, Any] = {"sigma_rels": (0.05, 0.28), "update_every": 2, "checkpoint_every": 4}
STEPS, PER_EPOCH = 14, 7


class Interruption(Exception):  # noqa: N818  not an error
    """Of a training."""


def batch(step: int) -> torch.Tensor:
    """The same on all ranks, so that any number of them does the same steps; made from the step, as a resume needs."""
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = batch(step)
    loss: torch.Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


class Net(pl.LightningModule):
    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 1)
        self.interrupt_at = interrupt_at
        self.evaluated: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x).relu())
        return y

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def training_step(self, _: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == self.interrupt_at:
            raise Interruption
        return loss_of(self, self.trainer.global_step)

    def validation_step(self, _: Any, index: int) -> None:
        self.evaluated.append(loss_of(self, 1000 + index).item())

    test_step = predict_step = validation_step

    def train_dataloader(self) -> list[int]:
        return list(range(PER_EPOCH))

    def val_dataloader(self) -> list[int]:
        return [0, 1]

    test_dataloader = predict_dataloader = val_dataloader


class Sharded(Net):
    def configure_model(self) -> None:
        for module in () if isinstance(self, FSDPModule) else (self.a, self.b, self):  # Lightning calls it again
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


class Environment(ClusterEnvironment):
    """The ranks that are there already."""

    creates_processes_externally = True
    main_address, main_port = "localhost", 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...


class FSDPOnCPU(FSDPStrategy):
    """Lightning's own asks for a GPU, and has no place for the device that torch wants to be told without one."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        policy = None if wrapped else ModuleWrapPolicy({nn.Linear})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)


def trainer(folder: str, kind: str, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    size = dist.get_world_size() if dist.is_initialized() else 1
    sharded = {"data_parallel_size": size, "tensor_parallel_size": 1}
    strategies: dict[str, Any] = {
        "one": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp1": lambda: FSDPOnCPU(state_dict_type="sharded", use_orig_params=True),
        "fsdp2": lambda: ModelParallelStrategy(**sharded),
        "fsdp2-one-file": lambda: ModelParallelStrategy(**sharded, save_distributed_checkpoint=False),
    }
    defaults = {
        "max_epochs": STEPS // PER_EPOCH, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
    }  # fmt: skip
    return pl.Trainer(
        accelerator="cpu", devices=size, strategy=strategies[kind](), default_root_dir=folder, callbacks=[*callbacks],
        **({"plugins": [Environment()] if kind != "one" else []} | defaults | settings),
    )  # fmt: skip


def net(kind: str, **settings: Any) -> Net:
    return Sharded(**settings) if kind.startswith("fsdp2") else Net(**settings)


def by_hand(run: str, **settings: Any) -> None:
    """The same steps in a plain loop of one process."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with PostHocEMA.from_model(model, run, **(SETTINGS | settings)) as ema:
        for step in range(STEPS):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update_(model)
            drain(ema)


def drain(ema: PostHocEMA) -> None:
    """A slow machine may skip a snapshot; here none is to be."""
    assert ema._session is not None
    ema._session.writer.drain()


class Averages(PostHocEMACallback):
    """The callback, on a machine that is quick enough."""

    def __init__(self, run: str | Path, **settings: Any) -> None:
        super().__init__(run, **(SETTINGS | settings))

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        if self.ema is not None:
            drain(self.ema)


def fit(run: str, kind: str) -> None:
    trainer(run, kind, Averages(run)).fit(net(kind))


def interrupted(folder: str, run: str, kind: str, at: int, **settings: Any) -> None:
    """Train up to three steps after a checkpoint at `at`."""
    saving = ModelCheckpoint(folder, filename="saved", every_n_train_steps=at)
    with contextlib.suppress(Interruption):
        trainer(folder, kind, Averages(run, **settings), saving, enable_checkpointing=True).fit(
            net(kind, interrupt_at=at + 3)
        )


def two_interrupted(folder: str, kind: str, at: int) -> None:
    """As `interrupted`, with two runs."""
    saving = ModelCheckpoint(folder, filename="saved", every_n_train_steps=at)
    ours = (Averages(f"{folder}/run"), Averages(f"{folder}/often", update_every=1))
    with contextlib.suppress(Interruption):
        trainer(folder, kind, *ours, saving, enable_checkpointing=True).fit(net(kind, interrupt_at=at + 3))


def two_resumed(folder: str, kind: str) -> None:
    ours = (Averages(f"{folder}/run"), Averages(f"{folder}/often", update_every=1))
    trainer(folder, kind, *ours).fit(net(kind), ckpt_path=f"{folder}/saved.ckpt")


def resumed(folder: str, run: str, kind: str, **settings: Any) -> None:
    trainer(folder, kind, Averages(run, **settings)).fit(net(kind), ckpt_path=f"{folder}/saved.ckpt")


def consolidate(path: Path) -> None:
    """As `python -m lightning.pytorch.utilities.consolidate_checkpoint`, in place."""
    whole = consolidate_checkpoint._format_checkpoint(consolidate_checkpoint._load_distributed_checkpoint(path))
    shutil.rmtree(path)
    torch.save(whole, path)


def saved(path: Path) -> dict[str, Any]:
    """The model in a checkpoint that is a file or a folder."""
    if not path.is_dir():
        return torch.load(path)["state_dict"]  # type: ignore[no-any-return]
    found = consolidate_checkpoint._load_distributed_checkpoint(path)
    return found["model"] if "model" in found else found["state_dict"]  # type: ignore[no-any-return]


def evaluated(run: str, kind: str, sigma_rel: float) -> list[float]:
    """What is seen by the sanity check, after each epoch, in a test afterwards, and in one by another Trainer."""
    model = net(kind)
    settings = {"update_every": 1, "checkpoint_every": PER_EPOCH, "evaluate_with": sigma_rel}
    first = trainer(run, kind, Averages(run, **settings), limit_val_batches=2)
    first.fit(model)
    first.test(model, verbose=False)
    other = net(kind)
    trainer(run, kind, Averages(run, **settings)).test(other, verbose=False)
    return model.evaluated + other.evaluated


class Saving(Net):
    """Which saves at the end of each epoch, and while it validates then; and counts what it validates."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.counts: list[float] = []

    def _save(self, name: str, **settings: Any) -> None:
        if not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/{name}.ckpt", **settings)

    def on_train_epoch_start(self) -> None:
        self.count.zero_()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.is_last_batch:
            self._save("own")

    def validation_step(self, _: Any, index: int) -> None:
        self.count += 1
        if self.when == "step":
            self._save("seen")
            self._save("light", weights_only=True)
        super().validation_step(_, index)

    def on_validation_epoch_end(self) -> None:
        self.counts.append(self.count.item())
        if self.when == "end":
            self._save("seen")
            self._save("light", weights_only=True)


class SavingSharded(Sharded, Saving):
    pass


def saved_in_validation(folder: str, kind: str, when: str) -> list[tuple[list[float], list[float]]]:
    """What validation sees where it does not save, and where it does."""
    found = []
    for name in ("never", when):
        model = (SavingSharded if kind == "fsdp2" else Saving)(name)
        averages = Averages(f"{folder}/{name}/run", evaluate_with=0.28, on_busy="skip")
        trainer(f"{folder}/{name}", kind, averages, limit_val_batches=2, max_epochs=1).fit(model)
        found.append((model.evaluated, model.counts))
    return found


def saved_on_error(folder: str, run: str, at: int) -> None:
    saving = OnExceptionCheckpoint(folder, "saved")
    with contextlib.suppress(Interruption):
        trainer(folder, "ddp", Averages(run), saving, enable_checkpointing=True).fit(net("ddp", interrupt_at=at))


class Adversaries(Net):
    """Two optimizers, each stepping once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.a, self.b)]

    def training_step(self, _: Any, index: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(loss_of(self, index))
            optimizer.step()


class Overflowing(Net):
    """Two steps whose gradients a GradScaler finds infinite."""

    def training_step(self, _: Any, index: int) -> torch.Tensor:
        step = self.trainer.global_step
        return loss_of(self, step) * (torch.inf if step in {5, 9} else 1)


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))


class Breaking(Averages):
    """Whose storage fails before the end."""

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.global_step == STEPS:
            folder = Path(trainer.default_root_dir) / "run/snapshots"
            shutil.rmtree(folder)
            folder.touch()


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.seen.append((step, metrics))
