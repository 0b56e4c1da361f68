"""Write a small T5 of random weights to a folder, for the scenario seq2seq: it has learnt nothing yet.

    python benchmarks/tiny_t5.py OUT --data DATA

Its tokenizer has 512 pieces, found in the public test part of e2e-nlg (DATA/e2e-nlg), so that no site's text shapes it.
"""

import argparse
from pathlib import Path

import torch
from task_scenarios.seq2seq import rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PIECES = 512
SIZES = {"d_model": 48, "d_kv": 12, "num_heads": 4, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1}
PAD, END = "<pad>", "</s>"


def make(folder: Path, texts: list[str]) -> Path:
    """Write the model and a byte-level tokenizer of `texts`; give the folder."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(texts, learning)
    PreTrainedTokenizerFast(tokenizer_object=found, pad_token=PAD, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    settings = T5Config(vocab_size=PIECES, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1, **SIZES)
    T5ForConditionalGeneration(settings).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    records = rows(given.data / "e2e-nlg" / "test.jsonl.gz")
    make(given.out, [text for row in records for text in (row["mr"], row["ref"])])
