"""The one list of what crosses the network: every field marked, nothing else sent, nothing else read."""

import inspect
import io
import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from shared import messages
from shared.arrays import Arrays, Update
from shared.messages import (
    MOST_SHAPES,
    REPLIES,
    REQUESTS,
    EvaluateReply,
    EvaluateRequest,
    JoinReply,
    JoinRequest,
    MessageError,
    Refusal,
    TrainReply,
    TrainRequest,
    from_bytes,
    from_record,
    to_bytes,
    to_record,
)

ARRAYS = {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "encoder/odd name.npy": np.float32([math.pi])}
SAMPLES: list[Any] = [
    JoinRequest("run", "{}", "c0ffee", "{}"),
    TrainRequest("run", "{}", 1, ARRAYS),
    EvaluateRequest("run", "{}", 1, ARRAYS),
    JoinReply("clinic", "notes", "record", 1200, 0.1, "ab" * 16, 0, "0" * 64),
    TrainReply(
        "clinic", 3, ARRAYS, 0.5, 1.25, 2, math.inf, "gaussian", "aes-256-ctr", "hooks", "ab" * 16, 7, "cd" * 32
    ),
    EvaluateReply(
        "clinic", 3, {"counts": np.zeros((2, 2, 4), np.float32)}, 0.0, 0.5, "none", "none", "ab" * 16, 1, "0" * 64
    ),
    Refusal("clinic", "refused", "no."),
]
PACKED = replace(SAMPLES[4], update=np.arange(200, dtype=np.uint8))

names = st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable())
arrays = st.dictionaries(
    names, npst.arrays(np.float32, npst.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32)), max_size=3
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    for item in fields(first):
        one, other = getattr(first, item.name), getattr(second, item.name)
        if isinstance(one, np.ndarray):
            if one.dtype != other.dtype or one.tobytes() != other.tobytes():
                return False
        elif isinstance(one, dict):
            if one.keys() != other.keys() or any(one[k].tobytes() != other[k].tobytes() for k in one):
                return False
            if any(one[k].shape != other[k].shape or other[k].dtype != np.float32 for k in one):
                return False
        elif one != other or type(one) is not type(other):
            return False
    return True


# -- what leaves a site ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", REPLIES)
def test_every_field_of_a_reply_is_marked_public_or_released(reply: type[Any]) -> None:
    marks = {item.name: item.metadata.get("leaves") for item in fields(reply)}
    assert set(marks.values()) <= {"public", "released"}, marks


def test_what_is_released_are_the_two_noised_arrays_and_all_arrays_are_released() -> None:
    released = {(r.__name__, i.name) for r in REPLIES for i in fields(r) if i.metadata.get("leaves") == "released"}
    held_in_arrays = {(r.__name__, i.name) for r in REPLIES for i in fields(r) if i.type in (Arrays, Update)}
    assert released == held_in_arrays == {("TrainReply", "update"), ("EvaluateReply", "histogram")}


def test_the_fields_that_leave_a_site_are_these_and_a_new_one_is_a_decision() -> None:
    ledger = ["ledger_id", "ledger_number", "ledger_head"]
    assert {reply.__name__: [item.name for item in fields(reply)] for reply in REPLIES} == {
        "JoinReply": ["site", "dataset", "unit", "records", "validation", *ledger],
        "TrainReply": [
            *("site", "round", "update", "sampling_rate", "noise_multiplier", "steps", "epsilon"),
            *("mechanism", "noise_source", "gradients", *ledger),
        ],
        "EvaluateReply": [
            *("site", "round", "histogram", "noise_multiplier", "epsilon", "mechanism", "noise_source", *ledger)
        ],
        "Refusal": ["site", "outcome", "reason"],
    }


def test_every_message_of_the_module_is_a_request_or_a_reply() -> None:
    classes = {c for _, c in inspect.getmembers(messages, inspect.isclass) if c.__module__ == "shared.messages"}
    assert classes == {*REPLIES, *REQUESTS.values(), MessageError, messages.Held}


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_the_record_holds_the_fields_and_the_name_and_nothing_else(message: Any) -> None:
    record = to_record(message)
    values = record.config_records["values"]
    assert list(record.config_records) == ["values"]
    assert set(record) == {"values"} | {i.name for i in fields(message) if isinstance(getattr(message, i.name), dict)}
    shapes = {f"{name}.shapes" for name in set(record) - {"values"}}
    assert set(values) | set(record) == {item.name for item in fields(message)} | {"values", "message"} | shapes
    assert all(list(record[name]) == ["flat"] for name in set(record) - {"values"})
    assert values["message"] == type(message).__name__
    assert list(record.metric_records) == []


def test_a_packed_update_goes_as_its_bytes_and_nothing_is_said_of_names_or_shapes() -> None:
    record = to_record(PACKED)
    assert set(record) == {"values", "update"}
    assert list(record.array_records["update"]) == ["packed"]
    assert set(record.config_records["values"]) == {i.name for i in fields(PACKED)} - {"update"} | {"message"}


def test_a_message_that_stays_is_counted_as_it_would_be_written() -> None:
    for message in [*SAMPLES, PACKED]:
        assert messages.content_size(messages.Held(message)) == messages.content_size(to_record(message))


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [*SAMPLES, PACKED], ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_went(message: Any) -> None:
    assert same(from_record(to_record(message), type(message)), message)


def test_a_packed_update_comes_back_from_the_ledger_as_it_was_and_takes_no_more_there() -> None:
    assert same(from_bytes(to_bytes(PACKED), TrainReply), PACKED)
    larger = replace(PACKED, update=np.zeros(1200, np.uint8))
    assert len(to_bytes(larger)) - len(to_bytes(PACKED)) == 1000


@settings(max_examples=40, deadline=None)
@given(
    arrays,
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text().filter(lambda text: text.isprintable()),
)
def test_any_reply_survives_the_network_and_the_ledger(update: Any, number: int, value: float, text: str) -> None:
    reply = TrainReply(text, number, update, value, value, number, value, text, text, text, text, number, text)
    assert same(from_record(to_record(reply), *REPLIES), reply)
    assert same(from_bytes(to_bytes(reply), TrainReply, EvaluateReply), reply)


def test_kept_bytes_hold_no_objects_that_could_run_code() -> None:
    data = to_bytes(SAMPLES[4])
    with pytest.raises(ValueError, match="pickle"):
        from_bytes(pickled(), TrainReply)
    assert same(from_bytes(data, TrainReply), SAMPLES[4])
    with pytest.raises(MessageError):
        from_bytes(data.replace(b"<f4", b"|O8"), TrainReply)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, values=np.array({"code": 1}, dtype=object))
    return buffer.getvalue()


# -- what is not ours is not read ----------------------------------------------------------------------------------


def changed(message: Any, /, **changes: Any) -> RecordDict:
    """Return its record with values set, or taken away by None."""
    record = to_record(message)
    values = {name: value for name, value in {**record["values"], **changes}.items() if value is not None}
    return RecordDict({**record, "values": ConfigRecord(values)})


TRAIN = SAMPLES[1]
NUMBER = ArrayRecord({"x": Array(np.zeros(2, np.float32))})
FLAT_NONE = ArrayRecord({"flat": Array(np.zeros(0, np.float32))})
SQUARE = ArrayRecord({"flat": Array(np.zeros((2, 2), np.float32))})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (RecordDict(), "expected TrainRequest, received None"),
        (to_record(SAMPLES[2]), "expected TrainRequest, received 'EvaluateRequest'"),
        (changed(TRAIN, message="object"), "received 'object'"),
        (changed(TRAIN, run=None), r"\['run'\] are missing or unknown"),
        (changed(TRAIN, more=1), r"\['more'\] are missing or unknown"),
        (RecordDict({**to_record(TRAIN), "more": NUMBER}), r"\['more'\] are missing or unknown"),
        (RecordDict({**to_record(TRAIN), "metrics": ConfigRecord({})}), r"\['metrics'\] are missing or unknown"),
        (changed(TRAIN, round="1"), "round is not a"),
        (changed(TRAIN, round=1.0), "round is not a"),
        (changed(TRAIN, round=True), "round is not a"),
        (changed(TRAIN, run=1), "run is not a"),
        (RecordDict({**changed(TRAIN, run=None), "run": NUMBER}), "run is not a"),
        (RecordDict({"values": changed(TRAIN, arrays="none")["values"], "weights": FLAT_NONE}), "arrays is not a"),
        *(
            (changed(TRAIN, **{"arrays.shapes": shapes}), "shapes are missing, or are none")
            for shapes in (None, 1, "", "{", "[]", "[" * 10**5, "7", '{"x": 2}', '{"x": [2.0]}', '{"x": [true]}')
        ),
        *(
            (changed(TRAIN, **{"arrays.shapes": shapes}), "shapes are missing, or are none")
            for shapes in ('{"x": [-1]}', '{"x": ["2"]}', '{"x": [9223372036854775808]}', f'{{"x": {[1] * 33}}}')
        ),
        (changed(TRAIN, **{"arrays.shapes": f'{{"{"x" * MOST_SHAPES}": [2]}}'}), "shapes are missing, or are none"),
        (changed(TRAIN, **{"arrays.shapes": "{}"}), "are of 0 values"),
        (changed(TRAIN, **{"arrays.shapes": '{"x": [1]}'}), "are of 1 values"),
        (RecordDict({**to_record(TRAIN), "arrays": ArrayRecord()}), "is not one array"),
        (RecordDict({**to_record(TRAIN), "arrays": NUMBER}), "is not one array"),
        (RecordDict({**to_record(TRAIN), "arrays": SQUARE}), "of one dimension"),
    ],
)
def test_a_record_that_is_not_the_message_is_refused(record: RecordDict, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        from_record(record, TrainRequest)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", ">f4", "complex64", "bool"])
def test_only_float32_travels(dtype: str) -> None:
    other = ArrayRecord({"flat": Array(np.zeros(2, dtype))})
    with pytest.raises(MessageError, match="only float32 travels"):
        from_record(RecordDict({**to_record(TRAIN), "arrays": other}), TrainRequest)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros(2, np.float32), "is float32; only bytes travel packed"),
        (np.zeros((1, 2), np.uint8), "of one dimension"),
        (np.array(1, np.uint8), "of one dimension"),
    ],
)
def test_what_is_packed_is_bytes(values: Any, said: str) -> None:
    record = RecordDict({**to_record(PACKED), "update": ArrayRecord({"packed": Array(values)})})
    with pytest.raises(MessageError, match=said):
        from_record(record, TrainReply)


def test_nothing_but_an_update_is_packed() -> None:
    bytes_ = ArrayRecord({"packed": Array(np.zeros(8, np.uint8))})
    for sample in (TRAIN, SAMPLES[5]):
        name = "arrays" if sample is TRAIN else "histogram"
        with pytest.raises(MessageError, match="is not one array, 'flat'"):
            from_record(RecordDict({**to_record(sample), name: bytes_}), type(sample))
    both = ArrayRecord({"packed": Array(np.zeros(8, np.uint8)), "flat": Array(np.zeros(8, np.float32))})
    with pytest.raises(MessageError, match="is not one array, 'flat'"):
        from_record(RecordDict({**to_record(PACKED), "update": both}), TrainReply)


# -- the digest of a question --------------------------------------------------------------------------------------


def test_the_digest_changes_with_all_that_decides_the_answer_and_with_nothing_else() -> None:
    first = messages.request_digest(TRAIN)
    moved = {name: array.copy() for name, array in reversed(ARRAYS.items())}
    assert messages.request_digest(replace(TRAIN, arrays=moved)) == first
    nudged = {**ARRAYS, "head.weight": np.nextafter(ARRAYS["head.weight"], np.float32(9))}
    reshaped = {**ARRAYS, "head.weight": ARRAYS["head.weight"].reshape(3, 2)}
    renamed = {f"{name}x": array for name, array in ARRAYS.items()}
    others = [
        replace(TRAIN, run="other"),
        replace(TRAIN, round=2),
        replace(TRAIN, config="{ }"),
        *(replace(TRAIN, arrays=value) for value in (nudged, reshaped, renamed, {})),
        *(replace(TRAIN, weights={"labels": np.array(value, np.float32)}) for value in ([1, 2], [2, 1])),
        EvaluateRequest(TRAIN.run, TRAIN.config, TRAIN.round, TRAIN.arrays),
    ]
    digests = [messages.request_digest(request) for request in others]
    assert len({first, *digests}) == 1 + len(others)


def test_a_question_has_one_name_by_run_round_and_kind() -> None:
    named = {
        messages.request_id(run, number, kind) for run in "ab" for number in (1, 11) for kind in ("train", "evaluate")
    }  # type: ignore[arg-type]
    assert len(named) == 8


def test_a_reply_that_an_earlier_version_has_kept_is_read() -> None:
    reply = next(sample for sample in SAMPLES if isinstance(sample, TrainReply))
    values = {item.name: getattr(reply, item.name) for item in fields(reply) if item.name != "update"}
    buffer = io.BytesIO()
    held = {f"update/{name}": array for name, array in reply.update.items()}
    np.savez(buffer, values=np.array(json.dumps({"message": "TrainReply", **values})), **held)
    assert same(from_bytes(buffer.getvalue(), TrainReply), reply)


@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 30), slice(0, 60)])
def test_a_kept_reply_that_is_cut_short_is_refused(cut: slice) -> None:
    data = to_bytes(PACKED)
    with pytest.raises(MessageError, match="not as it was written"):
        from_bytes(data[cut], TrainReply)
    with pytest.raises(MessageError, match="not as it was written"):
        from_bytes(data + b"x", TrainReply)


def test_arrays_of_no_values_and_of_one_are_kept_as_they_are() -> None:
    update = {
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(2.5, np.float32),
        "turned": np.ones((2, 3), np.float32).T,
    }
    kept = from_bytes(to_bytes(replace(PACKED, update=update)), TrainReply)
    assert {name: array.shape for name, array in kept.update.items()} == {"none": (0, 3), "one": (), "turned": (3, 2)}
    assert all(np.array_equal(kept.update[name], array) for name, array in update.items())
