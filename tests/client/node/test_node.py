"""A node as a site runs it: `moonflower client start` beside a real SuperLink, asked, killed and misled."""

from collections.abc import Callable
from typing import Any

from shared import models
from shared.messages import JoinRequest, TrainRequest
from shared.run_config import RunConfig

New = Callable[..., Any]


def join(config: RunConfig, run: str = "run") -> JoinRequest:
    model = models.load(config)
    return JoinRequest(run, config.as_json(), model.base_digest, models.shapes(model.arrays()))


def train(config: RunConfig, number: int = 1, run: str = "run") -> TrainRequest:
    return TrainRequest(run, config.as_json(), number, models.load(config).arrays())


def test_a_hostile_bundle_is_never_loaded_and_its_run_is_answered_by_the_installed_code(
    new_node: New, new_config: New
) -> None:
    node = new_node()
    node.start()
    node.up()
    reply = node.ask("join", join(new_config()))
    assert reply["values"]["message"] == "JoinReply", reply
    assert not node.link.mark.exists(), "the bundle's client code ran"
