"""Which teacher answers for which example: one for all, or several by mode and by domain.

What a run hands around in place of a client. An example's teacher is the most specific one that fits: by domain and
mode, then by domain, then by mode, then the one for all others. Knows clients and descriptions; which of them the
configuration asks for, and whether they fit, is opening.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from protos.scores import Ids, Mode, Scores, ScoreSpec, TeacherInfo

from .batches import Row
from .errors import UserError
from .full_distribution import TeacherHead
from .teacher_client import TeacherClient


class Scope(NamedTuple):
    """What a teacher is for: one mode, one domain of the data, both, or (None) any."""

    mode: Mode | None = None
    domain: str | None = None

    def __str__(self) -> str:
        parts = [self.mode.value] if self.mode else []
        parts += [] if self.domain is None else [f"domain {self.domain}"]
        return ", ".join(parts) or "all others"


EVERYTHING = Scope()


def choose(scopes: Sequence[Scope], mode: Mode | None, domain: str | None) -> int | None:
    """The index of the most specific of `scopes` that holds (mode, domain), or None. No two scopes are equal."""
    fitting = (i for i, s in enumerate(scopes) if s.mode in (None, mode) and s.domain in (None, domain))
    return max(fitting, key=lambda i: (scopes[i].domain is not None, scopes[i].mode is not None), default=None)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher that was opened and checked: how to call it, who it is, what it is for."""

    client: TeacherClient
    info: TeacherInfo
    scope: Scope = EVERYTHING
    head: TeacherHead | None = None
    """Its LM head, where a stage trains on its whole distribution."""


class Pending(NamedTuple):
    """A score that was asked for: entry `place` of what `future` gives."""

    future: Future[list[Scores]]
    place: int

    def result(self) -> Scores:
        """Waits for it; raises what the teacher's client raises."""
        return self.future.result()[self.place]


class Teachers:
    """The teachers of a run, at least one; they share vocabulary and normalised size."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.all = tuple(teachers)
        self._scopes = [t.scope for t in self.all]

    def find(self, mode: Mode | None, domain: str | None) -> Teacher | None:
        """The teacher of what is in `mode` and `domain`, or None where there is none."""
        index = choose(self._scopes, mode, domain)
        return None if index is None else self.all[index]

    def of(self, mode: Mode | None, domain: str | None) -> Teacher:
        """The same; UserError where there is none."""
        teacher = self.find(mode, domain)
        if teacher is None:
            raise nobody([(mode, domain)])
        return teacher

    @property
    def vocab_size(self) -> int:
        """Real tokens, the same for all."""
        return self.all[0].info.vocab_size

    @property
    def normalized_size(self) -> int:
        """Number of logits that probabilities are normalised over, the same for all."""
        return self.all[0].info.normalized_size

    @property
    def head(self) -> TeacherHead | None:
        """The only teacher's LM head, where the run trains on its whole distribution."""
        return self.all[0].head

    @property
    def name(self) -> str:
        """The names of all, for people."""
        return " and ".join(dict.fromkeys(t.info.name for t in self.all))

    def by_scope(self) -> dict[str, TeacherInfo]:
        """Each one's description by what it is for; by "" where it is the only one."""
        return {str(t.scope) if len(self.all) > 1 else "": t.info for t in self.all}

    @property
    def identity(self) -> str:
        """A text that is another one as soon as any example has another teacher: one teacher's is its fingerprint."""
        if self._scopes == [EVERYTHING]:
            return self.all[0].info.fingerprint
        return "\n".join(sorted(f"{t.scope}: {t.info.fingerprint}" for t in self.all))

    def modes_of(self, domain: str | None) -> tuple[Mode, ...]:
        """The modes in which a problem of `domain` can be answered: those that have a teacher that knows them."""
        found = ((mode, self.find(mode, domain)) for mode in Mode)
        return tuple(mode for mode, t in found if t is not None and mode in (t.info.modes or tuple(Mode)))

    def submit_score(
        self, rows: Sequence[Row], spec: ScoreSpec, candidates: Sequence[Ids | None] | None = None
    ) -> list[Pending]:
        """Asks each row's teacher for its score, all at once, one call for each teacher; in the order of `rows`.

        `candidates` int32[R,K] of each row are the ids that its teacher is asked about.
        """
        groups: dict[Teacher, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(self.of(row.mode, row.domain), []).append(i)
        found: dict[int, Pending] = {}
        for teacher, places in groups.items():
            sequences = [rows[i].tokens(None if candidates is None else candidates[i]) for i in places]
            future = teacher.client.submit_score(sequences, spec)
            found.update((i, Pending(future, place)) for place, i in enumerate(places))
        return [found[i] for i in range(len(rows))]

    def described(self) -> list[dict[str, Any]]:
        """Name, fingerprint, mode and domain of each, as training_config.json keeps them."""
        return [
            {
                "name": t.info.name,
                "fingerprint": t.info.fingerprint,
                "mode": t.scope.mode and t.scope.mode.value,
                "domain": t.scope.domain,
            }
            for t in self.all
        ]

    def check_same(self, about: Mapping[str, Any], domains: Iterable[str | None], where: str) -> None:
        """Raises UserError where an example of `domains` had another teacher in the training that `about` describes."""
        before, every = taught_by(about), sorted(set(domains), key=lambda d: d or "")
        scopes = [scope for scope, _, _ in before]
        for mode in Mode:
            for domain in every:
                teacher, index = self.find(mode, domain), choose(scopes, mode, domain)
                fingerprint = teacher and teacher.info.fingerprint
                known = None if index is None else before[index][2]
                if fingerprint != known:
                    which = f" for {Scope(mode, domain)}" if len(self.all) + len(before) > 2 else ""
                    raise UserError(
                        f"the checkpoint was trained with teacher {known or 'none'}{which}, "
                        f"this one is {fingerprint or 'none'}",
                        where,
                        "start the same teacher, or begin a new run from its weights with --pretrained_student",
                    )


def taught_by(about: Mapping[str, Any]) -> list[tuple[Scope, str, str]]:
    """(scope, name, fingerprint) of the teachers that a training_config.json names; older ones name a single one."""
    found = about.get("teachers") or [about["teacher"]] if about.get("teachers") or about.get("teacher") else []
    return [
        (Scope(Mode(t["mode"]) if t.get("mode") else None, t.get("domain")), str(t["name"]), str(t["fingerprint"]))
        for t in found
    ]


def nobody(missing: Sequence[tuple[Mode | None, str | None]]) -> UserError:
    """The error that these combinations of mode and domain have no teacher."""
    names = "; ".join(f"mode {mode.value if mode else 'any'}, domain {domain or 'none'}" for mode, domain in missing)
    return UserError(
        f"no teacher for {names}",
        "teacher.routes",
        "add a route for this, or set teacher.endpoint to the teacher of all that has no route",
    )
