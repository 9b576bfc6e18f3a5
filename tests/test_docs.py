"""The README's Python runs, as one session; the files that it points to exist."""

import doctest
import re
from pathlib import Path

import pi_attention.pattern

ROOT = Path(__file__).parents[1]


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_are_those_of_the_result_files():
    from benchmarks.report import filled, pages

    for page, text in pages().items():
        assert filled(text) == text, f"{page.name}: run python -m benchmarks.report"


def test_docstring_examples():
    assert doctest.testmod(pi_attention.pattern).failed == 0
