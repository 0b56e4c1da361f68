"""Numbers, sizes, times and other people's text, as a reader wants them."""

import math
from datetime import datetime
from decimal import ROUND_CEILING, Decimal

UNKNOWN = "–"
LONGEST = 600  # characters of one text from a site or an error that a page shows


def epsilon(value: float | None) -> str:
    """Write an epsilon, rounded up: a report never claims more privacy than there is."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "∞" if value == math.inf else "unknown"
    step = Decimal("0.01") if abs(value) >= 0.1 else Decimal("0.0001")
    return str(Decimal(repr(float(value))).quantize(step, ROUND_CEILING))


def number(value: float | None, digits: int = 3) -> str:
    """Write a plain number with some significant digits: 0.12, 1.9, 1e-05 as 10 to a power."""
    if value is None:
        return UNKNOWN
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    mantissa, power = text.split("e")
    tens = "10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return tens if mantissa == "1" else f"{mantissa} · {tens}"


def budget(value: float | None) -> str:
    """Write an epsilon that was asked for, as it was asked for: 8, 0.5."""
    return number(value, 6)


def score(value: float | None, digits: int = 3) -> str:
    """Write a score with fixed decimals, so that a column of them lines up."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{digits}f}"


def size(count: float) -> str:
    """Write bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """Write seconds in the two largest units that matter."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def moment(value: datetime | None) -> str:
    """Write a time to the second; the history's are UTC."""
    return UNKNOWN if value is None else f"{value:%Y-%m-%d %H:%M:%S} UTC"


def count(value: int, one: str, many: str | None = None) -> str:
    """Write a count and its noun."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def plain(text: str) -> str:
    """Replace what does not print, line breaks apart: hidden or reversing characters deceive a reader."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def cut(text: str | None, longest: int = LONGEST) -> str:
    """Shorten other people's text, and show that it was."""
    text = text or ""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
