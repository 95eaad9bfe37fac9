"""Opens the teachers that a run needs: which routes serve its examples, a client of each, each one's own handshake.

Everything that does not fit is refused before anything is computed, and the message names the teacher and the key that
it comes from. Knows the configuration and the modes and domains of the data, no example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from protos import errors
from protos.scores import Mode, TeacherInfo

from . import distributed, embedded_teacher, full_distribution, handshake, stock_teacher
from .config import Config
from .errors import UserError
from .models import Description
from .reporting import Reporter
from .teacher_client import Credentials, StockModel, TeacherClient, connect
from .teacher_client.tracing import NO_TRACER, Tracer
from .teachers import Scope, Teacher, Teachers, choose, nobody

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a teacher is to be found (None: this run starts it), and what it is for.

    `key` is the setting that names it, `modes` those in which examples of the data are its own. A `stock` one is asked
    as an OpenAI server for the model called `served`, which normalises over `normalized_size` logits.
    """

    key: str
    scope: Scope
    endpoint: str | list[str] | None
    fingerprint: str | None
    api_key_file: str
    modes: frozenset[Mode]
    stock: bool = False
    served: str | None = None
    normalized_size: int | None = None


def places(config: Config, stage: str, domains: Collection[str | None]) -> list[Place]:
    """The teachers that a run of `stage` on examples of these domains has; UserError where it lacks one.

    A route that no example needs is left out, with a line.
    """
    teacher = config.teacher
    none: frozenset[Mode] = frozenset()
    found = [
        Place(
            f"teacher.routes.{i}",
            Scope(Mode(r.mode) if r.mode else None, r.domain),
            r.endpoint,
            r.fingerprint,
            teacher.api_key_file if r.api_key_file is None else r.api_key_file,
            none,
            (r.kind or teacher.kind) == "openai",
            r.model,
            r.normalized_size,
        )
        for i, r in enumerate(teacher.routes)
    ]
    if teacher.endpoint is not None or not teacher.routes:
        named, key_file, stock = teacher.fingerprint, teacher.api_key_file, teacher.kind == "openai"
        main = Place("teacher.endpoint", Scope(), teacher.endpoint, named, key_file, none, stock)
        found.append(replace(main, served=teacher.model, normalized_size=teacher.normalized_size))
    scopes, needed = [place.scope for place in found], handshake.needed_modes(config, stage)
    modes: list[set[Mode]] = [set() for _ in found]
    missing = []
    for mode, domain in product(Mode, sorted(domains, key=lambda d: d or "")):
        index = choose(scopes, mode, domain)
        if index is not None:
            modes[index].add(mode)
        elif mode in needed:
            missing.append((mode, domain))
    if missing:
        raise nobody(missing)
    for place, used in zip(found, modes, strict=True):
        if not used:
            there = ", ".join(sorted(d for d in domains if d is not None)) or "none"
            text = "%s (%s) is no example's teacher and is not asked; the data's domains are: %s"
            log.warning(text, place.key, place.scope, there)
    return [replace(place, modes=frozenset(used)) for place, used in zip(found, modes, strict=True) if used]


def open_teachers(
    config: Config,
    stage: str,
    student: Description,
    domains: Collection[str | None],
    reporter: Reporter,
    device: Callable[[], torch.device],
    stack: ExitStack,
    tracer: Tracer = NO_TRACER,
) -> Teachers:
    """The teachers of a run, checked against the student; their clients are closed with `stack`."""
    wanted = places(config, stage, domains)
    for place in wanted:
        if place.stock:
            stock_teacher.check_config(config, stage, place.key)
    full = stage != "test" and config.wants_full(stage)
    if full and len(wanted) > 1:
        names = ", ".join(f"{place.key} ({place.scope})" for place in wanted)
        raise UserError(
            f"distribution full takes one teacher, whose LM head the student's device holds; the data has {names}",
            "teacher.routes",
            "set distribution to top_k in both stages, or keep one teacher",
        )
    opened = [_open(config, stage, student, place, len(wanted), reporter, stack, tracer) for place in wanted]
    _check_together(wanted, [teacher.info for teacher in opened])
    if full:
        (one,) = opened
        head = full_distribution.fetch(config, one.client, device())
        opened = [Teacher(one.client, one.info, one.scope, head)]
    return Teachers(opened)


def _open(
    config: Config,
    stage: str,
    student: Description,
    place: Place,
    count: int,
    reporter: Reporter,
    stack: ExitStack,
    tracer: Tracer,
) -> Teacher:
    address = place.endpoint
    on_wait: Callable[[str], None] = reporter.waiting

    def start_one() -> str:
        nonlocal on_wait
        embedded = stack.enter_context(embedded_teacher.start(config, reporter.waiting))
        on_wait = embedded.watching(reporter.waiting)  # a teacher of our own that has died is not waited for
        return embedded.grpc

    if address is None:  # only rank 0 runs the function, so only rank 0 owns the server; the others get its address
        address = distributed.on_main(start_one)
    label = f"{place.key} ({place.scope})" if count > 1 else ""
    stock = stock_teacher.stock_model(student, place.served, place.normalized_size) if place.stock else None
    client = _connect(config, place, address, label, on_wait, tracer, stock)
    stack.callback(client.close)
    info = client.teacher()
    who = f", for {place.scope}" if count > 1 else ""
    log.info("teacher %s (%s, %s)%s, fingerprint %s", info.name, info.engine, info.dtype, who, info.fingerprint)
    if place.stock:
        stock_teacher.check_limits(info, config, place.key)
    use = handshake.Use(label, f"{place.key.removesuffix('.endpoint')}.fingerprint", place.fingerprint, place.modes)
    handshake.check(
        info, student.tokenizer, student.logits_width, config, eos_ids=student.eos_ids, stage=stage, use=use
    )
    return Teacher(client, info, place.scope)


def _connect(
    config: Config,
    place: Place,
    address: str | list[str],
    label: str,
    on_wait: Callable[[str], None],
    tracer: Tracer,
    stock: StockModel | None,
) -> TeacherClient:
    """A client; a teacher that this run started itself listens on loopback and knows no key."""
    files = {name: getattr(config.teacher, name) for name in ("ca_file", "client_cert_file", "client_key_file")}
    try:
        own = place.endpoint is None
        credentials = None if own else Credentials(api_key_file=place.api_key_file, **files)
        return connect(
            address,
            timeout_s=config.teacher.timeout_s,
            patience_s=config.teacher.patience,
            max_in_flight=config.teacher.max_in_flight,
            name=f"trainer-{Path(config.training.output_dir).name}-{distributed.rank()}",
            on_wait=on_wait,
            credentials=credentials,
            tracer=tracer,
            stock=stock,
        )
    except ValueError as error:
        raise UserError(str(error), label or "teacher") from error
    except errors.TeacherError as error:
        if not label:
            raise
        raise type(error)(f"{label}: {error.message}") from error


def _check_together(wanted: Sequence[Place], infos: Sequence[TeacherInfo]) -> None:
    """Refuses teachers whose probabilities are not over the same logits; says where two are one model."""
    for i, info in enumerate(infos):
        if info.normalized_size != infos[0].normalized_size:
            raise UserError(
                f"teacher {info.name} at {wanted[i].key} normalises over {info.normalized_size} logits, "
                f"{infos[0].name} at {wanted[0].key} over {infos[0].normalized_size}",
                "teacher.routes",
                "serve all of them with backends that mask the padded vocabulary",
            )
        for earlier in range(i):
            if infos[earlier].fingerprint == info.fingerprint:
                text = "%s and %s are the same model (%s); where they are replicas, one route with both is faster"
                log.warning(text, wanted[earlier].key, wanted[i].key, info.fingerprint)
