"""Between the history's frozen values and the messages of coordinator.proto, and from messages to rows that print."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from server.control import coordinator_pb2 as pb
from server.control.registrar import Seen
from server.history import records

M = TypeVar("M", bound=Message)
TIMESTAMP = Timestamp.DESCRIPTOR.full_name


def message(kind: type[M], value: Any) -> M:
    """Make a message of a frozen value's fields: those that have a field of the same name, and are not None."""
    known = kind.DESCRIPTOR.fields_by_name
    values = {field.name: getattr(value, field.name) for field in fields(value) if field.name in known}
    made: M = kind(**{name: _plain(given) for name, given in values.items() if given is not None})
    return made


def _plain(value: Any) -> Any:
    if not isinstance(value, datetime):
        return value
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def site(name: str, keys: Iterable[records.SiteKey], seen: Seen | None) -> pb.Site:
    """Make a site of all its keys, of which the newest counts, and of what is known of its node."""
    newest = max(keys, key=lambda key: (key.revoked_at is None, key.enrolled_at))
    made = message(pb.Site, newest)
    made.name, made.revoked = name, newest.revoked_at is not None
    if seen is not None and seen.online is not None:
        made.online = seen.online
    if seen is not None and seen.at is not None:
        made.last_seen_at.FromDatetime(seen.at)
    return made


def sites(keys: Iterable[records.SiteKey], seen: Mapping[str, Seen]) -> list[pb.Site]:
    """Make all sites, by name."""
    by_name: dict[str, list[records.SiteKey]] = {}
    for key in keys:
        by_name.setdefault(key.site, []).append(key)
    return [site(name, found, seen.get(name)) for name, found in sorted(by_name.items())]


def row(told: Message) -> dict[str, Any]:
    """Give a message's single fields as Python values: times are aware UTC, what is absent is None."""
    found: dict[str, Any] = {}
    for field in told.DESCRIPTOR.fields:
        if field.is_repeated or (field.message_type is not None and field.message_type.full_name != TIMESTAMP):
            continue
        absent = field.has_presence and not told.HasField(field.name)
        value = None if absent else getattr(told, field.name)
        if value is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
            value = value.ToDatetime(tzinfo=UTC)
        found[field.name] = value
    return found
