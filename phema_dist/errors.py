"""Every error that phema_dist raises on purpose.

    PhemaError
    ├── ProfileError          (ValueError)         no such averaging profile, or none can be synthesized
    ├── SettingsError         (ValueError)         an argument that cannot work
    ├── LayoutError           (ValueError)         a model that cannot be averaged without being wrong
    ├── RunError              (ValueError)         a run that does not fit: already there, of another model, …
    │   ├── SupersededError                        another job continues this run
    │   └── SnapshotError                          a snapshot that is missing, incomplete or damaged
    │       └── DamagedError                       a stored file is not what was written
    ├── BackgroundError       (RuntimeError)       a background thread failed; its error is the cause
    └── StorageError          (OSError)            storage that does not do what was asked
        ├── KeyExistsError    (FileExistsError)    nothing is ever overwritten
        ├── KeyMissingError   (FileNotFoundError)
        └── AccessError       (PermissionError)    refused: credentials, policy, file mode

Each is also the builtin it refines, so `except ValueError` and `except OSError` go on working.
"""


class PhemaError(Exception):
    """The root: catch it to catch whatever phema_dist raises on purpose."""


class ProfileError(PhemaError, ValueError):
    """No such averaging profile exists, or the stored averages cannot make it."""


class SettingsError(PhemaError, ValueError):
    """An argument that cannot work."""


class LayoutError(PhemaError, ValueError):
    """A model, or a way of sharding it, that cannot be averaged without being wrong."""


class RunError(PhemaError, ValueError):
    """A run in storage that does not fit what was asked."""


class SupersededError(RunError):
    """Another job continues this run, or has begun one in its place."""


class SnapshotError(RunError):
    """A snapshot that is missing, incomplete or damaged."""


class DamagedError(SnapshotError):
    """A stored file is not what was written; `folder` is its snapshot's, if this rank found it."""

    def __init__(self, message: str, folder: str | None = None) -> None:
        super().__init__(message)
        self.folder = folder


class BackgroundError(PhemaError, RuntimeError):
    """A background thread failed; `__cause__` holds what stopped it."""


class StorageError(PhemaError, OSError):
    """Storage that does not do what was asked."""


class KeyExistsError(StorageError, FileExistsError):
    """The key holds something already, and nothing is ever overwritten."""


class KeyMissingError(StorageError, FileNotFoundError):
    """The key, or the bucket that should hold it, is not there."""


class AccessError(StorageError, PermissionError):
    """The store refused: wrong credentials, a policy, a file mode."""
