"""Corpora, tokenizers and packing: from text to training blocks."""
