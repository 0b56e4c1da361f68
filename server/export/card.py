"""The model card: README.md with front matter for the Hub, what was trained, its scores, its privacy, and code to use it."""

import inspect
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.export import plain
from server.export.base import Base
from server.export.source import Source
from server.history.records import Metric
from server.privacy import claims, statement_page
from server.report import words
from shared import __version__

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "peft", "safetensors", "flwr")
HUB_METRICS = {"accuracy": "accuracy", "f1": "f1", "precision": "precision", "recall": "recall", "auc": "roc_auc"}
NAMES = {"accuracy": "Accuracy", "f1": "Macro F1", "precision": "Macro precision", "recall": "Macro recall"}
NAMES |= {"auc": "Area under the ROC curve", "calibration_error": "Calibration error", "loss": "Cross-entropy"}
SPLITS = {"test": "public test set", "validation": "sites' validation records"}


def make(source: Source, form: str, base: Base) -> str:
    """Write the card of an export."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=False,  # noqa: S701 - Markdown, in which `_quoted` does it
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: _quoted(value) if type(value) is str else value,
    )
    return environment.get_template("card.jinja").render(
        front=_Block(_front(source, form, base)),
        code=_Block(code(form)),
        source=source,
        run=source.run,
        config=source.config,
        round=source.round,
        form=form,
        base=base,
        title=_title(source),
        labels=_Block(json.dumps(list(source.config.task.labels))),
        scores={(metric.scope, metric.name): metric for metric in source.metrics if metric.site is None},
        records=next((int(each.value) for each in source.metrics if each.name == "records"), None),
        score=_score,
        names=NAMES,
        statement=source.statement,
        claim=statement_page.claim(source.statement),
        verdict=statement_page.verdict(source.statement),
        claims=claims,
        private=source.statement.private,
        versions={"Moonflower": __version__, "Python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        epsilon=words.epsilon,
    )


def _quoted(text: str) -> str:
    """Keep other people's text on one line, in one cell, and no markup."""
    line = " ".join(words.plain(text).splitlines())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


class _Block(str):
    """Text of our own that keeps its lines."""


def code(form: str) -> str:
    """Give the code that loads the export, with nothing of Moonflower."""
    lines = inspect.getsource(plain).partition('"""\n\n')[2].rstrip()
    if form == "adapter":
        lines = lines.replace("from safetensors", "from peft import PeftModel\nfrom safetensors")
    return lines.replace("import AutoTokenizer", "import AutoModel, AutoTokenizer")


def _title(source: Source) -> str:
    model = source.config.model.name.rstrip("/").rpartition("/")[2].removeprefix("pypi:").partition("==")[0]
    return f"{source.run.name}: {model}, fine-tuned across {words.count(len(source.sites), 'site')}"


def _front(source: Source, form: str, base: Base) -> str:
    """Give the front matter's YAML. Names are the Hub's own; what it does not know is left out."""
    held = {"none": ["no-differential-privacy"], "in doubt": [], "nothing recorded": []}
    tags = ["moonflower", "federated-learning"]
    tags += held.get(statement_page.verdict(source.statement), ["differential-privacy"])
    values: dict[str, Any] = {**base.licence, "library_name": "peft" if form == "adapter" else "transformers"}
    if base.hub is not None:
        values |= {"base_model": base.hub, "base_model_relation": "adapter" if form == "adapter" else "finetune"}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=source.config.name,
            dataset_name=f"{source.run.name}: {SPLITS[metric.scope]}",
            dataset_split=metric.scope,
            metric_type=HUB_METRICS[metric.name],
            metric_name=NAMES[metric.name] + _interval(metric, ", 95 % interval of the noise {} to {}"),
            metric_value=round(metric.value, 4),
        )
        for metric in source.metrics
        if metric.site is None and metric.name in HUB_METRICS and math.isfinite(metric.value)
    ]
    if results:
        values |= {"metrics": list(dict.fromkeys(each.metric_type for each in results)), "eval_results": results}
    data = ModelCardData(model_name=source.run.id, pipeline_tag="text-classification", tags=tags, **values)
    return data.to_yaml()


def _score(metric: Metric | None) -> str:
    return words.UNKNOWN if metric is None else words.score(metric.value) + _interval(metric, " ({} to {})")


def _interval(metric: Metric, text: str) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return text.format(words.score(metric.low), words.score(metric.high))
