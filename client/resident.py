"""What stays warm between a node's messages: the model, each site's encoded records, their features.

One model serves every site of a process: a site's turn only sets the trainable arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import RLock

from torch import Tensor

from client import data, made_up
from client.data import Parts
from client.digests import Digests
from client.privacy import probe
from client.privacy.ledger import Ledger
from client.site import Site, open_ledger, split_key
from shared import arrays, models
from shared.arrays import Arrays
from shared.examples import Examples
from shared.features import FeatureCache, features
from shared.models import HEAD, LoadedModel
from shared.plan import Part
from shared.run_config import Gradients as Mode
from shared.run_config import RunConfig

# What neither the loaded model nor its task look at; all else of a run's configuration may decide what they do.
NOT_OF_THE_MODEL = {"name", "warm_start", "training", "refit", "loss", "privacy", "federation", "compression"}


@dataclass
class Resident:
    """A process's warm state. Everything in it can be made again from the site's files."""

    turn: RLock = field(default_factory=RLock)  # hold it while the model's arrays are one request's
    _model: tuple[str, LoadedModel] | None = None
    _digests: Digests = field(default_factory=Digests)
    _parts: dict[str, tuple[str, Parts]] = field(
        default_factory=dict
    )  # each site's, as its files were when it was read
    _features: FeatureCache = field(default_factory=FeatureCache)
    _long: set[Part] = field(default_factory=set)  # parts whose features were probed at a text's full length
    probed: dict[str, Mode] = field(default_factory=dict)  # kinds of training that the probe has found right in full
    scored: set[str] = field(default_factory=set)  # kinds of evaluation that it has
    probed_from: str = ""  # digest of the arrays, and the kind of training, that it has probed last

    def __reduce__(self) -> tuple[Callable[[], "Resident"], tuple[()]]:
        """Pickle as the receiving process's own: Ray unpickles the ClientApp anew for each message."""
        return of_this_process, ()

    def ledger(self, site: Site) -> Ledger:
        """Open the account of the site's dataset; whoever opens it closes it."""
        return open_ledger(site)

    def split_key(self, site: Site) -> bytes:
        """Return the 32 secret bytes that split the site's records."""
        return split_key(site)

    def model(self, config: RunConfig, device: str) -> LoadedModel:
        """Return the run's model on `device`; loading another one drops what was kept."""
        key = f"{device} {config.model_dump(exclude=NOT_OF_THE_MODEL)!r}"
        if self._model is None or self._model[0] != key:
            self._model = None
            loaded = models.load(config)
            loaded.module.to(models.pick_device(device))
            self._model = (key, loaded)
            self._parts.clear()
            self.probed.clear()
            self.scored.clear()
            self.probed_from = ""
            self._long.clear()
            self._features = FeatureCache()
        return self._model[1]

    def probe_is_due(self, kind: str, arrays: str) -> bool:  # noqa: ARG002 - of a subclass
        """Whether the engine is to be probed before a release of this kind, from arrays of this digest: always."""
        return True

    def parts(self, site: Site, config: RunConfig) -> Parts:
        """Return the site's records, encoded and split; read anew when the file has changed.

        Raises
        ------
        DataError
            Naming the row at fault. It must stay at the site.
        """
        key = self._key(site)
        held = self._parts.get(site.name)
        if held is None or held[0] != key or self._digests.each(map(Path, held[1].references)) != held[1].references:
            model = self.model(config, site.device)
            held = self._parts[site.name] = (key, data.load(site, model.task, model.processor, self._digests))
        return held[1]

    def _key(self, site: Site) -> str:
        return f"{self._digests.of(site.dataset.path)} {site.dataset!r} {site.split_key}"

    def features(self, site: Site, part: Part, examples: Examples, config: RunConfig, trained: Arrays) -> Tensor:
        """Return the features (rows, hidden_size) of a part under the encoder that `trained` gives.

        Raises
        ------
        SensitivityError
            Where the probe finds that records' features depend on each other.
        """
        model, encoder = self.model(config, site.device), self.encoder(trained)

        def probed() -> Tensor:
            if self.probe_is_due(kind := f"features {part}", encoder):
                with probe.stateless(model.module):
                    probe.check_features(*made_up.features(model))
                self.probed_from = f"{kind} {encoder}"
            if part not in self._long:
                if longest := made_up.longest(model):
                    probe.check_features(*made_up.features(model, longest))
                self._long.add(part)
            return features(model, examples, config.hardware)

        key, parts = self._parts[site.name]  # those that `examples` are of, whatever the files are by now
        state = f"{encoder} {config.hardware.precision} {key} {parts.references!r}"
        return self._features.get(f"{site.name} {part}", state, probed)

    def encoder(self, trained: Arrays) -> str:
        """Return the digest of what `trained` makes of the encoder."""
        return arrays.digest({name: array for name, array in trained.items() if not name.startswith(HEAD)})


@cache
def of_this_process() -> Resident:
    """Return the warm state that all unpickled ClientApps of this process share."""
    return Resident()
