"""transformers' own common suite, of exactly the installed version, on our models."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "transformers_suite"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder with the package `hf_suite`."""
    pytest.importorskip("parameterized")
    folder = tmp_path_factory.mktemp("suite")
    release = f"transformers=={version('transformers')}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", release]
    fetched = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"the source distribution of {release} cannot be had: {fetched.stderr[-300:]}")
    (archive,) = folder.glob("*.tar.gz")
    subprocess.run([sys.executable, HARNESS / "layout.py", archive, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_common_suite_of_transformers_passes(suite):
    report = suite / "report.xml"
    paths = os.pathsep.join([str(suite), str(HARNESS), os.environ.get("PYTHONPATH", "")])
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-c",
        os.devnull,
        "-W",
        "ignore",
        f"--rootdir={HARNESS}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", HARNESS / "suite.py"],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    outcomes, reasons = Counter(), Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")] or ["passed"]
        outcomes[kinds[0]] += 1
        reasons.update(child.get("message") for child in case if child.tag == "skipped")
    print(dict(outcomes), *reasons.most_common(), sep="\n")
    assert not outcomes["failure"] and not outcomes["error"], done.stdout[-6000:]
    assert outcomes["passed"] > 250
