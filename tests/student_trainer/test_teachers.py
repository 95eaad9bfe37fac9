"""Which teacher an example gets, which of them a run needs, and what a checkpoint says of them; without a server."""

from __future__ import annotations

from typing import Any

import pytest

from protos.scores import Mode
from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.opening import places
from student_trainer.teachers import Scope, Teacher, Teachers, choose, taught_by
from tests.student_trainer.live import teacher_info

THINKING, OTHER = Mode.THINKING, Mode.NON_THINKING
CLIENT: Any = None
"""Nobody is called here."""


def config(*routes: dict[str, str], endpoint: str | None = "all:1", **sections: Any) -> Config:
    return Config.model_validate({"teacher": {"endpoint": endpoint, "routes": list(routes)}, **sections})


def teachers(**fingerprints: str) -> Teachers:
    """Teachers by scope: `all`, `thinking`, `math`, `thinking_math`."""
    scopes = {
        "all": Scope(),
        "thinking": Scope(THINKING),
        "other": Scope(OTHER),
        "math": Scope(None, "math"),
        "thinking_math": Scope(THINKING, "math"),
    }
    return Teachers(
        [Teacher(CLIENT, teacher_info(name=f"t-{k}", fingerprint=f), scopes[k]) for k, f in fingerprints.items()]
    )


SCOPES = [Scope(), Scope(THINKING), Scope(None, "math"), Scope(THINKING, "math")]


@pytest.mark.parametrize(
    ("mode", "domain", "expected"),
    [
        (THINKING, "math", Scope(THINKING, "math")),
        (OTHER, "math", Scope(None, "math")),
        (THINKING, "code", Scope(THINKING)),
        (THINKING, None, Scope(THINKING)),
        (OTHER, "code", Scope()),
        (OTHER, None, Scope()),
    ],
)
def test_the_most_specific_scope_wins_whatever_the_order(mode: Mode, domain: str | None, expected: Scope) -> None:
    for scopes in (SCOPES, SCOPES[::-1]):
        found = choose(scopes, mode, domain)
        assert found is not None
        assert scopes[found] == expected


def test_domain_goes_before_mode() -> None:
    both = [Scope(THINKING), Scope(None, "math")]
    assert choose(both, THINKING, "math") == 1
    assert choose(both, OTHER, "code") is None


def test_what_has_no_teacher_is_refused_at_the_start_naming_mode_and_domain() -> None:
    routes = {"endpoint": "a:1", "mode": "thinking"}, {"endpoint": "b:1", "domain": "math"}
    with pytest.raises(UserError) as caught:
        places(config(*routes, endpoint=None), "all", {"math", "code", None})
    text = str(caught.value)
    assert text.startswith("teacher.routes: no teacher for mode non_thinking, domain none; ")
    assert "mode non_thinking, domain code" in text
    assert "thinking, domain math" not in text
    assert "set teacher.endpoint" in text
    only_thinking = {
        "non_policy_distillation": {"modes": "thinking"},
        "policy_distillation": {"thinking_prob": 1.0},
    }
    found = places(config(*routes, endpoint=None, **only_thinking), "all", {"math", "code", None})
    assert [(p.key, p.modes) for p in found] == [
        ("teacher.routes.0", {THINKING}),
        ("teacher.routes.1", {THINKING, OTHER}),
    ]


def test_without_routes_there_is_one_teacher_for_all_of_them() -> None:
    for endpoint in ("all:1", None):
        (place,) = places(config(endpoint=endpoint), "all", {"math", None})
        assert (place.key, place.scope, place.endpoint) == ("teacher.endpoint", Scope(), endpoint)
        assert place.modes == {THINKING, OTHER}


def test_each_place_has_the_modes_that_it_is_for(caplog: pytest.LogCaptureFixture) -> None:
    routes = (
        {"endpoint": "a:1", "mode": "thinking", "fingerprint": "fa"},
        {"endpoint": "b:1", "domain": "math"},
        {"endpoint": "c:1", "domain": "maths"},
    )
    found = {p.key: p for p in places(config(*routes), "all", {"math", None})}
    assert {key: place.modes for key, place in found.items()} == {
        "teacher.routes.0": {THINKING},
        "teacher.routes.1": {THINKING, OTHER},
        "teacher.endpoint": {OTHER},
    }
    assert found["teacher.routes.0"].fingerprint == "fa"
    assert found["teacher.endpoint"].fingerprint is None
    assert "teacher.routes.2 (domain maths) is no example's teacher and is not asked" in caplog.text
    assert "the data's domains are: math" in caplog.text


def test_an_example_finds_its_teacher_and_one_without_is_an_error() -> None:
    both = teachers(thinking="f1", math="f2")
    assert both.of(THINKING, None).info.fingerprint == "f1"
    assert both.of(OTHER, "math").info.fingerprint == "f2"
    assert both.modes_of("math") == (THINKING, OTHER)
    assert both.modes_of("code") == (THINKING,)
    assert both.name == "t-thinking and t-math"
    with pytest.raises(UserError, match="no teacher for mode non_thinking, domain code"):
        both.of(OTHER, "code")


def test_the_identity_changes_with_whoever_teaches_an_example() -> None:
    assert teachers(all="f1").identity == "f1"
    swapped = teachers(thinking="f1", other="f2"), teachers(thinking="f2", other="f1")
    assert swapped[0].identity != swapped[1].identity
    assert teachers(other="f2", thinking="f1").identity == swapped[0].identity


DOMAINS = {"math", None}


def about(known: Teachers) -> dict[str, Any]:
    return {"teachers": known.described()}


@pytest.mark.parametrize(
    ("before", "now", "which"),
    [
        (
            {"thinking": "f1", "other": "f2"},
            {"thinking": "f2", "other": "f1"},
            "teacher f1 for thinking, this one is f2",
        ),
        ({"all": "f1"}, {"all": "f1", "math": "f2"}, "teacher f1 for thinking, domain math, this one is f2"),
        ({"all": "f1", "math": "f2"}, {"all": "f1"}, "teacher f2 for thinking, domain math, this one is f1"),
        ({"all": "f1", "thinking_math": "f2"}, {"all": "f1", "math": "f2"}, "f1 for non_thinking, domain math"),
        ({"all": "f1"}, {"all": "f2"}, "the checkpoint was trained with teacher f1, this one is f2"),
        ({"all": "f1"}, {"thinking": "f1"}, "teacher f1, this one is none"),
    ],
)
def test_a_checkpoint_is_not_continued_where_any_example_would_get_another_teacher(
    before: dict[str, str], now: dict[str, str], which: str
) -> None:
    with pytest.raises(UserError, match="with --pretrained_student") as caught:
        teachers(**now).check_same(about(teachers(**before)), DOMAINS, "checkpoint-3")
    assert which in str(caught.value)
    assert str(caught.value).startswith("checkpoint-3: ")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"thinking": "f1", "other": "f2"}, {"other": "f2", "thinking": "f1"}),
        ({"all": "f1", "thinking": "f2"}, {"other": "f1", "thinking": "f2"}),
        ({"all": "f1"}, {"thinking": "f1", "other": "f1"}),
    ],
)
def test_it_is_continued_where_all_examples_have_the_teachers_that_they_had(
    before: dict[str, str], now: dict[str, str]
) -> None:
    teachers(**now).check_same(about(teachers(**before)), DOMAINS, "checkpoint-3")


def test_a_folder_of_before_there_were_routes_names_a_single_teacher() -> None:
    old = {"teacher": {"name": "t", "fingerprint": "f1"}}
    assert taught_by(old) == [(Scope(), "t", "f1")]
    assert taught_by({}) == []
    teachers(all="f1").check_same(old, DOMAINS, "x")
    with pytest.raises(UserError, match="trained with teacher f1, this one is f2"):
        teachers(all="f2").check_same(old, DOMAINS, "x")
