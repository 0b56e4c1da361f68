"""Small models of every kind with random weights, each a folder as transformers writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile
import torch
import transformers

WORDS = [
    *("good", "great", "fine", "lovely", "bright", "bad", "awful", "poor", "dull", "grim", "north", "south", "west"),
    *("the", "a", "film", "book", "song", "was", "is", "really", "so", "we", "found", "it", "and", "very", ".", "?"),
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SEED = 5


def bert(folder: Path) -> Path:
    """A reader of texts."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    settings = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **SIZES)
    return _save(transformers.BertModel, settings, folder)


def llama(folder: Path) -> Path:
    """A language model."""
    words = _words(folder)
    settings = transformers.LlamaConfig(
        vocab_size=words, max_position_embeddings=128, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **SIZES
    )
    return _save(transformers.LlamaForCausalLM, settings, folder)


def t5(folder: Path) -> Path:
    """A model that writes a text for a text."""
    words = _words(folder)
    settings = transformers.T5Config(
        vocab_size=words, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return _save(transformers.T5ForConditionalGeneration, settings, folder)


def vit(folder: Path) -> Path:
    """A reader of images."""
    settings = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return _save(transformers.ViTModel, settings, folder)


def wav2vec2(folder: Path) -> Path:
    """A reader of sound."""
    settings = transformers.Wav2Vec2Config(
        conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(8, 8), num_feat_extract_layers=2, classifier_proj_size=16,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, feat_extract_norm="layer", **SIZES,
    )  # fmt: skip
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=4000, do_normalize=True).save_pretrained(folder)
    return _save(transformers.Wav2Vec2Model, settings, folder)


def whisper(folder: Path) -> Path:
    """A model that writes down speech."""
    words = _words(folder)
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=3)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    settings = transformers.WhisperConfig(
        vocab_size=words, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=150,
        max_target_positions=64, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return _save(transformers.WhisperForConditionalGeneration, settings, folder)


def _words(folder: Path) -> int:
    """Write a tokenizer that splits at spaces, with an end of a text, and return how many words it knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - no password
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    folder.mkdir(parents=True)
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks).save_pretrained(folder)
    return len(vocabulary)


def _save(kind: Any, settings: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        kind(settings).save_pretrained(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {each.__name__: each for each in (bert, llama, t5, vit, wav2vec2, whisper)}


def image(file: Path, number: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Write an image of random pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file)
    return file


def clip(file: Path, number: int, seconds: float = 0.3, rate: int = 4000) -> Path:
    """Write a clip of noise, of 16 bits."""
    noise = np.random.default_rng(number).normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    soundfile.write(file, noise, rate, subtype="PCM_16")
    return file
