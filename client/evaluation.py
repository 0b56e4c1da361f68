"""One local evaluation: a noised histogram of the model's predictions on the site's validation records.

Each record falls in one cell of (true label, predicted label, confidence bin), so that adding or removing
it changes the counts by 1; noise of the plan's deviation goes on every cell, empty ones included. Counts
are whole numbers, so that under `privacy.noise = "discrete"` they are released as whole numbers.
"""

import numpy as np
import torch

from client.privacy import noise
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site
from shared import arrays, metrics
from shared.arrays import Arrays
from shared.messages import EvaluateRequest
from shared.plan import SitePlan
from shared.run_config import RunConfig


def evaluate(
    resident: Resident,
    site: Site,
    config: RunConfig,
    plan: SitePlan,
    request: EvaluateRequest,
    randomness: Keystream,
) -> Arrays:
    """Return {"counts": (labels, labels, confidence_bins)}, noised, float32."""
    model = resident.model(config, site.device)
    arrays.write(model.module, request.arrays)
    examples = resident.parts(site, config).validation
    features = resident.features(site, "validation", examples, config, request.arrays)
    with torch.no_grad():
        probabilities = model.module.head(features).softmax(1).double().cpu().numpy()
    counts = metrics.count(probabilities, np.asarray(examples.labels, dtype=int), config.evaluation.confidence_bins)
    kind = noise.of_counts(config.privacy, randomness)
    noised = kind.noised(torch.from_numpy(counts.astype(np.int64)), plan.evaluation_noise)
    return {"counts": noised.numpy()}
