"""The seam between us and an accelerator: copies to the host that run beside training.

Whatever phema_dist knows of streams, events and pinned memory is here. The training thread never waits, and no memory
of the device is allocated.
"""

from __future__ import annotations

import time

import torch

from phema_dist.errors import SettingsError
from phema_dist.memory import empty

_POLL_SECONDS = 0.001


def of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is now."""
    return tensor.device


def has_streams(device: torch.device) -> bool:
    """Whether copies from a device can run beside training; if not, a copy is done when it returns."""
    accelerator = torch.accelerator.current_accelerator()
    return (
        accelerator is not None
        and device.type == accelerator.type
        and hasattr(torch.get_device_module(device), "Stream")
    )


def host_buffer(numel: int, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Memory of the host. Pinned, a device can write to it by itself; PyTorch rounds that up to 2^n bytes."""
    return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=True) if pinned else empty((numel,), dtype)


class SideStream:
    """Copies from one device into numbered slots of host buffers, beside training.

    The training thread calls `begin` and `fence`; any other thread may `wait`.
    """

    def __init__(self, device: torch.device, num_slots: int) -> None:
        self._device = device
        self._stream = torch.Stream(device)
        # Reused, so that none ends on another thread: CUDA may then open a context on device 0, of hundreds of MB.
        self._arrived = [torch.Event(device, enable_timing=False) for _ in range(num_slots)]

    def begin(self, slot: int, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Begin to copy `sources` as they will be once the device has done what it was asked so far.

        Nothing is allocated on the device, and the thread does not wait, if `targets` are pinned and have the dtypes
        and strides of `sources`, without gaps; otherwise it is only slower. Raises SettingsError in a graph capture.
        """
        training = self._training_stream()
        self._stream.wait_stream(training)
        for source in sources:
            source.record_stream(self._stream)  # if freed meanwhile, its memory is not given away before it is copied
        with self._stream:
            torch._foreach_copy_(targets, sources, non_blocking=True)  # one call, not 5 000
        self._arrived[slot].record(self._stream)

    def fence(self) -> None:
        """Let all that the device is asked from now on wait for the copies begun so far. Raises as `begin`."""
        self._training_stream().wait_stream(self._stream)

    def wait(self, slot: int) -> None:
        """Return when the copies into a slot have arrived; raises what went wrong on the device."""
        # Not synchronize(): torch.Event can only spin, which takes a core and the driver's lock from training.
        while not self._arrived[slot].query():
            time.sleep(_POLL_SECONDS)

    def _training_stream(self) -> torch.Stream:
        capturing = getattr(torch.get_device_module(self._device), "is_current_stream_capturing", None)
        if capturing is not None and capturing():
            raise SettingsError(
                "an update must not be captured in a graph; it would be made once, or break the capture. Capture the "
                "training step without update_ and without attached optimizers, and call update_ after each replay."
            )
        return torch.accelerator.current_stream(self._device)
