"""The architecture, enforced: who may import whom, and what a bare import loads."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pi_attention"

ORDER = [
    "files",
    "json_lines",
    "paths",
    "units",
    "pattern",
    "heads",
    "stack",
    "describe",
    "recommended",
    "accounting",
    "receptive_field",
    "planner",
    "devices",
    "explorer",
    "segments",
    "masks",
    "ops",
    "accelerator",
    "environment",
    "nn.rope",
    "cache",
    "nn",
    "distributed",
    "bill",
    "models",
    "convert",
    "models.interface",
    "data",
    "tasks",
    "plots",
    "training",
    "serving",
    "cli",
]
"""Rooms (folders and files of the root): one imports only from rooms above it. A file of a room may stand elsewhere."""

WITHIN = {
    "ops": [
        "checks",
        "transforms",
        "scores",
        "fusion",
        "reference",
        "sinks",
        "blocked.rows",
        "blocked.one_query",
        "blocked.band",
        "blocked.functional",
        "blocked.operator",
        "blocked.attention",
        "fused.kernels.steps",
        "fused.kernels",
        "fused.layout",
        "fused.tuning",
        "fused.compiled",
        "fused.tiling",
        "fused.hopper.steps",
        "fused.hopper.rows",
        "fused.hopper.forward",
        "fused.hopper.query",
        "fused.hopper.key",
        "fused.hopper.serves",
        "fused.hopper.launch",
        "fused.hopper",
        "fused.fallback",
        "fused.launch",
        "fused.decoding",
        "fused.operators",
        "fused.attention",
        "dense",
        "api",
        "paged",
    ],
    "cache": ["contract", "near", "held", "starts", "growing", "fixed"],
    "nn": ["gate", "layers", "sources", "attention"],
    "distributed": ["plan", "exchange", "context", "sharding", "tensor_parallel", "layout"],
    "models": [
        "settings",
        "cache_argument",
        "configuration_pi",
        "card",
        "initialisation",
        "caching",
        "inputs",
        "library_cache",
        "fingerprint",
        "prompt_cache",
        "continuous",
        "rotary",
        "ragged",
        "paged",
        "batching",
        "sampling",
        "generation",
        "loss",
        "attention_map",
        "modeling_pi",
        "heads",
    ],
    "convert": ["config", "rotary", "extension", "interface", "gates", "undo", "model", "conversion", "choice"],
    "plots": ["style", "lines", "pattern", "reach", "network"],
    "training": [
        "values",
        "config",
        "metrics",
        "earlier",
        "unsealed",
        "checkpoints",
        "state",
        "step",
        "optimizer",
        "interrupts",
        "trackers",
        "hub",
        "card",
        "progress",
        "resume",
        "text",
        "run",
        "heartbeat",
        "ranks",
        "report",
        "train",
        "finetune",
        "unfinished",
    ],
    "serving": ["needs", "library", "requests", "text", "memory", "answer", "engine", "handlers", "app", "server"],
    "cli": ["terminal", "limits", "options", "runs", "pretrained", "conversion"],
}
"""Files of a room, each importing only from those above it; the rest of the room stands behind them, free in itself."""

STANDARD_LIBRARY_ONLY = [
    "files",
    "json_lines",
    "paths",
    "units",
    "pattern",
    "heads",
    "stack",
    "describe",
    "accounting",
    "receptive_field",
    "recommended",
    "planner",
    "devices",
]


def modules() -> dict[str, Path]:
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"]
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            found.add(node.module or "")
    return found


def place(name: str, order: list[str]) -> int | None:
    """Where the most exact entry for a module stands."""
    owners = [entry for entry in order if name == entry or name.startswith(entry + ".")]
    return order.index(max(owners, key=len)) if owners else None


def rank(name: str) -> tuple[int, int]:
    """Place of the room, then of the file in it; a package itself stands behind its files."""
    room = place(name, ORDER)
    assert room is not None, f"{name} has no place in the order: add it to ORDER"
    files = WITHIN.get(ORDER[room], [])
    within = place(name.removeprefix(ORDER[room] + "."), files)
    return room, len(files) if within is None else within


def test_a_file_imports_only_from_files_above_it():
    for name, path in modules().items():
        for imported in imports(path):
            if imported.startswith("pi_attention."):
                target = imported.removeprefix("pi_attention.")
                inside = name.rpartition(".")[0] == target.rpartition(".")[0] and rank(name) == rank(target)
                assert rank(target) < rank(name) or inside, f"{name} imports {target}, which stands below it"


def test_every_file_and_room_of_the_order_is_there():
    rooms = {*ORDER, *(f"{room}.{file}" for room, files in WITHIN.items() for file in files)}
    for entry in rooms:
        path = PACKAGE / entry.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), entry


def test_some_files_need_the_standard_library_alone():
    for name in STANDARD_LIBRARY_ONLY:
        for imported in imports(modules()[name]):
            ours = imported.removeprefix("pi_attention.") in STANDARD_LIBRARY_ONLY
            assert ours or imported.partition(".")[0] in sys.stdlib_module_names, f"{name} imports {imported}"


def test_no_fast_path_imports_the_reference():
    for name, path in modules().items():
        if name not in ("ops.api", "models.attention_map"):  # the map of "eager" is the reference's
            assert "pi_attention.ops.reference" not in imports(path), name


def test_a_bare_import_loads_torch_only():
    heavy = ["triton", "transformers", "matplotlib", "datasets", "accelerate", "tyro", "rich", "yaml"]
    code = (
        "import sys, torch; before = set(sys.modules); import pi_attention; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_results_are_measured_without_the_report_that_shows_them():
    root = PACKAGE.parent
    others = {"pi_attention": {"benchmarks", "experiments", "report"}, "benchmarks": {"experiments", "report"}}
    others["experiments"] = {"benchmarks", "report"}
    for folder, forbidden in others.items():
        for path in (root / folder).rglob("*.py"):
            found = {imported.partition(".")[0] for imported in imports(path)}
            assert not found & forbidden, f"{path.relative_to(root)} imports {found & forbidden}"


def test_files_and_functions_stay_small():
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    assert statistics.median(len(source.splitlines()) for source in sources) <= 120
    functions = [
        node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    ]
    long = {node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80}
    assert not long
