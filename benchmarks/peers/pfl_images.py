"""site_rounds.py's side of pfl-research: its own backend, algorithm and model class, as its benchmarks use them.

    python pfl_images.py WORK ROUNDS COHORT

Runs in an environment of its own, alone or under torchrun. Users' tensors are made once and stay in memory, nothing is
evaluated, and there is no privacy mechanism.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from cnn import BATCH, RATE, Records, ended, initial
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional as F


class Clock(TrainingProcessCallback):
    """Notes when a round ended."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # noqa: ARG002
        """Note it, once for all processes."""
        if get_ops().distributed.global_rank == 0:
            ended(self._work, "pfl", time.time())
        return False, Metrics()


def main() -> None:
    """Play the rounds."""
    work, rounds, cohort = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - pfl samples users by it
    records = Records(work)
    network = initial(work)
    network.loss = lambda images, labels: F.cross_entropy(network(images), labels)
    network.metrics = lambda images, labels: {
        "accuracy": Weighted(int((network(images).argmax(1) == labels).sum()), len(labels))
    }
    users = {number: Dataset(list(records.of(number)), user_id=str(number)) for number in range(len(records))}
    data = FederatedDataset(users.__getitem__, get_user_sampler("random", list(users)))
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=cohort, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=RATE, local_num_epochs=1, local_batch_size=BATCH),
        callbacks=[Clock(work)],
    )
    if get_ops().distributed.global_rank == 0:
        torch.save(network.state_dict(), work / "pfl.pt")


if __name__ == "__main__":
    main()
