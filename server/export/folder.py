"""A run's model as a Hugging Face folder: read, checked, written beside its place, put there by one rename."""

import secrets
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel

from server import optimization
from server.export import card, plain, weights
from server.export.base import find
from server.export.source import Source, read
from server.history.store import History
from server.privacy import statement_page
from server.report.words import size
from shared import arrays, models, records, tasks
from shared.errors import ModelError, MoonflowerError
from shared.examples import Examples, collate
from shared.models import LoadedModel
from shared.run_config import RunConfig

Form = Literal["adapter", "merged"]
ROOM = 64_000_000  # bytes for what stands beside the weights: tokenizer, card, statement
TOLERANCE = 1e-3  # of logits, between the run's code and plain code: kernels round differently
SAMPLES = 16  # texts that both score before an export is put in place


class ExportError(MoonflowerError):
    """A model cannot be exported in this form, or to this place."""

    exit_code = 2


def write(
    history: History,
    run_id: str,
    run_folder: Path,
    out: Path,
    form: Form = "merged",
    *,
    round_number: int | None = None,
) -> Path:
    """Write what a run published after its last committed round, or after `round_number`; return `out`.

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

    Raises
    ------
    NotFoundError
        Where there is no such run, or nothing of it to export.
    ExportError
        Where `out` exists or has no room, or the run has no adapter.
    ModelError
        Where the base model is missing, or is not the one that was trained on.
    """
    if form not in get_args(Form):
        raise ExportError(f"form={form!r} is not a form of export; use one of {', '.join(get_args(Form))}.")
    check_place(out)
    source = read(history, run_id, run_folder, round_number)
    config = source.config
    if form == "adapter" and config.model.trainable != "lora":
        raise ExportError(
            f"Run {source.run.id} has no adapter: it trained with model.trainable={config.model.trainable!r}; export it merged."
        )
    model = _load(source)
    whole = sum(parameter.nbytes for parameter in model.module.parameters())
    _check_room(out, ROOM + (whole if form == "merged" else arrays.nbytes(source.state.published)))
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        _fill(part, source, model, form)
        part.rename(out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if _of_the_disk(error):
            raise ExportError(
                f"{out} cannot be written: {_first_line(error)}; mend that, or export elsewhere."
            ) from error
        raise
    return out


def _fill(part: Path, source: Source, model: LoadedModel, form: Form) -> None:
    config = source.config
    texts = _samples(source)
    expected = _logits(model, texts, config)
    base = find(config.model)
    with models.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        tokenizer = model.processor
        tokenizer.model_max_length = config.task.max_length
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.save_pretrained(part)
        weights.write_head(part, model.module)
        if form == "adapter":
            weights.write_adapter(part, model, base.hub)
            encoder: torch.nn.Module = PeftModel.from_pretrained(_plain(base.located), str(part))
        else:
            weights.write_merged(part, model, base.located, config.task.labels)
            encoder = _plain(str(part))
        found = plain.load(str(part), encoder)(texts)
    worst = float((found - expected).abs().max())
    if not worst <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"Run {source.run.id}: the exported model's logits differ from the run's by {worst:.3g} on {len(texts)} texts; "
            f"nothing was written. This is a fault of the export of {config.model.name}; please report it."
        )
    (part / "privacy_statement.json").write_text(statement_page.as_json(source.statement) + "\n", encoding="utf-8")
    (part / "privacy_statement.html").write_text(statement_page.as_page(source.statement) + "\n", encoding="utf-8")
    readme = part / "README.md"
    readme.write_text(card.make(source, form, base), encoding="utf-8")
    for file in part.rglob("*.safetensors"):
        file.chmod(readme.stat().st_mode)  # as the user's umask has it; safetensors makes files for the owner alone


def _plain(folder: str) -> torch.nn.Module:
    model: torch.nn.Module = AutoModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model


def _load(source: Source) -> LoadedModel:
    """Load the run's model with the checkpoint's arrays in it."""
    model = models.load(source.config)
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


def _samples(source: Source) -> list[str]:
    """Give texts to compare on: of the public test set, or the labels' own words; and one that is cut."""
    task = source.config.task
    texts = list(task.labels) if source.test_set is None else _texts(source, source.test_set)
    return [*texts, " ".join(texts * task.max_length)]


def _texts(source: Source, test_set: Path) -> list[str]:
    found = records.read(test_set, tasks.of(source.config), identified=False)
    return [record.values["text"] for record in found[:SAMPLES]]


@torch.no_grad()
def _logits(model: LoadedModel, texts: Sequence[str], config: RunConfig) -> Tensor:
    """Score texts as the run does, one by one, in float32."""
    label = config.task.labels[0]
    made = [model.task.encode({"text": text, "label": label}, model.processor) for text in texts]
    examples = Examples.single(model.task, model.processor, made)
    device = torch.device("cpu")
    return torch.cat([model.outputs(collate(examples, [(index,)], device)) for index in range(len(texts))])


def _of_the_disk(error: BaseException) -> bool:
    """Whether a write failed; what is written in Rust says so in its text alone."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


def _first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


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
