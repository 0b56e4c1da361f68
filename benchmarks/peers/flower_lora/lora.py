"""engine_overhead.py's side of Flower with a model: FedAvg, and clients that load it for each message, as Flower's examples do.

Flower's own examples of fine-tuning with adapters (FlowerTune) build the model anew in each call of `train`: a client has nothing
that lasts from one message to the next.
"""

import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


def network(context: Context) -> Any:
    """Load the model, with fresh adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(str(context.run_config["model"]))
    return get_peft_model(loaded, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))


def adapters(model: Any) -> ArrayRecord:
    """Take the adapters out of a model."""
    from peft import get_peft_model_state_dict

    return ArrayRecord(get_peft_model_state_dict(model))


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

    strategy.start(grid, adapters(network(context)), num_rounds=int(settings["rounds"]), evaluate_fn=ended)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Put the adapters into the model, and take them out."""
    from peft import set_peft_model_state_dict

    model = network(context)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": adapters(model), "metrics": metrics}), reply_to=message)
