"""The same model, adapters and training step as a plain Flower app: FedAvg, a fresh process a message, no privacy."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from shared import models
from shared.run_config import RunConfig

server = ServerApp()
client = ClientApp()


def load(context: Context) -> tuple[models.LoadedModel, RunConfig]:
    """Load the model; each process does it anew."""
    config = RunConfig.model_validate(json.loads(Path(str(context.run_config["run"])).read_text(encoding="utf-8")))
    return models.load(config), config


def arrays(model: models.LoadedModel) -> ArrayRecord:
    """Give the adapters and the head."""
    state = model.module.state_dict()
    return ArrayRecord({name: state[name] for name in model.exchanged})


def texts(model: models.LoadedModel, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give a batch as large as a site's expected one."""
    count = config.training.batch_size or 8
    words = len(model.processor)
    ids = torch.randint(words // 30, words * 2 // 3, (count, config.task.max_length))
    return ids, torch.ones_like(ids), torch.randint(0, 2, (count,))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play FedAvg, and write when each round ended."""
    model, _ = load(context)
    nodes, times = int(context.run_config["nodes"]), Path(str(context.run_config["times"]))
    strategy = FedAvg(min_available_nodes=nodes, min_train_nodes=nodes, min_evaluate_nodes=nodes)

    def ended(number: int, _: ArrayRecord) -> None:
        with times.open("a", encoding="utf-8") as file:
            file.write(f"{number} {time.time()}\n")

    strategy.start(grid, arrays(model), num_rounds=int(context.run_config["rounds"]), evaluate_fn=ended)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take the run's local steps."""
    model, config = load(context)
    model.module.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    ids, mask, labels = texts(model, config)
    trained = [parameter for name, parameter in model.module.named_parameters() if name in model.trainable]
    optimizer = torch.optim.SGD(trained, lr=config.training.learning_rate)
    if first := str(context.run_config["first"]):
        with Path(first).open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")
    for _ in range(config.training.local_steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.module(ids, mask), labels).backward()
        optimizer.step()
    content = RecordDict({"arrays": arrays(model), "metrics": MetricRecord({"num-examples": len(ids)})})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score a batch."""
    model, config = load(context)
    model.module.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    ids, mask, labels = texts(model, config)
    with torch.no_grad():
        right = (model.module(ids, mask).argmax(1) == labels).float().mean()
    metrics = MetricRecord({"accuracy": float(right), "num-examples": len(ids)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
