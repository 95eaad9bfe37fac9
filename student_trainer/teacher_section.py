"""The configuration's section about the teachers: where each is, what it is for, and how all are called."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from student_trainer.section import PositiveInt, Section


def _addresses(value: str | list[str] | None) -> str | list[str] | None:
    if value is not None and (not value or not all([value] if isinstance(value, str) else value)):
        raise ValueError("an address is empty; use host:port, a list of these, or null for the embedded teacher")
    return value


class TeacherRoute(Section):
    """A teacher for some of the examples."""

    endpoint: Annotated[str | list[str], AfterValidator(_addresses)]
    """Address of its server, or a list for replicas of it, as teacher.endpoint."""
    mode: Literal["thinking", "non_thinking"] | None = None
    """The mode that it is for; null is either."""
    domain: str | None = None
    """The domain that it is for, as data.domain_column has it; null is any."""
    fingerprint: str | None = None
    """Fingerprint that it must have; null takes whichever answers first and stays with it."""
    api_key_file: str | None = None
    """File with the key for this teacher; null takes teacher.api_key_file."""

    @model_validator(mode="after")
    def _some_scope(self) -> TeacherRoute:
        if self.mode is None and self.domain is None:
            raise ValueError("a route needs a mode, a domain or both; the teacher of all others is teacher.endpoint")
        return self


class Teacher(Section):
    """Where the teachers are, and how they are called."""

    endpoint: Annotated[str | list[str] | None, AfterValidator(_addresses)] = None
    """Address of a teacher server: host:port or grpc://host:port for gRPC, http://host:port for HTTP, grpcs:// and
    https:// for these with TLS, a list for replicas of one teacher, or dns://name:port, dns+http://name:port and the
    like for a name each of whose addresses is a replica; null starts models.teacher_model as a process of this run,
    unless there are routes."""
    routes: list[TeacherRoute] = Field(default_factory=list)
    """Further teachers, for a mode, a domain or both of them: a list of {endpoint, mode, domain, ...}. The most
    specific route wins: domain and mode, then domain, then mode, then teacher.endpoint for whatever has no route. All
    share the student's tokenizer. A run with several teachers needs distribution top_k."""
    fingerprint: str | None = None
    """Fingerprint that the teacher of `endpoint` must have; null takes whichever answers first and stays with it."""
    api_key_file: str = ""
    """File that holds the key for the teachers and nothing else; read again when it changes. The key itself is in no
    setting, because settings are logged and kept with checkpoints."""
    ca_file: str = ""
    """File with the authorities of the teachers' certificates, for grpcs:// and https://; empty takes the system's."""
    client_cert_file: str = ""
    """File with this trainer's certificate, where teachers want one (mutual TLS)."""
    client_key_file: str = ""
    """File with the private key of client_cert_file."""
    timeout_s: Annotated[float, Field(gt=0)] = 600
    """Seconds after which one call is given up."""
    patience: Annotated[float, Field(ge=0)] = 1800
    """Seconds for which a teacher that is down, loading or overloaded is waited for."""
    max_in_flight: PositiveInt = 4
    """Calls under way at the same time."""
    cache_dir: str | None = None
    """Folder that keeps the teacher's LM head between runs, where distribution is full; null takes
    $XDG_CACHE_HOME/strong2weak or ~/.cache/strong2weak."""
    server_args: list[str] = Field(default_factory=list)
    """Further command-line arguments of the server that the trainer starts itself."""

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Teacher:
        if bool(self.client_cert_file) != bool(self.client_key_file):
            raise ValueError("client_cert_file and client_key_file belong together; give both or none")
        return self

    @field_validator("routes")
    @classmethod
    def _one_for_each(cls, routes: list[TeacherRoute]) -> list[TeacherRoute]:
        seen: set[tuple[str | None, str | None]] = set()
        for route in routes:
            if (route.mode, route.domain) in seen:
                raise ValueError(
                    f"two routes are for mode {route.mode or 'any'} and domain {route.domain or 'any'}; keep one of "
                    "them, or give it both addresses as replicas: endpoint [a, b]"
                )
            seen.add((route.mode, route.domain))
        return routes
