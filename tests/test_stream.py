"""The stream on runs that are written by hand, sharded in any way: what it makes equals the dense sum, bit for bit."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phema_dist.errors import LayoutError, SnapshotError
from phema_dist.shard import Box, whole
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import BLOCK_BYTES, FORMAT, Manifest, RunInfo, TensorFacts, shard_name
from phema_dist.storage.snapshot import DTYPE_NAMES, Image, write_snapshot
from phema_dist.storage.store import LocalStore, open_store
from phema_dist.synthesis import stream as streams
from phema_dist.synthesis import tiles
from phema_dist.synthesis.recipe import plan
from phema_dist.synthesis.stream import num_bytes, stream

SIGMA_RELS = (0.05, 0.28)
SHAPES: dict[str, tuple[int, ...]] = {"a": (7, 5), "b": (3, 4, 2, 2), "c": (11,), "d": (), "e": (2, 0), "f": (1, 6)}
Owned = list[list[tuple[str, Box]]]  # for each rank


def by_rows(num_ranks: int) -> Owned:
    """A run of whole rows of each tensor for each rank."""
    owned: Owned = [[] for _ in range(num_ranks)]
    for name, shape in SHAPES.items():
        box = whole(shape)
        edges = [box.num_rows * rank // num_ranks for rank in range(num_ranks + 1)]
        for rank, (start, stop) in enumerate(pairwise(edges)):
            if start < stop:
                owned[rank].append((name, box.rows(start, stop)))
    return owned


def by_columns(num_ranks: int) -> Owned:
    """As tensor parallelism cuts: along the last dimension, in the opposite order of tensors."""
    owned: Owned = [[] for _ in range(num_ranks)]
    for name, shape in reversed(SHAPES.items()):
        if len(shape) < 2 or shape[-1] < num_ranks:
            owned[0].append((name, whole(shape)))
            continue
        edges = [shape[-1] * rank // num_ranks for rank in range(num_ranks + 1)]
        for rank, (start, stop) in enumerate(pairwise(edges)):
            owned[rank].append((name, Box((*(0,) * (len(shape) - 1), start), (*shape[:-1], stop - start))))
    return owned


Values = dict[tuple[float, int], dict[str, torch.Tensor]]


def write_run(
    path: Path, layouts: Sequence[tuple[int, Owned]], dtype: torch.dtype = torch.float32
) -> tuple[runs.Run, Values]:
    """A run with a snapshot for each (t, layout), each layout its own attempt, and what is in it."""
    store = open_store(path)
    tensors = {name: TensorFacts(shape, "F32", "parameter") for name, shape in SHAPES.items()}
    runs.create_run(
        store, RunInfo(FORMAT, "test", SIGMA_RELS, "steps", 0, only_save_diff=False, tensors=tensors, aliases={})
    )
    values: Values = {}
    parent = None
    for t, owned in layouts:
        attempt = runs.start_attempt(
            store,
            len(owned),
            number=len(list((path / "attempts").glob("*"))),
            parent=parent.attempt if parent else None,
            t=parent.t if parent else 0,
        )
        for sigma_rel in SIGMA_RELS:
            generator = torch.Generator().manual_seed(t + int(1000 * sigma_rel))
            values[sigma_rel, t] = {
                name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
            }
        for rank, boxes in enumerate(owned):
            images = []
            for sigma_rel in SIGMA_RELS if boxes else ():
                image = Image([(fqn, dtype, box) for fqn, box in boxes])
                for (name, box), view in zip(boxes, image.views, strict=True):
                    view.copy_(values[sigma_rel, t][name][box.relative_to(whole(SHAPES[name]))])
                images.append((shard_name(sigma_rel, rank), sigma_rel, image))
            manifest = Manifest(
                FORMAT, t, attempt.number, attempt.token, rank, len(owned), t, ((t, t),), DTYPE_NAMES[dtype],
                BLOCK_BYTES, (),
            )  # fmt: skip
            write_snapshot(store, manifest, images)
        parent = runs.open_run(store).newest()
    return runs.open_run(store), values


def made(
    run: runs.Run, sigma_rels: Sequence[float], wanted: dict[str, list[Box]] | None = None
) -> list[dict[str, torch.Tensor]]:
    states = [{name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()} for _ in sigma_rels]

    def sink(k: int, name: str, box: Box, values: torch.Tensor) -> None:
        part = states[k][name][box.relative_to(whole(SHAPES[name]))]
        assert part.isnan().all(), "an element was handed out twice"
        part.copy_(values)

    stream(run.store, run.info, plan(run, sigma_rels), sink, wanted=wanted)
    return states


def dense(run: runs.Run, values: Values, sigma_rel: float) -> dict[str, torch.Tensor]:
    """The same sum of whole tensors, in the documented order: batches of 16 terms, each begun at zero."""
    (recipe,) = plan(run, [sigma_rel])
    if len(recipe.terms) == 1:
        return {name: x.float() for name, x in values[sigma_rel, recipe.t].items()}
    result = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for begin in range(0, len(recipe.terms), 16):
        for name, shape in SHAPES.items():
            batch = torch.zeros(shape)
            for term in recipe.terms[begin : begin + 16]:
                batch.add_(values[term.sigma_rel, term.snapshot.t][name].float(), alpha=term.coefficient)
            result[name] += batch
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_mixture_of_shardings_gives_the_dense_sum_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    layouts = [by_rows(1), by_columns(3), by_rows(4), by_rows(2), by_columns(2), *[by_rows(3)] * 5]
    run, values = write_run(tmp_path / "run", [(10 * (i + 1), owned) for i, owned in enumerate(layouts)], dtype)
    assert len(run.complete) == 10  # 20 terms: more than one batch
    sigma_rels = [0.05, 0.1, 0.28, 0.2]
    for sigma_rel, state in zip(sigma_rels, made(run, sigma_rels), strict=True):
        wanted = dense(run, values, sigma_rel)
        assert all(torch.equal(state[name], wanted[name]) for name in SHAPES)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_only_what_is_wanted_is_made(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layouts = [by_rows(2), by_columns(2)]
    run, values = write_run(tmp_path_factory.mktemp("run"), [(10, layouts[0]), (20, layouts[1])])
    wanted = {}
    for name, shape in SHAPES.items():
        if data.draw(st.booleans()):
            offsets = tuple(data.draw(st.integers(0, max(n - 1, 0))) for n in shape)
            sizes = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
            wanted[name] = [Box(offsets, sizes)]
    (state,) = made(run, [0.15], wanted)
    full = dense(run, values, 0.15)
    for name, shape in SHAPES.items():
        inside = torch.zeros(shape, dtype=torch.bool)
        for box in wanted.get(name, []):
            inside[box.relative_to(whole(shape))] = True
        assert torch.equal(state[name][inside], full[name][inside])
        assert state[name][~inside].isnan().all()


def test_results_do_not_depend_on_tiles_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = write_run(tmp_path / "run", [(10 * i, by_rows(i)) for i in (1, 2, 3)])
    whole_tiles = made(run, [0.1, 0.2])
    monkeypatch.setattr(tiles, "TILE_BYTES", 16)
    monkeypatch.setattr(streams, "_num_readers", lambda *_: 5)
    tiny_tiles = made(run, [0.1, 0.2])
    for a, b in zip(whole_tiles, tiny_tiles, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in SHAPES)


def test_several_targets_read_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = write_run(tmp_path / "run", [(10 * i, by_rows(2)) for i in (1, 2, 3)])
    original, num_read = LocalStore.read_into, 0

    def counted(self: LocalStore, key: str, start: int, buffer: memoryview) -> None:
        nonlocal num_read
        num_read += len(buffer)
        original(self, key, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", counted)
    made(run, [0.1])
    one, num_read = num_read, 0
    made(run, [0.1, 0.12, 0.15, 0.2, 0.25])
    assert num_read == one
    headers = sum(file.header_bytes for manifest in run.complete[0].manifests for file in manifest.files[:1])
    assert one == headers + num_bytes(plan(run, [0.1]))


def test_a_shard_of_another_rank_in_its_place_is_refused(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run", [(10, [[("a", Box((0, 0), (3, 5)))], [("a", Box((3, 0), (3, 5)))]])])
    with pytest.raises((LayoutError, SnapshotError), match="every element of a"):
        made(run, [0.1])


def test_one_of_two_equal_files_swapped_is_refused(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run", [(10, by_rows(1)), (20, by_rows(1))])
    folders = [tmp_path / "run" / s.folder / "sigma_rel-0.05" for s in run.complete]
    content = (folders[0] / "rank-00000.safetensors").read_bytes()
    (folders[1] / "rank-00000.safetensors").write_bytes(content)
    with pytest.raises(SnapshotError, match=r"000000000020-a1/sigma_rel-0\.05/rank-00000\.safetensors is damaged"):
        made(run, [0.1])
