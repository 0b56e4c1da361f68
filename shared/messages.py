"""Everything that crosses the network, in one list: each field typed, each reply's field marked.

A reply's field is *public* (declared in the site's configuration, or computed from what is declared) or
*released* (it went through a privacy mechanism and is in the site's ledger). There is no third kind: raw
losses, accuracies, record counts and the text of unforeseen errors do not leave a site. A class that is
not here cannot be sent, and a field without a mark fails the tests.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Any, Literal, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from shared import received
from shared.arrays import Arrays, Packed, Update, digest
from shared.errors import MoonflowerError, let_interrupts_through

M = TypeVar("M")

Kind = Literal["join", "train", "evaluate"]
FLOWER_TYPES: dict[Kind, str] = {"join": "query", "train": "train", "evaluate": "evaluate"}

MECHANISMS = ("gaussian", "discrete-gaussian", "none")  # none: no noise, hence no privacy
NOISE_SOURCES = ("aes-256-ctr", "device", "none")  # device: the accelerator's own generator
# How each record's gradient was had; summed: not by itself, under privacy.clipping = "none".
GRADIENTS = ("one-pass", "hooks", "ghost", "summed")
UNITS = ("record", "person")
LEDGER_ID, LEDGER_HEAD = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")
FLAT, SHAPES = "flat", ".shapes"  # how a field of arrays is called in a record
PACKED = "packed"  # how it is where it travels as `shared.compression` packs it
MAGIC = b"moonflower reply 1\n"  # how a kept reply begins
ALIGNED = 64  # bytes that the place of its first array is a multiple of
MOST_DIMENSIONS = 16
NPY_HEADER = 128  # bytes of numpy's header of an array of one dimension, in which Flower's arrays travel
MOST_SHAPES = 2**20  # characters: of names and shapes; a model of 10,000 arrays has fewer
LARGEST = 2**31 - 1  # of a count that a database keeps


def public() -> Any:
    """Mark a reply's field as declared, or computed from what is declared."""
    return field(metadata={"leaves": "public"})


def released() -> Any:
    """Mark a reply's field as the output of a privacy mechanism that the ledger has charged."""
    return field(metadata={"leaves": "released"})


@dataclass(frozen=True)
class JoinRequest:
    """Asks a site whether it will take part in a whole run, before any work."""

    run: str
    config: str  # RunConfig as canonical JSON
    base_digest: str  # of every parameter that is not exchanged
    shapes: str  # of the exchanged arrays, JSON


@dataclass(frozen=True)
class JoinReply:
    """The site will: its name, what it declares of its data, and what it will spend."""

    site: str = public()
    dataset: str = public()
    unit: str = public()  # one of UNITS: who the promise is made to, for the dataset's life
    records: int = public()  # rounded, as site.toml declares; where the unit is the person, how many persons
    validation: float = public()  # share of the units kept for validation
    ledger_id: str = public()  # of the dataset's account: random, made when it was opened; 32 hexadecimal digits
    ledger_number: int = public()  # events in the account so far, over all runs
    ledger_head: str = public()  # digest of the last of them; ledger_chain.NO_HEAD before the first


@dataclass(frozen=True)
class TrainRequest:
    """Asks for one round's update, from `arrays` on."""

    run: str
    config: str
    round: int
    arrays: Arrays
    weights: Arrays = field(default_factory=dict)  # of labels, made of released counts: `shared.imbalance`; or none

    @cached_property
    def arrays_digest(self) -> str:
        """Digest of `arrays`, made once however many sites of a process are asked."""
        return digest(self.arrays)


@dataclass(frozen=True)
class TrainReply:
    """A noised update of the phase's trainable arrays, and the privacy that it cost."""

    site: str = public()
    round: int = public()
    update: Update = (
        released()
    )  # arrays after the local steps minus the request's; packed as the run's `compression` says
    sampling_rate: float = public()
    noise_multiplier: float = public()
    steps: int = public()
    epsilon: float = public()  # of this part of the dataset in this run so far, from the site's ledger
    mechanism: str = public()  # one of MECHANISMS
    noise_source: str = public()  # one of NOISE_SOURCES
    gradients: str = public()  # one of GRADIENTS
    ledger_id: str = public()
    ledger_number: int = public()  # of this release in the account's chain, from 1
    ledger_head: str = public()  # digest of the event before it; ledger_chain.NO_HEAD for the first


@dataclass(frozen=True)
class EvaluateRequest:
    """Asks for one histogram over the site's validation records, scored by `arrays`."""

    run: str
    config: str
    round: int
    arrays: Arrays

    @cached_property
    def arrays_digest(self) -> str:
        """As of `TrainRequest`."""
        return digest(self.arrays)


@dataclass(frozen=True)
class EvaluateReply:
    """Noised counts of how the model does (of a classifier: true label, predicted label, bin), and the privacy that they cost."""

    site: str = public()
    round: int = public()
    histogram: Arrays = released()  # {"counts": the task's cells}
    noise_multiplier: float = public()
    epsilon: float = public()
    mechanism: str = public()
    noise_source: str = public()
    ledger_id: str = public()
    ledger_number: int = public()
    ledger_head: str = public()


@dataclass(frozen=True)
class Refusal:
    """The site did not do what was asked.

    `reason` is the text of a refusal that rests on public values (policy, budget, retry, configuration);
    for anything else it is a fixed sentence, because an error's text can quote a record.
    """

    site: str = public()
    outcome: str = public()  # "refused", "failed", or "exhausted": out of privacy budget
    reason: str = public()


REQUESTS: dict[Kind, type[JoinRequest] | type[TrainRequest] | type[EvaluateRequest]] = {
    "join": JoinRequest,
    "train": TrainRequest,
    "evaluate": EvaluateRequest,
}
REPLIES = (JoinReply, TrainReply, EvaluateReply, Refusal)


class MessageError(MoonflowerError):
    """What arrived is not the message that was expected."""


class Held(RecordDict):
    """A message that stays on its machine: a Flower record in name, which nobody needs to write out or to read.

    Its arrays are shared by whoever is given it, to be read only.
    """

    message: Any

    def __init__(self, message: Any) -> None:
        super().__init__()
        self.message = message


def to_record(message: Any) -> RecordDict:
    """Turn one of this module's messages into a Flower record: an ArrayRecord a field of arrays, one ConfigRecord.

    A field's arrays go as one, end to end, with their names and shapes as JSON beside it: Flower sends each array in
    requests of its own, which for many small ones takes longer than a round's training. Packed ones go as they are.
    """
    record = RecordDict()
    values: dict[str, Any] = {"message": type(message).__name__}
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, dict):
            flat = [np.ravel(array) for array in value.values()]
            record[item.name] = ArrayRecord({FLAT: Array(np.concatenate(flat or [np.zeros(0, np.float32)]))})
            values[item.name + SHAPES] = json.dumps({name: array.shape for name, array in value.items()})
        elif isinstance(value, np.ndarray):
            record[item.name] = ArrayRecord({PACKED: Array(value)})
        else:
            values[item.name] = value
    record["values"] = ConfigRecord(values)
    return record


def from_record(record: RecordDict, *kinds: type[Any]) -> Any:
    """Read one of `kinds` back, or raise `MessageError` where a field is missing, extra or of another type.

    A record's own views (`array_records` and its like) are not touched: each makes a cycle, which would keep a message of
    many megabytes until Python looks for cycles.
    """
    if isinstance(record, Held):
        return _checked(record, *kinds)
    held_values = record.get("values")
    values = held_values if isinstance(held_values, ConfigRecord) else None
    name = None if values is None else str(values.get("message"))
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if values is None or kind is None:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise MessageError(f"expected {expected}, received {name!r}.")
    hints = _hints(kind)
    wanted: set[str] = {item.name for item in fields(kind)}
    shapes = {item + SHAPES for item in wanted if hints[item] in (Arrays, Update)}
    held = (set(record) | set(values)) - {"values", "message"} - shapes
    if held != wanted:
        raise MessageError(f"{name}: fields {sorted(held ^ wanted)} are missing or unknown.")
    arguments: dict[str, Any] = {}
    for item in wanted:
        held_arrays = record.get(item)
        if hints[item] == Update and isinstance(held_arrays, ArrayRecord) and list(held_arrays) == [PACKED]:
            arguments[item] = _packed(item, held_arrays)
        elif hints[item] in (Arrays, Update) and isinstance(held_arrays, ArrayRecord):
            arguments[item] = _apart(item, held_arrays, values.get(item + SHAPES))
        elif item in values and type(values[item]) is hints[item]:
            arguments[item] = values[item]
        else:
            raise MessageError(f"{name}.{item} is not a {hints[item]}.")
    return kind(**arguments)


def _checked(record: Held, *kinds: type[Any]) -> Any:
    message: Any = record.message
    if not isinstance(message, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise MessageError(f"expected {expected}, received {type(message).__name__!r}.")
    return message


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the types of a message's fields, worked out once."""
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


_HINTS: dict[type[Any], dict[str, Any]] = {}


def _apart(field: str, record: ArrayRecord, shapes: object) -> Arrays:
    """Take a field's arrays apart; what is not just them raises `MessageError`."""
    flat = _float32(field, record)
    try:
        named = json.loads(shapes) if isinstance(shapes, str) and len(shapes) <= MOST_SHAPES else None
    except (ValueError, RecursionError):
        named = None
    if not isinstance(named, dict) or not all(_is_shape(shape, flat.size) for shape in named.values()):
        raise MessageError(f"{field}: the arrays' shapes are missing, or are none.")
    sizes = [prod(shape) for shape in named.values()]
    if sum(sizes) != flat.size:
        raise MessageError(f"{field}: the arrays' shapes are of {sum(sizes)} values, and {flat.size} arrived.")
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    try:
        return {name: part.reshape(shape) for (name, shape), part in zip(named.items(), parts, strict=True)}
    except ValueError:  # of no values, and yet of dimensions that numpy cannot count
        raise MessageError(f"{field}: the arrays' shapes are missing, or are none.") from None


def _is_shape(shape: object, largest: int) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= MOST_DIMENSIONS
        and all(type(length) is int and 0 <= length <= largest for length in shape)
    )


def _float32(field: str, record: ArrayRecord) -> npt.NDArray[np.float32]:
    if list(record) != [FLAT]:
        raise MessageError(f"{field} is not one array, {FLAT!r}.")
    values = _one_dimension(field, record[FLAT])
    if values.dtype != np.float32:
        raise MessageError(f"{field} is {values.dtype}; only float32 travels.")
    return values


def _packed(field: str, record: ArrayRecord) -> Packed:
    """Return a field's packed bytes; what they are worth, `shared.compression` knows."""
    values = _one_dimension(field, record[PACKED])
    if values.dtype != np.uint8:
        raise MessageError(f"{field} is {values.dtype}; only bytes travel packed.")
    return values


def _one_dimension(field: str, array: Array) -> npt.NDArray[Any]:
    try:
        values = received.view(array)
    except Exception as error:  # whatever numpy makes of another's bytes
        let_interrupts_through(error)
        raise MessageError(f"{field} cannot be read: {type(error).__name__}.") from None
    if not isinstance(values, np.ndarray) or values.ndim != 1:
        raise MessageError(f"{field} is no array of one dimension.")
    return values


def implausible(reply: JoinReply | TrainReply | EvaluateReply) -> str | None:
    """Say which of a reply's words or ledger fields cannot be; they go into a history and onto screens."""
    if isinstance(reply, JoinReply):
        if reply.unit not in UNITS:
            return f"the reply's unit={reply.unit[:32]!r} is none of {', '.join(UNITS)}."
    else:
        words: dict[str, tuple[str, tuple[str, ...]]] = {
            "mechanism": (reply.mechanism, MECHANISMS),
            "noise_source": (reply.noise_source, NOISE_SOURCES),
        }
        if isinstance(reply, TrainReply):
            words["gradients"] = (reply.gradients, GRADIENTS)
        for name, (word, known) in words.items():
            if word not in known:
                return f"the reply's {name}={word[:32]!r} is none of {', '.join(known)}."
        if (reply.mechanism == "none") != (reply.noise_multiplier == 0):
            return f"the reply's mechanism={reply.mechanism!r} and noise_multiplier={reply.noise_multiplier:g} contradict each other."
    if not LEDGER_ID.fullmatch(reply.ledger_id):
        return f"the reply's ledger_id={reply.ledger_id[:40]!r} is not of 32 hexadecimal digits."
    if not (0 if isinstance(reply, JoinReply) else 1) <= reply.ledger_number <= LARGEST:
        return f"the reply's ledger_number={reply.ledger_number} counts no events."
    return None if LEDGER_HEAD.fullmatch(reply.ledger_head) else "the reply's ledger_head is no SHA-256."


def request_id(run: str, round_number: int, kind: Kind) -> str:
    """Name of a question that a site answers once: the same name is the same question, or it is refused."""
    return f"{run}/{round_number}/{kind}"


def request_digest(request: TrainRequest | EvaluateRequest) -> str:
    """SHA-256 of all that decides the answer: kind, run, round, configuration, arrays and labels' weights."""
    state = hashlib.sha256()
    parts = [type(request).__name__, request.run, str(request.round), request.config, request.arrays_digest]
    if isinstance(request, TrainRequest):
        parts.append(digest(request.weights))
    for part in parts:
        state.update(part.encode() + b"\0")
    return state.hexdigest()


def to_bytes(message: Any) -> bytes:
    """Serialise a reply to keep it: what a retry resends."""
    values: dict[str, Any] = {"message": type(message).__name__}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, dict):
            arrays |= {f"{item.name}/{name}": array for name, array in value.items()}
        elif isinstance(value, np.ndarray):
            arrays[item.name] = value
        else:
            values[item.name] = value
    described = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    head = json.dumps([values, described]).encode()
    head += b" " * (-(len(MAGIC) + 8 + len(head)) % ALIGNED)
    flat = (np.ravel(array).view(np.uint8).data for array in arrays.values())
    return b"".join([MAGIC, len(head).to_bytes(8, "little"), head, *flat])


def from_bytes(data: bytes, *kinds: type[M]) -> M:
    """Read what `to_bytes` wrote, now or, as a numpy archive, in earlier versions; arrays are read where they lie.

    Raises
    ------
    MessageError
        Where it is cut short, or longer than it says.
    """
    arguments, arrays = _kept(data) if data.startswith(MAGIC) else _archived(data)
    for key, array in arrays.items():
        item, slash, name = key.partition("/")
        if slash:
            arguments.setdefault(item, {})[name] = array
        else:
            arguments[item] = array
    name = arguments.pop("message")
    kind = next(kind for kind in kinds if kind.__name__ == name)
    for item, hint in _hints(kind).items():
        if hint in (Arrays, Update):
            arguments.setdefault(item, {})
    return kind(**arguments)


def _kept(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    place = len(MAGIC) + 8
    end = place + int.from_bytes(data[len(MAGIC) : place], "little")
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        arguments, described = json.loads(data[place:end])
        for name, kind, shape in described:
            arrays[name] = np.frombuffer(data, np.dtype(kind), prod(shape), end).reshape(shape)
            end += arrays[name].nbytes
    except (ValueError, TypeError):
        end = -1
    if end != len(data):
        raise MessageError("a kept reply is not as it was written.")
    return arguments, arrays


def _archived(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as kept:
        return json.loads(str(kept["values"])), {key: kept[key] for key in kept.files if key != "values"}


def size(message: Message) -> int:
    """Bytes of a message's content; 0 for one that carries none."""
    return content_size(message.content) if message.has_content() else 0


def content_size(content: RecordDict) -> int:
    """Bytes of a message's content.

    Values are counted here, arrays by Flower: its own count fails on empty texts and lists, and a site may
    send those.
    """
    if isinstance(content, Held):
        return _written_size(content.message)
    counted = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            counted += record.count_bytes()
        else:
            counted += sum(len(key) + _size(value) for key, value in record.items())
    return counted


def _written_size(message: Any) -> int:
    """Bytes that `to_record` would make of a message, by its fields' sizes."""
    counted = len("message") + len(type(message).__name__)
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, dict):
            counted += sum(array.nbytes for array in value.values()) + len(FLAT) + NPY_HEADER
            shapes = json.dumps({name: array.shape for name, array in value.items()})
            counted += len(item.name + SHAPES) + len(shapes)
        elif isinstance(value, np.ndarray):
            counted += value.nbytes + len(PACKED) + NPY_HEADER
        else:
            counted += len(item.name) + _size(value)
    return counted


def _size(value: object) -> int:
    if isinstance(value, str | bytes | list):
        return len(value) * (8 if isinstance(value, list) else 1)
    return 1 if isinstance(value, bool) else 8
