"""The generated code is what protoc makes of teacher.proto, and the .proto passes buf."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "protos/teacher/v1"


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}={FOLDER}", *outputs, f"{FOLDER}/teacher.proto"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    made = sorted(p.name for p in (tmp_path / FOLDER).iterdir())
    assert made == ["teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py"]
    for name in made:
        assert (tmp_path / FOLDER / name).read_text() == (ROOT / FOLDER / name).read_text(), (
            f"run `make protos`: {name}"
        )


def test_the_proto_passes_buf_lint() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    run = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
