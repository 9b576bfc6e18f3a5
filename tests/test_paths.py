"""Paths of every odd kind: the argument, the value and the remedy are named, and nothing hangs."""

import os
from pathlib import Path

import pytest
from test_command_line import called

from pi_attention.data.corpus import load_documents
from pi_attention.paths import LONGEST_NAME, need_file, need_folder, need_new_file
from pi_attention.training.config import TrainConfig, load_yaml

LONG = "x" * 300
UNREADABLE = Path("/proc/self/mem")  # even for root
needs_proc = pytest.mark.skipif(not UNREADABLE.exists(), reason="no /proc")


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """The current folder, with a pipe, folders and a link in place of files."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / "pipe.txt").symlink_to(tmp_path / "pipe.txt")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", LONG], "data='xxx"),
        (["train", "--data", f"{LONG}.txt"], "file name too long: take a shorter one"),
        (["train", "--data", "pipe.txt"], "data='pipe.txt' is no file, but a named pipe: give a text file"),
        (["train", "--data", "/dev/null"], "data='/dev/null' is no file, but a device"),
        (["train", "--data", "circle.txt"], "lead in a circle, name the file itself"),
        (["train", "--data", "folder.txt"], "holds 'pipe.txt', which is no file"),
        (["train", "--config", "pipe.txt"], "config='pipe.txt' is no file, but a named pipe: give a YAML file"),
        (["train", "--config", LONG], "config='xxx"),
        (["train", "--out", LONG], "out='xxx"),
        (["train", "--out", "pipe.txt"], "out='pipe.txt' cannot be a folder"),
        (["eval", LONG], "run='xxx"),
        (["eval", "pipe.txt"], "run='pipe.txt'"),
        (["generate", LONG], "run='xxx"),
        (["inspect", LONG], "run='xxx"),
        (["inspect", "--out", LONG], "out='xxx"),
        (["plan", "--out", LONG], "out='xxx"),
        (["plan", "--out", "x" * 250], f"has a name of more than {LONGEST_NAME} bytes"),
        (["plan", "--out", "pipe.txt"], "out='pipe.txt' is no file, but a named pipe: choose another one"),
        (["plan", "--out", "/dev/null"], "out='/dev/null' is no file, but a device: choose another one"),
        (["plan", "--out", "folder.txt"], "out='folder.txt' is no file, but a folder: choose another one"),
        (["convert", "--model", "m", "--out", LONG], "out='xxx"),
        (["train", "--out", ""], "--out: the path is empty; '.' is the current folder"),
        (["train", "--out="], "--out: the path is empty"),
        (["eval", ""], "the path is empty"),
        (["plan", "--out", ""], "--out: the path is empty"),
    ],
    ids=lambda value: " ".join(word[:20] for word in value) if isinstance(value, list) else "",
)
def test_a_path_that_cannot_serve_is_named_with_its_argument(arguments, words, odd, monkeypatch, offline):
    before = sorted(odd.rglob("*"))
    code, _, err = called(arguments, monkeypatch)
    assert code == 2 and words in err, err
    assert err.count("\n") == 1 and len(err) < 500
    assert sorted(odd.rglob("*")) == before and (odd / "pipe.txt").is_fifo()


@needs_proc
def test_a_file_that_cannot_be_read_and_a_folder_that_takes_none_are_named(odd, monkeypatch):
    (odd / "unreadable.txt").symlink_to(UNREADABLE)
    with pytest.raises(ValueError, match=r"data='unreadable\.txt' cannot be used, input/output error: choose"):
        load_documents("unreadable.txt")
    with pytest.raises(ValueError, match=r"out='/proc/x/y' cannot be written, '/proc' takes no files"):
        need_folder("out", Path("/proc/x/y"))
    assert "takes no files" in called(["train", "--data", "file", "--out", "/proc/x"], monkeypatch)[2]


def test_a_file_without_permission_is_named(odd, monkeypatch):
    text = odd / "secret.txt"
    text.write_text("text")
    text.chmod(0)
    if os.getuid() == 0:  # who may read it all the same
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"data='secret\.txt' may not be read: change its permissions, or give a text"):
        load_documents("secret.txt")


def test_a_null_byte_is_named(tmp_path):
    for call in (
        lambda: need_file("data", Path("a\0b"), "a file"),
        lambda: need_folder("data", Path("a\0b")),
        lambda: load_documents("a\0b"),
    ):
        with pytest.raises(ValueError, match=r"data=.* holds a null byte"):
            call()


def test_the_longest_name_is_written(tmp_path):
    from pi_attention.files import write_text

    path = tmp_path / ("é" * (LONGEST_NAME // 2))
    need_new_file("out", path)
    write_text(path, "text")
    assert path.read_text() == "text"


def test_an_empty_path_in_a_file_of_settings_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text('run: {out: ""}')
    with pytest.raises(ValueError, match=r"run\.out is empty: give a path"):
        load_yaml(TrainConfig, tmp_path / "c.yaml")
