"""Where in a network of transformers its layers, its attention and its linear layers are, whatever it calls them."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Run = Callable[[], object]  # one forward pass of a small record


def linear(encoder: nn.Module, *, but: str | None = None) -> list[str]:
    """Names of the linear layers, but for those that give tokens, or whose names begin with `but` (the head's)."""
    last = _output_embeddings(encoder)
    return [
        name
        for name, part in encoder.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
        and part is not last
        and not (but and f"{name}.".startswith(but))
        and ".lora_" not in name
    ]


def attention(encoder: nn.Module, *, but: str | None = None) -> list[str]:
    """Names of the linear layers inside attention: what makes queries, keys and values, and what brings them together.

    Transformers names every attention's class so (BertAttention, T5LayerSelfAttention, Wav2Vec2SdpaAttention), where the layers
    in it go by many names: query, q, q_proj, q_lin, c_attn, qkv, Wqkv, query_key_value, dense, o_proj, out_proj.
    """
    inside = tuple(f"{name}." for name, part in encoder.named_modules() if _is_attention(part))
    return [name for name in linear(encoder, but=but) if name.startswith(inside)]


def layers(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each layer of the network's last stack, in order: of a decoder, where there are two stacks."""
    stacks = [
        (name, part)
        for name, part in encoder.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and all(_attends(layer) for layer in part)
    ]
    names = [name for name, _ in stacks]
    outer = [
        (name, part)
        for name, part in stacks
        if not any(name.startswith(f"{other}.") for other in names if other != name)
    ]
    if not outer:
        return []
    name, stack = outer[-1]
    return [(f"{name}.{number}", layer) for number, layer in enumerate(stack)]


def after(module: nn.Module, stack: list[nn.Module], run: Run) -> Iterator[nn.Parameter]:
    """Yield the parameters that are first used after the last layer of `stack`: a final norm, a pooler.

    It is seen from one forward pass, because the order in which a network holds its modules need not be that in which
    it calls them. What gives tokens (an output embedding) is not among them.
    """
    inside = {part for layer in stack for part in layer.modules()}
    called: list[nn.Module] = []
    handles = [
        part.register_forward_pre_hook(lambda part, _: called.append(part))
        for part in module.modules()
        if any(True for _ in part.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    end = max((place for place, part in enumerate(called) if part in inside), default=len(called))
    before = {parameter for part in called[: end + 1] for parameter in part.parameters(recurse=False)}
    last = _output_embeddings(module)
    for part in called[end + 1 :]:
        if part is not last:
            yield from (parameter for parameter in part.parameters(recurse=False) if parameter not in before)


def _is_attention(part: nn.Module) -> bool:
    return "Attention" in type(part).__name__


def _attends(layer: nn.Module) -> bool:
    return any(_is_attention(part) for part in layer.modules())


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    for part in module.modules():
        find = getattr(part, "get_output_embeddings", None)
        if find is not None:
            found = find()
            return found if isinstance(found, nn.Module) else None
    return None
