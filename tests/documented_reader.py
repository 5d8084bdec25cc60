"""A reader of stored averages, written from docs/storage-format.md alone: no phema_dist, and no torch."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

Json = dict[str, Any]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8", "I64": "<i8", "I32": "<i4", "U8": "u1"}
FOLDER = re.compile(r"([0-9]{12}|[1-9][0-9]{12,15})-a([0-9]+)")


def document(path: Path) -> Json:
    text = path.read_bytes()
    found: Json = json.loads(text)
    if "xxh3" in found:
        assert xxhash.xxh3_64_hexdigest(b"{" + text[27:]) == found.pop("xxh3"), f"{path} is damaged"
    assert found.get("format", 1) == 1, f"{path} is of a newer format"
    return found


def visible_until(attempts: dict[int, Json]) -> dict[int, float]:
    limits: dict[int, float] = {}
    number, limit = max(attempts, default=None), float("inf")
    while number is not None:
        limits[number] = limit
        number, limit = attempts[number]["parent"], min(limit, attempts[number]["t"])
    return limits


def manifests(folder: Path, attempt: Json) -> list[Json] | None:
    """The manifests of a snapshot, or None if it is not complete."""
    found, size = [], attempt["world_size"]
    for rank in range(size):
        path = folder / f"rank-{rank:05d}-of-{size:05d}.json"
        if not path.exists() or (manifest := document(path)).get("refused"):
            return None
        whose = (manifest["token"], manifest["rank"], manifest["world_size"], f"{manifest['t']:012d}")
        assert whose == (attempt["token"], rank, size, folder.name.partition("-")[0])
        for file in manifest["files"]:
            shard = folder / file["name"]
            if not shard.exists() or shard.stat().st_size != file["header_bytes"] + file["data_bytes"]:
                return None
        found.append(manifest)
    return found


def complete(run: Path) -> dict[int, list[Json]]:
    """The visible complete snapshots: their manifests, by t."""
    attempts = {int(path.stem): document(path) for path in (run / "attempts").iterdir()}
    limits = visible_until(attempts)
    names = (match for path in (run / "snapshots").iterdir() if (match := FOLDER.fullmatch(path.name)))
    found = {}
    for t, number, name in sorted((int(match[1]), int(match[2]), match[0]) for match in names):
        if t <= limits.get(number, -1) and (whole := manifests(run / "snapshots" / name, attempts[number])):
            found[t] = whole
    return found


def average(run: Path, whole: list[Json], sigma_rel: float) -> dict[str, Any]:
    """A stored average and the buffers, under all names."""
    info = document(run / "run.json")
    tensors = {name: np.zeros(facts["shape"], np.float64) for name, facts in info["tensors"].items()}
    missing = {name: np.ones(facts["shape"], bool) for name, facts in info["tensors"].items()}
    for manifest in whole:
        folder = run / "snapshots" / f"{manifest['t']:012d}-a{manifest['attempt']}"
        for file in (file for file in manifest["files"] if file["sigma_rel"] == sigma_rel):
            content = (folder / file["name"]).read_bytes()
            header, data = content[: file["header_bytes"]], content[file["header_bytes"] :]
            size = manifest["block_bytes"]
            blocks = [header, *(data[start : start + size] for start in range(0, len(data), size))]
            assert [xxhash.xxh3_64_hexdigest(block) for block in blocks] == file["checksums"], f"{file['name']} damaged"
            table = json.loads(header[8:])
            offsets = json.loads(table.pop("__metadata__")["DCP_SHARDING_INFO"])
            for name, facts in table.items():
                first, stop = facts["data_offsets"]
                values = np.frombuffer(data[first:stop], DTYPES[facts["dtype"]])
                if facts["dtype"] == "BF16":
                    values = (values.astype("<u4") << 16).view("<f4")
                corner = offsets[name]["saved_offsets"]
                box = tuple(slice(at, at + n) for at, n in zip(corner, facts["shape"], strict=True))
                assert missing[name][box].all(), f"{name} is stored twice"
                missing[name][box] = False
                tensors[name][box] = values.reshape(facts["shape"])
    assert not any(holes.any() for holes in missing.values())
    return tensors | {alias: tensors[name] for alias, name in info["aliases"].items()}
