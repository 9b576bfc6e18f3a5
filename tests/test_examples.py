"""The programs and notebooks of examples/ run as they are written; the documentation shows each of them."""

import ast
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def run(name, *arguments, folder):
    """What an example prints, in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(told):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", told)]


def test_the_layer_in_a_gpt(tmp_path):
    first, *_, last = losses(run("gpt.py", "--steps", 11, "--context", 128, folder=tmp_path))
    assert last < first - 1


def test_the_gpt_is_as_short_as_it_claims():
    lines = [line for line in (EXAMPLES / "gpt.py").read_text().splitlines() if line.strip()]
    docstring = len(ast.get_docstring(ast.parse("\n".join(lines))).splitlines())
    assert len(lines) - docstring <= 60


def test_a_converted_model_fine_tuned_by_lora(tmp_path):
    pytest.importorskip("peft")
    from pi_attention.cli.runs import load_run

    told = run("convert_lora.py", "--steps", 3, "--context", 200, "--out", tmp_path / "lora", folder=tmp_path)
    assert len(losses(told)) == 3
    assert load_run(tmp_path / "lora")[0].config.model_type == "pi_converted"


def test_a_book_through_a_cache_that_stops_growing(tmp_path):
    told = run("stream_book.py", "--tokens", 1500, "--chunk", 200, folder=tmp_path)
    kept = [int(tokens.replace(",", "")) for tokens in re.findall(r"cache ([\d,]+) tokens", told)]
    assert len(kept) == 8 and kept[3] == kept[4] == kept[6] < 600


def test_patterns_compared_for_a_context(tmp_path):
    asked = ["--context", 1024, "--heads", 4, "--budget", 32]
    run("choose_pattern.py", *asked, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    told = run("choose_pattern.py", *asked, "--out", "pattern.png", folder=tmp_path)
    assert "fewest keys" in told and (tmp_path / "pattern.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            exec(compile(source, f"{notebook.name}, cell {number}", "exec"), names)


def test_notebooks_are_saved_as_they_ran():
    assert len(NOTEBOOKS) == 2
    for notebook in NOTEBOOKS:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


def test_the_gallery_shows_every_example():
    page = (ROOT / "docs" / "examples.md").read_text()
    for example in [*EXAMPLES.glob("*.py"), *NOTEBOOKS]:
        assert f"examples/{example.name}" in page, f"docs/examples.md does not show {example.name}"
    saved = "".join(notebook.read_text() for notebook in NOTEBOOKS)
    for picture in re.findall(r"\]\((figures/[^)]+)\)", page):
        encoded = b64encode((ROOT / "docs" / picture).read_bytes()).decode()
        assert encoded in saved.replace("\\n", ""), f"{picture} is no picture of a notebook"
