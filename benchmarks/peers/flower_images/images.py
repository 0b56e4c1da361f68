"""site_rounds.py's side of Flower: FedAvg, and clients that take the same local steps; nothing is evaluated.

What a process has loaded it keeps for its later messages: the records, mapped into memory, and the network.
"""

import time
from functools import cache
from pathlib import Path

import torch
from cnn import BATCH, RATE, Cnn, Records, ended, initial
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional as F

server = ServerApp()
client = ClientApp()


@cache
def kept(work: str) -> tuple[Records, Cnn]:
    """Load what stays."""
    torch.set_num_threads(1)
    return Records(Path(work)), Cnn()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play FedAvg, and write when each round ended."""
    settings = context.run_config
    work, sites, cohort = Path(str(settings["work"])), int(settings["sites"]), int(settings["cohort"])
    strategy = FedAvg(
        fraction_train=cohort / sites, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=sites
    )

    def now(number: int, _: ArrayRecord) -> None:
        if number:
            ended(work, "flower", time.time())

    first = ArrayRecord(initial(work).state_dict())
    strategy.start(grid, first, num_rounds=int(settings["rounds"]), evaluate_fn=now)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take one pass over the site's records."""
    records, network = kept(str(context.run_config["work"]))
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = records.of(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    for start in range(0, len(labels), BATCH):
        optimizer.zero_grad()
        F.cross_entropy(network(images[start : start + BATCH]), labels[start : start + BATCH]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
