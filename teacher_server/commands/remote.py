"""A running teacher from the outside: its address, a key, TLS, and what went wrong in one line with a next step.

It knows HTTP alone; `ping.py` speaks gRPC itself.
"""

from __future__ import annotations

import argparse
import json
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from teacher_server.config import is_loopback

DEFAULT = "http://127.0.0.1:8000"


class RemoteError(Exception):
    """What a command ends with; one line for whoever typed it."""


@dataclass(frozen=True)
class Place:
    """Where a teacher is and how it is reached; paths of files, "" for none."""

    address: str
    key: str
    ca_file: str
    client_cert_file: str
    client_key_file: str
    timeout_s: float

    @property
    def tls(self) -> bool:
        """Whether the address is one of TLS."""
        return self.address.startswith(("https://", "grpcs://"))

    @property
    def is_grpc(self) -> bool:
        """Whether the address is one of gRPC."""
        return not self.address.startswith(("http://", "https://"))

    def read(self, path: str) -> bytes | None:
        """A file's bytes; None for "", RemoteError where it cannot be read."""
        try:
            return Path(path).read_bytes() if path else None
        except OSError as error:
            raise RemoteError(f"cannot read {path}: {error.strerror or error}") from error

    def context(self) -> ssl.SSLContext:
        """How the teacher's certificate is checked; RemoteError for files that cannot be used."""
        for path in (self.ca_file, self.client_cert_file, self.client_key_file):
            self.read(path)
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.client_cert_file:
                context.load_cert_chain(self.client_cert_file, self.client_key_file or None)
        except ssl.SSLError as error:
            raise RemoteError(f"TLS cannot use these files: {error.reason or error}") from error
        return context


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    parser.add_argument("--address", default=DEFAULT, metavar="URL", help=f"The teacher [default: {DEFAULT}].")
    parser.add_argument("--key-file", default="", metavar="FILE", help="File that holds a key and nothing else.")
    parser.add_argument("--ca-file", default="", metavar="FILE", help="Authorities of its certificate, in PEM.")
    parser.add_argument("--client-cert-file", default="", metavar="FILE", help="A certificate to show it, in PEM.")
    parser.add_argument("--client-key-file", default="", metavar="FILE", help="That certificate's private key.")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="Seconds to wait [default: 10].")


def place_of(options: argparse.Namespace) -> Place:
    """The place that the options name; RemoteError where they cannot be used."""
    address = str(options.address).rstrip("/")
    scheme, separator, rest = address.partition("://")
    try:
        parts = urlsplit(f"//{rest if separator else address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    known = not separator or scheme in ("http", "https", "grpc", "grpcs")
    if not known or not host or (scheme not in ("http", "https") and port is None):
        raise RemoteError(f"{options.address} is no address; use http://host:port or grpc://host:port, https or grpcs")
    key = ""
    if options.key_file:
        words = (Place(address, "", "", "", "", 0).read(options.key_file) or b"").decode("utf-8", "replace").split()
        if len(words) != 1 or not words[0].isascii():
            raise RemoteError(f"{options.key_file} must hold one key and nothing else, it holds {len(words)} words")
        key = words[0]
    place = Place(
        address, key, options.ca_file, options.client_cert_file, options.client_key_file, float(options.timeout)
    )
    given = next((n for n in ("ca_file", "client_cert_file", "client_key_file") if getattr(options, n)), "")
    if given and not place.tls:
        raise RemoteError(f"--{given.replace('_', '-')} needs TLS, and {address} is without; use https:// or grpcs://")
    if not place.timeout_s > 0:
        raise RemoteError(f"--timeout must be above 0, got {options.timeout}")
    return place


class Remote:
    """HTTP to one teacher."""

    def __init__(self, place: Place) -> None:
        if place.is_grpc:
            raise RemoteError(f"{place.address} is gRPC, and this command asks over HTTP; give its http:// address")
        self.place = place
        self._client = httpx.Client(
            base_url=place.address,
            headers={"authorization": f"Bearer {place.key}"} if place.key else {},
            verify=place.context() if place.tls else False,
            timeout=place.timeout_s,
            trust_env=not is_loopback(httpx.URL(place.address).host),
        )

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """An answer of whatever status; RemoteError where there is none."""
        try:
            return self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise RemoteError(
                f"{self.place.address} did not answer in {self.place.timeout_s:g} s; allow more with --timeout, or "
                "look whether a firewall is between"
            ) from error
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError) as error:
            raise RemoteError(self._why(error)) from error
        except httpx.HTTPError as error:
            raise RemoteError(f"{self.place.address}: {error or type(error).__name__}") from error

    def json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object of an answer that is a success; RemoteError for all else."""
        response = self.ask(method, path, body)
        if not response.is_success:
            raise RemoteError(explain(response))
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RemoteError(f"{self.place.address} is no teacher: {path} answers with something else than JSON")
        return found

    def _why(self, error: Exception) -> str:
        text, address = str(error), self.place.address
        if "CERTIFICATE_VERIFY_FAILED" in text:
            reason = text.split("CERTIFICATE_VERIFY_FAILED] ")[-1].split(" (_ssl")[0]
            return f"{address}: {reason}; name the authority of its certificate with --ca-file"
        if "CERTIFICATE_REQUIRED" in text or "certificate required" in text.lower():
            return f"{address} wants a certificate of yours; give --client-cert-file and --client-key-file"
        if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER" in text:
            return f"{address} does not speak TLS there; use http://, or the port of https"
        if isinstance(error, (httpx.ReadError, httpx.RemoteProtocolError)):
            other = "a certificate of yours is wanted (--client-cert-file)" if self.place.tls else "it is one of https"
            return f"{address} closed the connection without an answer; maybe it is a port of gRPC, or {other}"
        return f"nobody answers at {address} ({text}); is the teacher started, and is that its HTTP port?"


def explain(response: httpx.Response) -> str:
    """What an answer that is no success says, in one line."""
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or "reason" not in problem:
        return f"{response.url} answers with status {response.status_code}, and not as a teacher does"
    hint = "; give one with --key-file" if response.status_code == 401 else ""
    request_id = response.headers.get("x-request-id", "")
    return f"{problem['reason']}: {problem.get('detail', '')}{hint} (request {request_id})"


def run(parser: argparse.ArgumentParser, arguments: Sequence[str], command: Callable[[Any, Place], int]) -> int:
    """Runs a command; its exit code, or 1 with a line on standard error."""
    options = parser.parse_args(list(arguments))
    try:
        return command(options, place_of(options))
    except RemoteError as error:
        print(f"{parser.prog.split()[-1]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has enough
        sys.stderr.close()
        return 0


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """A command's parser, with the options that every one has."""
    parser = argparse.ArgumentParser(prog=f"python -m teacher_server {name}", description=description)
    add_options(parser)
    return parser
