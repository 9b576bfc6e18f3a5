"""Text arrives as the text that it is, or the error names file, row, field and type. Bytes in are bytes out."""

import csv
import json
import warnings

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pi_attention.data.corpus import load_documents
from pi_attention.data.packing import PackedBlocks
from pi_attention.data.tokenizers import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
LOOKALIKES = ["NA", "null", "None", "nan", "N/A", "-", "0", "007", "1e5", "True", "2020-01-01", " x ", "#", "\ufeffx"]
TEXT = st.sampled_from(LOOKALIKES) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def write(path, documents, field="text"):
    """The documents as a file of the kind that its name ends in."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["number", field], *enumerate(documents)])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({field: d}, ensure_ascii=False) + "\n" for d in documents), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{field: document} for document in documents]))
    else:
        parquet.write_table(pa.table({field: documents}), path)
    return str(path)


ROWS = {
    "documents": st.lists(TEXT, min_size=1, max_size=6),
    "kind": st.sampled_from([".csv", ".jsonl", ".json", ".parquet"]),
}


def check_rows(documents, kind, folder):
    assert load_documents(write(folder / f"d{kind}", documents)) == documents


@settings(deadline=None, max_examples=60)
@given(**ROWS)
def test_rows_arrive_as_they_were_written(documents, kind, tmp_path_factory):
    check_rows(documents, kind, tmp_path_factory.mktemp("rows"))


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(**ROWS)
def test_very_many_rows_arrive_as_they_were_written(documents, kind, tmp_path_factory):
    check_rows(documents, kind, tmp_path_factory.mktemp("rows"))


@settings(deadline=None, max_examples=60)
@given(document=TEXT)
def test_bytes_of_a_file_are_the_tokens(document, tmp_path_factory):
    check_bytes(document, tmp_path_factory.mktemp("bytes"))


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(document=TEXT)
def test_bytes_of_very_many_files_are_the_tokens(document, tmp_path_factory):
    check_bytes(document, tmp_path_factory.mktemp("bytes"))


def check_bytes(document, folder):
    file = folder / "d.txt"
    file.write_bytes(document.encode())
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw:
        return
    (read,) = load_documents(str(file))
    ids = TOKENIZER(read, add_special_tokens=False)["input_ids"]
    assert bytes(ids) == raw
    assert TOKENIZER.decode(ids) == read


def test_line_ends_stay(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert load_documents(str(tmp_path / "d.txt")) == ["one\r\ntwo\rthree\n"]


@pytest.mark.parametrize("saved", [False, True])
def test_text_never_becomes_the_end_of_document_token(saved, tmp_path):
    tokenizer = TOKENIZER
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(str(tmp_path))
    text = "abc<|endoftext|>def"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_blocks_read_no_control_token_from_text_whatever_the_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False  # as most tokenizers on the hub
    blocks = PackedBlocks(["a<|endoftext|>b"], tokenizer, 8)
    assert blocks.tokens.tolist() == [*b"a<|endoftext|>b", 256]


@pytest.mark.parametrize(("name", "head"), [("d.txt", ""), ("d.csv", "text\n"), ("d.jsonl", "")])
def test_a_byte_order_mark_is_no_text(name, head, tmp_path):
    body = '{"text": "Hello"}' if name.endswith("jsonl") else "Hello"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + head.encode() + body.encode())
    assert load_documents(str(tmp_path / name)) == ["Hello"]


def test_empty_documents_are_counted(tmp_path):
    (tmp_path / "d.csv").write_text('text\nNA\n""\n\nlast\n')
    with pytest.warns(UserWarning, match=r"d\.csv.*2 of 4 documents are empty"):
        assert load_documents(str(tmp_path / "d.csv")) == ["NA", "last"]
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a blank line is no document
        assert load_documents(str(tmp_path / "e.jsonl")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": 7}\n', r"d\.jsonl.*'text' of line 2, but int \(7\)"),
        ("d.jsonl", '{"text": null}\n', r"'text' of line 1, but null"),
        ("d.jsonl", '{"text": ["a"]}\n', r"'text' of line 1, but list"),
        ("d.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"no field 'text' in line 2.*body"),
        ("d.jsonl", '{"text": "a"}\n{"text": "b', r"no JSON in line 2"),
        ("d.jsonl", "7\n", r"no object in line 1, but int"),
        ("d.json", '[{"text": "a"}, {"text": true}]', r"'text' of row 2, but bool"),
        ("d.jsonl", '{"text": "\\ud800"}\n', r"lone surrogate.*'text' of line 1"),
        ("d.jsonl", "", r"d\.jsonl.*no text"),
        ("d.csv", "", r"d\.csv.*no header"),
        ("d.csv", "text\n", r"d\.csv.*no text"),
        ("d.csv", "text,n\na, b,1\n", r"3 fields in row 1 \(line 2\) and 2 in its header"),
        ("d.csv", "text,n\na\n", r"1 fields in row 1"),
        ("d.csv", 'text\n"a" b\n', r"d\.csv.*line 2"),
        ("d.csv", 'text\n"a', r"d\.csv.*no comma-separated file"),
        ("d.csv", "text,text\na,b\n", r"2 fields 'text'"),
        ("d.csv", "body\na\n", r"no field 'text'.*body"),
        ("d.parquet", "no parquet", r"d\.parquet.*cannot be read as Parquet"),
    ],
)
def test_what_is_no_text_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        load_documents(str(tmp_path / name))


def test_a_parquet_column_that_is_no_text_is_named(tmp_path):
    for values, words in (([1, 2], "row 1, but int"), (["a", None], "row 2, but null"), ([b"a"], "but bytes")):
        parquet.write_table(pa.table({"text": values}), tmp_path / "d.parquet")
        with pytest.raises(ValueError, match=words):
            load_documents(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize("raw", [b"caf\xe9 ", "text".encode("utf-16")])
@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl"])
def test_another_encoding_is_named_with_its_file(raw, name, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}.*UTF-8"):
        load_documents(str(tmp_path / name))


def test_a_folder_that_holds_more_than_files_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub.txt").mkdir()
    with pytest.raises(ValueError, match=r"'sub\.txt', which is no file"):
        load_documents(str(tmp_path))
    (tmp_path / "sub.txt").rmdir()
    (tmp_path / "loop.txt").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"'loop\.txt', which is no file"):
        load_documents(str(tmp_path))


def test_rows_of_the_hub_are_checked_too(monkeypatch):
    import datasets

    columns = {"text": ["one", "", 3]}
    made = type("Made", (), {"column_names": ["text"], "__getitem__": lambda self, name: columns[name]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: made())
    with pytest.raises(ValueError, match=r"somebody/some.*'text' of row 3, but int"):
        load_documents("somebody/some")
    columns["text"].pop()
    with pytest.warns(UserWarning, match="1 of 2 documents are empty"):
        assert load_documents("somebody/some") == ["one"]


@pytest.mark.parametrize("name", ["nofile", "./some/place", "/no/place", "a/b/c", "some where/x"])
def test_what_cannot_be_on_the_hub_is_not_looked_for_there(name, monkeypatch):
    import datasets

    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(
        FileNotFoundError, match=r"data='.*' does not exist: give .* OWNER/NAME of a data set on the hub"
    ):
        load_documents(name)


def test_no_text_makes_no_blocks():
    with pytest.raises(ValueError, match="no text"):
        PackedBlocks([], TOKENIZER, 8)


def test_what_would_be_dropped_or_misread_is_named(tmp_path):
    (tmp_path / "wide.txt").write_bytes("Hello".encode("utf-16-le"))
    with pytest.warns(UserWarning, match=r"wide\.txt.* UTF-16"):
        load_documents(str(tmp_path / "wide.txt"))
    (tmp_path / "twice.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"twice\.jsonl.*line 1.*the key 'text' stands twice"):
        load_documents(str(tmp_path / "twice.jsonl"))
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet.* has 2 fields 'text'"):
        load_documents(str(tmp_path / "twice.parquet"))


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match="holds no text: give a file or folder with some"):
        load_documents(str(tmp_path))
    (tmp_path / "c.md").write_text("three")
    with pytest.raises(ValueError, match=r"holds no \.txt file, but 1 other entries, such as 'c\.md': name a file"):
        load_documents(str(tmp_path))


def test_a_folder_says_what_it_leaves_out(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "B.TXT").write_text("two")
    assert sorted(load_documents(str(tmp_path))) == ["one", "two"]
    (tmp_path / "c.md").write_text("three")
    with pytest.warns(UserWarning, match=r"1 entries that are no \.txt file are left out, such as 'c\.md'"):
        assert len(load_documents(str(tmp_path))) == 2


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_a_byte_order_mark_in_a_field_is_told_and_kept(kind, tmp_path):
    documents = ["\ufeffHello", "in the \ufeffmiddle", "none"]
    with pytest.warns(UserWarning, match="1 of 3 documents begin with a byte order mark"):
        assert load_documents(write(tmp_path / f"d{kind}", documents)) == documents
