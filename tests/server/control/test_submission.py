"""A run that is submitted: checked, laid out whole, entered once."""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from server import job
from server.control import coordinator_pb2 as pb
from server.control import submission
from server.control.client import Client, UnreachableError
from server.history.store import History
from shared.errors import ConfigError, MoonflowerError

RUN = """
name = "lungs"
[model]
name = "any"
[task]
labels = ["negative", "positive"]
[training]
rounds = 3
sampling_rate = 0.5
"""
TEST_SET = b'{"text": "a good film", "label": "positive"}\n'


def folders(coordinator):
    runs = coordinator.settings.runs
    return sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []


def test_a_submitted_run_waits_in_the_queue_with_its_folder(any_coordinator):
    coordinator = any_coordinator
    told = coordinator.submit()
    (run,) = coordinator.history.queue()
    assert (run.id, run.status, run.origin, run.submitted_by) == (told.id, "pending", "daemon", "ann")
    assert (told.status, told.rounds_planned, told.private) == ("pending", 3, True)
    folder = coordinator.settings.run(run.id)
    planned = job.load(folder)
    assert planned.run == run.id
    assert planned.config.federation.coordinator == "north"
    assert planned.config.digest == run.config_digest
    assert planned.test_set is not None
    assert planned.test_set.read_bytes() == TEST_SET
    assert planned.checkpoints.is_dir()
    assert not planned.simulated
    assert json.loads((folder / job.RUN_FILE).read_text())["supervised"] is True
    assert folders(coordinator) == [run.id]


def test_a_submission_that_is_sent_again_makes_one_run(any_coordinator):
    coordinator = any_coordinator
    first = coordinator.submit("one")
    assert coordinator.submit("one").id == first.id
    assert [run.id for run in coordinator.history.runs()] == [first.id] == folders(coordinator)


def test_submissions_of_one_request_at_the_same_moment_make_one_run(any_coordinator):
    coordinator = any_coordinator
    with ThreadPoolExecutor(6) as pool:
        ids = {each.id for each in pool.map(coordinator.submit, ["one"] * 6)}
    assert [run.id for run in coordinator.history.runs()] == list(ids) == folders(coordinator)


def test_other_content_another_request_and_another_caller_make_other_runs(coordinator):
    coordinator.submit("one")
    coordinator.submit("two")
    coordinator.submit("one", config_toml=RUN + "[privacy]\nepsilon = 4\n")
    coordinator.submit("one", test_set=None)
    coordinator.submit("one", test_set=TEST_SET * 2)
    assert len(coordinator.history.runs()) == len(folders(coordinator)) == 5


def test_a_submission_that_died_between_folder_and_database_is_taken_up(coordinator, monkeypatch):
    def die(*_, **__):
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(History, "create_run", die)
        with pytest.raises(MoonflowerError, match="the coordinator failed to answer; its log says why"):
            coordinator.submit("one")
    assert len(folders(coordinator)) == 1
    assert [coordinator.submit("one").id] == folders(coordinator) == [run.id for run in coordinator.history.queue()]


def test_a_lost_answer_is_asked_for_again_by_the_client(coordinator, monkeypatch):
    """The connection breaks after the run was entered: as the client sees it, the server was away."""
    asked = []
    call = Client.call

    def lossy(self, method, request):
        answer = call(self, method, request)
        asked.append(request.request_id)
        if len(asked) < 3:
            raise UnreachableError("the connection broke.")
        return answer

    monkeypatch.setattr(Client, "call", lossy)
    with coordinator.client() as client:
        run = client.submit(RUN, TEST_SET)
    assert len(asked) == 3
    assert len(set(asked)) == 1
    assert [each.id for each in coordinator.history.runs()] == [run.id]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"config_toml": "name ="}, "run.toml is not TOML: Invalid value"),
        ({"config_toml": RUN + "[training2]\n"}, "run.toml: unknown setting 'training2' (={})."),
        ({"config_toml": RUN.replace("rounds = 3", "rounds = -3")}, "training.rounds=-3 must be at least 0"),
        ({"config_toml": RUN + "federation = 3\n"}, "training.federation"),
        (
            {"config_toml": RUN + '[federation]\ncoordinator = "south"\n'},
            "run.toml: federation.coordinator='south' is not this coordinator's name, which is 'north'; take the setting "
            "out, or submit the run there.",
        ),
        ({"test_set": b""}, "test.jsonl holds no records."),
        ({"test_set": b"{}\n"}, "test.jsonl, row 1: column 'text' is missing among none; call it so."),
        (
            {"test_set": b'{"text": "x", "label": "no"}\n'},
            "test.jsonl, row 1: 'label' holds the label 'no', which is not one",
        ),
        ({"test_set": b"\xff\xfe\n"}, "test.jsonl, row 1: not UTF-8; save the file so."),
        (
            {"config_toml": RUN.replace("[task]", '[task]\nname = "image-classification"'), "test_set": b"{}\n"},
            "task.name='image-classification' has its records in files of their own, which a submission does not carry",
        ),
        ({"request_id": ""}, "request_id is missing"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(coordinator, sent, said):
    with pytest.raises(ConfigError) as caught:
        coordinator.submit(**sent)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(coordinator.settings.state) not in str(caught.value)
    assert folders(coordinator) == []
    assert coordinator.history.runs() == []


def test_what_a_killed_submission_left_is_removed_at_the_next_start(coordinator):
    left = coordinator.settings.runs / f"{submission.UNFINISHED}abc"
    (left / "checkpoints").mkdir(parents=True)
    run = coordinator.submit()
    submission.tidy(coordinator.settings.runs)
    assert folders(coordinator) == [run.id]


def test_a_disk_that_is_full_is_no_run(coordinator, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission, "_sync", full)
    with pytest.raises(MoonflowerError, match="its log says why"):
        coordinator.submit()
    assert (folders(coordinator), coordinator.history.runs()) == ([], [])


def test_a_request_that_is_no_such_message_is_a_mistake_of_the_caller(coordinator):
    credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
    with grpc.secure_channel(coordinator.address, credentials) as channel:
        send = channel.unary_unary(f"/{pb.DESCRIPTOR.package}.Coordinator/SubmitRun")
        with pytest.raises(grpc.RpcError) as caught:
            send(b"\xff\xff", metadata=[("authorization", f"Bearer {coordinator.secrets['ann']}")], timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
