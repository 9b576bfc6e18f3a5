"""The architecture, enforced: who may import whom, and what a bare import loads."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pi_attention"

ORDER = [
    "files",
    "pattern",
    "accounting",
    "receptive_field",
    "planner",
    "devices",
    "explorer",
    "segments",
    "masks",
    "ops.transforms",
    "ops.fusion",
    "ops.reference",
    "ops.sinks",
    "ops.blocked.rows",
    "ops.blocked.one_query",
    "ops.blocked.band",
    "ops.blocked.functional",
    "ops.blocked.operator",
    "ops.blocked.attention",
    "ops.fused.kernels.steps",
    "ops.fused.kernels",
    "ops.fused.tuning",
    "ops.fused.compiled",
    "ops.fused.tiling",
    "ops.fused.launch",
    "ops.fused.operators",
    "ops.fused.attention",
    "ops.dense",
    "ops.checks",
    "ops.api",
    "accelerator",
    "environment",
    "cache",
    "nn.rope",
    "nn.gate",
    "nn.layers",
    "nn.attention",
    "nn",
    "distributed.plan",
    "distributed.exchange",
    "distributed.context",
    "distributed.sharding",
    "distributed.layout",
    "distributed",
    "bill",
    "models.configuration_pi",
    "models.card",
    "models.static_cache",
    "models.continuous",
    "models.undo",
    "models.near_sinks",
    "models.caching",
    "models.rotary",
    "models.loss",
    "models.attention_map",
    "models.modeling_pi",
    "models.heads",
    "models.interface",
    "models",
    "convert",
    "data",
    "tasks",
    "plots",
    "training.values",
    "training.config",
    "training",
    "cli.terminal",
    "cli.limits",
    "cli.options",
    "cli.runs",
    "cli",
]
"""A file imports only from files above it; its own folder counts where the folder stands."""

STANDARD_LIBRARY_ONLY = ["files", "pattern", "accounting", "receptive_field", "planner", "devices"]


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


def rank(name: str) -> int:
    owners = [i for i, entry in enumerate(ORDER) if name == entry or name.startswith(entry + ".")]
    assert owners, f"{name} has no place in the order: add it to ORDER"
    return owners[0]


def test_a_file_imports_only_from_files_above_it():
    for name, path in modules().items():
        for imported in imports(path):
            if imported.startswith("pi_attention."):
                target = imported.removeprefix("pi_attention.")
                inside = name.rpartition(".")[0] == target.rpartition(".")[0] and rank(name) == rank(target)
                assert rank(target) < rank(name) or inside, f"{name} imports {target}, which stands below it"


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
