"""An explanation to look at: words on red and blue, in the terminal or on a page of one file."""

import html
import json
from dataclasses import asdict

from rich.console import Console
from rich.style import Style
from rich.text import Text

from server.export.use.explaining import Explanation
from server.listing import clean

FOR, AGAINST = (33, 102, 172), (178, 24, 43)  # blue and red, which most colour-blind readers tell apart
DARK = 0.55  # of the largest share: from there on letters are white


def summary(found: Explanation) -> list[str]:
    """Say what is explained, and how far the shares add up."""
    whole = found.logit - found.empty
    lines = [
        f"{clean(found.target)}: probability {found.probability:.3f}, logit {found.logit:.4f}; without words {found.empty:.4f}.",
        f"The words' shares add up to {whole + found.gap:.4f} of {whole:.4f}: completeness gap {found.gap:+.4f}.",
    ]
    if found.predicted != found.target:
        lines.append(f"The model predicts {clean(found.predicted)}.")
    if found.cut:
        lines.append("The text is longer than the model reads; its end is with the last word.")
    return lines


def as_json(found: Explanation) -> str:
    """For programs."""
    return json.dumps(asdict(found), indent=2)


def show(found: Explanation, console: Console) -> None:
    """Print the text in colours; where there are none, each word with its share."""
    most = _most(found)
    if console.color_system is None:
        for piece in found.pieces:
            console.out(f"{piece.share:+.4f}  {clean(piece.text.strip())}", highlight=False)
        return
    line = Text()
    for piece in found.pieces:
        red, green, blue = _colour(piece.share / most)
        dark = abs(piece.share) / most > DARK
        style = Style.parse(f"{'white' if dark else 'black'} on rgb({red},{green},{blue})")
        line.append(clean(piece.text.replace("\n", " ").replace("\t", " ")), style)
    console.print(line)


def page(found: Explanation, model: str) -> str:
    """Make a page of one file, without scripts."""
    most = _most(found)
    words = "".join(
        f'<span title="{piece.share:+.4f}" style="background:rgb{_colour(piece.share / most)};'
        f'color:{"#fff" if abs(piece.share) / most > DARK else "#000"}">{html.escape(piece.text)}</span>'
        for piece in found.pieces
    )
    said = "".join(f"<p>{html.escape(line)}</p>" for line in summary(found))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Which words speak for a label</title>'
        "<style>body{font:17px/1.9 Georgia,serif;max-width:46em;margin:3em auto;padding:0 1em}"
        ".t{white-space:pre-wrap}.t span{padding:.2em 0}p,h1{font-family:system-ui,sans-serif}h1{font-size:1.2em}</style></head>"
        f'<body><h1>{html.escape(model)}: {html.escape(found.target)}</h1>{said}<div class="t">{words}</div>'
        f'<p><span style="background:rgb{FOR};color:#fff">&nbsp;for&nbsp;</span> '
        f'<span style="background:rgb{AGAINST};color:#fff">&nbsp;against&nbsp;</span> '
        "Integrated gradients over the token embeddings; point at a word for its share.</p></body></html>\n"
    )


def _most(found: Explanation) -> float:
    return max((abs(piece.share) for piece in found.pieces), default=0.0) or 1.0


def _colour(share: float) -> tuple[int, int, int]:
    """White at 0, to blue at 1 and red at -1."""
    towards, much = (FOR if share > 0 else AGAINST), min(1.0, abs(share))
    red, green, blue = (round(255 + (end - 255) * much) for end in towards)
    return red, green, blue
