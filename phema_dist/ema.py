"""PostHocEMA: what a training loop holds. It wires the rooms together and contains no mathematics."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from phema_dist.errors import SettingsError
from phema_dist.filling import restore
from phema_dist.ranks import Ranks, join
from phema_dist.storage import pins
from phema_dist.storage import run as runs
from phema_dist.storage.store import open_store
from phema_dist.switching import SwitchingAverages
from phema_dist.training.attach import Attachment
from phema_dist.training.session import Session, begin
from phema_dist.training.settings import Settings, check_resume, floats, integer, planned, sum_dtype
from phema_dist.training.start import check_sigma_rels
from phema_dist.training.status import Counts, Status, describe
from phema_dist.training.swap import holds_average

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from phema_dist.prediction import Plan
    from phema_dist.storage.store import Store
    from phema_dist.training.state import TrainingState

_log = logging.getLogger("phema_dist")


class PostHocEMA(SwitchingAverages):
    """Averages of a model while it trains, and an average of any length afterwards.

    Make one with `from_model` to train, or with `from_path` to read a run. Under torchrun, make it on every rank, and
    call `update_` and `close` on every rank: these never communicate. What is collective says so.
    """

    def __init__(self, store: Store, settings: Settings, calculation_dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(settings, Settings):
            raise SettingsError("make a PostHocEMA with PostHocEMA.from_model or PostHocEMA.from_path.")
        super().__init__(store, settings, calculation_dtype)
        self._model: nn.Module | None = None
        self._resume: bool | int = True  # how a run that was opened to read would go on
        self._attachment: Attachment | None = None

    def __repr__(self) -> str:
        return f"PostHocEMA({self._store.url!r}, t={self.t}{', closed' * self._closed})"

    @staticmethod
    def from_model(
        model: nn.Module,
        checkpoint_dir: str | os.PathLike[str],
        max_checkpoints: int = 20,
        sigma_rels: Sequence[float] | None = None,
        update_every: int = 10,
        checkpoint_every: int = 1000,
        checkpoint_dtype: torch.dtype | None = None,
        calculation_dtype: torch.dtype = torch.float32,
        only_save_diff: bool = False,
        update_after_step: int = 0,
        *,
        storage_options: Mapping[str, Any] | None = None,
        resume: bool | int = False,
        process_group: ProcessGroup | None = None,
        t_unit: str = "steps",
        prefix: str = "",
        on_error: str = "warn",
        on_busy: str = "wait",
        drain_on_sigterm: bool = False,
        plan: Plan | None = None,
        retention: str = "best",
    ) -> PostHocEMA:
        """Begin to average a model, or go on with a run. Collective: call it on every rank, after wrapping the model.

        Args:
            model: plain, or wrapped by DDP, FSDP1, `fully_shard` or tensor parallelism, compiled or not.
            checkpoint_dir: where the run lives: a folder that all ranks share, or any fsspec URL (s3://bucket/run).
            max_checkpoints: how many snapshots to keep, pinned ones included; which ones says `retention`.
            sigma_rels: the averaging lengths that are tracked, each in (0, 0.28867]; None: (0.05, 0.28).
            update_every: calls of `update_` from one update of the averages to the next. In long runs fewer are made:
                one each time t has grown by 1e-4 of itself, below which float32 averages would stop moving. The
                profile is exact either way.
            checkpoint_every: calls of `update_` from one snapshot to the next.
            checkpoint_dtype: of stored averages: float32 (None), bfloat16 or float16.
            calculation_dtype: the default for the sums of a synthesis: float32 or float64.
            only_save_diff: leave out parameters that do not require gradients now. One that does later has no average.
            update_after_step: t at which averaging begins; everything before is forgotten.
            storage_options: for the store (key, secret, endpoint_url, …), or the usual AWS environment.
            resume: True: go on from the newest complete snapshot. An integer: the t where the model is; the averages
                go on from the newest complete snapshot at or before it. Begins afresh where there is none.
            process_group: the ranks that hold the model together; None: all.
            t_unit: what t counts, for people who read the run: steps, samples, …
            prefix: before the names of this rank's tensors, where ranks hold different modules whose names collide
                (pipeline stages, local experts).
            on_error: "warn": a snapshot that cannot be stored is lost, and training goes on. "raise": the rank that
                lost its part also raises StorageError, once, at the next `update_` or `close`, which have then done
                their work (catch it to go on without that snapshot), or at the next `model` or `state_dict` (on all
                ranks, where these are collective).
            on_busy: "wait" for an update that comes while the two before it are still being taken in, or "skip" it,
                which is exact for the profile; the update of a snapshot is never skipped. Ranks skip each for itself;
                so with "skip", `close` and `training_state` bring the averages up to the last call of `update_`, from
                the model as it is then.
            drain_on_sigterm: store what is queued when SIGTERM comes, for at most 15 s, then do as without this.
            plan: of `phema_dist.plan`: says max_checkpoints, sigma_rels, update_every, checkpoint_every and
                checkpoint_dtype; leave those out.
            retention: "best": keep the snapshots of which every sigma_rel can be made best, at whatever t training
                ends. "last": the newest. Neither deletes the newest complete snapshot, nor one that is pinned.

        Raises:
            SettingsError, ProfileError: an argument that cannot work.
            LayoutError: a model that cannot be averaged without being wrong.
            RunError: the folder holds a run already and `resume` is False, or a run of another model.
            StorageError: the store cannot be reached or written; on every rank, before training starts.
        """
        ranks = join(process_group)

        def checked() -> PostHocEMA:
            settings = Settings(
                max_checkpoints, floats(sigma_rels), update_every, checkpoint_every, checkpoint_dtype,
                only_save_diff, update_after_step, t_unit, on_error, on_busy, drain_on_sigterm, prefix, retention,
            )  # fmt: skip
            store = open_store(checkpoint_dir, storage_options)
            ema = PostHocEMA(store, planned(settings, plan), sum_dtype(calculation_dtype))
            ema._resume = check_resume(resume)
            return ema

        ema = ranks.each(checked)
        ema._begin(model, ranks, ema._resume)  # noqa: SLF001  its own
        return ema

    @staticmethod
    def from_path(
        checkpoint_dir: str | os.PathLike[str],
        model: nn.Module | None = None,
        max_checkpoints: int = 20,
        sigma_rels: Sequence[float] | None = None,
        update_every: int = 10,
        checkpoint_every: int = 1000,
        checkpoint_dtype: torch.dtype | None = None,
        only_save_diff: bool = False,
        *,
        step: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        process_group: ProcessGroup | None = None,
        prefix: str = "",
        retention: str = "best",
    ) -> PostHocEMA:
        """Open a run to read it. Not collective: one rank, or a process without ranks, may do it alone.

        The first `update_` goes on with the run, as `from_model(..., resume=True)` would; that is collective. The
        sigma_rels are the run's.

        Args:
            checkpoint_dir: where the run lives.
            model: what to update, if `update_` will be called without one.
            max_checkpoints: as in `from_model`, if the run goes on; so are the others.
            sigma_rels: only to check: must be the run's.
            update_every: as in `from_model`.
            checkpoint_every: as in `from_model`.
            checkpoint_dtype: as in `from_model`.
            only_save_diff: as in `from_model`.
            step: go on from the newest complete snapshot at or before this t.
            storage_options: for the store.
            process_group: as in `from_model`; if given, its ranks also enter `model` together.
            prefix: as in `from_model`.
            retention: as in `from_model`.

        Raises:
            RunError: there is no run, or it has other sigma_rels.
            StorageError: the store cannot be reached.
        """
        settings = Settings(
            max_checkpoints, floats(sigma_rels), update_every, checkpoint_every, checkpoint_dtype,
            only_save_diff=only_save_diff, prefix=prefix, retention=retention,
        )  # fmt: skip
        ema = PostHocEMA(open_store(checkpoint_dir, storage_options), settings)
        check_sigma_rels(ema._store, runs.open_run(ema._store).info, settings)
        ema._model, ema._group = model, process_group
        ema._resume = True if step is None else check_resume(step)
        return ema

    @property
    def t(self) -> int:
        """Training time at the last call of `update_`; 0 before the first, or if the run is only read."""
        return 0 if self._session is None else self._session.t - self._session.num_skipped

    def update_(self, model: nn.Module | None = None, t: int | None = None) -> None:
        """Tell the averages that the parameters have changed; call it after each optimizer step, on every rank.

        Copies what this rank owns, if an update is due, and returns; averaging and storing happen in the background.
        Does not communicate (except the first call after `from_path`). Waits only while the two updates before it are
        still being taken in.

        Args:
            model: None, or the model of the constructor, with or without its wrappers; another one with the same
                tensors is averaged from now on.
            t: training time now, if it is not one more than at the last call: samples seen, tokens, …

        Raises:
            SettingsError: t does not grow, or the parameters are an average, inside `with ema.model(...)`.
            LayoutError: a tensor was added, removed, resized or has another dtype.
            BackgroundError: a background thread has stopped; its error is the cause.
            StorageError: with on_error="raise", a snapshot was lost; this update is made all the same.
        """
        session = self._training(model)
        if self._attachment is not None:
            raise SettingsError("attached optimizers make the updates; update_ would count their steps twice.")
        try:
            session.update(model, t)
        finally:
            session.writer.fence()

    def attach(
        self, *optimizers: torch.optim.Optimizer, model: nn.Module | None = None, t: Callable[[], int] | None = None
    ) -> None:
        """Do what a call of `update_` does, whenever all of these optimizers have stepped.

        A step that a GradScaler skips is no update and does not count, and is found out without waiting for the
        device. The copy of the parameters overlaps with the next forward and backward; only optimizers may change
        parameters then. Does not communicate (except after `from_path`, as `update_`).

        Args:
            optimizers: in the order in which they step. One that steps again, before a later one has stepped, begins a
                new round: a round that some optimizer skipped is no update. The step that torch's `get_state_dict`
                makes to fill an optimizer's state is none either.
            model: as in `update_`.
            t: asked for the training time after each round (images seen, …); None: the number of rounds. What it tells
                must have grown by then, so count before `optimizer.step()`.

        Raises:
            SettingsError: no optimizer, or one that is attached already.
        """
        session = self._training(model)
        if self._attachment is not None:
            raise SettingsError("attach was called before; call it once, with all optimizers, in stepping order.")

        def stepped(skips: torch.Tensor | None) -> None:
            self._training(model).update(model, None if t is None else t(), skips)

        self._attachment = Attachment(optimizers, stepped, session.writer.fence)

    def pin(self, t: int) -> None:
        """Keep the snapshot at t for ever: no retention deletes it. Not collective: one rank is enough, any may.

        A snapshot that this job has taken may be pinned at once, before it is stored; it may still be skipped or lost,
        which is logged. For any other one this reads the run's table of contents, and takes as long. `phema pin RUN
        --t T --remove` takes a pin back.

        Args:
            t: of the snapshot: `ema.t` just after the `update_` that was its turn, or one that `phema ls` shows.

        Raises:
            SnapshotError: there is no complete snapshot at t; names the nearest.
            StorageError: the pin could not be written.
        """
        session = self._session

        def is_coming() -> bool:
            return session is not None and session.writer.has_taken(integer(t), session.num_skipped)

        pins.pin(self._store, integer(t), is_coming)

    @property
    def training_state(self) -> TrainingState:
        """The averages as a part of the job's own training checkpoint, for `torch.distributed.checkpoint`.

        `dcp.save({"model": ..., "optim": ..., "ema": ema.training_state})` stores the float32 averages, sharded;
        `dcp.load` restores them, bit for bit, on another number of ranks, another mesh or another wrapper. Loading
        replaces what `resume` began with. Both are collective.
        """
        from phema_dist.training.state import TrainingState  # noqa: PLC0415  loads torch.distributed.checkpoint

        return TrainingState(self._training(None), self._ranks)

    def status(self) -> Status:
        """How the background path of this rank fares, as a flat dict for a log. Never waits and never communicates.

        W&B takes it as it is. TensorBoard and MLflow take numbers only:
        `{name: value for name, value in ema.status().items() if isinstance(value, int | float)}`.

        Counts begin when this object begins to train; an object that only reads has zeros.

        Returns:
            t: as `ema.t`; where a device skips steps it learns of them an update later.
            updates, updates_skipped, updates_refused: taken into the averages; skipped because the averages were busy
                (`on_busy`); left out because parameters were not finite.
            lag: updates that were copied and are not yet in the averages.
            stall_seconds: how long `update_` has waited for the averages, in all.
            snapshots_written, snapshots_skipped, snapshots_failed: of which this rank has stored its part; which it did
                not take because storage was busy; which it lost, or had no finite averages for.
            bytes: that this rank has stored in snapshots.
            last_written_snapshot: t of the newest one whose part this rank has stored.
            last_complete_snapshot: t of the newest one that all ranks have stored, as far as rank 0 knows: it looks
                after each snapshot of its own, when others may still be writing theirs. None on other ranks.
            last_error: of storage, or what stopped a thread; None if all went well.
        """
        return describe(Counts()) if self._session is None else self._session.writer.status(self._session.t)

    def close(self, timeout: float | None = None) -> None:
        """Write a last snapshot, of the last update, and wait until all is stored. Does not communicate.

        Args:
            timeout: seconds to wait at most; None: as long as it takes (every put has a deadline).

        Raises:
            BackgroundError: a background thread has stopped, `timeout` was too short, or that snapshot was not stored.
        """
        if self._session is not None and not self._closed:
            self._end()
            self._session.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif self._session is not None and not self._closed:
            self._end()
            self._session.writer.abandon(_SECONDS_AFTER_ERROR, f"left by {kind.__name__ if kind else None}")

    def _begin(self, model: nn.Module, ranks: Ranks, resume: bool | int) -> Session:
        """Collective: start training on the run, from its snapshot if it has one."""
        with torch.inference_mode(mode=False):  # or the background threads could not write what is made here
            self._session = begin(
                self._store, model, ranks, self._settings, partial(restore, self._store), resume=resume
            )
        self._ranks = ranks
        return self._session

    def _training(self, model: nn.Module | None) -> Session:
        """The session, to average in; collective if there is none yet."""
        if self._closed:
            raise SettingsError("this PostHocEMA is closed; make a new one with resume=True to go on.")
        model = (self._model if self._session is None else self._session.model) if model is None else model
        if model is None:
            raise SettingsError("update_ needs a model: pass it here, or to from_path.")
        if holds_average(model):
            raise SettingsError(
                "inside `with ema.model(...)` the parameters are an average: train, update and switch outside."
            )
        if self._session is not None:
            return self._session
        return self._begin(model, join(self._group), self._resume)

    def _end(self) -> None:
        self._closed = True
        if self._attachment is not None:
            self._attachment.remove()
            if not self._attachment.num_rounds:
                _log.warning(
                    "%s: the attached optimizers made no round of steps; nothing was averaged", self._store.url
                )


_SECONDS_AFTER_ERROR = 10.0
