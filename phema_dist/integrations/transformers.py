"""Averages of what `transformers.Trainer` trains: `Trainer(..., callbacks=[PostHocEMACallback("runs/my-run")])`.

A callback is called on every rank, but not before an evaluation, and not with what is logged. So evaluating and logging
are the trainer's, in a few lines:

    class AveragedTrainer(Trainer):
        def evaluate(self, *args, **kwargs):
            with callback.ema.model(self.model, sigma_rel=0.05, exchange=True):
                return super().evaluate(*args, **kwargs)

        def log(self, logs, *args):
            status = callback.ema.status().items()
            super().log(logs | {f"ema/{name}": x for name, x in status if isinstance(x, int | float)}, *args)

What `save_model` saves inside of `with callback.ema.model(...)` is the average, as `from_pretrained` loads it. With
`load_best_model_at_end` the trainer loads what it has saved: the parameters of the best step, not its average.
"""

# ruff: noqa: ARG002  events have these arguments

from __future__ import annotations

import gc
import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerState

from phema_dist.ema import PostHocEMA
from phema_dist.errors import SettingsError
from phema_dist.ranks import join

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainingArguments

_log = logging.getLogger("phema_dist")
_NAME = "phema_dist"  # in the trainer's state


class PostHocEMACallback(TrainerCallback):
    """Averages the model of a Trainer: plain, under DDP or FSDP, on any number of ranks.

    One call of `update_` per step of the trainer, so t is its `global_step`. The averages go into the trainer's
    checkpoints, whose folder all ranks must share, and come back bit for bit with `train(resume_from_checkpoint=...)`.
    A Trainer may have several of these callbacks, in the same order whenever it goes on.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str], *, resume: bool = False, **settings: Any) -> None:
        """Nothing happens before `train`.

        Args:
            checkpoint_dir: where the run lives; not the trainer's output_dir, which is for training checkpoints.
            resume: also take over a run that is there when training begins at step 0, as a job does that was killed
                before its first checkpoint. What the run has is hidden then, until `phema gc --abandoned` deletes it.
            settings: all other arguments of `PostHocEMA.from_model`.
        """
        self._checkpoint_dir, self._resume, self._settings = checkpoint_dir, resume, settings
        self._ema: PostHocEMA | None = None
        self._entry = _NAME

    @property
    def ema(self) -> PostHocEMA:
        """The averages, from the beginning of `train` on; closed at its end, when they can still be evaluated.

        Raises:
            SettingsError: `train` has not begun.
        """
        if self._ema is None:
            raise SettingsError("there are no averages before Trainer.train; to read a run, use PostHocEMA.from_path.")
        return self._ema

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at: Any) -> None:
        """Begin the run, or go on with it where the trainer does. Collective; errors as `PostHocEMA.from_model`.

        Raises:
            SettingsError: DeepSpeed holds the parameters, or `on_busy="skip"` with `load_best_model_at_end`.
        """
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise SettingsError("DeepSpeed keeps the parameters to itself; use the trainer's DDP or fsdp=True instead.")
        if args.load_best_model_at_end and self._settings.get("on_busy") == "skip":
            raise SettingsError(
                'load_best_model_at_end changes the parameters before the end; it needs on_busy="wait".'
            )
        if self._ema is not None:
            self._ema.close()  # of a `train` that was left by an error
        begun = state.global_step > 0
        ours = vars(state).setdefault("_phema_dist", [])  # callbacks of this `train`; no field, so it is not saved
        self._entry = f"{_NAME}-{len(ours)}" if ours else _NAME
        ours.append(self)
        self._ema = PostHocEMA.from_model(
            _wrapped(at["model"]), self._checkpoint_dir, resume=state.global_step if begun or self._resume else False,
            **self._settings,
        )  # fmt: skip
        ranks = join()
        if begun and (folder := ranks.on_first(lambda: _find(args, state, self._entry))):
            load({"ema": self._ema.training_state}, checkpoint_id=folder)
        _entries(state)[self._entry] = {"token": ranks.on_first(lambda: secrets.token_hex(4))}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make an update, after each optimizer step; one that a GradScaler skipped is a step that changed nothing."""
        self.ema.update_(t=state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Store the averages in the trainer's checkpoint, unless it is one to load, not to resume. Collective."""
        if not args.save_only_model:
            save({"ema": self.ema.training_state}, checkpoint_id=_checkpoint(args, state) / _folder(state, self._entry))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the last snapshot."""
        self.ema.close()


def _wrapped(model: nn.Module) -> nn.Module:
    """The DDP module around a model, or the model: callbacks get it bare, and do not get the trainer."""
    ddp = (each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel))
    return next((each for each in ddp if each.module is model), model)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _entries(state: TrainerState) -> dict[str, Any]:
    """What goes into the trainer's checkpoints, and comes from the one that it goes on from."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _folder(state: TrainerState, entry: str) -> str:
    """The part of a checkpoint that is ours: of one `train`, and of no other that writes to the same place."""
    return f"{_NAME}-{_entries(state).get(entry, {}).get('token')}"


def _find(args: TrainingArguments, state: TrainerState, entry: str) -> Path | None:
    """Where the averages of the checkpoint are that the trainer has just loaded."""
    # Callbacks are not told which one it was; but `state` has its token, and so has our folder in it.
    name, here = _folder(state, entry), _checkpoint(args, state)
    for checkpoint in (here, Path(str(args.resume_from_checkpoint or here))):
        if (checkpoint / name / ".metadata").exists():  # the last file that `save` writes
            return checkpoint / name
    _log.warning(
        "%s has no %s: the averages go on from the newest snapshot at or before t=%d, not bit for bit. If the trainer "
        "went on from a checkpoint elsewhere, name that in TrainingArguments, too: resume_from_checkpoint=...",
        here, name, state.global_step,
    )  # fmt: skip
    return None
