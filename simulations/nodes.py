"""The ClientApp of virtual sites: the sites' own, with one that finds them in a pool, or in a folder each."""

from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

import client.app
from client.answers import Randomness
from client.privacy.randomness import Keystream
from client.site import Site
from simulations import pool


def site_from_context(context: Context) -> Site:
    """Find the site of a virtual node: of the run's pool, or of a folder of its own."""
    run = Path(str(context.node_config.get("run") or context.run_config.get("run", "")))
    if not (run / pool.FOLDER).is_dir():
        return client.app.site_from_context(context)
    return pool.pool_at((run / pool.FOLDER).absolute()).site(int(context.node_config["partition-id"]))


def build(randomness: Randomness = lambda _: Keystream.from_system()) -> ClientApp:
    """Return a ClientApp for virtual sites; only a test may give another source of random numbers."""
    return client.app.build(site_from_context, randomness, pool.PoolResident())


app = build()
