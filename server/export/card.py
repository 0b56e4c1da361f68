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

from server.export import kinds
from server.export.base import Base
from server.export.manifest import Manifest
from server.export.scoring import Measured
from server.export.source import Source
from server.history.records import Metric
from server.privacy import claims, statement_page
from server.report import words
from shared import __version__, tasks
from shared.score_names import NO_SCORES, telling, title

HERE = Path(__file__).parent
SESSION = "session.py"  # read, not imported: onnxruntime need not be installed
PACKAGES = ("torch", "transformers", "peft", "safetensors", "flwr")
HUB_METRICS = {
    **{name: name for name in ("accuracy", "f1", "precision", "recall", "exact_match", "perplexity", "wer", "chrf")},
    **{"auc": "roc_auc", "entity_f1": "f1", "f1_micro": "f1", "rouge1": "rouge", "rouge_l": "rouge"},
}
BASE = '"base"  # the base model\'s folder'
RELATIONS = {"int8": "quantized"}  # of an export to its base, as the Hub has them
SPLITS = {"test": "public test set", "validation": "sites' validation records"}
TRAINED = {
    "lora": "LoRA (B; A stays as it was drawn)",
    "full": "every weight",
    "head": "the head alone",
    "bias": "biases",
    "last": "the last layers",
}


def make(source: Source, manifest: Manifest, base: Base, measured: Measured | None) -> str:
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
    environment.filters["zip"] = lambda first, second: zip(first, second, strict=True)
    kind = kinds.of(manifest)
    scores = {(metric.scope, metric.name): metric for metric in source.metrics if metric.site is None}
    return environment.get_template("card.jinja").render(
        front=_Block(_front(source, manifest, base)),
        said=f"A model for {manifest.task}" if kind is None else kind.said,
        trained=_trained(source),
        limits=_limits(source),
        code=_Block(code(kind, manifest)) if kind else "",
        use=_Block(use(kind, manifest)),
        note=_Block(kind.note) if kind else "",
        columns=[
            f"{role} ({column.kind}{'' if column.needed else ', where there is one'})"
            for role, column in tasks.of(source.config).columns.items()
        ],
        datasets=sorted({(each.site, each.dataset) for each in source.statement.accounts}),
        sentences=manifest.head == "pooled"
        and manifest.format == "hf"
        and (manifest.form == "merged" or base.hub is not None),
        manifest=manifest,
        measured=measured,
        best=source.best,
        source=source,
        run=source.run,
        config=source.config,
        round=source.round,
        base=base,
        heading=_title(source),
        scores=scores,
        names=telling(name for _, name in scores),
        title=title,
        records=next((int(each.value) for each in source.metrics if each.name in NO_SCORES), None),
        score=_score,
        number=words.score,
        size=words.size,
        statement=source.statement,
        claim=statement_page.claim(source.statement),
        verdict=statement_page.verdict(source.statement),
        claims=claims,
        private=source.statement.private,
        versions={"Moonflower": __version__, "Python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        epsilon=words.epsilon,
    )


def _trained(source: Source) -> str:
    model = source.config.model
    said = (
        TRAINED[model.trainable] if model.trainable != "last" else f"the last {words.count(model.last_layers, 'layer')}"
    )
    head = source.config.task.labels and model.trainable not in ("full", "head")
    return f"{said} and the head" if head else said


def _limits(source: Source) -> list[tuple[str, str]]:
    """Say what is cut, of what the task reads and writes."""
    task = source.config.task
    columns = tasks.of(source.config).columns.values()
    kinds_of = {column.kind for column in columns}
    found = []
    if kinds_of & {"text", "words", "messages"}:
        found.append(("longest text", f"{task.max_length} tokens; longer ones are cut"))
    if "audio" in kinds_of:
        found.append(("longest clip", f"{task.max_seconds} s; longer ones are cut"))
    return found


def _quoted(text: str) -> str:
    """Keep other people's text on one line, in one cell, and no markup."""
    line = " ".join(words.plain(text).splitlines())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


class _Block(str):
    """Text of our own that keeps its lines."""


def code(kind: kinds.Kind, manifest: Manifest) -> str:
    """Give the code that runs the export, with nothing of Moonflower."""
    lines = _body(inspect.getsource(kinds.module(kind, manifest)))
    return lines if manifest.format == "hf" else f"{lines}\n\n\n{_body((HERE / SESSION).read_text(encoding='utf-8'))}"


def use(kind: kinds.Kind | None, manifest: Manifest) -> str:
    """Give the code that loads the export, and runs an example."""
    lines = []
    if manifest.format != "hf":
        lines.append('model = Session("model.onnx")')
    elif manifest.form == "adapter":
        lines += [
            f"from transformers import AutoConfig, {manifest.auto}",
            "from peft import PeftModel\n",
            f"base = {json.dumps(manifest.base) if manifest.base else BASE}",
            'config = AutoConfig.from_pretrained(".")',
            f"model = {manifest.auto}.from_pretrained(base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)",
            'model = PeftModel.from_pretrained(model, ".").eval()',
        ]
    else:
        lines += [
            f"from transformers import {manifest.auto}\n",
            f'model = {manifest.auto}.from_pretrained(".", dtype=torch.float32)',
        ]
    if kind is None:
        return "\n".join(["import torch", *lines])
    if manifest.labels:
        lines.append(f"labels = {json.dumps(list(manifest.labels))}")
    return "\n".join(
        [
            *([kind.imports.rstrip()] if kind.imports else []),
            *lines,
            'run = load(".", model)',
            kinds.use(kind, manifest),
        ]
    )


def _body(code: str) -> str:
    """Give a module's code without the docstring on top."""
    return code.partition('"""\n\n')[2].rstrip()


def _title(source: Source) -> str:
    model = source.config.model.name.rstrip("/").rpartition("/")[2].removeprefix("pypi:").partition("==")[0]
    return f"{source.run.name}: {model}, fine-tuned across {words.count(len(source.sites), 'site')}"


def _front(source: Source, manifest: Manifest, base: Base) -> str:
    """Give the front matter's YAML. Names are the Hub's own; what it does not know is left out."""
    held = {"none": ["no-differential-privacy"], "in doubt": [], "nothing recorded": [], "study": []}
    tags = ["moonflower", "federated-learning"]
    tags += held.get(statement_page.verdict(source.statement), ["differential-privacy"])
    form, kind = manifest.form, kinds.of(manifest)
    tag = manifest.task if kind is None else kind.tag
    library = "onnx" if manifest.format != "hf" else "peft" if form == "adapter" else "transformers"
    values: dict[str, Any] = {**base.licence, "library_name": library}
    if base.hub is not None:
        values |= {
            "base_model": base.hub,
            "base_model_relation": RELATIONS.get(manifest.format) or ("adapter" if form == "adapter" else "finetune"),
        }
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=source.config.name,
            dataset_name=f"{source.run.name}: {SPLITS[metric.scope]}",
            dataset_split=metric.scope,
            metric_type=HUB_METRICS[metric.name],
            metric_name=title(metric.name) + _interval(metric, ", 95 % interval of the noise {} to {}"),
            metric_value=round(metric.value, 4),
        )
        for metric in source.metrics
        if metric.site is None and metric.name in HUB_METRICS and math.isfinite(metric.value)
    ]
    if results:
        values |= {"metrics": list(dict.fromkeys(each.metric_type for each in results)), "eval_results": results}
    data = ModelCardData(model_name=source.run.id, pipeline_tag=tag, tags=tags, **values)
    return data.to_yaml()


def _score(metric: Metric | None) -> str:
    return words.UNKNOWN if metric is None else words.score(metric.value) + _interval(metric, " ({} to {})")


def _interval(metric: Metric, text: str) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return text.format(words.score(metric.low), words.score(metric.high))
