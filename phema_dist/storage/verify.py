"""Whether a run is what was written: every byte of it is read, once, and what is wrong is named.

Nothing is changed, and a job may write and delete meanwhile: what is found wrong in a snapshot whose files have changed
since is looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from phema_dist.errors import RunError
from phema_dist.storage.completeness import (
    LARGEST_INDEX,
    LARGEST_MANIFEST,
    batches,
    check_size,
    manifest_names,
    t_and_attempt,
)
from phema_dist.storage.document import one_line
from phema_dist.storage.manifest import INDEX_NAME, RUN_KEY, Index, Manifest, from_json
from phema_dist.storage.run import open_run
from phema_dist.storage.scan import File, Finding, Progress, Scan

if TYPE_CHECKING:
    from phema_dist.storage.manifest import Attempt
    from phema_dist.storage.run import Known, Run, Snapshot
    from phema_dist.storage.store import Store

Document: TypeAlias = Manifest | Index | RunError  # parsed, or what is wrong with it
_LOOKS = 5  # at what changes while we look
_MOST_HEADER_BYTES = 100 << 20  # a limit of safetensors


@dataclass(frozen=True)
class Verdict:
    """What became of a look at everything. Without problems, whatever readers find complete is what was written."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    num_complete: int  # snapshots without a problem, hidden ones too
    num_bytes: int  # of shard files that were read


def verify(store: Store, progress: Progress | None = None) -> Verdict:
    """Read a run and compare all of it with what was written.

    A file that cannot be read is a problem of the run; many such files are one of the storage.

    Raises:
        RunError: there is no run.
        StorageError: storage does not do what it is asked.
    """
    known: Known = {}
    scan = Scan(store, progress)
    try:
        run = open_run(store, known)
    except RunError as error:
        if RUN_KEY not in store.list():
            raise
        return Verdict((Finding("", str(error)),), (), 0, 0)
    findings = _check(run, known, list(known), scan)
    for _ in range(_LOOKS):
        suspects = {
            folder: _files(run, known, folder)
            for folder, found in findings.items()
            if not all(f.is_note for f in found)
        }
        if not suspects:
            break
        run = open_run(store, known)
        changed = [folder for folder, files in suspects.items() if _files(run, known, folder) != files]
        for folder in changed:
            del findings[folder]
        findings |= _check(run, known, [folder for folder in changed if folder in known], scan)
        if not changed:
            break
    found = [*_check_attempts(run), *chain.from_iterable(findings[folder] for folder in sorted(findings))]
    return Verdict(
        tuple(f for f in found if not f.is_note),
        tuple(f for f in found if f.is_note),
        sum(s.problem is None and all(f.is_note for f in findings.get(folder, ())) for folder, (_, s) in known.items()),
        scan.num_bytes,
    )


def _files(run: Run, known: Known, folder: str) -> object:
    """What a snapshot consists of, to see whether it changes."""
    return known.get(folder, (None,))[0], folder in run.indexed


def _check_attempts(run: Run) -> Iterator[Finding]:
    """Whether all that snapshots and attempts are based on is recorded."""
    numbers = {attempt.number for attempt in run.attempts}
    for attempt in run.attempts:
        if attempt.parent is not None and attempt.parent not in numbers:
            key = f"attempts/{attempt.number}.json"
            what = f"goes on from attempt {attempt.parent}, which is not recorded: what that one wrote is hidden"
            yield Finding(key, f"{key} {what}.")


def _check(run: Run, known: Known, folders: Sequence[str], scan: Scan) -> dict[str, list[Finding]]:
    """Read some snapshots, all at once; what is found, by folder."""
    attempts = {attempt.number: attempt for attempt in run.attempts}
    findings: dict[str, list[Finding]] = {}
    whole: dict[str, Attempt] = {}
    for folder in folders:
        _, snapshot = known[folder]
        if snapshot.attempt in attempts and not snapshot.unfinished:
            whole[folder] = attempts[snapshot.attempt]
        else:
            findings[folder] = [_incomplete(run, known, snapshot)]
    documents = _read_documents(run, known, whole)
    manifests = {}
    for folder, attempt in whole.items():
        findings[folder] = []
        manifests[folder] = list(_check_documents(folder, attempt, documents, findings[folder]))
    files = {
        folder: list(_check_sizes(folder, known[folder][0], manifests[folder], findings[folder])) for folder in whole
    }
    scan.read([file for each in files.values() for file in each])
    for folder, attempt in whole.items():
        found = findings[folder]
        found += [finding for file in files[folder] if (finding := scan.judge(file, run.info))]
        problem = known[folder][1].problem
        if not found and len(manifests[folder]) == attempt.world_size:
            found += scan.check_cover(folder, files[folder], run.info)
        if not found and problem:  # what stops readers is a problem
            found.append(Finding(folder, f"{folder} is incomplete: {problem}."))
        found += _strays(folder, known[folder][0], manifests[folder], attempt)
    return {folder: found for folder, found in findings.items() if found}


def _incomplete(run: Run, known: Known, snapshot: Snapshot) -> Finding:
    """What is to be said of a snapshot that lacks manifests, or its attempt's record."""
    folder, (files, _) = snapshot.folder, known[snapshot.folder]
    text = f"{folder} is incomplete: {snapshot.problem}"
    if snapshot.unfinished and folder in run.indexed and files:  # an index is written of what is complete
        return Finding(folder, f"{text}, though its {INDEX_NAME} says that it was complete.")
    return Finding(folder, f"{text}.", is_note=snapshot.unfinished)


def _read_documents(run: Run, known: Known, attempts: Mapping[str, Attempt]) -> dict[str, Document]:
    """The manifests and indexes of these folders, by key: what they say, or why that is nothing."""
    sizes = {
        f"{folder}/{name}": known[folder][0].get(name, 0)
        for folder, attempt in attempts.items()
        for name in manifest_names(attempt.world_size)
    }
    sizes |= {f"{folder}/{INDEX_NAME}": run.indexed[folder] for folder in attempts if folder in run.indexed}
    most = {key: LARGEST_INDEX if key.endswith(INDEX_NAME) else LARGEST_MANIFEST for key in sizes}
    found: dict[str, Document] = {}
    for batch in batches(sizes):
        texts = run.store.get_many((key for key in batch if sizes[key] <= most[key]), absent_ok=True)
        for key in batch:
            kind: type[Any] = Index if key.endswith(INDEX_NAME) else Manifest
            try:
                check_size(run.store, key, sizes[key], most[key])
                if key in texts:
                    found[key] = from_json(kind, texts.pop(key), key)
            except RunError as error:
                found[key] = error
    return found


def _check_documents(
    folder: str, attempt: Attempt, documents: Mapping[str, Document], findings: list[Finding]
) -> Iterator[Manifest]:
    """The manifests of a snapshot that are what they should be."""
    t, _ = t_and_attempt(folder)
    manifests: list[Manifest] = []
    for rank, name in enumerate(manifest_names(attempt.world_size)):
        key = f"{folder}/{name}"
        manifest = documents.get(key)
        if not isinstance(manifest, Manifest):
            text = f"{key} is gone." if manifest is None else f"{manifest} Rank {rank} wrote it."
            findings.append(Finding(key, text, rank))
            continue
        if (manifest.token, manifest.rank, manifest.t, manifest.attempt) != (attempt.token, rank, t, attempt.number):
            what = f"of rank {manifest.rank} at t={manifest.t}, attempt {manifest.attempt}, token {manifest.token}"
            text = f"{key} is the manifest {what}; rank {rank} of attempt {attempt.number} has token {attempt.token}."
            findings.append(Finding(key, text, rank))
            continue
        if manifest.refused is not None:
            text = f"{folder} is incomplete: rank {rank} had nothing to give: {one_line(manifest.refused)}."
            findings.append(Finding(folder, text, rank, is_note=True))
        manifests.append(manifest)
    yield from manifests
    key = f"{folder}/{INDEX_NAME}"
    index = documents.get(key)
    if index is not None and len(manifests) == attempt.world_size:
        if isinstance(index, RunError):
            findings.append(Finding(key, str(index)))
        elif index != Index(index.format, tuple(manifests)):
            findings.append(Finding(key, f"{key} is not what the manifests are that it should repeat."))


def _check_sizes(
    folder: str, sizes: Mapping[str, int], manifests: Sequence[Manifest], findings: list[Finding]
) -> Iterator[File]:
    """The files that are there as the manifests tell of them, and so can be read."""
    for manifest in manifests:
        for facts in manifest.files:
            file = File(folder, manifest.rank, facts, manifest.block_bytes)
            expected, num_parts = facts.header_bytes + facts.data_bytes, 1 - -facts.data_bytes // manifest.block_bytes
            found = sizes.get(facts.name)
            if found is None:
                problem = "is gone"
            elif found != expected:
                problem = f"has {found} bytes; {expected} were written"
            elif len(facts.checksums) != num_parts:
                problem = f"has {len(facts.checksums)} checksums in its manifest; there should be {num_parts}"
            elif facts.header_bytes > _MOST_HEADER_BYTES:
                problem = (
                    f"has a header of {facts.header_bytes} bytes; a safetensors file has at most {_MOST_HEADER_BYTES}"
                )
            else:
                yield file
                continue
            findings.append(Finding(file.key, f"{file.key} {problem}. Rank {manifest.rank} wrote it.", manifest.rank))


def _strays(
    folder: str, sizes: Mapping[str, int], manifests: Sequence[Manifest], attempt: Attempt
) -> Iterator[Finding]:
    """Files that nobody named. They harm no reader, but somebody put them there."""
    if len(manifests) == attempt.world_size:
        named = {facts.name for manifest in manifests for facts in manifest.files}
        named.update(manifest_names(attempt.world_size))
        for name in sorted(sizes.keys() - named):
            yield Finding(f"{folder}/{name}", f"{folder}/{name} is named by no manifest.", is_note=True)
