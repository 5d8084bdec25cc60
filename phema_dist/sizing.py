"""How many parameters a checkpoint, or a run, has: from its tables of contents, without reading a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phema_dist.errors import RunError, SettingsError
from phema_dist.storage.document import one_line, parse_json
from phema_dist.storage.manifest import AVERAGED_DTYPES, PARAMETER, RUN_KEY
from phema_dist.storage.remote import without_credentials
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

_INDEX = "model.safetensors.index.json"
_NOT_OF_THE_MODEL = {"optim", "optimizer", "optimizers", "ema"}


def count_parameters(source: str, storage_options: Mapping[str, Any] | None = None) -> int:
    """Elements of the tensors that would be averaged.

    Args:
        source: a .safetensors file, a Hugging Face folder or its index, a folder of torch.distributed.checkpoint
            (whose table is a pickle: only of your own), or a run, at any fsspec URL.
        storage_options: for the store of a run.

    Raises:
        SettingsError: it is none of these, or damaged.
        RunError, StorageError: it is a run that cannot be read.
    """
    path, shown = Path(source), without_credentials(source)
    try:
        number = _count(path)
    except Exception as error:  # a damaged pickle raises whatever it likes
        why = one_line(without_credentials(f"{type(error).__name__}: {error}"))
        raise SettingsError(
            f"{shown} must be a checkpoint with a readable table of contents; got {why}. Give another copy, or the "
            "number of parameters itself."
        ) from error
    if number is None:
        number = _count_run(source, storage_options)
    if not number:
        raise SettingsError(f"{shown} must hold parameters to average, in a floating dtype; it has none.")
    return number


def _count(path: Path) -> int | None:
    """Of a local checkpoint; None if it is none."""
    if path.suffix == ".safetensors":
        return _count_files([path])
    if path.name.endswith(".index.json"):
        index = parse_json(path.read_bytes())
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{path.name} must have a weight_map of names to files")
        return _count_files(path.parent / name for name in sorted(set(files.values())))
    if not path.is_dir() or (path / RUN_KEY).exists():
        return None
    if (path / ".metadata").exists():
        return _count_distributed(path)
    if (path / _INDEX).exists():
        return _count(path / _INDEX)
    files = sorted(path.glob("*.safetensors"))
    return _count_files(files) if files else None


def _count_files(paths: Iterable[Path]) -> int:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  only for this kind

    number = 0
    for path in paths:
        try:
            with safe_open(path, "np") as file:
                parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  it is no mapping
                number += sum(math.prod(part.get_shape()) for part in parts if part.get_dtype() in AVERAGED_DTYPES)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from error
    return number


def _count_distributed(path: Path) -> int:
    """What is under `model`, if there is such a part, else all but the optimizer's."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # noqa: PLC0415  loads much
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: PLC0415

    sizes: dict[str, int] = {}
    for fqn, facts in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if isinstance(facts, TensorStorageMetadata) and facts.properties.dtype.is_floating_point:
            part = fqn.partition(".")[0]
            sizes[part] = sizes.get(part, 0) + math.prod(facts.size)
    return sizes.get("model") or sum(size for part, size in sizes.items() if part not in _NOT_OF_THE_MODEL)


def _count_run(source: str, storage_options: Mapping[str, Any] | None) -> int:
    try:
        run = open_run(open_store(source, storage_options))
    except RunError as error:
        raise SettingsError(
            f"{without_credentials(source)} must be a .safetensors file, a Hugging Face folder or index, a folder of "
            f"torch.distributed.checkpoint, or a run; {error}"
        ) from error
    return sum(math.prod(facts.shape) for facts in run.info.tensors.values() if facts.kind == PARAMETER)
