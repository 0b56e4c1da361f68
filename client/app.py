"""The Flower ClientApp: wiring only. Each handler reads a request, answers it, and sends what was released.

Nothing else can leave: replies are `shared.messages`, and an error that is not a refusal resting on
public values leaves as a fixed sentence, its text going to the site's own log.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import answers, site
from client.answers import Randomness
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site
from shared.errors import BudgetError, ConfigError, MoonflowerError, RefusedError, let_interrupts_through
from shared.messages import REQUESTS, Held, Kind, Refusal, from_record, to_record

log = logging.getLogger("moonflower.site")
R = TypeVar("R")

SiteOf = Callable[[Context], Site]
UNKNOWN = "unknown"  # the name of a site whose site.toml cannot be read


def build(
    site_of: SiteOf,
    randomness: Randomness = lambda _: Keystream.from_system(),
    resident: Resident | None = None,
) -> ClientApp:
    """Return a ClientApp for the sites that `site_of` finds.

    `randomness` makes the source of a request's sampling and noise; only a test may give another than the
    operating system's. `resident` is the process's warm state, where it is not one of its own.
    """
    app = ClientApp()
    resident = Resident() if resident is None else resident

    def handle(kind: Kind, message: Message, context: Context) -> Message:
        name = UNKNOWN
        try:
            own = site_of(context)
            name = own.name
            request: Any = from_record(message.content, REQUESTS[kind])
            reply: Any = answers.answer(resident, own, kind, request, randomness)
        except MoonflowerError as error:
            let_interrupts_through(error)
            log.warning("%s: %s request not answered: %s", name, kind, error)
            reply = refusal(name, error)
        except Exception as error:  # Flower would send its text
            let_interrupts_through(error)
            log.exception("%s: %s request failed", name, kind)
            reply = Refusal(name, "failed", "the site failed; its own log says why.")
        content = Held(reply) if isinstance(message.content, Held) else to_record(reply)
        return Message(content, reply_to=message)

    @app.query()
    def join(message: Message, context: Context) -> Message:
        return handle("join", message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handle("train", message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return handle("evaluate", message, context)

    return app


def refusal(name: str, error: MoonflowerError) -> Refusal:
    """Say why, where the reason is public; else that the site's log has it (a row's text stays there)."""
    if isinstance(error, BudgetError) and name != UNKNOWN:
        return Refusal(name, "exhausted", str(error))
    if isinstance(error, RefusedError | ConfigError) and name != UNKNOWN:
        return Refusal(name, "refused", str(error))
    return Refusal(name, "failed", "the site's data or machine is at fault; its own log says why.")


def site_from_context(context: Context) -> Site:
    """Find the site: `site` in the node's configuration, or the run folder's site of this partition.

    Flower's simulation engine numbers its nodes by `partition-id`; a real node is started with
    `--node-config 'site="/path/to/site.toml"'`.
    """
    if "site" in context.node_config:
        return site.load(Path(str(context.node_config["site"])))
    folder = Path(str(context.run_config.get("run", ""))) / "sites"
    files = sorted(folder.glob("*/site.toml"))
    number = int(context.node_config.get("partition-id", -1))
    if not 0 <= number < len(files):
        raise ConfigError(
            f"{folder} holds {len(files)} sites and this is node {number}; start as many nodes as the run has sites, as in: "
            f"flwr run . --federation-config 'num-supernodes={len(files)}'."
        )
    return site.load(files[number])


app = build(site_from_context)
