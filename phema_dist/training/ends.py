"""How a process ends: what is queued is stored first, as far as that is quick, and nothing hangs.

Closed, or left by an exception, a writer ends by itself. What is still open when the interpreter ends is drained
here, and on SIGTERM too if the user asked for it. `os._exit` and SIGKILL leave partials, which readers ignore.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from phema_dist.errors import BackgroundError, SettingsError, StorageError

_log = logging.getLogger("phema_dist")


class Drainable(Protocol):
    """What has something queued, and threads."""

    @property
    def name(self) -> str:
        """What it stores, for the log."""

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until what is queued is stored; False after `timeout` seconds. It stays open.

        Raises StorageError for a snapshot that was lost, once, and BackgroundError if there is nothing to wait for.
        """

    def abandon(self, timeout: float, why: str) -> None:
        """End the threads; store what is queued if that takes less than `timeout` seconds. Raises nothing."""


_open: set[Drainable] = set()
_SECONDS_AT_EXIT = 10.0
_SECONDS_AT_SIGTERM = 15.0  # torchrun kills 30 s after it
_HOLD_SECONDS = 0.25
_POLL_SECONDS = 0.01


def opened(writer: Drainable) -> None:
    """Drain it when the process ends, unless it is closed before."""
    _open.add(writer)


def closed(writer: Drainable) -> None:
    """It has ended by itself."""
    _open.discard(writer)


def _drain_at_exit() -> None:
    end = time.monotonic() + _SECONDS_AT_SIGTERM + 1
    while any(sigterm.draining for sigterm in _sigterms) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)  # then SIGTERM does what it does
    end = time.monotonic() + _SECONDS_AT_EXIT
    for writer in list(_open):
        writer.abandon(max(0.0, end - time.monotonic()), "the program ends and PostHocEMA was not closed")


def drain_on_sigterm() -> None:
    """On SIGTERM, store what is queued, for at most 15 s; then do what SIGTERM did before this call.

    A thread of its own does it, so a main thread that is stuck in a collective does not delay it. The program waits
    meanwhile, once it is back in Python. Another SIGTERM changes nothing then, as launchers send several; Ctrl-C ends
    the wait. There is no last snapshot: the signal meets the ranks at different t, and what they would store then does
    not fit together. A handler that is installed later replaces this one, and may call it. Where SIGTERM is ignored, it
    stays ignored. A second call changes nothing.

    Raises:
        SettingsError: this is not the main thread, or SIGTERM is handled by something that is not Python.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN:
        return
    if _sigterms:
        if before in {signal.SIG_DFL, signal.default_int_handler}:  # somebody took ours away and left nothing
            signal.signal(signal.SIGTERM, _sigterms[0].handler)
        return
    if threading.current_thread() is not threading.main_thread():
        raise SettingsError(
            "drain_on_sigterm=True must be asked for on the main thread, which alone may handle signals. Make the "
            "PostHocEMA there; or leave it out, note the signal in a handler of your own, and call close(timeout=15)."
        )
    if before is None:
        raise SettingsError(
            "drain_on_sigterm=True must find SIGTERM handled by Python or by nobody; here it is handled by another "
            "language. Leave it out, and call close(timeout=15) before the process ends."
        )
    ear, bell = socket.socketpair()
    bell.setblocking(False)  # as a wake-up fd must be
    wakeup_fd = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
    sigterm = _Sigterm(before, wakeup_fd, _file_of(wakeup_fd), ear, bell)
    _sigterms.append(sigterm)
    threading.Thread(target=_watch, args=(sigterm,), name="phema-sigterm", daemon=True).start()
    signal.signal(signal.SIGTERM, sigterm.handler)


@dataclass(eq=False)
class _Sigterm:
    """What SIGTERM did before, and where it stands. Without locks: who holds one may be who is interrupted."""

    before: Callable[[int, FrameType | None], Any] | int
    wakeup_fd: int  # of who was woken before; -1: nobody
    wakeup_file: tuple[int, int] | None
    ear: socket.socket  # hears the numbers of signals
    bell: socket.socket
    draining: bool = False
    num_drains: int = 0
    held: bool = False  # the main thread is in the handler
    let_go: bool = False  # ... has left it, and is to come back
    due: bool = False  # it is for the main thread to do what SIGTERM did before
    handler: Callable[[int, FrameType | None], None] = field(init=False)

    def __post_init__(self) -> None:
        self.handler = functools.partial(_hold, self)

    @property
    def replaced(self) -> bool:
        """A later handler stands where ours did; it calls ours, or not."""
        return signal.getsignal(signal.SIGTERM) is not self.handler


_sigterms: list[_Sigterm] = []  # one, from drain_on_sigterm on


def _hold(sigterm: _Sigterm, number: int, frame: FrameType | None) -> None:
    """On the main thread, once it is in Python: let the program wait for the watcher's drain, then go on as before.

    It is let go now and then, for a moment: it may hold a lock that the drain needs, as that of the log.
    """
    if sigterm.held:
        return
    sigterm.held = True
    try:
        over = sigterm not in _sigterms or _wait_for_drain(sigterm)  # a forked child has none
    finally:
        sigterm.held = False
    if not over:
        sigterm.let_go = True
        return
    sigterm.due = False
    if callable(sigterm.before):
        sigterm.before(number, frame)
    elif sigterm.replaced:
        signal.signal(number, sigterm.before)
        os.kill(os.getpid(), number)


def _wait_for_drain(sigterm: _Sigterm) -> bool:
    """Whether the drain is over and it is for the main thread to go on."""
    num_drains, calls_once = sigterm.num_drains, sigterm.replaced
    if calls_once:
        _ring(sigterm)
    end = time.monotonic() + (_SECONDS_AT_SIGTERM + 1 if calls_once else _HOLD_SECONDS)
    while time.monotonic() < end:
        if sigterm.due or (calls_once and sigterm.num_drains > num_drains):
            return True
        time.sleep(_POLL_SECONDS)
    if not calls_once and not sigterm.draining and not sigterm.due:
        _ring(sigterm)  # somebody has taken the wake-up fd, and the watcher knows of nothing
    return calls_once or sigterm.due


def _ring(sigterm: _Sigterm) -> None:
    with contextlib.suppress(OSError):  # full of signals, and so heard
        sigterm.bell.send(bytes([signal.SIGTERM]))


def _watch(sigterm: _Sigterm) -> None:
    """On a thread of its own: drain when SIGTERM comes, whatever the main thread does, and see that it goes on."""
    while True:
        if signal.SIGTERM not in _hear(sigterm, None):
            continue
        sigterm.draining = True
        try:
            _drain(sigterm)
        except Exception:  # noqa: BLE001  whatever it is, the process must end
            _log.exception("SIGTERM: not all that was queued could be stored")
        _pass_on(sigterm, bytes([signal.SIGTERM]))
        if not sigterm.replaced:
            if sigterm.before is signal.SIG_DFL:
                _die()
            sigterm.due = True
        sigterm.num_drains += 1
        while sigterm.due and not sigterm.replaced:
            _call_back(sigterm)
            _hear(sigterm, _POLL_SECONDS)
        _hear(sigterm, 0)  # our own calls
        sigterm.draining = sigterm.due = False


def _drain(sigterm: _Sigterm) -> None:
    busy = list(_open)
    for writer in busy:
        text = "%s: SIGTERM: storing what is queued, for at most %.0f s, no last snapshot"
        _log.warning(text, writer.name, _SECONDS_AT_SIGTERM)
    end = time.monotonic() + _SECONDS_AT_SIGTERM
    while busy and time.monotonic() < end:
        try:
            if busy[-1].drain(_POLL_SECONDS):
                _log.warning("%s: SIGTERM: nothing is queued any more", busy.pop().name)
        except StorageError as error:  # of one snapshot; the next may fare better
            _log.warning("%s", error)
        except BackgroundError as error:
            _log.warning("%s", error)
            busy.pop()
        _call_back(sigterm)
        if signal.SIGINT in _hear(sigterm, 0):
            break
    for writer in busy:
        _log.warning("%s: SIGTERM: storage is still busy; what it has not stored is lost", writer.name)


def _call_back(sigterm: _Sigterm) -> None:
    """Let the main thread come into the handler again, if it has left it; a real signal ends its sleep too."""
    if sigterm.let_go and not sigterm.replaced:
        sigterm.let_go = False
        os.kill(os.getpid(), signal.SIGTERM)


def _hear(sigterm: _Sigterm, timeout: float | None) -> bytes:
    """The numbers of signals that have come. Other than SIGTERM, they are passed on at once."""
    sigterm.ear.settimeout(timeout)
    try:
        heard = sigterm.ear.recv(4096)
    except (TimeoutError, BlockingIOError):
        return b""
    if others := heard.replace(bytes([signal.SIGTERM]), b""):
        _pass_on(sigterm, others)
    return heard


def _pass_on(sigterm: _Sigterm, numbers: bytes) -> None:
    """Wake who was woken before us, as asyncio, unless its file is closed and the number is another's by now."""
    if sigterm.wakeup_file is not None and sigterm.wakeup_file == _file_of(sigterm.wakeup_fd):
        with contextlib.suppress(OSError):
            os.write(sigterm.wakeup_fd, numbers)


def _file_of(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _die() -> None:
    """End the process by SIGTERM; only the main thread may ask Python for it, and it may be stuck."""
    set_handler = ctypes.pythonapi.PyOS_setsig
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGTERM, int(signal.SIG_DFL))
    os.kill(os.getpid(), signal.SIGTERM)


def _forget() -> None:
    """In a forked child, as a DataLoader's worker: it has no thread to wait for, and its signals are not ours."""
    _open.clear()
    for sigterm in _sigterms:
        with contextlib.suppress(ValueError, OSError):  # what was there before us is gone
            if (fd := signal.set_wakeup_fd(-1)) != sigterm.bell.fileno():
                signal.set_wakeup_fd(fd)
            elif sigterm.wakeup_fd >= 0:
                signal.set_wakeup_fd(sigterm.wakeup_fd)
        if not sigterm.replaced:
            signal.signal(signal.SIGTERM, sigterm.before)
        sigterm.ear.close()
        sigterm.bell.close()
    _sigterms.clear()


# Private, but there is no other moment: when atexit runs, storage clients can no longer start the threads they need.
threading._register_atexit(_drain_at_exit)  # type: ignore[attr-defined]  # noqa: SLF001
os.register_at_fork(after_in_child=_forget)
