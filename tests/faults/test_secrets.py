"""Keys and what they are made of, looked for in all that a server writes: its log, its metrics, every answer."""

from __future__ import annotations

import json
import re
import ssl
from pathlib import Path

import grpc
import httpx

from teacher_server.auth import Permission
from teacher_server.keys import make_key, write
from teacher_server.transports import access
from tests.certificates import make_authority
from tests.servers import bearer, process

BODIES = {
    "/v1/score": {"sequences": ["abc"]},
    "/v1/generate": {"prompts": [{"text": "ab"}], "sampling": {"max_tokens": 2}},
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
}


def test_no_key_and_nothing_of_it_is_in_a_log_a_metric_or_an_answer(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "authority")
    right, stored = make_key("trainer", may=list(Permission))
    narrow, other = make_key("watcher", may=[Permission.OBSERVE])
    unknown, _ = make_key("stranger")
    damaged = right[:-1] + ("A" if right[-1] != "A" else "B")
    odd = ["s3cret-with-spaces in it", "s3cret" * 200]
    keys_file = tmp_path / "secret-keys.json"
    write(keys_file, [stored, other])
    certificate, private = authority.pair("server")
    tls = ("--tls-cert-file", str(certificate), "--tls-key-file", str(private), "--keys-file", str(keys_file))
    arguments = ("--backend", "theoretical", "--model", "theory", "--log-level", "debug", *tls)
    (tmp_path / "server").mkdir()
    said: list[str] = []
    with process(tmp_path / "server", *arguments) as (_, addresses):
        verify = ssl.create_default_context(cafile=str(authority.ca))
        with httpx.Client(base_url=addresses["http"], verify=verify, timeout=60, trust_env=False) as client:
            for key in (right, narrow, unknown, damaged, *odd):
                for path in sorted(access.HTTP):
                    for method in ("GET", "POST", "DELETE"):
                        body = BODIES.get(path)
                        for headers in (bearer(key), {"authorization": key}, {"authorization": f"Basic {key}"}):
                            answer = client.request(method, path, json=body, headers=headers)
                            said += [answer.text, *map(str, answer.headers.items())]
                said.append(client.get("/v1/nothing", headers=bearer(key)).text)
                said.append(client.post("/v1/score", content=b"{", headers=bearer(key)).text)
            said.append(client.get("/metrics", headers=bearer(right)).text)
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        with grpc.secure_channel(addresses["grpc"], credentials) as channel:
            for key in (right, narrow, unknown, damaged, *odd):
                for name in sorted(access.GRPC):
                    call = channel.stream_stream(name)(iter([b"\xff"]), metadata=tuple(bearer(key).items()), timeout=2)
                    try:
                        next(call)
                    except grpc.RpcError as error:
                        said.append(f"{error.details()} {error.trailing_metadata()}")  # type: ignore[attr-defined]
                    except StopIteration:
                        pass
                    finally:
                        call.cancel()
    log = (tmp_path / "server" / "log").read_text()
    kept = json.loads(keys_file.read_text())
    hashes = set(re.findall(r"[0-9a-zA-Z+/_=-]{20,}", json.dumps(kept)))
    assert len(hashes) >= 2, "the file's hashes were not found"
    pem = [line for line in private.read_text().splitlines() if len(line) > 40 and "-" not in line]
    secrets = {right, narrow, unknown, damaged, *odd, *hashes, *pem}
    assert "trainer" in log, "the log has the names of those who called"
    for where, text in (("the log", log), ("an answer", "\n".join(said))):
        for secret in secrets:
            for part in {secret, secret[-24:], secret[4:28]}:
                assert part not in text, f"{where} holds {part!r} of {secret!r}"
    answers = "\n".join(said)
    for path in (str(keys_file), str(private), str(certificate), str(tmp_path)):
        assert path not in answers
