"""Architectures of transformers, built tiny with random weights: what the sensitivity matrix is run on.

Each is two layers of width 16 or so, without dropout and in train mode, from its configuration class: nothing is
fetched. What it computes from a batch is in benchmarks/architecture_tasks.py; its backbone is the library's own code,
untouched.
"""

from functools import partial
from typing import Any

import torch
import transformers as hf
from architecture_tasks import (
    CHANNELS,
    PADDING,
    SIDE,
    VOCABULARY,
    Architecture,
    Classifier,
    ImageClassifier,
    LanguageModel,
    SpeechClassifier,
    Transcriber,
    Translator,
    images,
    pairs,
    sounds,
    spectrograms,
    texts,
    transcripts,
)
from torch import nn

TEXT = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 0, "eos_token_id": 2}
WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,  # far from uniform attention and even predictions, which would hide an error
}
ENCODER = {**TEXT, **WIDE, "max_position_embeddings": 32, "type_vocab_size": 2}
DECODER = {**TEXT, **WIDE, "max_position_embeddings": 32, "num_key_value_heads": 1, "head_dim": 8}
SEQ2SEQ = {
    **TEXT,
    "d_model": 16,
    "init_std": 0.2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
}
VISION = {**WIDE, "image_size": SIDE, "patch_size": 8, "num_channels": CHANNELS}  # 4 patches, and what goes before them
SPEECH = {
    **WIDE,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 3),
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",  # "group" takes the mean over the padding as well: such a model couples records
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}


# -- how each is built -----------------------------------------------------------------------------------------


def _row(
    family: str, wrap: type[nn.Module], records: Any, model: Any, name: str, note: str, settings: dict[str, Any]
) -> Architecture:
    def build() -> nn.Module:
        torch.manual_seed(0)
        config = model.config_class(**{name: value for name, value in settings.items() if value is not None})
        for setting, value in config.to_dict().items():  # dropout, layerdrop, drop path
            if isinstance(value, float) and "drop" in setting:
                setattr(config, setting, 0.0)
        backbone = model(config)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # the head pools by itself
        module = wrap(backbone, _width(config)) if issubclass(wrap, Classifier) else wrap(backbone)
        for parameter in module.parameters():  # a bias of 0 or a norm of 1 would hide an error
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return module.train()

    return Architecture(name, family, build, records, note)


def _width(config: Any) -> int:
    widths = getattr(config, "hidden_sizes", None)
    return int(widths[-1] if widths else config.hidden_size)


def _encoder(name: str, model: Any, note: str = "", **settings: Any) -> Architecture:
    return _row("encoder", Classifier, texts, model, name, note, {**ENCODER, **settings})


def _decoder(name: str, model: Any, note: str = "", **settings: Any) -> Architecture:
    records = partial(texts, labels=False)
    return _row("decoder", LanguageModel, records, model, name, note, {**DECODER, **settings})


def _seq2seq(name: str, model: Any, note: str = "", **settings: Any) -> Architecture:
    return _row("encoder-decoder", Translator, pairs, model, name, note, {**SEQ2SEQ, **settings})


def _vision(name: str, model: Any, note: str = "", records: Any = images, **settings: Any) -> Architecture:
    return _row("vision", ImageClassifier, records, model, name, note, {**VISION, **settings})


def _speech(name: str, model: Any, note: str = "", **settings: Any) -> Architecture:
    return _row("audio", SpeechClassifier, sounds, model, name, note, {**SPEECH, **settings})


POSITIONS = "broadcast position ids"
TIED = "tied head"
SWIN = {
    **dict.fromkeys(WIDE),  # its names for them are its own
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 2,
    "patch_size": 2,
    "image_size": SIDE,
    "num_channels": CHANNELS,
}
CONVNEXT = {"hidden_sizes": (8, 16), "depths": (1, 1), "num_stages": 2, "patch_size": 2}
EXPERTS = {
    "experts_implementation": "eager",
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
}

ARCHITECTURES: tuple[Architecture, ...] = (
    _encoder("BERT", hf.BertModel, POSITIONS),
    _encoder("DistilBERT", hf.DistilBertModel, POSITIONS, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
    _encoder("RoBERTa", hf.RobertaModel),
    _encoder("XLM-RoBERTa", hf.XLMRobertaModel),
    _encoder("CamemBERT", hf.CamembertModel),
    _encoder("ELECTRA", hf.ElectraModel, POSITIONS, embedding_size=12),
    _encoder("ALBERT", hf.AlbertModel, "one layer's weights used twice", embedding_size=12),
    _encoder(
        "DeBERTa-v2",
        hf.DebertaV2Model,
        "a table of relative positions without a batch, through shared projections",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    _encoder("ModernBERT", hf.ModernBertModel, "norms without bias", local_attention=4, global_attn_every_n_layers=2),
    _encoder("MPNet", hf.MPNetModel, "relative position bias"),
    _encoder("RoFormer", hf.RoFormerModel, embedding_size=16),
    _encoder("Longformer", hf.LongformerModel, "windows of tokens", attention_window=4),
    _encoder("ESM", hf.EsmModel, mask_token_id=3, position_embedding_type="rotary", token_dropout=False),
    _encoder("XLNet", hf.XLNetModel, "tokens before the batch", max_position_embeddings=None, d_head=8, d_inner=24),
    _decoder("GPT-2", hf.GPT2LMHeadModel, f"{TIED}, Conv1D, {POSITIONS}", n_embd=16, n_layer=2, n_head=2),
    _decoder("GPT-Neo", hf.GPTNeoForCausalLM, TIED, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
    _decoder("GPT-J", hf.GPTJForCausalLM, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
    _decoder("GPT-NeoX", hf.GPTNeoXForCausalLM),
    _decoder("OPT", hf.OPTForCausalLM, f"{TIED}, tokens flattened into the batch", ffn_dim=24, word_embed_proj_dim=16),
    _decoder("Llama", hf.LlamaForCausalLM, TIED, tie_word_embeddings=True),
    _decoder("Qwen2", hf.Qwen2ForCausalLM, TIED, tie_word_embeddings=True),
    _decoder("Qwen3", hf.Qwen3ForCausalLM, f"{TIED}, norms of heads", tie_word_embeddings=True),
    _decoder("Mistral", hf.MistralForCausalLM, sliding_window=4),
    _decoder("Gemma", hf.GemmaForCausalLM, f"{TIED}, norms of 1 + weight"),
    _decoder("Gemma-2", hf.Gemma2ForCausalLM, f"{TIED}, norms of 1 + weight", query_pre_attn_scalar=8),
    _decoder("Phi", hf.PhiForCausalLM, num_key_value_heads=2),
    _decoder("Phi-3", hf.Phi3ForCausalLM),
    _decoder("BLOOM", hf.BloomForCausalLM, TIED, n_layer=2, n_head=2),
    _decoder("Falcon", hf.FalconForCausalLM, TIED, head_dim=None, bias=True),
    _decoder("StableLM", hf.StableLmForCausalLM),
    _decoder("OLMo-2", hf.Olmo2ForCausalLM),
    _decoder("StarCoder2", hf.Starcoder2ForCausalLM, TIED, tie_word_embeddings=True),
    _decoder("Mixtral", hf.MixtralForCausalLM, "experts by token", num_local_experts=4, **EXPERTS),
    _decoder(
        "Qwen2-MoE",
        hf.Qwen2MoeForCausalLM,
        "experts by token",
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        **EXPERTS,
    ),
    _seq2seq(
        "T5",
        hf.T5ForConditionalGeneration,
        f"{TIED}, relative position bias",
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        tie_word_embeddings=True,
        relative_attention_num_buckets=8,
    ),
    _seq2seq("BART", hf.BartForConditionalGeneration, TIED),
    _seq2seq("mBART", hf.MBartForConditionalGeneration, TIED),
    _seq2seq("Pegasus", hf.PegasusForConditionalGeneration, TIED),
    _seq2seq("Marian", hf.MarianMTModel, TIED),
    _vision("ViT", hf.ViTModel, "class token"),
    _vision("DeiT", hf.DeiTModel, "class and distillation token"),
    _vision("BEiT", hf.BeitModel, "layer scale, relative position bias", use_relative_position_bias=True),
    _vision("DINOv2", hf.Dinov2Model, "layer scale"),
    _vision("Swin", hf.SwinModel, "windows flattened into the batch", **SWIN),
    _vision("ConvNeXt", hf.ConvNextModel, "layer scale, permuted images", **CONVNEXT),
    _vision("ConvNeXt-V2", hf.ConvNextV2Model, "response norms, permuted images", **CONVNEXT),
    _vision("SigLIP", hf.SiglipVisionModel, vision_use_head=False),
    _vision("CLIP", hf.CLIPVisionModel, "class token"),
    _vision("ViT-MSN", hf.ViTMSNModel, "class token"),
    _speech("Wav2Vec2", hf.Wav2Vec2Model, "padding set to 0 in place, weight norm"),
    _speech("HuBERT", hf.HubertModel, "padding set to 0 in place, weight norm"),
    _speech("WavLM", hf.WavLMModel, "gated relative positions, weight norm"),
    _row(
        "audio",
        ImageClassifier,
        partial(spectrograms, shape=(20, 16)),
        hf.ASTModel,
        "AST",
        "class and distillation token",
        {**WIDE, "num_mel_bins": 16, "max_length": 20, "patch_size": 8, "frequency_stride": 8, "time_stride": 6},
    ),
    _row(
        "audio",
        Transcriber,
        transcripts,
        hf.WhisperForConditionalGeneration,
        "Whisper",
        TIED,
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 16,
        },
    ),
)
