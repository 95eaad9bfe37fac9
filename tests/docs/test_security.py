"""The commands of docs/security.md run as written: keys, certificates, a server that other machines reach, curl."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from student_trainer.teacher_client import Credentials, connect
from tests.servers import environment, process

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def block(containing: str) -> str:
    """The one bash block with these words."""
    (found,) = [text for text in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) if containing in text]
    return str(found)


def run(script: str, folder: Path) -> str:
    """What a script prints; `python` is this one, with the project on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PYTHONPATH=str(ROOT), PATH=path)
    done = subprocess.run(["bash", "-ec", script], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("curl")), reason="needs openssl and curl")
def test_the_commands_of_the_page_make_a_server_that_only_known_clients_use(tmp_path: Path) -> None:
    commands = [line.split("#")[0] for line in block("keys add trainer-1").splitlines() if " keys " in line]
    printed = run("\n".join(commands), tmp_path)
    (tmp_path / "my-key").write_text(printed.splitlines()[0])
    assert "evaluation" in printed
    run(block("openssl req -x509"), tmp_path)
    words = re.sub(r"#.*|\\\n", " ", block("--tls-client-ca-file ca.pem")).split()
    options = words[words.index("--host") :]
    options[1] = "127.0.0.1"  # a test opens no port to others
    options = [str(tmp_path / word) if word.endswith((".pem", ".key", ".json")) else word for word in options]
    with process(tmp_path, "--backend", "theoretical", "--model", "theory", *options) as (_, addresses):
        curl = block("curl --cacert").split("python ")[0].replace("https://teacher-node:8000", addresses["http"])
        assert '"fingerprint"' in run(curl.replace("curl", "curl -sf"), tmp_path)
        for less in (r'-H "[^"]*"', "--cert trainer.pem --key trainer.key", "--cacert ca.pem"):
            with pytest.raises(AssertionError):
                run(re.sub(less, "", curl).replace("curl", "curl -sf"), tmp_path)
        files = {name: str(tmp_path / file) for name, file in re.findall(r"teacher\.(\w+_file)=(\S+)", PAGE)}
        with connect(f"grpcs://{addresses['grpc']}", patience_s=0, credentials=Credentials(**files)) as client:
            assert client.teacher().name == "theory"


def test_every_limit_of_the_table_is_a_setting_with_that_default() -> None:
    from teacher_server.config import ServerConfig

    config = ServerConfig(model="m")
    settings = set(re.findall(r"`(?:limits)?\.(\w+)`", PAGE))
    assert settings == set(type(config.limits).model_fields)
    rows = dict(re.findall(r"\| ([\d,]+)[^|]*\| `limits\.(\w+)` \|", PAGE))
    for number, name in rows.items():
        value = getattr(config.limits, name)
        assert int(number.replace(",", "")) in (value, value / 1024), name
