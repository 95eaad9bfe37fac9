"""Names of several servers under TLS: the certificate must be the name's, though a connection goes to an address."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos import errors
from protos.scores import Sequence
from student_trainer.teacher_client import Credentials, connect
from tests.certificates import make_authority
from tests.servers import serving, theory


@pytest.mark.parametrize("scheme", ["dns+grpcs", "dns+https"])
def test_a_certificate_is_checked_against_the_name(tmp_path: Path, scheme: str) -> None:
    authority = make_authority(tmp_path / "authority")
    certificate, key = (str(path) for path in authority.pair("server"))
    credentials = Credentials("", str(authority.ca))
    with serving(theory(), tls={"cert_file": certificate, "key_file": key}) as server:
        port = (server.grpc if scheme == "dns+grpcs" else server.http).rpartition(":")[2]
        with connect(
            f"{scheme}://localhost:{port}", credentials=credentials, resolve=lambda host, port: ["127.0.0.1"]
        ) as client:
            assert client.score([Sequence([1, 2, 3])])[0].positions == 2
        with pytest.raises(errors.Unavailable):
            connect(
                f"{scheme}://another.test:{port}",
                credentials=credentials,
                patience_s=0.5,
                resolve=lambda host, port: ["127.0.0.1"],
            )
