"""A tiny Transformer in a folder: two layers of width 32 over the words of `machines.made_up`."""

from pathlib import Path

import torch
from machines import BAD, FILLING, GOOD
from transformers import BertConfig, BertModel, BertTokenizer


def make_model(folder: Path) -> Path:
    """Write a BERT with random weights and a WordPiece tokenizer, and give its folder."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLING]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder
