"""What a sweep is: a scenario, a grid of settings, and seeds. Each cell of the grid is run once with each seed.

A sweep is known by the configurations that it comes to: the same command names the same sweep, so that it goes on.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Self

from shared.errors import ConfigError
from simulations import scenario as scenarios
from simulations.scenario import Scenario

OPENING, CLOSING, QUOTES = "[{(", "]})", "\"'"
MOST_SEEDS = 1000
Place = tuple[int, int]  # a cell's number, and a seed


@dataclass(frozen=True)
class Cell:
    """One point of the grid: what it sets, as it was given."""

    number: int  # from 1
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its settings in one line."""
        return ", ".join(f"{key}={text}" for key, text in self.settings.items()) or "as it is"

    @property
    def values(self) -> dict[str, Any]:
        """Its settings as values."""
        return {key: scenarios.override(f"{key}={text}")[1] for key, text in self.settings.items()}


@dataclass(frozen=True)
class Plan:
    """A sweep. Texts are as they were given, so that a cell's command can be given again."""

    scenario: str  # a built-in one's name, or the absolute path of a file
    settings: tuple[str, ...]  # KEY=VALUE, of every cell
    grid: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    device: str = "auto"
    digest: str = field(default="", compare=False)  # of the configurations, as they were when the sweep was made

    @classmethod
    def make(
        cls, scenario: str, settings: Sequence[str], grid: Sequence[str], seeds: str | None, device: str | None
    ) -> Self:
        """Read the command line's texts, and check that every cell is a valid scenario.

        Raises
        ------
        ConfigError
            One line that names the option or the cell at fault.
        """
        given = tuple(_setting(text) for text in settings)
        axes = dict[str, tuple[str, ...]]()
        for text in grid:
            key, values = read_axis(text)
            if key == "seed":
                raise ConfigError(f"--grid {text!r}: seeds are given by --seeds, as in --seeds 3 or --seeds 1,5,9.")
            if key in axes:
                raise ConfigError(f"--grid names {key} twice; name it once, with all its values.")
            if key in {each.partition("=")[0] for each in given}:
                raise ConfigError(f"{key} is given by --set and by --grid; give it once.")
            axes[key] = values
        place = str(Path(scenario).absolute()) if scenario.endswith(".toml") else scenario
        first = scenarios.load(place, dict(scenarios.override(text) for text in given))
        made = cls(place, given, axes, read_seeds(seeds, first.seed), device or "auto")
        return cls(**{**vars(made), "digest": made.found()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read back what `as_dict` gave."""
        grid = {key: tuple(texts) for key, texts in values["grid"].items()}
        settings, seeds = tuple(values["settings"]), tuple(values["seeds"])
        return cls(values["scenario"], settings, grid, seeds, values["device"], values["digest"])

    def as_dict(self) -> dict[str, Any]:
        """Give the sweep as JSON values."""
        grid = {key: list(texts) for key, texts in self.grid.items()}
        return {**vars(self), "grid": grid, "settings": list(self.settings), "seeds": list(self.seeds)}

    @property
    def cells(self) -> list[Cell]:
        """The grid's points, the last key's values the quickest to change."""
        return [
            Cell(number, dict(zip(self.grid, texts, strict=True)))
            for number, texts in enumerate(product(*self.grid.values()), 1)
        ]

    @property
    def places(self) -> list[Place]:
        """All runs, in the order in which they start: every cell has one before any has two."""
        return [(cell.number, seed) for seed in self.seeds for cell in self.cells]

    def of(self, cell: Cell, seed: int) -> Scenario:
        """Make a run's scenario."""
        fixed = dict(scenarios.override(text) for text in self.settings)
        return scenarios.load(self.scenario, {**fixed, **cell.values, "seed": seed})

    def found(self) -> str:
        """Check every run's scenario as it is now, and give the digest of all.

        Raises
        ------
        ConfigError
            Naming the cell at fault.
        """
        digest, seen = hashlib.sha256(), dict[str, Cell]()
        for cell in self.cells:
            for seed in self.seeds:
                try:
                    made = self.of(cell, seed)
                except ConfigError as error:
                    raise ConfigError(f"cell {cell.number} ({cell.name}), seed {seed}: {error}") from None
                # Without defaults: a Moonflower that knows more settings goes on with the sweep.
                text = made.model_copy(update={"data": _anywhere(made)}).model_dump_json(exclude_defaults=True)
                if text in seen:
                    raise ConfigError(
                        f"cell {cell.number} ({cell.name}) is the same as cell {seen[text].number} ({seen[text].name}); "
                        "give each value once."
                    )
                seen[text] = cell
                digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(self.device.encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse to go on with another scenario than the one that the sweep was made of.

        Raises
        ------
        ConfigError
            Where the scenario's file has changed, or Moonflower reads it otherwise now.
        """
        if self.found() != self.digest:
            raise ConfigError(
                f"scenario {self.scenario} is not what it was when the sweep was made; put it back, or give the command again for a "
                "new sweep."
            )

    def command(self, cell: Cell, seed: int) -> list[str]:
        """Give the command that makes one of the runs again, by itself."""
        texts = [*self.settings, *(f"{key}={text}" for key, text in cell.settings.items())]
        command = ["moonflower", "simulate", self.scenario, *(word for text in texts for word in ("--set", text))]
        command += ["--seed", str(seed)]
        return command if self.device == "auto" else [*command, "--device", self.device]


def read_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """Read `--grid KEY=V1,V2,...`: the key in full, and its values as texts.

    Raises
    ------
    ConfigError
        Where it is not of this form, lacks a value, or has one twice.
    """
    key, equals, rest = text.partition("=")
    values = [part.strip() for part in _split(rest)]
    if not equals or not key.strip() or not all(values):
        raise ConfigError(f"--grid {text!r} is not KEY=VALUE,VALUE, as in --grid privacy.epsilon=1,3,8.")
    read = [repr(scenarios.override(f"{key}={value}")[1]) for value in values]
    twice = next((value for number, value in enumerate(values) if read[number] in read[:number]), None)
    if twice is not None:
        raise ConfigError(f"--grid {text!r} has the value {twice} twice; give each value once.")
    return scenarios.full_key(key.strip()), tuple(values)


def read_seeds(text: str | None, base: int) -> tuple[int, ...]:
    """Read `--seeds`: how many, counted from the scenario's own, or which, with commas between.

    Raises
    ------
    ConfigError
        Where it is neither.
    """
    if text is None:
        return (base,)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"--seeds {text!r} is neither a number of seeds nor a list of them, as in --seeds 1,5,9.")
    numbers = [int(part) for part in parts]
    if "," not in text:
        if not 1 <= numbers[0] <= MOST_SEEDS:
            raise ConfigError(
                f"--seeds {text} must be 1 to {MOST_SEEDS}; a comma makes it a seed's name, as in --seeds {text},"
            )
        return tuple(range(base, base + numbers[0]))
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"--seeds {text} names a seed twice; name each once.")
    return tuple(numbers)


def _setting(text: str) -> str:
    """Check a `--set`, with its key in full and its folder wherever the command is given."""
    key, value = scenarios.override(text)
    written = text.partition("=")[2]
    if key == "data.folder" and isinstance(value, str) and value:
        written = str(Path(value).absolute())
    return f"{key}={written}"


def _anywhere(scenario: Scenario) -> Any:
    """Give the scenario's data with its folder as it is from anywhere."""
    folder = scenario.data.folder
    return scenario.data if folder is None else scenario.data.model_copy(update={"folder": folder.absolute()})


def _split(text: str) -> Iterator[str]:
    """Split at the commas that stand in no list, table or quotes."""
    start, depth, quote = 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        elif letter in OPENING or letter in CLOSING:
            depth += 1 if letter in OPENING else -1
        elif letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def number(value: Any) -> float | None:
    """Give a setting's value as a place on an axis; None where it is no number."""
    held = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return None if math.isnan(held) else held
