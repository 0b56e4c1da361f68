"""Exported folders used in a process of its own that cannot import anything of Moonflower, by the code of their cards."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RUNNER = """
import importlib.util, json, os, re, sys
assert not any(importlib.util.find_spec(name) for name in ("shared", "server", "client", "simulations"))
import torch
from safetensors.torch import load_file
found = {}
for name, (folder, base, batches, texts) in json.load(sys.stdin).items():
    print(name, file=sys.stderr)
    os.chdir(folder)
    scope = {}
    for block in re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL):
        if base is not None:
            block = re.sub(r"^base = .*", f"base = {base!r}", block, flags=re.MULTILINE)
        exec(block, scope)
    gathered = []
    with torch.no_grad():
        for file in batches:
            outputs = scope["model"](**load_file(file))
            gathered.append({n: getattr(outputs, n).tolist() for n in ("logits", "start_logits", "end_logits") if hasattr(outputs, n)})
    found[name] = {"batches": gathered, "texts": scope["run"](texts).tolist() if texts else []}
    if texts and os.path.exists("modules.json") and os.path.exists("model.safetensors"):
        from sentence_transformers import SentenceTransformer
        found[name]["sentences"] = SentenceTransformer(folder, device="cpu").encode(texts).tolist()
print(json.dumps(found))
"""


def run_cards(
    asked: Mapping[str, tuple[Path, Path | None, list[dict[str, torch.Tensor]], list[str]]], scratch: Path
) -> dict[str, dict[str, Any]]:
    """Run each card's code as it stands, then its model on batches, and its `run` on texts.

    Of each name: the folder, the base's folder (of an adapter), batches and texts.
    """
    given: dict[str, Any] = {}
    for name, (folder, base, batches, texts) in asked.items():
        files = []
        for number, batch in enumerate(batches):
            files.append(str(scratch / f"{name}-{number}.safetensors"))
            save_file({key: value.contiguous() for key, value in batch.items()}, files[-1])
        given[name] = (str(folder), str(base) if base else None, files, texts)
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUNNER],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd="/",
        env={**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
