"""Authorities and certificates for tests, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Authority:
    """An authority in a folder, with a certificate each for a server on loopback and a client."""

    folder: Path

    @property
    def ca(self) -> Path:
        """Its own certificate."""
        return self.folder / "ca.pem"

    def pair(self, who: str) -> tuple[Path, Path]:
        """(certificate, private key) of `server` or `client`."""
        return self.folder / f"{who}.pem", self.folder / f"{who}.key"


def make_authority(folder: Path) -> Authority:
    """A new authority; the test is left out where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={folder.name}", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for who in ("server", "client"):
        openssl("req", *KEY, "-subj", f"/CN={who}", "-keyout", f"{who}.key", "-out", f"{who}.csr")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{who}.csr", *signing, "-out", f"{who}.pem")
    return Authority(folder)
