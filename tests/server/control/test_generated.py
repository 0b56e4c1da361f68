"""The committed code of coordinator.proto is what the proto gives."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROTO = "server/control/coordinator.proto"
GENERATED = ["coordinator_pb2.py", "coordinator_pb2.pyi", "coordinator_pb2_grpc.py"]


def test_the_committed_code_is_what_the_proto_gives(tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=."]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, PROTO], cwd=ROOT, check=True, timeout=60)
    for name in GENERATED:
        fresh = (tmp_path / "server" / "control" / name).read_text(encoding="utf-8")
        assert (ROOT / "server" / "control" / name).read_text(encoding="utf-8") == fresh, "run `make proto`"
