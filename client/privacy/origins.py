"""What a tensor of one pass comes from: the records, or trained parameters alone. Kept as an attribute of the tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

RECORDS, PARAMETER = "records", "parameter"
_NAME = "_moonflower_origin"


@dataclass(frozen=True)
class LookedUp:
    """A tensor of rows of a trained table at places that are not the records' own: positions, token types."""

    table: nn.Parameter
    ids: Tensor


Origin = str | LookedUp


def of(tensor: Tensor) -> Origin | None:
    """Return the origin; None of a constant, or of what is frozen."""
    origin: Origin | None = getattr(tensor, _NAME, None)
    return origin


def trained(tensor: Tensor) -> bool:
    """Whether it is a trained parameter, or computed from such alone."""
    return of(tensor) not in (None, RECORDS)


def plain(value: Any) -> Any:
    """Return what is trained without its gradient, and anything else as it is."""
    return value.detach() if isinstance(value, Tensor) and trained(value) else value


def mark(value: Any, origin: Origin, *, only_where_graph: bool = False) -> None:
    """Set the origin of a tensor, or of all in a list or tuple."""
    if isinstance(value, Tensor):
        if not only_where_graph or value.requires_grad:
            setattr(value, _NAME, origin)
    elif isinstance(value, list | tuple):
        for each in value:
            mark(each, origin, only_where_graph=only_where_graph)


def unmark(tensor: Tensor) -> None:
    """Forget the origin."""
    if hasattr(tensor, _NAME):
        delattr(tensor, _NAME)


def tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among a function's arguments, and in lists and tuples of them."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for each in value:
                if isinstance(each, Tensor):
                    yield each
