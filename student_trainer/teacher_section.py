"""The configuration's section about the teachers: where each is, what it is for, and how all are called."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from student_trainer.section import PositiveInt, Section


def _addresses(value: str | list[str] | None) -> str | list[str] | None:
    if value is not None and (not value or not all([value] if isinstance(value, str) else value)):
        raise ValueError("an address is empty; use host:port, a list of these, or null for the embedded teacher")
    return value


Kind = Literal["strong2weak", "openai"]


def _check_kind(kind: Kind, endpoint: str | list[str] | None, model: str | None, normalized_size: int | None) -> None:
    """ValueError for an address at which no server of this kind can be, and for settings that it has no use for."""
    if kind == "strong2weak":
        given = "model" if model is not None else "normalized_size" if normalized_size is not None else ""
        if given:
            raise ValueError(f"{given} is for a stock server, a strong2weak teacher tells it; set kind=openai for one")
        return
    addresses = [endpoint] if isinstance(endpoint, str) else endpoint or []
    if not addresses:
        raise ValueError("kind openai is a server that runs already; set endpoint to its address, http://host:port")
    for address in addresses:
        if not address.removeprefix("dns+").startswith(("http://", "https://")):
            raise ValueError(f"kind openai is asked over HTTP; use http://host:port instead of {address}")


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
    kind: Kind | None = None
    """What kind of server it is, as teacher.kind; null takes that."""
    model: str | None = None
    """Name of the model at a server of kind openai; null takes its only one."""
    normalized_size: PositiveInt | None = None
    """As teacher.normalized_size; null asks the server."""

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
    kind: Kind = "strong2weak"
    """What kind of server the endpoint is: strong2weak, or openai for a stock vLLM or SGLang server at an http:// or
    https:// address. It gives the top k at temperature 1; docs/stock-servers.md says what it cannot."""
    model: str | None = None
    """Name of the model at a server of kind openai; null takes its only one. strong2weak servers have one each."""
    normalized_size: PositiveInt | None = None
    """Number of logits that a server of kind openai normalises over, vocab_size of its model's config.json; null asks
    it, and takes the student's where it does not tell."""
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

    @model_validator(mode="after")
    def _kinds(self) -> Teacher:
        if self.endpoint is not None or not self.routes:
            _check_kind(self.kind, self.endpoint, self.model, self.normalized_size)
        for route in self.routes:
            _check_kind(route.kind or self.kind, route.endpoint, route.model, route.normalized_size)
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
