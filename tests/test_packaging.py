"""What is built for a package index: content, links, versions, and that two builds are the same."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

import pi_attention

ROOT = Path(__file__).parents[1]


def test_changelog_and_citation_are_of_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == pi_attention.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == pi_attention.__version__


def workflows():
    return sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", workflows(), ids=lambda file: file.stem)
def test_workflows_pin_what_they_run_and_ask_for_little(file):
    text = file.read_text()
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) and "# v" in rest for name, rest in used)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"} and "secrets." not in text
    targets = set(re.findall(r"run: make ([\w-]+)", text))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_workflows_try_the_versions_that_the_package_claims():
    claimed = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == jobs["wheel"]["strategy"]["matrix"]["python"] == claimed


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source distribution of a copy of the repository, each built twice."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    for folder in folders:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folders


def test_two_builds_are_the_same(built):
    first, second = (
        {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} for folder in built
    )
    assert first == second and len(first) == 2


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(next(built[0].glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = message_from_bytes(wheel.read(f"pi_attention-{pi_attention.__version__}.dist-info/METADATA"))
    package = ROOT / "pi_attention"
    files = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    assert metadata["Requires-Dist"].startswith("torch") and metadata["License-Expression"] == "Apache-2.0"
    targets = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(targets) > 10 and all(target.startswith("https://") for target in targets)


def test_the_source_distribution_holds_the_repository(built):
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no clone")
    with tarfile.open(next(built[0].glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}  # not one that was just removed
    assert tracked <= names
    assert not {name for name in names if name.startswith(("data/", "runs/", ".venv"))}
