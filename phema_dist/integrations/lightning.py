"""A Lightning callback: averages of what a Trainer trains, through Lightning's own checkpoints bit for bit.

It says at which of Lightning's hooks PostHocEMA is called, and no more. lightning is imported here alone.
"""

# ruff: noqa: ARG002  Lightning's hooks have these arguments

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.distributed.checkpoint.state_dict_loader import load

from phema_dist.ema import PostHocEMA
from phema_dist.errors import DamagedError, PhemaError, RunError, SettingsError, SnapshotError
from phema_dist.memory import empty
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.ranks import ALONE
from phema_dist.shard import whole
from phema_dist.training.layout import read_layout
from phema_dist.training.swap import keep, swapped

try:
    from lightning.pytorch import Callback
except ImportError as missing:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]  # the same package under its older name
    except ImportError:
        raise ImportError('PostHocEMACallback needs Lightning: pip install "phema-dist[lightning]"') from missing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import nn

    from phema_dist.ranks import Ranks
    from phema_dist.training.state import TrainingState

Trainer: TypeAlias = Any  # it has attributes that its class does not declare
_log = logging.getLogger("phema_dist")
_ENTRY = "phema_dist"  # in Lightning's checkpoints
_STATE = "optimizer_"  # and a number: states of optimizers, in Lightning's folders
_READS = ("storage_options", "process_group", "prefix")  # settings that reading a run needs too
_AT_ONCE = 64 << 20  # bytes of averages that ranks give to each other in one message
_Averages: TypeAlias = dict[str, dict[str, Any]]  # by profile and tensor


class PostHocEMACallback(Callback):
    """Keep post-hoc averages while a Trainer fits, and validate, test and predict with one of them if asked to.

    `Trainer(callbacks=[PostHocEMACallback("runs/digits", update_every=10, checkpoint_every=1000)])`. Works with one
    device, DDP, FSDPStrategy and ModelParallelStrategy. Nothing happens under `fast_dev_run`.

    `update_` is called after each step of the optimizers, however many batches a step has: `PostHocEMA.attach` with the
    optimizers in the order of `configure_optimizers`, so that a step that GradScaler skips is none, and several
    optimizers make one call together. A fit that ends writes a last snapshot; one that an exception or Ctrl-C ends
    stores what was queued. `ema` is the PostHocEMA, from the beginning of a fit on.

    Lightning's checkpoints carry the clock and the float32 averages: 4 bytes per parameter and tracked sigma_rel, whole
    in a checkpoint that is one file (gathered on rank 0), as shards in one that is a folder (of the FSDP strategies,
    beside the states of the optimizers). `Trainer.fit(ckpt_path=...)` goes on from them bit for bit, in the middle of
    an epoch too, on any number of ranks; later snapshots of the run are hidden. One that several ranks write because of
    an exception has the clock alone, as has one with `exact_resume=False`: the averages then go on from the newest
    complete snapshot at or before that t. The checkpoint's own parameters are those of training, never an average:
    `Trainer.save_checkpoint` takes the average out while it saves.

    A Trainer may have several of these callbacks, in the same order whenever it goes on; one of them may evaluate.

    Args:
        checkpoint_dir: where the run lives, as in `PostHocEMA.from_model`.
        evaluate_with: a sigma_rel: validation, testing and prediction see this average in the model. While fitting, a
            tracked one is as of the last update, another one of the newest snapshot; before there is any, they see the
            parameters themselves, which is logged. After a fit, or without one, it is read from the run.
        t: training time, asked for after each update (samples seen, ...), as in `PostHocEMA.attach`; None: steps.
        exact_resume: whether checkpoints carry the averages.
        settings: of `PostHocEMA.from_model`. `resume` is for a fit without `ckpt_path`, or with a checkpoint that was
            saved without this callback.

    Raises:
        TypeError: settings that `PostHocEMA.from_model` does not have.
        ProfileError: there is no such length to evaluate with.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        *,
        evaluate_with: float | None = None,
        t: Callable[[], int] | None = None,
        exact_resume: bool = True,
        **settings: Any,
    ) -> None:
        inspect.signature(PostHocEMA.from_model).bind(None, checkpoint_dir, **settings)
        if evaluate_with is not None:
            sigma_rel_to_gamma(evaluate_with)  # raises now, not at the first validation
        self.ema: PostHocEMA | None = None
        self._checkpoint_dir, self._settings, self._t = checkpoint_dir, settings, t
        self._evaluate_with, self._exact_resume = evaluate_with, exact_resume
        self._state: TrainingState | None = None  # of the latest fit, also when that has ended
        self._loaded: dict[str, Any] | None = None  # from the checkpoint that a fit goes on from
        self._entry = _ENTRY  # of this callback
        self._trainer: Callable[[], Trainer] = _nobody  # of the latest fit
        self._average: ExitStack | None = None  # holds an average in the model
        self._error: PhemaError | None = None  # of the last snapshot
        self._logged = -1  # global step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find this callback's place among those of its kind, and forget what an earlier fit has not gone on from.

        Raises:
            SettingsError: two of them evaluate.
        """
        ours = [each for each in trainer.callbacks if isinstance(each, PostHocEMACallback)]
        if sum(each._evaluate_with is not None for each in ours) > 1:  # noqa: SLF001
            raise SettingsError(
                "only one PostHocEMACallback of a Trainer may have evaluate_with: a model holds one average at a time."
            )
        self._loaded = None
        place = ours.index(self)
        self._entry = f"{_ENTRY}-{place}" if place else _ENTRY

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on: all is wrapped, restored and checked by now."""
        if trainer.fast_dev_run:
            return
        (loaded, self._loaded), self._error = (self._loaded, None), None
        settings = dict(self._settings)
        if loaded is not None:
            settings["resume"] = loaded["t"]
        elif self.ema is not None and self._trainer() is trainer:  # another fit of the same Trainer goes on too
            settings["resume"] = self.ema.t
        self._trainer = weakref.ref(trainer)
        self.ema = PostHocEMA.from_model(trainer.model, self._checkpoint_dir, **settings)
        self._state = self.ema.training_state
        if loaded is not None and len(loaded) > 1:
            state, ranks = self._state.state_dict(), self.ema._ranks  # noqa: SLF001
            if "shards" in loaded:
                load({loaded["shards"]: state}, checkpoint_id=ranks.on_first(lambda: trainer.ckpt_path))
            else:
                ranks.each(lambda: _fill(state["averages"], loaded["averages"]))
                state["clock"] = loaded["clock"]
            self._state.load_state_dict(state)
        self.ema.attach(*trainer.optimizers, t=self._t)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log `PostHocEMA.status`, as often as Lightning logs."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # 0: never
        if self.ema is not None and trainer.loggers and every and step % every == 0 and step != self._logged:
            self._logged = step
            scalars = {k: v for k, v in self.ema.status().items() if isinstance(v, int | float)}
            for logger in trainer.loggers:
                logger.log_metrics({f"{self._entry}/{name}": value for name, value in scalars.items()}, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last snapshot. That it could not be stored is told when others have stored their checkpoints."""
        try:
            if self.ema is not None:
                self.ema.close()
        except PhemaError as error:
            self._error = error

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise what the last snapshot met."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its parameters back, and store what is queued: ranks may stand at different t."""
        self._leave()
        if self.ema is not None:
            self.ema.__exit__(type(exception), exception, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model, if one is to be evaluated."""
        if self._evaluate_with is None or trainer.sanity_checking or trainer.fast_dev_run or self._average is not None:
            return
        ema = self.ema
        if ema is None:
            reads = {name: self._settings[name] for name in _READS if name in self._settings}
            try:
                ema = PostHocEMA.from_path(self._checkpoint_dir, **reads)
            except RunError as error:
                raise RunError(f"{error} evaluate_with needs a run: fit before, or leave it out.") from error
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None and trainer.is_global_zero:
            _log.warning(
                "the average of sigma_rel=%g at the newest snapshot of %s is evaluated, not one at the t of %s",
                self._evaluate_with, self._checkpoint_dir, trainer.ckpt_path,
            )  # fmt: skip
        try:
            self._enter(trainer, ema.model(trainer.model, self._evaluate_with, exchange=True))
        except SnapshotError as error:
            if trainer.state.fn != "fit" or isinstance(error, DamagedError):
                raise
            if trainer.is_global_zero:
                _log.warning("the parameters are evaluated, not an average: %s", error)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its parameters back."""
        self._leave()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the clock and the averages. Collective, if all ranks can be expected here."""
        if self.ema is None or self._state is None:
            return
        saved = checkpoint[self._entry] = {"t": self.ema.t}
        if not self._exact_resume or (trainer.interrupted and trainer.world_size > 1):
            return
        try:
            state = self._state.state_dict()
        except PhemaError as error:  # on all ranks; as from a signal handler, where ranks may stand at different t
            if trainer.is_global_zero:
                _log.warning("the checkpoint has the clock of the averages, not the averages: %s", error)
            return
        if any(map(_is_shard, checkpoint["state_dict"].values())):
            # Lightning gives the state dict and each state of an optimizer to DCP, and the rest to torch.save.
            saved["shards"] = f"{_STATE}{len(checkpoint['optimizer_states'])}"
            checkpoint["optimizer_states"].append(state)
        else:
            ranks = self.ema._ranks  # noqa: SLF001
            saved |= {"clock": state["clock"], "averages": _whole(state["averages"], ranks)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what `on_save_checkpoint` added, for the beginning of the fit."""
        saved = checkpoint.get(self._entry)
        if saved is not None and "shards" in saved and "optimizer_states" in checkpoint:
            # A folder that Lightning's consolidate_checkpoint has made one file of.
            saved = {"t": saved["t"], **checkpoint["optimizer_states"][int(saved["shards"].removeprefix(_STATE))]}
        self._loaded = saved if trainer.state.fn == "fit" else None

    def _enter(self, trainer: Trainer, average: AbstractContextManager[Any]) -> None:
        with ExitStack() as stack:
            stack.enter_context(_saving_by(trainer, self._save))
            stack.enter_context(average)
            self._average = stack.pop_all()

    def _leave(self) -> None:
        average, self._average = self._average, None
        if average is not None:
            average.close()

    def _save(self, trainer: Trainer, *args: Any, **settings: Any) -> None:
        """Save a checkpoint with the parameters of training, then go on with the very same average.

        No rank waits for another one here: a signal to save may find some in validation, and others beyond.
        """
        if self._average is None:
            raise SettingsError("a checkpoint cannot be saved now: an average is just being put into the model.")
        average = _copied(trainer.model, only_save_diff=self._settings.get("only_save_diff", False))
        self._leave()
        try:
            trainer.save_checkpoint(*args, **settings)
        finally:
            self._enter(trainer, average())


def _nobody() -> None:
    """No trainer; a lambda could not be sent to the processes of ddp_spawn."""


@contextmanager
def _saving_by(trainer: Trainer, save: Callable[..., None]) -> Iterator[None]:
    """Let `trainer.save_checkpoint` be this, for users, callbacks and signals."""
    before = vars(trainer).get("save_checkpoint")
    trainer.save_checkpoint = partial(save, trainer)
    try:
        yield
    finally:
        if before is None:
            del trainer.save_checkpoint
        else:
            trainer.save_checkpoint = before


def _copied(model: nn.Module, *, only_save_diff: bool) -> Callable[[], AbstractContextManager[None]]:
    """A block in which the model has what it has now, without communication."""
    model.train()  # see swapped
    layout = read_layout(model, only_save_diff=only_save_diff)
    bring_back = keep(model, layout)  # the buffers, too: validation may count in them

    @contextmanager
    def again() -> Iterator[None]:
        with swapped(model, layout, ALONE):
            for each in bring_back:
                each()
            model.eval()
            torch.clear_autocast_cache()
            yield

    return again


def _is_shard(tensor: object) -> bool:
    """Whether it is a DTensor or a ShardedTensor, of a checkpoint that DCP writes."""
    return hasattr(tensor, "__create_chunk_list__") or hasattr(tensor, "local_shards")


def _whole(averages: _Averages, ranks: Ranks) -> _Averages:
    """Collective: as full tensors on rank 0 what all ranks own in boxes; nothing on the others."""
    mine = {(profile, fqn): tensor for profile, held in averages.items() for fqn, tensor in held.items()}
    facts: dict[tuple[str, str], tuple[torch.Size, torch.dtype]] = {}
    for theirs in ranks.gather({key: (tensor.shape, tensor.dtype) for key, tensor in mine.items()}):
        facts |= theirs
    full: _Averages = {}
    while facts:
        batch, num_bytes = [], 0
        while facts and num_bytes < _AT_ONCE:
            key, (shape, dtype) = next(iter(facts.items()))
            batch.append((key, *facts.pop(key)))
            num_bytes += shape.numel() * dtype.itemsize
        parts = ranks.gather({key: mine[key].boxes for key, *_ in batch if key in mine})
        if ranks.rank == 0:
            for (profile, fqn), shape, dtype in batch:
                tensor = full.setdefault(profile, {})[fqn] = empty(shape, dtype)
                for box, values in (part for held in parts for part in held.get((profile, fqn), ())):
                    tensor[box.relative_to(whole(shape))].copy_(values)
    return full


def _fill(averages: _Averages, full: _Averages) -> None:
    """Copy what this rank owns out of full tensors."""
    for profile, held in averages.items():
        for fqn, tensor in held.items():
            found = full.get(profile, {}).get(fqn)
            if found is None or found.shape != tensor.shape:
                raise RunError(
                    f"the checkpoint must hold the averages of this model; {profile} of {fqn} is missing there, or has "
                    "another shape. Pass sigma_rels as when it was saved; or begin with exact_resume=False, which goes "
                    "on from the newest snapshot before it."
                )
            for box, values in tensor.boxes:
                values.copy_(found[box.relative_to(whole(found.shape))])
