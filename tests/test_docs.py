"""The Python of the README and of docs/ runs, each page as one session; the files that they point to exist."""

import doctest
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    if not blocks:
        pytest.skip("a page without Python")
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            made = target == "explorer.html"  # by python -m report, for the site
            assert made or target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def anchors(page):
    """What GitHub and the site call the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_into_pages_name_a_heading():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", page.read_text()):
            assert anchor in anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"


def test_tables_are_those_of_the_result_files():
    from report.pages import filled, pages

    for page, text in pages().items():
        assert filled(text) == text, f"{page.name}: run python -m report"


def test_the_committed_theory_is_what_the_code_computes():
    from benchmarks.theory import RESULTS, one_layer

    committed = json.loads((RESULTS / "one_layer.json").read_text())
    assert {name: value for name, value in committed.items() if name != "machine"} == one_layer()


@pytest.mark.parametrize(
    "name", ["pattern", "heads", "stack", "receptive_field", "planner", "recommended", "convert.choice"]
)
def test_docstring_examples(name):
    found = doctest.testmod(import_module(f"pi_attention.{name}"))
    assert found.attempted > 0 and found.failed == 0


def test_lines_of_prose_are_short():
    for path in (*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "experiments").glob("*.md")):
        code = generated = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            generated = line.startswith("<!-- benchmark") or (generated and not line.startswith("<!-- end"))
            assert code or generated or line.startswith("|") or len(line) <= 120, f"{path.name}:{number}"
