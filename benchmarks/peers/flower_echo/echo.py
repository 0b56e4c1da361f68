"""engine_overhead.py's side of Flower: FedAvg, and clients that send back the arrays that they get."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play FedAvg over all nodes, and write when each round ended."""
    settings = context.run_config
    work, sites = Path(str(settings["work"])), int(settings["sites"])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)

    def ended(number: int, _: ArrayRecord) -> None:
        if number:
            with (work / "flower.times").open("a", encoding="utf-8") as file:
                file.write(f"{time.time():.6f}\n")

    with np.load(work / "arrays.npz") as held:
        first = ArrayRecord({name: Array(held[name]) for name in held.files})
    strategy.start(grid, first, num_rounds=int(settings["rounds"]), evaluate_fn=ended)


@client.train()
def train(message: Message, _: Context) -> Message:
    """Send it back."""
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)
