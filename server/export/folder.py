"""A run's model as a Hugging Face folder: read, checked, written beside its place, put there by one rename."""

import secrets
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError

from server import optimization
from server.export import adapter, card, check, exported, graph, kinds, pooling, scoring, weights
from server.export.base import Base, find
from server.export.choice import Asked
from server.export.manifest import Manifest
from server.export.source import Source, read
from server.history.store import History
from server.privacy import statement_page
from server.report.words import score, size
from shared import arrays, models
from shared.errors import ModelError, MoonflowerError
from shared.models import LoadedModel
from shared.score_names import title
from shared.tasks.causal_lm import PLAIN

Form = Literal["adapter", "merged"]
Format = Literal["hf", "onnx", "int8"]
ROOM = 64_000_000  # bytes for what stands beside the weights: tokenizer, card, statement
TURN = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # whose turn it is to write
HF_FILES = ("model.safetensors*", "model-*.safetensors", pooling.POOLING, pooling.NORM, pooling.HEAD, "modules.json")


class ExportError(MoonflowerError):
    """A model cannot be exported in this form, or to this place."""

    exit_code = 2


@dataclass(frozen=True)
class Written:
    """What an export was made from, and what int8 costs."""

    source: Source
    measured: scoring.Measured | None

    def remarks(self) -> list[str]:
        """Say why this round, and what int8 is worth: lines for people."""
        found = []
        best = self.source.best
        if best is not None:
            where = "the sites' released histograms" if best.scope == "validation" else "the public test set"
            found.append(
                f"Round {self.source.round.number} is the best by {title(best.name)} of {where}: {score(best.value)}."
            )
        if self.measured is not None:
            before, after = map(size, self.measured.sizes)
            found.append(f"int8: {after} instead of {before}.")
            found += [
                f"{title(old.name)} on the public test set: {score(new.value)} instead of {score(old.value)}."
                for old, new in zip(self.measured.before, self.measured.after, strict=True)
            ]
        return found


def write(
    history: History,
    run_id: str,
    run_folder: Path,
    out: Path,
    form: Form = "merged",
    *,
    format: Format = "hf",
    chosen: Asked = "last",
) -> Written:
    """Write what a run published after a committed round; return what it was made from.

    Parameters
    ----------
    run_id
        The run, running or ended; a beginning of its id is enough.
    run_folder
        Its folder at the coordinator, with run.json and checkpoints/.
    out
        The folder to make. It is there whole, or not at all.
    form
        `adapter` (of a LoRA run): a PEFT adapter and the head, without the base model. `merged`: a whole model.
    format
        `hf`: for transformers. `onnx`: one file for onnxruntime; `int8` the same with weights of eight bits.
    chosen
        The round: its number, `last`, or `best` by released scores.

    Raises
    ------
    NotFoundError
        Where there is no such run, or nothing of it to export.
    ExportError
        Where `out` exists or has no room, or the run has no such form.
    ModelError
        Where the base model is missing, or is not the one that was trained on.
    """
    _check_asked(form, format)
    check_place(out)
    source = read(history, run_id, run_folder, chosen)
    config = source.config
    if form == "adapter" and config.model.trainable != "lora":
        raise ExportError(
            f"Run {source.run.id} has no adapter: it trained with model.trainable={config.model.trainable!r}; export it merged."
        )
    _check_graph(source, format)
    model = _load(source)
    whole = sum(parameter.nbytes for parameter in model.module.parameters()) * (1 if format == "hf" else 3)
    _check_room(out, ROOM + (whole if form == "merged" else arrays.nbytes(source.state.published)))
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        with models.quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
            measured = _fill(part, source, model, form, format)
        part.rename(out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if _of_the_disk(error):
            raise ExportError(
                f"{out} cannot be written: {_first_line(error)}; mend that, or export elsewhere."
            ) from error
        raise
    return Written(source, measured)


def _fill(part: Path, source: Source, model: LoadedModel, form: Form, format: Format) -> scoring.Measured | None:
    taken = check.samples(source, model)
    base = find(source.config.model)
    inputs = tuple(taken[0].batch)
    manifest = Manifest.of(source, model.task, form, "hf", base, inputs)
    manifest.write(part)
    _write_processor(part, model, inputs)
    if model.task.model == "pooled":
        pooling.write_head(part, model.module)
    if form == "adapter":
        adapter.write_adapter(part, model, base.located, base.hub)
    else:
        weights.write_merged(part, model, base.located)
    network = exported.network(part, manifest, base.located)
    check.compare(source, manifest, taken, str(part), network)
    measured = None
    if format != "hf":
        manifest = replace(manifest, format=format)
        manifest.write(part)
        measured = _write_graph(part, source, model, manifest, taken, network)
    _write_papers(part, source, manifest, base, measured)
    return measured


def _write_graph(
    part: Path,
    source: Source,
    model: LoadedModel,
    manifest: Manifest,
    taken: list[check.Sample],
    network: torch.nn.Module,
) -> scoring.Measured | None:
    """Put one ONNX file in the place of the weights; int8 is measured, where there is a public test set."""
    file = part / graph.FILE
    whole = graph.pooled(network, model) if model.task.model == "pooled" else network
    widest = graph.two(taken[-1].batch)
    graph.write(file, whole, widest, tuple(taken[-1].expected), lengths="input_ids" in widest)
    for pattern in HF_FILES:
        for held in part.glob(pattern):
            shutil.rmtree(held) if held.is_dir() else held.unlink()
    check.compare(source, manifest, taken, str(part), graph.session(file))
    if manifest.format == "onnx":
        return None
    before = scoring.public(source, model)
    sizes = graph.quantise(file)
    run = graph.Run(graph.session(file), tensor=model.task.model != "whole")
    return scoring.Measured(sizes, before, scoring.public(source, replace(model, module=run)))


def _write_papers(
    part: Path, source: Source, manifest: Manifest, base: Base, measured: scoring.Measured | None
) -> None:
    """Write the statement and the card."""
    (part / "privacy_statement.json").write_text(statement_page.as_json(source.statement) + "\n", encoding="utf-8")
    (part / "privacy_statement.html").write_text(statement_page.as_page(source.statement) + "\n", encoding="utf-8")
    readme = part / "README.md"
    readme.write_text(card.make(source, manifest, base, measured), encoding="utf-8")
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(readme.stat().st_mode)  # as the user's umask has it; safetensors makes files for the owner alone


def _write_processor(part: Path, model: LoadedModel, inputs: tuple[str, ...]) -> None:
    """Write what makes numbers of a record, set as the run used it."""
    processor, task = model.processor, model.task
    if hasattr(processor, "get_vocab"):  # a tokenizer
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token or processor.unk_token
        kind = kinds.KINDS.get(task.name)
        writes = kind is not None and kind.plain == "writing"
        processor.padding_side = "left" if writes else "right"  # it goes on where the text ends
        if not writes:
            processor.model_max_length = task.settings.max_length
        known = set(processor.model_input_names)
        processor.model_input_names = [name for name in inputs if name in known]
        if writes and processor.chat_template is None:
            processor.chat_template = PLAIN + TURN  # by conversations were written
    if hasattr(task, "longest"):
        processor.n_samples = task.longest  # a clip's window, which not all extractors know
    processor.save_pretrained(part)


def _load(source: Source) -> LoadedModel:
    """Load the run's model with the checkpoint's arrays in it."""
    config = source.config.model.model_copy(
        update={"base": "float32"}
    )  # the adapters are over it, whatever it was packed in
    model = models.load(source.config.model_copy(update={"model": config}))
    optimization.check_base(source.state, model, source.config.model.name)
    published = source.state.published
    if not arrays.same_shapes(published, model.arrays()):
        raise ModelError(
            f"The checkpoint of run {source.run.id} does not fit model.name={source.config.model.name!r}: its arrays have "
            "other names or shapes; put the model back as it was."
        )
    arrays.write(model.module, published)
    model.module.eval()
    return model


def _of_the_disk(error: BaseException) -> bool:
    """Whether a write failed; what is written in Rust says so in its text alone."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


def _first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def _check_asked(form: str, format: str) -> None:
    """Refuse what is no form or format, and an adapter that is not for transformers."""
    if form not in get_args(Form):
        raise ExportError(f"form={form!r} is not a form of export; use one of {', '.join(get_args(Form))}.")
    if format not in get_args(Format):
        raise ExportError(f"format={format!r} is not a format of export; use one of {', '.join(get_args(Format))}.")
    if format != "hf":
        if form != "merged":
            raise ExportError(
                f"--format {format} holds a whole model, and --form adapter a part of one; export it merged."
            )
        graph.check_packages()


def _check_graph(source: Source, format: str) -> None:
    kind = kinds.KINDS.get(source.config.task.name)
    if format != "hf" and (kind is None or not kind.graph):
        raise ExportError(
            f"--format {format} holds one pass of a network, and {source.config.task.name} takes many, which build on each "
            "other; export it with --format hf."
        )


def check_place(out: Path) -> None:
    """Refuse a place where something is already, or whose parent is missing, before any work."""
    if out.exists() or out.is_symlink():
        raise ExportError(f"--out {out} exists; name a folder that does not, an export replaces nothing.")
    if not out.absolute().parent.is_dir():
        raise ExportError(f"--out {out}: there is no folder {out.parent}; make it, or write elsewhere.")


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise ExportError(
            f"The export takes up to {size(needed)}, and {size(free)} are free where {out} would be; free some, or export elsewhere."
        )
