"""A thread that handles jobs in order and never dies without a word: what ends it is raised where its work is wanted.

Its queue has no bound of its own: who submits waits first, for the buffers that the jobs carry.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from phema_dist.errors import BackgroundError, PhemaError

Job = TypeVar("Job")
_PERIOD = 1.0  # how often those who wait look whether there is still somebody to wait for


class Worker(Generic[Job]):
    """A thread that handles jobs in order; whatever its handler raises ends it, and the next call here says so.

    Workers that wait for each other share `changed`: it is told of each job that comes, or is done.
    """

    def __init__(self, name: str, handle: Callable[[Job], None], changed: threading.Condition | None = None) -> None:
        self._handle = handle
        self._changed = changed or threading.Condition()
        self._jobs: deque[Job] = deque()  # the first one is being handled
        self._error: BaseException | None = None
        self._stopping = False
        # A daemon, so that a store that hangs cannot keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Jobs that are queued or being handled."""
        return len(self._jobs)

    @property
    def pending(self) -> list[Job]:
        """The jobs that are queued or being handled, the oldest first."""
        return list(self._jobs.copy())  # one step: no thread changes it meanwhile

    @property
    def works(self) -> bool:
        """Whether jobs are being handled; not after an error, after `stop`, nor in a forked child."""
        return self._error is None and not self._stopping and self._thread.is_alive()

    @property
    def problem(self) -> str | None:
        """Why it stopped, in one line, if it did by itself."""
        if self._error is None:
            return None
        kind = "" if isinstance(self._error, PhemaError) else type(self._error).__name__
        return f"{self._thread.name} stopped: {': '.join(filter(None, (kind, str(self._error))))}"

    def check(self) -> None:
        """Raise BackgroundError if the thread stopped by itself, or if this process is a fork and does not have it."""
        if self._error is not None:
            raise BackgroundError(f"{self.problem}{_advice(self._error)}") from self._error
        if not self._stopping and not self._thread.is_alive():
            raise BackgroundError(
                f"{self._thread.name} does not run in this process, which was forked from the one that trains. Only "
                "that one may update and close; a child may open the run with PostHocEMA.from_path."
            )

    def wait_until_fewer(self, num_pending: int, timeout: float | None = None) -> bool:
        """Wait until fewer jobs are pending; False after `timeout` seconds, BackgroundError if the thread stopped."""
        self.check()  # before the lock, which a fork may have left taken
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self.num_pending >= num_pending and self.works:
                left = _PERIOD if end is None else end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _PERIOD))
        self.check()
        return self.num_pending < num_pending

    def submit(self, job: Job) -> None:
        """Queue a job."""
        with self._changed:
            self._jobs.append(job)  # one step: Ctrl-C cannot leave a job that is counted and not there
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the thread end after the job that it has, if any; the others are dropped."""
        if self._thread.is_alive():
            with self._changed:
                self._stopping = True
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._wait_for_job():
                self._handle(self._jobs[0])
                with self._changed:
                    self._jobs.popleft()
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  kept for the training thread, which raises it
            self._error = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _wait_for_job(self) -> bool:
        with self._changed:
            while not self._jobs and not self._stopping:
                self._changed.wait(_PERIOD)
            if self._stopping:
                self._jobs.clear()
            return not self._stopping


def _advice(error: BaseException) -> str:
    """What to do next, unless the error says it."""
    if isinstance(error, PhemaError):
        return ""
    return ". Stored snapshots are whole; make a new PostHocEMA with resume=True to go on from the newest."
