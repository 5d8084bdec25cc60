"""The house of design.md: who may import whom, and who owns which effect."""

import ast
from collections.abc import Iterator
from pathlib import Path

import phema_dist

PACKAGE = Path(phema_dist.__file__).parent
# From the ground up: a module may import only what stands before it.
ORDER = [
    "errors", "host", "profile", "walk", "translation", "legacy", "target", "schedule", "prediction", "planning",
    "shard", "memory", "ranks",
    "storage.document",
    "storage.manifest", "storage.key", "storage.remote", "storage.carrier", "storage.s3", "storage.store",
    "storage.snapshot", "storage.completeness", "storage.run", "storage.scan", "storage.verify",
    "storage.pins", "storage.gc",
    "training.parts", "training.wrappers", "training.layout", "training.swap", "training.holders", "training.ownership",
    "training.device",
    "training.staging", "training.tracker", "training.buffers", "training.policy", "training.ends",
    "training.settings", "training.worker", "training.status", "training.storing", "training.writer",
    "training.start", "training.session", "training.attach", "training.state", "training.exchange",
    "training.masters",
    "synthesis.sums", "synthesis.noise", "synthesis.recipe", "synthesis.tiles", "synthesis.reading", "synthesis.sizes",
    "synthesis.stream",
    "synthesis.request",
    "synthesis.reader", "synthesis.checkpoint", "synthesis.files", "synthesis.export",
    "synthesis.consolidate", "synthesis.join", "migration",
    "sizing", "plot.style", "plot.error", "plot.averages", "plot.timeline", "plot.sweep", "plot",
    "selection.grid", "selection.metric", "selection.results", "selection.folder", "selection.sweep",
    "filling", "evaluation", "switching", "ema", "report",
    "integrations.averaged_model", "integrations.lightning", "integrations.transformers",
    "cli.arguments", "cli.plans", "cli.runs", "cli.averages", "cli.imports", "cli.conversions", "cli.sweeps",
    "cli.pictures", "cli",
]  # fmt: skip
CLI, PLOT = ({name for name in ORDER if f"{name}.".startswith(f"{package}.")} for package in ("cli", "plot"))
EXEMPT = {"__init__", "__main__", "storage", "training", "synthesis", "selection", "integrations"}
OWNERS = {
    "fsspec": {"storage.remote", "storage.s3"},
    "s3fs": set(),
    "botocore": set(),
    "obstore": {"storage.carrier"},
    "matplotlib": PLOT | {"cli.pictures"},
    "argparse": CLI,
    "tqdm": {"cli.arguments"},
    "lightning": {"integrations.lightning"},
    "pytorch_lightning": {"integrations.lightning"},
    "concurrent": {"storage.scan", "synthesis.reading", "synthesis.stream"},
    "pickle": set(),
    "torch.distributed": {
        "ranks",
        "training.parts",
        "training.wrappers",
        "training.state",
        "synthesis.reader",
        "sizing",
        "evaluation",
        "ema",
        "integrations.lightning",
        "integrations.transformers",
    },
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place() -> None:
    assert {name for name, _ in modules()} - EXEMPT == set(ORDER)


def test_imports_point_upwards() -> None:
    for name, tree in modules():
        if name in EXEMPT:
            continue
        for imported in imports(tree):
            inner = imported.removeprefix("phema_dist.")
            if inner in {imported, "__version__"}:
                continue
            home = max((module for module in ORDER if f"{inner}.".startswith(f"{module}.")), key=len)
            assert ORDER.index(home) < ORDER.index(name), f"{name} imports {imported}"
            assert not (name.startswith("synthesis.") and home.startswith("training.")), f"{name} imports {imported}"
            assert not (name.startswith("training.") and home.startswith("synthesis.")), f"{name} imports {imported}"


def test_every_effect_has_one_owner() -> None:
    for name, tree in modules():
        for imported in imports(tree):
            for effect, owners in OWNERS.items():
                if f"{imported}.".startswith(f"{effect}."):
                    assert name in owners, f"{name} imports {imported}"


def test_threads_are_started_in_two_places_and_printing_is_done_in_one() -> None:
    for name, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called != "print" or name in CLI, f"{name} prints"
            homes = {"training.worker", "training.ends"}
            assert called != "threading.Thread" or name in homes, f"{name} starts a thread"


def test_collectives_are_called_in_ranks_only() -> None:
    collectives = {"all_gather_object", "broadcast_object_list", "all_reduce", "barrier", "all_gather", "broadcast"}
    for name, tree in modules():
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        called = {function.attr for function in calls if isinstance(function, ast.Attribute)}
        assert name == "ranks" or not called & collectives, f"{name} calls {called & collectives}"


def test_streams_events_and_pinned_memory_are_known_in_one_place() -> None:
    for name, tree in modules():
        code = ast.unparse(tree)
        for word in ("torch.Stream", "torch.Event", "torch.cuda", "torch.accelerator", "pin_memory"):
            assert word not in code or name == "training.device", f"{name} knows of {word}"


def test_modules_stay_readable() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(phema_dist.__all__) == dir(phema_dist)
    for name in phema_dist.__all__:
        assert getattr(phema_dist, name).__module__.startswith("phema_dist.")
