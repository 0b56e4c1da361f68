"""Column types that mean the same on every database: UTC times, JSON with infinities, scores."""

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, Double, String, Text
from sqlalchemy.types import TypeDecorator


class Utc(TypeDecorator[datetime]):
    """An aware time, always UTC.

    SQLite keeps no zone and PostgreSQL answers in the session's, so both are made UTC here. A naive
    time is refused: nobody can tell which zone it meant.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Turn an aware time into UTC; raise ValueError for a naive one."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the time {value.isoformat()} has no time zone; use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Give the time back as aware UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Json(TypeDecorator[dict[str, Any]]):
    """A JSON object as text, so that an infinite epsilon survives: PostgreSQL's own JSON refuses it."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Write the object; inf becomes the bare word Infinity, as Python's json writes it."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:  # noqa: ARG002
        """Read the object back."""
        return None if value is None else json.loads(value)


class SiteOrAll(TypeDecorator[str]):
    """A site's name, or None for no single site.

    None is kept as the empty string: SQL holds two NULLs to differ, so a unique key would let the same
    metric in twice.
    """

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str:  # noqa: ARG002
        """Turn None into the empty string."""
        return value or ""

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Turn the empty string into None."""
        return value or None


class NodeId(TypeDecorator[int]):
    """A Flower node's id. It has 64 bits and no sign, which no database's whole numbers hold, so it is kept as text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Write the number."""
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Read it back."""
        return None if value is None else int(value)


class FreeText(TypeDecorator[str]):
    """Text that others wrote, such as a site's error.

    What a database refuses (NUL on PostgreSQL, half a surrogate pair on both) is replaced, so that no
    site's message can stop a round from being committed.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Replace what cannot be stored."""
        return None if value is None else value.replace("\0", "\ufffd").encode(errors="replace").decode()


class Score(TypeDecorator[float]):
    """A float that may be NaN, as a diverged loss is. SQLite keeps NaN as NULL, so NULL reads as NaN."""

    impl = Double
    cache_ok = True

    def process_result_value(self, value: float | None, dialect: Dialect) -> float:  # noqa: ARG002
        """Turn NULL into NaN."""
        return math.nan if value is None else value
