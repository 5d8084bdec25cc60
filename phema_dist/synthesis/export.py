"""Checkpoints on a local disk, written by all ranks together: what is there already, what is missing, and no halves.

Each file appears whole or not at all (`files`). A finished one of the same recipe and form is kept, so the same call
after a kill goes on where it was; whatever else is in the way is refused before a byte of the run is read.
"""

from __future__ import annotations

import io
import json
import mmap
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import SettingsError, StorageError
from phema_dist.shard import Box
from phema_dist.synthesis.checkpoint import CheckpointFile, Form, Item, cut, divide, index_of
from phema_dist.synthesis.files import (
    create,
    discard,
    locked,
    named_alike,
    publish,
    read_header,
    remove,
    shared,
    write_box,
    write_file,
)
from phema_dist.synthesis.tiles import cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from phema_dist.ranks import Ranks
    from phema_dist.synthesis.stream import Sink

# Makes the wanted boxes of some outputs, given by their index, and hands them to a sink that counts those from 0 on.
Read = Callable[[Sequence[int], Mapping[str, Sequence[Box]], "Sink"], object]
SHARD = re.compile(r"rank-(\d{5})-of-(\d{5})\.safetensors")
_VOLATILE = {"library", "certificate"}  # what may differ between two checkpoints of one recipe
_REPLACE = "Choose another --out, or replace it with --force."


@dataclass(frozen=True)
class Output:
    """A checkpoint to write: its file, or its folder if it is sharded, and what its metadata says.

    `reconsider` is told what an existing checkpoint says of itself before that is refused, and may raise instead.
    """

    path: Path
    facts: Mapping[str, Any]
    reconsider: Callable[[Mapping[str, Any]], object] = lambda _: None


@dataclass(frozen=True)
class Missing:
    """What is to be done for an output."""

    shown: Path  # what a person is told: the file, the index of its files, or the folder
    num_files: int
    num_kept: int  # of them, that are there already
    files: frozenset[str]  # to make
    index: bytes | None  # to make, last of all
    in_the_way: tuple[Path, ...]  # to delete before the first file gets its name, or two checkpoints would mix
    left_over: tuple[Path, ...]  # to delete afterwards
    replace: frozenset[Path]

    @property
    def nothing(self) -> bool:
        """Whether the checkpoint is there already."""
        return not self.files and self.index is None


@dataclass(frozen=True, eq=False)
class _Task:
    """A file to make."""

    output: int
    file: CheckpointFile
    path: Path
    header: bytes
    replace: bool


def find_missing(
    form: Form, items: Sequence[Item], num_ranks: int, output: Output, ours: set[Path], *, overwrite: bool
) -> Missing:
    """Look what is there of an output. For rank 0; `ours` are files that this very call has made, or kept.

    Raises:
        SettingsError: there is something else, and `overwrite` is False.
    """
    _check_place(output, form)
    files = [file for group in divide(items, form, output.path.name, num_ranks) for file in group]
    numbered = len(files) > 1 and not form.sharded
    expected = {_path(output, form, file.name): file for file in files}
    index_path, index = _index_path(output), index_of(files) if numbered else None
    found = named_alike(output.path if form.sharded else output.path.parent, _family(output, form))
    finished, others = set[Path](), list[Path]()
    for path in found:
        if overwrite:
            difference = "is to be replaced"
        elif path == index_path:
            difference = "" if path.read_bytes() == index else "is the index of another checkpoint"
        else:
            difference = _difference(path, expected.get(path), form, output)
        if not difference:
            finished.add(path)
        elif overwrite or path in ours:
            others.append(path)
        else:
            raise SettingsError(f"{path} {difference}. {_REPLACE}")
    files_to_make = frozenset(file.name for path, file in expected.items() if path not in finished)
    if files_to_make:
        ours.update(finished)  # of an unfinished checkpoint; should its recipe have to change, they change with it
    stale = [path for path in others if path not in expected and path != index_path] if files_to_make else []
    old_index = [path for path in others if path == index_path]
    return Missing(
        shown=index_path if numbered else output.path,
        num_files=len(expected),
        num_kept=len(expected) - len(files_to_make),
        files=files_to_make,
        index=index if index_path not in finished else None,
        in_the_way=tuple(others if form.sharded else old_index if numbered else ()),
        left_over=() if form.sharded else tuple(stale if numbered else [*old_index, *stale]),
        replace=frozenset(others),
    )


def _check_place(output: Output, form: Form) -> None:
    """Whatever opens a folder of shards reads all safetensors files in it."""
    if not form.sharded and output.path.is_dir():
        raise SettingsError(f"{output.path} must be a file, and is a folder. Choose another --out.")
    folder = output.path if form.sharded else output.path.parent
    names = [path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    found = [name for name in names if bool(SHARD.fullmatch(name)) is not form.sharded]
    if found:
        raise SettingsError(
            f"{folder} must not hold both the files of --sharded and other checkpoints, which readers would mix; "
            f"{min(found)} is there. Choose another --out."
        )


@contextmanager
def alone_in(ranks: Ranks, folders: Iterable[Path]) -> Iterator[None]:
    """Collective: no other process looks what is there, or writes, in these folders meanwhile; it waits."""
    with ExitStack() as stack:
        ranks.on_first(lambda: [stack.enter_context(locked(folder)) for folder in sorted(set(folders))])
        yield


def write_missing(
    ranks: Ranks,
    form: Form,
    items: Sequence[Item],
    outputs: Sequence[Output],
    missing: Sequence[Missing],
    ours: set[Path],
    read: Read,
) -> None:
    """Collective: write what is missing of each output, all of them in one pass over what `read` reads.

    Numbered files have a pass each: so one is finished, and kept if this is killed, before the next is begun.
    """
    plans = [divide(items, form, output.path.name, ranks.size) for output in outputs]
    cleared: set[int] = set()
    for group in zip(*plans, strict=True):
        tasks = [
            _Task(k, file, path, file.header(outputs[k].facts), path in missing[k].replace)
            for k, files in enumerate(group)
            for file in files
            if file.name in missing[k].files
            for path in [_path(outputs[k], form, file.name)]
        ]
        if tasks:
            with _drafts(ranks, tasks) as drafts:
                ranks.each(partial(_fill, ranks, tasks, [hidden for hidden, _ in drafts], read))
                ranks.on_first(partial(_publish_all, form, outputs, missing, tasks, drafts, cleared, ours))
    ranks.on_first(partial(_finish, outputs, missing))


@contextmanager
def _drafts(ranks: Ranks, tasks: Sequence[_Task]) -> Iterator[list[tuple[Path, int]]]:
    """Collective: a hidden file for each task, made by rank 0, which keeps its descriptor."""
    begun: list[tuple[Path, int]] = []

    def begin() -> list[tuple[Path, int]]:
        # Not a list of its own: those that were begun before an error go too.
        begun.extend(create(task.path, task.header, len(task.header) + task.file.data_bytes) for task in tasks)
        return begun

    try:
        yield ranks.on_first(begin)
    finally:
        for hidden, fd in begun:
            discard(hidden, fd)


def _fill(ranks: Ranks, tasks: Sequence[_Task], hidden: Sequence[Path], read: Read) -> None:
    """Write this rank's part of the files: all of its shard, or some rows of each."""
    mine = [(task, path) for task, path in zip(tasks, hidden, strict=True) if task.file.is_written_by(ranks.rank)]
    if not mine:
        return
    file = mine[0][0].file  # those of the other outputs have the same tensors
    parts = file.parts if file.out_of else cut(file.parts, ranks.rank, ranks.size)
    items = {item.fqn: (item, box) for item, box in file.parts}
    with ExitStack() as stack:
        fds = [stack.enter_context(shared(path)) for _, path in mine]

        def write(k: int, fqn: str, box: Box, values: torch.Tensor) -> None:
            item, within = items[fqn]
            found = cast(values, item.dtype, fqn)
            for start in file.starts[fqn]:
                write_box(fds[k], len(mine[k][0].header) + start, box, within, found)

        wanted = {item.fqn: [box] for item, box in parts if box.numel}
        if wanted:
            read([task.output for task, _ in mine], wanted, write)


def _publish_all(
    form: Form,
    outputs: Sequence[Output],
    missing: Sequence[Missing],
    tasks: Sequence[_Task],
    drafts: Sequence[tuple[Path, int]],
    cleared: set[int],
    ours: set[Path],
) -> None:
    for k in {task.output for task in tasks} - cleared:
        remove(missing[k].in_the_way)
        cleared.add(k)
    # Rank 0's shard last: without the beginning of every tensor list, whatever loads a folder of shards fails.
    for task, (hidden, fd) in reversed(list(zip(tasks, drafts, strict=True))):
        if form.pickled:
            _publish_pickled(task, fd, outputs[task.output].facts)
        else:
            publish(hidden, fd, task.path, replace=task.replace)
        ours.add(task.path)


def _publish_pickled(task: _Task, fd: int, facts: Mapping[str, Any]) -> None:
    """Save the tensors of a finished draft as a .pt, from a map of it; tied names share their storage."""
    data = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for item, box in task.file.parts:
        start = len(task.header) + task.file.starts[item.fqn][0]
        tensor = (
            torch.frombuffer(data, dtype=item.dtype, count=box.numel, offset=start).view(box.sizes)
            if box.numel
            else torch.empty(box.sizes, dtype=item.dtype, device="cpu")
        )
        state |= dict.fromkeys(item.names, tensor)
    state._metadata = OrderedDict(phema_dist=_plain(facts))  # type: ignore[attr-defined]  # noqa: SLF001  torch's place
    saved, saved_fd = create(task.path, b"", 0)
    try:
        try:
            with _Releasing(saved_fd, data) as stream:
                torch.save(state, stream)
        except (OSError, RuntimeError) as error:  # torch tells of a position that it did not expect
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else error
            raise StorageError(f"writing {task.path}: the disk answered: {reason}.") from error
        publish(saved, saved_fd, task.path, replace=task.replace)
    finally:
        discard(saved, saved_fd)


class _Releasing(io.BufferedWriter):
    """A file that gives back the memory of a map once what was read there is written: the next tensor needs it."""

    def __init__(self, fd: int, data: mmap.mmap) -> None:
        super().__init__(io.FileIO(fd, "wb", closefd=False))
        self._data = data

    def write(self, buffer: Buffer) -> int:
        written = super().write(buffer)
        self._data.madvise(mmap.MADV_DONTNEED)
        return written


def _finish(outputs: Sequence[Output], missing: Sequence[Missing]) -> None:
    for output, todo in zip(outputs, missing, strict=True):
        if todo.index is not None:
            path = _index_path(output)
            write_file(path, todo.index, replace=path in todo.replace)
        remove(todo.left_over)


def _path(output: Output, form: Form, name: str) -> Path:
    return output.path / name if form.sharded else output.path.with_name(name)


def _index_path(output: Output) -> Path:
    return output.path.with_name(f"{output.path.name}.index.json")


def _family(output: Output, form: Form) -> re.Pattern[str]:
    """Names of the files that make one checkpoint, in any form that could be mistaken for this one."""
    if form.sharded:
        return SHARD
    name, stem, suffix = map(re.escape, (output.path.name, output.path.stem, output.path.suffix))
    return re.compile(name if form.pickled else rf"{name}|{name}\.index\.json|{stem}-\d{{5}}-of-\d{{5}}{suffix}")


def _difference(path: Path, file: CheckpointFile | None, form: Form, output: Output) -> str:
    """What distinguishes a file from the one that is to be made there, if any; "" if nothing does."""
    try:
        found_table, found = _read_facts(path, pickled=form.pickled)
    except (ValueError, KeyError, TypeError) as error:
        return f"exists, and is not a whole checkpoint file of phema_dist: {error}"
    table: dict[str, Any] = {}
    facts = output.facts
    if file is not None:
        facts = file.facts_with_shard(facts)
        table = {} if form.pickled else json.loads(file.header(output.facts)[8:])
        table.pop("__metadata__", None)
    wanted = _plain(facts)
    if file is not None and stable(found) == stable(wanted) and found_table == table:
        return ""
    output.reconsider(found)
    return explain(found, wanted)


def _read_facts(path: Path, *, pickled: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a checkpoint file, as its header has them, and what it says of itself.

    Raises:
        ValueError, KeyError, TypeError: it is not one of ours.
    """
    if pickled:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {}, dict(state._metadata["phema_dist"])  # noqa: SLF001  torch's place for it
        except Exception as error:
            raise ValueError(f"{type(error).__name__}") from error
    table, _ = read_header(path)
    metadata = table.pop("__metadata__", {})
    if "phema_dist" not in metadata:
        raise ValueError("its metadata tells of no recipe")
    facts = json.loads(metadata["phema_dist"])
    return table, dict(facts)


def explain(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How the checkpoint that a file belongs to differs from another one, in words."""
    old, new = found.get("form", {}), wanted["form"]
    changed = [name for name in new if old.get(name) != new[name]]
    reasons = {
        "was made by another version of phema_dist": "attempts" not in found,
        "was made from another run": not found.get("attempts", {}).items() & wanted["attempts"].items(),
        f"holds another average, {found.get('target')}": found.get("target") != wanted["target"],
        f"was made for t={found.get('t')}, not t={wanted['t']}; pass --t {found.get('t')} for the same": (
            found.get("t") != wanted["t"]
        ),
        f"was written with {', '.join(f'{name} {old.get(name)!r}, not {new[name]!r}' for name in changed)}": changed,
        "was made from other snapshots, or with other coefficients": (
            {**stable(found), "shard": 0} != {**stable(wanted), "shard": 0}
        ),
    }
    otherwise = (
        "is part of the same average divided into files otherwise; choose --max-file-size, or the ranks, as then"
    )
    return next((reason for reason, holds in reasons.items() if holds), otherwise)


def stable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What two files of one checkpoint have in common."""
    return {key: value for key, value in facts.items() if key not in _VOLATILE}


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return dict(json.loads(json.dumps(facts)))
