import json
import lzma

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from pi_attention.data.corpus import load_documents
from pi_attention.data.packing import IGNORE, PackedBlocks, hold_out
from pi_attention.data.tokenizers import beginning, byte_pair_tokenizer, byte_tokenizer, load_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.tasks.generation import generate_text


def test_bundled_corpus():
    documents = load_documents("shakespeare")
    assert len(documents) == 42
    assert 5_000_000 < sum(map(len, documents)) < 5_200_000
    assert any("To be, or not to be" in document for document in documents)


def test_local_files(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in ("one", "two"))
    (tmp_path / "c.jsonl").write_text(lines)
    assert load_documents(str(tmp_path)) == ["first", "second"]
    assert load_documents(str(tmp_path / "a.txt")) == ["first"]
    assert load_documents(str(tmp_path / "c.jsonl"), text_field="body") == ["one", "two"]
    with pytest.raises(ValueError, match=r"no field 'text'.*body"):
        load_documents(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.csv").write_text('number,text\n1,one\n2,"two, or\nthree"\n')
    assert load_documents(str(tmp_path / "d.csv")) == ["one", "two, or\nthree"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "d.parquet")
    assert load_documents(str(tmp_path / "d.parquet")) == ["one", "two"]


def test_wrong_corpora_are_named(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):  # at once: it is no name on the hub
        load_documents("nowhere.csv")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text"):
        load_documents(str(tmp_path / "empty.txt"))
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(ValueError, match="ending"):
        load_documents(str(tmp_path / "x.pdf"))
    with pytest.raises(ValueError, match="hub"):
        load_documents("nobody/no-such-data-set")


def test_byte_tokens_are_the_bytes():
    tokenizer = byte_tokenizer()
    text = "héllo\n\n  π ☃ \x00\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257


def test_byte_tokenizer_survives_saving(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("aπ", add_special_tokens=False)["input_ids"] == list("aπ".encode())
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "none"))


def test_byte_pairs_stand_for_their_text_whatever_it_holds():
    documents = [f"{i} times {j} is {i * j}. <|endoftext|> é\n" for i in range(30) for j in range(20)]
    tokenizer = byte_pair_tokenizer(documents, 600)
    assert 257 < len(tokenizer) <= 600
    assert tokenizer.backend_tokenizer.to_str() == byte_pair_tokenizer(documents, 600).backend_tokenizer.to_str()
    for text in ("", "12 times 3", "héllo\n\n  π ☃ \x00\t <|endoftext|>", documents[7]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    assert len(tokenizer(documents[0])["input_ids"]) < len(documents[0]) / 2


def test_blocks_hold_every_token_in_order_and_keep_documents_apart():
    documents = ["a" * 5, "b" * 9, "c" * 3, "d" * 20]
    blocks = PackedBlocks(documents, byte_tokenizer(), 8)
    ids = torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))])
    whole = [t for d in documents for t in [*d.encode(), 256]]
    assert ids.tolist() == whole[: len(ids)] and len(whole) - len(ids) < 8
    first = blocks[0]
    assert first["segment_ids"].tolist() == [0] * 6 + [1] * 2
    assert first["labels"].tolist() == [97] * 5 + [256, IGNORE, 98]
    assert first["segment_ids"].dtype == torch.int32
    np.testing.assert_allclose(blocks.bytes_per_token, 37 / 41)


def template_of(single):
    """The byte tokenizer with special tokens around a text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("single", "first"),
    [("$A", []), ("<s> $A", [257]), ("$A <|endoftext|>", []), ("<s> <s> $A <|endoftext|>", [257, 257])],
)
def test_documents_and_prompts_begin_as_the_tokenizer_begins_a_text(single, first):
    tokenizer = template_of(single)
    assert beginning(tokenizer) == first
    blocks = PackedBlocks(["abc", "defg"], tokenizer, 4)
    assert blocks.tokens.tolist() == [*first, *b"abc", 256, *first, *b"defg", 256]
    assert blocks.document.tolist() == [0] * (len(first) + 4) + [1] * (len(first) + 5)
    np.testing.assert_allclose(blocks.bytes_per_token, 7 / 9)


def test_a_generated_text_goes_on_behind_the_beginning_that_the_tokenizer_sets():
    torch.manual_seed(0)
    model = PiForCausalLM(PiConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    prompts = []
    model.register_forward_pre_hook(lambda *call: prompts.append(call[2]["input_ids"]), with_kwargs=True)
    generate_text(model, template_of("<s> $A <|endoftext|>"), "ab", max_new_tokens=1, temperature=0)
    assert prompts[0].tolist() == [[257, *b"ab"]]


def test_too_little_text_is_named():
    with pytest.raises(ValueError, match="context=100"):
        PackedBlocks(["abc"], byte_tokenizer(), 100)


def test_held_out_documents():
    documents = [f"{i}" * 100 for i in range(10)] * 2
    training, validation = hold_out(documents, 0.1, seed=0)
    assert sorted(training + validation) == sorted(documents)
    assert len(validation) == 2
    assert hold_out(documents, 0.1, seed=0)[1] == validation
    training, validation = hold_out(["x" * 90 + "y" * 10], 0.1, seed=0)
    assert (training, validation) == (["x" * 90], ["y" * 10])
    with pytest.raises(ValueError, match="validation_fraction"):
        hold_out(documents, 1.0, seed=0)


def test_corpus_file_is_compressed():
    from importlib import resources

    file = resources.files("pi_attention.data") / "corpora" / "shakespeare.jsonl.xz"
    with file.open("rb") as raw:
        assert len(lzma.decompress(raw.read())) > 5_000_000


def test_blocks_are_cut_shorter_without_reading_the_text_again():
    documents, tokenizer = ["one text", "and another, longer text"], byte_tokenizer()
    blocks = PackedBlocks(documents, tokenizer, 12)
    wanted = PackedBlocks(documents, tokenizer, 5)
    found = blocks.cut(5)
    assert len(found) == len(wanted) and blocks.context == blocks.cut(40).context == 12
    for number in range(len(wanted)):
        assert all(torch.equal(found[number][name], value) for name, value in wanted[number].items())
