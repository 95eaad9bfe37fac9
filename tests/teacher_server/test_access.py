"""The matrix of who may come in where, made from the routes and methods that a server really has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from teacher_server.auth import Permission
from teacher_server.keys import make_key, write
from teacher_server.transports import access
from tests.servers import Server, bearer, ended, serving, theory

KEYS = {permission.value: make_key(permission.value, may=[permission]) for permission in Permission}
ALL_KEY, ALL_STORED = make_key("all")
STRANGER, _ = make_key("stranger")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys: one that may do all, and one for each permission."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    write(file, [ALL_STORED, *(stored for _, stored in KEYS.values())])
    with serving(theory(), key=ALL_KEY, keys_file=str(file)) as server:
        yield server


def routes(server: Server) -> set[tuple[str, str]]:
    """(method, path) of every route of the application that runs."""

    def walk(some: Any) -> Iterator[tuple[str, str]]:
        for route in some:
            router = getattr(route, "original_router", None)  # newer FastAPI keeps an included router whole
            if router is not None:
                yield from walk(router.routes)
            else:
                yield from ((method, route.path) for method in route.methods)

    return set(walk(server.app._http.config.app.routes))


def methods(server: Server) -> set[str]:
    """/service/method of every gRPC method that the server's reflection knows."""
    found = set()
    with grpc.insecure_channel(server.grpc) as channel:

        def ask(**what: str) -> Any:
            request = reflection_pb2.ServerReflectionRequest(**what)
            metadata = tuple(bearer(ALL_KEY).items())
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            (answer,) = call(iter([request]), metadata=metadata)
            return answer

        for service in ask(list_services="").list_services_response.service:
            for data in ask(file_containing_symbol=service.name).file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                for described in file.service:
                    if f"{file.package}.{described.name}" == service.name:
                        found |= {f"/{service.name}/{method.name}" for method in described.method}
    return found


def status(server: Server, method: str, key: str, message: bytes = b"") -> str:
    """The name of the status of a call with one message, or OK."""
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_stream(method)(iter([message]), metadata=tuple(bearer(key).items()), timeout=10)
        return ended(call)


def test_every_route_and_method_has_a_decision_and_no_decision_is_left_over(locked: Server) -> None:
    assert {path for _, path in routes(locked)} == set(access.HTTP)
    other = {name for name in access.GRPC if name.startswith("/grpc.reflection.v1.")} | {"/grpc.health.v1.Health/List"}
    assert set(access.GRPC) - other <= methods(locked) <= set(access.GRPC)  # newer versions of grpcio have the others


def test_nothing_is_open_but_health() -> None:
    open_ones = [name for name, decision in (access.HTTP | access.GRPC).items() if decision.open]
    assert all("health" in name.lower() or name == "/ready" for name in open_ones), open_ones
    assert not access.of_path("/new").open
    assert not access.of_method("/new.Service/New").open


@pytest.mark.parametrize("key", ["", "nonsense", STRANGER, ALL_KEY[:-1] + "_"], ids=["none", "bad", "unknown", "wrong"])
def test_without_a_known_key_every_route_but_health_is_refused(locked: Server, key: str) -> None:
    client = httpx.Client(base_url=locked.http, headers=bearer(key), timeout=60)
    for method, path in sorted(routes(locked)):
        response = client.request(method, path)
        if access.of_path(path).open:
            assert response.status_code in (200, 405), path
            continue
        assert response.status_code == 401, (path, response.text)
        asked = response.headers["www-authenticate"]
        assert asked.startswith("Bearer")
        assert ("Basic" in asked) == (access.of_path(path).browser and method in ("GET", "HEAD")), path
        if method != "HEAD":
            assert response.json()["reason"] == "UNAUTHENTICATED"
    for path in ("/nothing", "/health/", "//health", "/HEALTH"):
        assert client.get(path).status_code == 401, path
    client.close()
    for name in sorted(methods(locked) | {"/none.Such/Method"}):
        assert (status(locked, name, key) == "UNAUTHENTICATED") != access.of_method(name).open, name


@pytest.mark.parametrize("may", list(KEYS))
def test_a_key_opens_what_it_may_and_nothing_else(locked: Server, may: str) -> None:
    key = KEYS[may][0]
    client = httpx.Client(base_url=locked.http, headers=bearer(key), timeout=60)
    for method, path in sorted(routes(locked)):
        response = client.request(method, path)
        needs = access.of_path(path).needs
        assert (response.status_code == 403) == (needs is not None and needs.value != may), (path, response.text)
        assert response.status_code != 401
    client.close()
    for name in sorted(methods(locked)):
        needs = access.of_method(name).needs
        assert (status(locked, name, key) == "PERMISSION_DENIED") == (needs is not None and needs.value != may), name


def test_a_browser_brings_a_key_as_a_password_to_pages_and_nowhere_else(locked: Server) -> None:
    def ask(method: str, path: str, key: str) -> httpx.Response:
        return httpx.request(method, f"{locked.http}{path}", auth=("anyone", key), timeout=60)

    for method, path in sorted(routes(locked)):
        page = access.of_path(path).browser and method in ("GET", "HEAD")
        status = ask(method, path, KEYS["observe"][0]).status_code
        assert (status == 401) == (not page and not access.of_path(path).open), (method, path)
        if page:
            assert status == 200, path
            assert ask(method, path, KEYS["score"][0]).status_code == 403, path
            assert ask(method, path, STRANGER).status_code == 401, path
    for nonsense in ("Basic", "Basic ?", "Basic /w==", "Basic Og=="):
        assert httpx.get(f"{locked.http}/", headers={"authorization": nonsense}).status_code == 401


def test_what_is_not_there_is_told_to_known_clients_alone(locked: Server) -> None:
    assert httpx.get(f"{locked.http}/nothing", headers=bearer(ALL_KEY)).status_code == 404
    assert status(locked, "/none.Such/Method", ALL_KEY) == "UNIMPLEMENTED"


def test_a_clients_name_is_its_keys_and_what_it_says_is_a_label(
    locked: Server, caplog: pytest.LogCaptureFixture
) -> None:
    headers = bearer(KEYS["score"][0]) | {"x-client": "generate"}
    with caplog.at_level("DEBUG"):
        httpx.post(f"{locked.http}/v1/score", json={"sequences": ["abc"]}, headers=headers).raise_for_status()
    assert "score of score (generate): OK" in caplog.text


def test_refusals_are_counted_and_a_body_is_not_read(locked: Server) -> None:
    before = locked.metric("teacher_refused_total", transport="http", reason="UNAUTHENTICATED")
    invalid = locked.metric("teacher_requests_total", method="score", outcome="INVALID_REQUEST")
    response = httpx.post(f"{locked.http}/v1/score", content=b"{" * 1000)
    assert response.status_code == 401
    assert locked.metric("teacher_refused_total", transport="http", reason="UNAUTHENTICATED") == before + 1
    assert locked.metric("teacher_requests_total", method="score", outcome="INVALID_REQUEST") == invalid


def test_malformed_messages_are_invalid_requests_on_every_method(locked: Server) -> None:
    for name in sorted(methods(locked)):
        assert status(locked, name, ALL_KEY, b"\xff\xff\xff") == "INVALID_ARGUMENT", name
