"""Data sets of the experiments in their real formats, with made-up contents."""

import gzip
import json
from datetime import datetime, timedelta

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from experiments import retrieval_qa, series
from pi_attention.data.tokenizers import byte_tokenizer


def zipped(path, text):
    with gzip.open(path, "wt") as file:
        file.write(text)


def decoder(folder):
    """A tiny decoder with random weights, and the tokenizer of bytes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=128, **sizes))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write(folder):
    """Fill a folder with data of the real formats and tiny contents."""
    draw = np.random.default_rng(0)
    for name in ("squad", "openclipart", "series", "emoji/google/64", "emoji/twitter/64", "fashion-mnist"):
        (folder / name).mkdir(parents=True)
    decoder(folder / "toy-decoder")
    text = "The river runs past the old mill. " * 40
    asked = {"question": "What does the river pass?", "answers": [{"answer_start": 24, "text": "old mill"}]}
    article = {"paragraphs": [{"context": text, "qas": [asked] * 4}]}
    for name in (*retrieval_qa.TRAINING, retrieval_qa.TEST):
        zipped(folder / "squad" / f"{name}.json.gz", json.dumps({"data": [article, article]}))
    pixels = draw.integers(0, 256, (120, 64, 64, 3), dtype=np.uint8)
    np.savez(folder / "openclipart" / "openclipart64.npz", x=pixels)
    pairs = [{"row": i, "caption": f"a thing {i}", "id": f"things/theme{i % 30}_{i}"} for i in range(120)]
    (folder / "openclipart" / "openclipart_pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    emoji = [{"hexcode": f"1F{600 + i}", "label": f"face {i}", "tags": ["round"]} for i in range(60)]
    (folder / "emoji" / "compact.json").write_text(json.dumps(emoji))
    for vendor in ("google", "twitter"):
        for entry, image in zip(emoji, pixels, strict=False):
            Image.fromarray(image).save(folder / "emoji" / vendor / "64" / f"{entry['hexcode'].lower()}-fe0f.png")
    for part, count in (("train", 30), ("t10k", 10)):
        for name, header, shape in (("images-idx3", 16, (count, 784)), ("labels-idx1", 8, (count,))):
            values = bytes(header) + draw.integers(0, 10, shape, dtype=np.uint8).tobytes()
            (folder / "fashion-mnist" / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(values))
    lines = [f"review number {i},{i % 2},imdb" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label,source", *lines, lines[0], "other,1,elsewhere"]))
    (folder / "wikitext-103").mkdir()
    (folder / "wikitext-103" / "wiki.test.tokens").write_text("once upon a time " * 200)
    days = [datetime(2000, 1, 1) + timedelta(days=i) for i in range(6000)]
    prices = 100 * np.exp(np.cumsum(draw.normal(0, 0.01, 6000)))
    for name, column, form in (("sp500", "Adj Close", "%m/%d/%Y"), ("wti", "DCOILWTICO", "%m/%d/%Y")):
        lines = [f"{day.strftime(form)},{price:.2f}" for day, price in zip(days, prices, strict=True)]
        zipped(folder / "series" / f"{name}.csv.gz", "\n".join([f"Date,{column}", *lines]))
    lines = [f"20,{day.isoformat(' ')},{price:.0f}" for day, price in zip(days, prices, strict=True)]
    zipped(folder / "series" / "CGM.csv.gz", "\n".join(["isig,datetime,glucose", *lines]))
    columns = {"date": days, "delay": draw.integers(-9, 99, 6000), "distance": draw.integers(99, 999, 6000)}
    columns |= {"origin": ["ATL"] * 6000, "destination": ["PHL"] * 6000}
    parquet.write_table(pyarrow.table(columns), folder / "series" / "flights-3m.parquet")
    for task in series.CLASSIFICATIONS:
        for part in ("TRAIN", "TEST"):
            rows = [",".join(f"{x:.3f}" for x in draw.normal(size=60 + i)) + f":{i % 3}" for i in range(12)]
            (folder / "series" / f"{task}_{part}.ts").write_text("\n".join(["@data", *rows]))
