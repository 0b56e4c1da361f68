"""What a site has not sent of its updates yet, where a run sends only the largest values (`compression.update = "top-k"`).

It is added to the site's next update of the phase (error feedback: Stich, Cordonnier and Jaggi 2018, "Sparsified SGD with
memory"). Only noised updates go into it, whole, and each of them is charged: so it is post-processing, like what is sent. It is
kept in the ledger, in the commit that charges the update and keeps the reply. A crash before that commit leaves
the residual, the spend and the replies as they were, one after it has changed all three; and a retry, which resends the kept
reply, touches none.

A phase begins without one: its arrays, clipping norm and learning rate are its own. A reply that the coordinator never used
is lost as any update is; what it has left counts on. A site that is not asked in a round keeps what it has.
"""

import io
from typing import Any

import numpy as np

from client.privacy.ledger import Ledger
from client.privacy.randomness import Keystream
from shared import compression
from shared.arrays import Arrays, Update, same_shapes
from shared.errors import RefusedError
from shared.messages import TrainRequest
from shared.run_config import RunConfig

KIND = "train"  # of the ledger's states: the one that `charge` replaces with an update
PHASE = "phase"  # no array's name: those of a model's parameters have a dot


class Compressed:
    """A noised update as it is sent, and the state that is charged with it."""

    def __init__(
        self, update: Arrays, config: RunConfig, request: TrainRequest, ledger: Ledger, randomness: Keystream
    ) -> None:
        self._ledger, self._run, self._before = ledger, request.run, ledger.state(request.run, KIND)
        self._phase, _, _ = config.place(request.round)
        self.update: Update
        self.update, self._left = compression.compress(
            update, _of(self._before, self._phase, update), config.compression, randomness.words
        )

    @property
    def state(self) -> bytes | None:
        """What `Ledger.charge` keeps; None where nothing is left, ever."""
        return to_bytes(self._phase, self._left) if self._left else None

    def check(self) -> None:
        """Refuse to charge an update whose residual another process of the site has sent meanwhile; under the write lock.

        Raises
        ------
        RefusedError
            Nothing is lost: asked again, the site begins with the residual that is there.
        """
        if self._left and self._ledger.state(self._run, KIND) != self._before:
            raise RefusedError("another process of this site has answered a round of the run meanwhile; ask again.")


def to_bytes(phase: str, residual: Arrays) -> bytes:
    """Write a residual down, as the ledger keeps it."""
    buffer, kept = io.BytesIO(), dict[str, Any](residual)
    np.savez(buffer, **kept | {PHASE: np.array(phase)})
    return buffer.getvalue()


def from_bytes(state: bytes) -> tuple[str, Arrays]:
    """Read what `to_bytes` wrote: the phase, and the residual."""
    with np.load(io.BytesIO(state), allow_pickle=False) as kept:
        return str(kept[PHASE]), {name: kept[name] for name in kept.files if name != PHASE}


def _of(state: bytes | None, phase: str, like: Arrays) -> Arrays:
    """Return the residual that goes with updates like this one: none of another phase's."""
    if state is None:
        return {}
    written, residual = from_bytes(state)
    return residual if written == phase and same_shapes(residual, like) else {}
