"""Come over: the snapshot folder of another library becomes a run, whose averages are known for what they are.

`{index}.{step}.pt` holds the averages of the tracked sigma_rel number `index` after `step` calls. A folder does not say
which sigma_rels those were, nor the library's `update_every`: who trained must. It does hold the library's own count
of steps, which tells when averaging began.

Everything is looked at before anything is written. Then snapshots come over in the order of t, a file at a time, and
each exists when its manifest does: killed in between, the same call goes on after the newest one. Files are read with
`weights_only`, and nothing in the folder is changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from phema_dist import __version__
from phema_dist.errors import RunError, SettingsError, SnapshotError
from phema_dist.legacy import DEFAULT_UPDATE_EVERY
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.shard import whole
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import (
    BLOCK_BYTES,
    BUFFER,
    FORMAT,
    PARAMETER,
    Imported,
    Manifest,
    RunInfo,
    TensorFacts,
    shard_name,
)
from phema_dist.storage.snapshot import (
    AVERAGE_DTYPES,
    DTYPE_NAMES,
    DTYPES,
    HALF_ULP,
    Image,
    make_images,
    write_snapshot,
)
from phema_dist.storage.store import LocalStore

if TYPE_CHECKING:
    from phema_dist.storage.store import Store

_log = logging.getLogger("phema_dist")
_FILE = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,14})\.pt")
_PREFIX = {"posthoc-ema": "", "ema-pytorch": "ema_model."}  # of names in the files
_STATE = ("initted", "step")  # the library's own entries
_COUNTER = "num_batches_tracked"  # of BatchNorm: an integer that a checkpoint_dtype has made a float
_FIRST_CALL = {"posthoc-ema": 100, "ema-pytorch": 1}  # at which averaging begins, where nothing else is known
_MOST_NAMED = 3

Files = dict[int, tuple[Path, ...]]  # by step, one for each sigma_rel


@dataclass(frozen=True)
class Folder:
    """A folder of `library`'s files, and what its user gave that library. `update_after_step` None: as the files say.

    Raises:
        SettingsError, ProfileError: there is no such folder, library or profile.
    """

    path: Path
    library: str
    sigma_rels: tuple[float, ...]
    update_every: int
    update_after_step: int | None = None

    def __post_init__(self) -> None:
        """Check all of it."""
        if self.library not in DEFAULT_UPDATE_EVERY:
            raise SettingsError(f"the library must be one of {', '.join(DEFAULT_UPDATE_EVERY)}; got {self.library}.")
        if not self.path.is_dir():
            raise SettingsError(f"{self.path} must be the folder with the .pt files of {self.library}; it is none.")
        if not self.sigma_rels or len({*self.sigma_rels}) < len(self.sigma_rels):
            raise SettingsError(f"sigma_rels must be those of the training, each once; got {self.sigma_rels}.")
        for sigma_rel in self.sigma_rels:
            sigma_rel_to_gamma(sigma_rel)
        if self.update_every < 1 or (self.update_after_step or 0) < 0:
            raise SettingsError(
                f"update_every must be at least 1, and update_after_step 0; got {self.update_every} and "
                f"{self.update_after_step}."
            )
        if self.library == "ema-pytorch" and (self.update_after_step or 1) > 1:
            raise SettingsError(f"PostHocEMA of ema-pytorch has no update_after_step; got {self.update_after_step}.")


@dataclass(frozen=True)
class Copied:
    """What came over: the files of one step, as the snapshot at t; 0 bytes if it was there already."""

    t: int
    step: int
    num_bytes: int


def copy_folder(folder: Folder, store: Store) -> Iterator[Copied]:
    """Make the folder's files snapshots of a run, or go on with that; yields each when it is stored.

    A snapshot's t is that of its last update, which may be a few calls before the step in the file's name.

    Raises:
        SnapshotError: a file is missing, foreign, unreadable, or holds other tensors than the rest; names it. Or none
            is finite.
        SettingsError: the store is in the folder.
        RunError: the store holds another run.
        StorageError: it cannot be written.
    """
    _check_outside(folder, store)
    files = _find(folder)
    tensors = _look(folder, files)
    first = _first_call(folder, files)
    info = RunInfo(
        FORMAT, __version__, folder.sigma_rels, "steps", first - 1,
        only_save_diff=True,  # nobody says whether a folder has all of the model
        tensors=tensors, aliases={}, imported=Imported(folder.library, folder.update_every),
    )  # fmt: skip
    run = runs.find_run(store)
    if run is None:
        _check_some_finite(folder, files, tensors)
        runs.create_run(store, info)
        run = runs.open_run(store)
    _check_same(store, run.info, info)
    newest = run.newest()
    by_t: dict[int, int] = {}
    for step in sorted(files):
        t = first + (step - first) // folder.update_every * folder.update_every
        if t in by_t:
            _log.warning(
                "%s: the files of step %d hold what those of step %d do: no update came between",
                folder.path,
                step,
                by_t[t],
            )
        else:
            by_t[t] = step
    todo = {t: step for t, step in by_t.items() if newest is None or t > newest.t}
    for t in sorted(by_t.keys() - todo.keys()):
        yield Copied(t, by_t[t], 0)
    if not todo:
        return
    parent, start = (newest.attempt, newest.t) if newest else (None, 0)
    attempt = runs.start_attempt(store, 1, run.next_attempt, parent, start)
    (image,), views = make_images([(fqn, DTYPES[facts.dtype], whole(facts.shape)) for fqn, facts in tensors.items()])
    stored = {facts.dtype for facts in tensors.values() if facts.kind == PARAMETER} & HALF_ULP.keys()
    if "BF16" in stored:
        _log.warning(
            "%s: averages are bfloat16; if the model was too, %s averaged in bfloat16, where averages stop moving: "
            "no certificate knows of that", folder.path, folder.library,
        )  # fmt: skip
    for t, step in todo.items():
        if (bad := next(_not_finite(folder, files[step], tensors), None)) is not None:
            _log.warning("left out step %d: %s", step, bad)
            continue
        since = t - info.origin
        manifest = Manifest(
            FORMAT, t, attempt.number, attempt.token, rank=0, world_size=1, calls=step,
            updates=((1, 1), (since, (since - 1) // folder.update_every)) if since > 1 else ((1, 1),),
            dtype=max(stored, key=HALF_ULP.__getitem__, default="F32"), block_bytes=BLOCK_BYTES, files=(),
        )  # fmt: skip
        filled = _filled(folder, files[step], image, dict(zip(tensors, views, strict=True)))
        yield Copied(t, step, write_snapshot(store, manifest, filled))


def _find(folder: Folder) -> Files:
    """The files by step, one for each sigma_rel."""
    found: dict[tuple[int, int], Path] = {}
    foreign = []
    for path in sorted(folder.path.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and path.is_file():
            found[int(match[2]), int(match[1])] = path
        elif not path.name.startswith("."):
            foreign.append(path.name)
    if foreign:
        raise SnapshotError(
            f"{folder.path} must hold files INDEX.STEP.pt of {folder.library} only; it also has {_some(foreign)}. Move "
            "that elsewhere."
        )
    if not found:
        raise SnapshotError(f"{folder.path} must hold files INDEX.STEP.pt of {folder.library}; there are none.")
    steps, indices = {step for step, _ in found}, {index for _, index in found}
    count = len(folder.sigma_rels)
    if indices != set(range(count)):
        raise SnapshotError(
            f"{folder.path} must have files of one index for each of the {count} sigma_rels "
            f"{_some(map(str, folder.sigma_rels))}; its indices are {_some(map(str, sorted(indices)))}."
        )
    missing = [f"{index}.{step}.pt" for step in sorted(steps) for index in range(count) if (step, index) not in found]
    if missing:
        raise SnapshotError(
            f"{folder.path} must have a file of each index for each step; {_some(missing)} is missing. Put it back, or "
            "move the other files of that step elsewhere."
        )
    return {step: tuple(found[step, index] for index in range(count)) for step in steps}


def _look(folder: Folder, files: Files) -> dict[str, TensorFacts]:
    """What the tensors are, the same in all files."""
    tensors: dict[str, TensorFacts] = {}
    where: Path | None = None
    for path in (path for step in sorted(files) for path in files[step]):
        here = {fqn: _facts(path, fqn, tensor) for fqn, tensor in _read(folder, path).items()}
        if where is None:
            tensors, where = here, path
        odd = sorted(fqn for fqn in tensors | here if tensors.get(fqn) != here.get(fqn))
        if odd:
            raise SnapshotError(
                f"{path} must hold the same tensors as {where.name}; {odd[0]} is {_said(here, odd[0])} instead of "
                f"{_said(tensors, odd[0])}. Is it of another model? Move it elsewhere."
            )
    if not any(facts.kind == PARAMETER for facts in tensors.values()):
        raise SnapshotError(f"{where} must hold at least one average, of floats; found none. Is it the right folder?")
    return tensors


def _read(folder: Folder, path: Path) -> dict[str, torch.Tensor]:
    """The averages in a file, by name, mapped and not yet read."""
    prefix, content = _PREFIX[folder.library], _load(path)
    averages = {name: value for name, value in content.items() if name not in {*_STATE, "sigma_rel"}}
    tensors = {name: value for name, value in averages.items() if isinstance(value, torch.Tensor)}
    odd = sorted(averages.keys() - tensors.keys())
    if odd or any(name not in content for name in _STATE):
        raise SnapshotError(
            f"{path} must be a snapshot of {folder.library}: averages, and {' and '.join(_STATE)}; "
            f"{f'{odd[0]} is no tensor' if odd else 'it is not'}. Move it elsewhere."
        )
    others = [library for library, other in _PREFIX.items() if other and all(n.startswith(other) for n in tensors)]
    if tensors and (others or ["posthoc-ema"]) != [folder.library]:
        raise SnapshotError(
            f"{path} must be a snapshot of {folder.library}, and its names are those of "
            f"{(others or ['posthoc-ema'])[0]}, as {next(iter(tensors))}. Say so with --from."
        )
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in tensors.items()}


def _load(path: Path) -> Mapping[str, object]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many things of a file that is none
        raise SnapshotError(f"{path} must be a file of torch.save, with tensors only: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise SnapshotError(f"{path} must be a state dict; found a {type(content).__name__}.")
    return content


def _facts(path: Path, fqn: str, tensor: torch.Tensor) -> TensorFacts:
    if not _is_plain(tensor) or tensor.dtype not in DTYPE_NAMES:
        kind = "nested" if tensor.is_nested else f"{tensor.layout} {tensor.device.type}"
        raise SnapshotError(
            f"{path}: {fqn} must be a dense CPU tensor, all of it in the file; it is a {kind} tensor of "
            f"{tensor.dtype}, which a run cannot store. Move the file elsewhere."
        )
    if fqn.rpartition(".")[2] == _COUNTER:
        return TensorFacts(tuple(tensor.shape), "I64", BUFFER)
    kind = PARAMETER if tensor.dtype in AVERAGE_DTYPES else BUFFER
    return TensorFacts(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], kind)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is dense, on the CPU, and no larger than what is stored of it, as an expanded one is."""
    return (
        not tensor.is_nested
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )


def _said(tensors: Mapping[str, TensorFacts], fqn: str) -> str:
    return f"{tensors[fqn].dtype} {list(tensors[fqn].shape)}" if fqn in tensors else "absent"


def _first_call(folder: Folder, files: Files) -> int:
    """The call at which averaging began, from the library's own count of calls since.

    A 16-bit checkpoint_dtype has rounded that count: then what is said, or the library's default, need only fit.
    """
    counts = {path: _load(path)["step"] for paths in files.values() for path in paths}
    odd = [
        path
        for path, count in counts.items()
        if not isinstance(count, torch.Tensor) or not _is_plain(count) or count.numel() != 1 or count.is_complex()
    ]
    if odd:
        raise SnapshotError(f"{odd[0]} must hold the library's count of steps, one number. Move it elsewhere.")
    by_path = {path: count for path, count in counts.items() if isinstance(count, torch.Tensor)}
    step, earliest = min((step, paths[0]) for step, paths in files.items())
    count = by_path[earliest]
    told = folder.update_after_step
    if told is None and (not count.is_floating_point() or float(count) < 1 / torch.finfo(count.dtype).eps):
        first = step - int(count) + 1
    else:
        first = _FIRST_CALL[folder.library] if told is None else max(told, 1)
    for step, paths in sorted(files.items()):
        wanted = step - first + 1
        for path in paths:
            found = by_path[path]
            if (
                wanted < 1
                or first < 1
                or not torch.equal(found, torch.tensor(wanted).to(found.dtype).view(found.shape))
            ):
                raise SnapshotError(
                    f"{path} must hold the averages after {wanted} calls, if averaging began at call {first}; it "
                    f"counts {found.item():g}. Was update_after_step another one? Say it with --update-after-step. If "
                    "training was continued in this folder, move the files of its earlier part elsewhere."
                )
    return first


def _check_outside(folder: Folder, store: Store) -> None:
    """Raise SettingsError if the run would lie in the folder."""
    if isinstance(store, LocalStore):
        out, inside = Path(store.url).resolve(), folder.path.resolve()
        if inside == out or inside in out.parents:
            raise SettingsError(f"{out} must not be in {folder.path}, which stays as it is. Choose another --out.")


def _check_some_finite(folder: Folder, files: Files, tensors: Mapping[str, TensorFacts]) -> None:
    """Raise SnapshotError if no step can come over. Mostly the first one can, and no other is read."""
    bad: str | None = None
    for step in sorted(files):
        if (bad := next(_not_finite(folder, files[step], tensors), None)) is None:
            return
    raise SnapshotError(
        f"{folder.path} must have a step whose averages are all finite; it has none, as {bad}. Did training diverge?"
    )


def _check_same(store: Store, found: RunInfo, wanted: RunInfo) -> None:
    """Raise RunError unless the run is of this folder."""
    for what in ("imported", "sigma_rels", "origin", "tensors"):
        if getattr(found, what) != getattr(wanted, what):
            said = "" if what == "tensors" else f": {getattr(found, what)} instead of {getattr(wanted, what)}"
            raise RunError(
                f"{store.url} must be empty, or an import of the same folder; it holds a run with other {what}{said}. "
                "Choose another place with --out."
            )


def _not_finite(folder: Folder, paths: Sequence[Path], tensors: Mapping[str, TensorFacts]) -> Iterator[str]:
    for path in paths:
        for fqn, tensor in _read(folder, path).items():
            if tensors[fqn].kind == PARAMETER and not (tensor.sum().isfinite() or tensor.isfinite().all()):
                yield f"{path.name}: {fqn} is not finite"


def _filled(
    folder: Folder, paths: Sequence[Path], image: Image, views: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, float, Image]]:
    """One image, filled from one file after another."""
    for sigma_rel, path in zip(folder.sigma_rels, paths, strict=True):
        for fqn, tensor in _read(folder, path).items():
            rounded_counter = tensor.is_floating_point() and not views[fqn].is_floating_point()
            # In float16 it may have become infinite, which no integer is.
            views[fqn].copy_(torch.nan_to_num(tensor, posinf=0.0) if rounded_counter else tensor)
        yield shard_name(sigma_rel, 0), sigma_rel, image


def _some(names: Iterator[str] | Sequence[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return ", ".join(found[:_MOST_NAMED]) + more
