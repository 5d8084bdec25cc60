"""An accelerator made of threads, behind the names of torch that phema_dist/training/device.py uses.

Its tensors are CPU tensors that it says are its own. A stream runs its kernels in order, on a thread of its own. Side
streams are lazy: they run nothing before somebody waits for it, so copies always happen as late as the program allows.
Training's stream is a thread too, and its kernels are given to `launch`; or it is the thread that trains: then every
operation on a tensor is a kernel, and where the stream waits the thread does.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from phema_dist.training import device

HOST = torch.device("cpu")
DEVICE = torch.device("cuda", 0)  # by name only
UNTOUCHED = 77  # what is in a host buffer before anything was copied to it

Kernel = Callable[[], object]


class Stream:
    """Stands for torch.Stream."""

    def __init__(self, *, lazy: bool = False) -> None:
        self._kernels: list[Kernel] = []
        self._lazy = lazy
        self._num_wanted = self._num_done = 0
        self._error: RuntimeError | None = None
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, kernel: Kernel) -> None:
        with self._changed:
            self._kernels.append(kernel)
            if not self._lazy:
                self._want(len(self._kernels))

    def num_launched(self) -> int:
        return len(self._kernels)

    def has_done(self, count: int) -> bool:
        """Ask for the first `count` kernels, without waiting. An error stays, as on a GPU."""
        with self._changed:
            self._want(count)
            if self._error is not None:
                raise RuntimeError(f"the device failed: {self._error}") from self._error
            return self._num_done >= count

    def synchronize(self, count: int | None = None) -> None:
        """Wait for the first `count` kernels, or for all."""
        count = len(self._kernels) if count is None else count
        while not self.has_done(count) and not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._num_done >= count or self._error or self._closed)

    def wait_stream(self, other: "Stream | ThisThread") -> None:
        count = other.num_launched()
        self.launch(lambda: other.synchronize(count))

    def __enter__(self) -> None:
        _entered.append(self)

    def __exit__(self, *_: object) -> None:
        assert _entered.pop() is self

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _want(self, count: int) -> None:
        self._num_wanted = max(self._num_wanted, count)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._num_done < self._num_wanted)
                if self._closed:
                    return
            try:
                if self._error is None:
                    self._kernels[self._num_done]()
            except RuntimeError as error:
                self._error = error
            with self._changed:
                self._num_done += 1
                self._changed.notify_all()


class ThisThread:
    """The stream of the thread that trains, where a kernel has run once it is launched."""

    def launch(self, kernel: Kernel) -> None:
        kernel()

    def num_launched(self) -> int:
        return 0

    def has_done(self, count: int) -> bool:
        return True

    def synchronize(self, count: int = 0) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        other.synchronize(other.num_launched())

    def close(self) -> None:
        pass


class Event:
    """Stands for torch.Event: it can be recorded again and again."""

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        self._at: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self._at = stream, stream.num_launched()

    def query(self) -> bool:
        return self._at is None or self._at[0].has_done(self._at[1])


_entered: list[Stream] = []


class FakeAccelerator:
    """Everything that is patched, for as long as the test runs.

    `place` says where a tensor is; by default all that phema_dist asks about are here. Set `capturing` to be in the
    capture of a graph, and `fail` to have the next copy fail on the device.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, this_thread: bool) -> None:
        self.training: defaultdict[torch.device, Stream | ThisThread] = defaultdict(
            ThisThread if this_thread else Stream
        )
        self.side: list[Stream] = []
        self.place: Callable[[torch.Tensor], torch.device] = lambda _: DEVICE
        self.pinned: list[torch.Tensor] = []
        self.recorded: set[tuple[int, Stream]] = set()
        self.capturing = self.fail = False
        self._copy = torch._foreach_copy_

        module = SimpleNamespace(Stream=Stream, is_current_stream_capturing=lambda: self.capturing)
        patch.setattr(device, "of", self._of)
        patch.setattr(device, "host_buffer", self._host_buffer)
        patch.setattr(torch, "Stream", self._side_stream)
        patch.setattr(torch, "Event", Event)
        patch.setattr(torch, "get_device_module", lambda _: module)
        patch.setattr(torch, "_foreach_copy_", self._foreach_copy)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, to: self.recorded.add((tensor.data_ptr(), to)))
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(DEVICE.type))
        patch.setattr(torch.accelerator, "current_stream", lambda where: self.training[where])

    def launch(self, kernel: Kernel) -> None:
        """Ask the device for something, on training's stream."""
        self.training[DEVICE].launch(kernel)

    def synchronize(self) -> None:
        """Wait for what training asked for."""
        self.training[DEVICE].synchronize()

    def close(self) -> None:
        for stream in (*self.side, *self.training.values()):
            stream.close()

    def _of(self, tensor: torch.Tensor) -> torch.device:
        return self.place(tensor)

    def _side_stream(self, where: torch.device) -> Stream:
        self.side.append(Stream(lazy=True))
        return self.side[-1]

    def _host_buffer(self, numel: int, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        buffer = torch.full((numel,), UNTOUCHED, dtype=dtype)
        if pinned:
            self.pinned.append(buffer)
        return buffer

    def _foreach_copy(
        self, targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool = False
    ) -> None:
        fails, self.fail = self.fail, False

        @torch.no_grad()
        def kernel() -> None:
            if fails:
                raise RuntimeError("an illegal memory access was encountered")
            self._copy(targets, sources)

        if non_blocking and _entered:
            _entered[-1].launch(kernel)
        else:
            kernel()
