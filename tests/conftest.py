import os

os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"  # else torch fails on it under CI alone, and warns here

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from pathlib import Path

import problems
import pytest

IMPLEMENTATIONS = ["reference", "blocked", "triton"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        problems.need_triton()
    return request.param


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked, and so not waited for; its libraries read the environment once."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder of data for the experiments, made up."""
    import made_up_data

    made_up_data.write(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that an output that nothing wrote shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", poison(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="run every variant of the experiments at toy size")
    parser.addoption("--support", type=Path, help="write the outcomes behind the support table to this file")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one worker a core
    path = config.getoption("--support")
    if path is not None and not hasattr(config, "workerinput"):
        from support import SupportTable

        config.pluginmanager.register(SupportTable(path))
