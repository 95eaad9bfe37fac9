"""A server that is asked as a stock one: here our own through its OpenAI face, which has vLLM's shapes."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from protos import errors
from protos.scores import Field, Message, Mode, Prompt, Sampling, ScoreSpec, Sequence, ids_array
from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.handshake import check
from student_trainer.models import Description, describe
from student_trainer.run import run
from student_trainer.settings import load_config
from student_trainer.stock_teacher import check_config, check_limits, stock_model
from student_trainer.teacher_client import StockModel, TeacherClient, connect, openai_channel
from student_trainer.teacher_client.openai_channel import OpenAiTransport
from student_trainer.teacher_client.openai_scores import TAIL_RESOLUTION
from teacher_server.backends.byte_text import ByteText
from tests.servers import serving, theory
from tests.student_trainer.conftest import STUDENT
from tests.student_trainer.test_stages import settings

REAL = 305
"""Real tokens of the tiny pair: what our server normalises over, of 320 logits."""


@pytest.fixture(scope="module")
def student() -> Description:
    return describe(Config.model_validate({"models": {"student_model": str(STUDENT)}}), STUDENT)


@pytest.fixture(scope="module")
def model(student: Description) -> StockModel:
    return stock_model(student, None, REAL)


@pytest.fixture(scope="module")
def client(pair_teacher: dict[str, Any], model: StockModel) -> Iterator[TeacherClient]:
    with connect(f"{pair_teacher['http']}/v1", stock=model, patience_s=0) as client:
        yield client


@pytest.fixture(scope="module")
def wire(pair_teacher: dict[str, Any]) -> Iterator[TeacherClient]:
    """The same server over its own wire."""
    with connect(pair_teacher["grpc"]) as client:
        yield client


def ids(model: StockModel) -> list[int]:
    return model.encode("<|im_start|>user\nCalculate 2+34<|im_end|>\n<|im_start|>assistant\n<think>\n2+34=36\n</think>")


def test_it_is_described_as_far_as_it_can_be_asked(
    client: TeacherClient, wire: TeacherClient, model: StockModel, student: Description
) -> None:
    info, own = client.teacher(), wire.teacher()
    assert (info.name, info.vocab_size, info.normalized_size) == (own.name, own.vocab_size, own.normalized_size)
    assert (info.tokenizer_hash, info.template_hash, info.modes) == (own.tokenizer_hash, own.template_hash, own.modes)
    assert info.limits.sequence_tokens == own.limits.sequence_tokens - 1
    assert (info.limits.candidates, info.can_generate) == (0, True)
    assert info.fields == {Field.TOKEN_LOGPROBS, Field.TOP, Field.TAIL_LOGPROB, Field.LOG_NORMALIZER}
    assert info.fingerprint.startswith("stock-")
    plain = Config.model_validate(ONE)
    check(info, student.tokenizer, student.logits_width, plain, eos_ids=student.eos_ids)


def test_its_scores_are_those_of_the_wire(client: TeacherClient, wire: TeacherClient, model: StockModel) -> None:
    asked = [Sequence(ids(model), 3), Sequence(ids(model)[:9])]
    for one, other in zip(client.score(asked, ScoreSpec(8)), wire.score(asked, ScoreSpec(8)), strict=True):
        for name in ("token_logprobs", "top_logprobs", "log_normalizer"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
        assert (one.top_token_ids == other.top_token_ids).all()
        assert one.tail_logprob is not None
        assert other.tail_logprob is not None
        mass, exact = np.exp(one.tail_logprob, dtype=np.float64), np.exp(other.tail_logprob, dtype=np.float64)
        assert (abs(mass - exact) <= TAIL_RESOLUTION + 1e-3 * exact).all()


def test_its_greedy_completions_are_those_of_the_wire(
    client: TeacherClient, wire: TeacherClient, model: StockModel
) -> None:
    prompts = [Prompt(token_ids=ids(model)[:27]), Prompt(token_ids=ids(model)[:30])]
    greedy = Sampling(16, temperature=0)
    pairs = zip(client.generate(prompts, greedy, n=2), wire.generate(prompts, greedy, n=2), strict=True)
    for one, other in (pair for row in pairs for pair in zip(*row, strict=True)):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.prompt_token_ids.tolist() == other.prompt_token_ids.tolist()


def test_its_samples_have_seeds_log_probabilities_and_stop_ids(client: TeacherClient, model: StockModel) -> None:
    prompt = [Prompt(text="1")]
    first, again = (client.generate(prompt, Sampling(8, 2.0, seed=5), n=2, logprobs=True)[0] for _ in range(2))
    assert [one.token_ids.tolist() for one in first] == [one.token_ids.tolist() for one in again]
    assert first[0].token_ids.tolist() != first[1].token_ids.tolist()
    whole = np.concatenate([first[0].prompt_token_ids, first[0].token_ids])
    np.testing.assert_allclose(
        first[0].logprobs, client.score([Sequence(whole)])[0].token_logprobs[-len(first[0].token_ids) :], atol=1e-4
    )
    second = int(first[0].token_ids[1])
    (cut,) = client.generate(prompt, Sampling(8, 2.0, seed=5, stop_token_ids=(second,)))[0]
    assert int(cut.token_ids[-1]) == second


Ask = Callable[[TeacherClient, StockModel], Any]
REFUSED: list[tuple[Ask, type[errors.TeacherError], str]] = [
    (lambda c, m: c.score([Sequence(ids(m))], ScoreSpec(8, (1.0, 2.0))), errors.Unsupported, r"at temperature 2 can"),
    (lambda c, m: c.score([Sequence([1, 2], 1, [[3]])]), errors.Unsupported, "names 1 candidates"),
    (
        lambda c, m: c.score([Sequence([1, 2])], ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))),
        errors.Unsupported,
        "cannot give hidden_states",
    ),
    (lambda c, m: c.score([Sequence([1, 2])], ScoreSpec(306)), errors.TooLarge, r"top_k is 306, .* --max-logprobs 306"),
    (lambda c, m: c.score([Sequence([1, 2]), Sequence([1, 310])]), errors.InvalidSequence, "sequence 1 .* id 310"),
    (lambda c, m: c.generate([Prompt(token_ids=[-1])], Sampling(1)), errors.InvalidSequence, "prompt 0 .* id -1"),
    (
        lambda c, m: c.generate([Prompt((Message("user", "a"),))], Sampling(1)),
        errors.Unsupported,
        "render the messages",
    ),
    (
        lambda c, m: c.generate([Prompt(token_ids=[1])], Sampling(1, max_thinking_tokens=4)),
        errors.Unsupported,
        "no max_thinking_tokens",
    ),
    (lambda c, m: c.head(), errors.Unsupported, "gives no LM head"),
]


@pytest.mark.parametrize(("ask", "kind", "text"), REFUSED)
def test_what_such_a_server_cannot_do_is_refused(
    client: TeacherClient, model: StockModel, ask: Ask, kind: type[errors.TeacherError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        ask(client, model)


def test_another_tokenizer_is_told_by_texts_and_by_ids(pair_teacher: dict[str, Any], model: StockModel) -> None:
    def swapped(given: Any, plain: bool) -> str:
        return model.decode([{65: 66, 66: 65}.get(i, i) for i in given], plain)

    with pytest.raises(errors.TeacherMismatch, match=r"another tokenizer .* the token id 65 is"):
        connect(pair_teacher["http"], stock=replace(model, decode=swapped))
    with pytest.raises(errors.TeacherMismatch, match=r"another tokenizer .* its token \d+ is"):
        connect(pair_teacher["http"], stock=replace(model, encode=lambda text: [*model.encode(text)[:-1], 0]))


def test_a_model_that_it_does_not_serve_is_another_teacher(pair_teacher: dict[str, Any], model: StockModel) -> None:
    with pytest.raises(errors.TeacherMismatch, match=r"serves .*, not gpt"):
        connect(pair_teacher["http"], stock=replace(model, served="gpt"))


def byte_model() -> StockModel:
    """What the theoretical teacher is, whose tokens are bytes."""
    text = ByteText()
    return StockModel(
        vocab_size=text.vocab_size,
        logits_width=text.vocab_size,
        eos_token_ids=text.eos_token_ids,
        tokenizer_hash=text.tokenizer_hash,
        template_hash=text.template_hash,
        modes=text.modes,
        encode=lambda given: text.encode(given).tolist(),
        decode=lambda given, plain: text.decode(ids_array(given), special=not plain),
    )


def test_a_server_that_comes_back_as_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(theory()) as server:
        address = server.http
        client = connect(address, stock=byte_model(), patience_s=30)
        client.score([Sequence([1, 2, 3])])
    port = int(address.rpartition(":")[2])
    monkeypatch.setattr(openai_channel, "QUIET_S", 0.0)
    other = serving(theory(name="second"), http_port=port)
    text = r"has the fingerprint stock-\w+, the call expects stock-"
    with other, client, pytest.raises(errors.TeacherMismatch, match=text):
        client.score([Sequence([1, 2, 3])])


def test_a_server_that_never_answers_passes_the_deadline(model: StockModel) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        transport = OpenAiTransport(f"http://127.0.0.1:{silent.getsockname()[1]}", model)
        with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.\d+ s"):
            transport.teacher(0.3)
        transport.close()


def test_an_address_without_http_is_refused(model: StockModel) -> None:
    with pytest.raises(ValueError, match="no address of an OpenAI server"):
        connect("127.0.0.1:8000", stock=model)


ONE: dict[str, dict[str, Any]] = {
    "data": {"max_length": 96},
    "non_policy_distillation": {"temperature": 1.0, "top_k": 8},
    "policy_distillation": {"temperature": 1.0, "top_k": 8},
}
"""A configuration whose scores such a server can give."""

CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("non_policy_distillation", {"temperature": 3.0}, "set non_policy_distillation.temperature=1.0, or use a strong"),
    ("policy_distillation", {"temperature": 2.0}, "set policy_distillation.temperature=1.0"),
    ("non_policy_distillation", {"distribution": "full"}, "non_policy_distillation.distribution is full"),
    ("policy_distillation", {"distribution": "full"}, "policy_distillation.distribution is full"),
    ("policy_distillation", {"support": "student"}, "set policy_distillation.support=teacher"),
]


@pytest.mark.parametrize(("section", "values", "text"), CONFIGS)
def test_a_configuration_that_needs_more_is_refused_at_the_start(
    section: str, values: dict[str, Any], text: str
) -> None:
    check_config(Config.model_validate(ONE), "all", "teacher.endpoint")
    with pytest.raises(UserError, match=text):
        check_config(Config.model_validate(ONE | {section: ONE[section] | values}), "all", "teacher.endpoint")


def test_a_policy_gradient_needs_no_more_than_such_a_server_gives() -> None:
    values = ONE["policy_distillation"] | {"loss": "policy_gradient"}
    check_config(Config.model_validate(ONE | {"policy_distillation": values}), "all", "teacher.endpoint")


def test_its_limits_are_refused_with_the_engines_options(client: TeacherClient) -> None:
    small = replace(client.teacher(), limits=replace(client.teacher().limits, sequence_tokens=511, top_k=20))
    check_limits(small, Config.model_validate(ONE), "teacher.endpoint")
    long = Config.model_validate(ONE | {"data": {"max_length": 600}})
    with pytest.raises(UserError, match=r"at most 511 tokens .* --max-model-len or SGLang's --context-length 601"):
        check_limits(small, long, "teacher.endpoint")
    wide = Config.model_validate(ONE | {"policy_distillation": {"temperature": 1.0, "top_k": 64}})
    with pytest.raises(UserError, match=r"policy_distillation.top_k is 64; .* start vLLM with --max-logprobs 64"):
        check_limits(small, wide, "teacher.endpoint")


SECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "openai"}, "set endpoint to its address"),
    ({"kind": "openai", "endpoint": "host:8000"}, "use http://host:port instead of host:8000"),
    ({"endpoint": "host:8000", "model": "m"}, "model is for a stock server"),
    ({"endpoint": "http://host:8000", "normalized_size": 9}, "normalized_size is for a stock server"),
    ({"routes": [{"kind": "openai", "endpoint": "grpc://a:1", "mode": "thinking"}]}, "use http://host:port instead of"),
]


@pytest.mark.parametrize(("teacher", "text"), SECTIONS)
def test_a_teacher_section_that_means_no_server_is_refused(teacher: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        load_config(None, [f"teacher.{key}={value}" for key, value in teacher.items()], {})


def test_names_and_lists_of_stock_servers_are_addresses_too() -> None:
    for endpoint in ("http://a:1/v1", ["https://a:1", "http://b:2/v1"], "dns+http://a:1"):
        Config.model_validate({"teacher": {"kind": "openai", "endpoint": endpoint}})


def stock_settings(folder: Path, http: str, **sections: dict[str, Any]) -> Config:
    """A run of a few steps with a server that is asked as a stock one."""
    teacher = {"endpoint": f"{http}/v1", "kind": "openai", "normalized_size": REAL, "patience": 5}
    one = {"temperature": 1.0, "num_epochs": 1}
    given = {"non_policy_distillation": one, "policy_distillation": one, "teacher": teacher} | sections
    return settings(folder, http, **given)


def test_stage_test_says_what_kind_of_teacher_it_is(pair_teacher: dict[str, Any], tmp_path: Path) -> None:
    shown = io.StringIO()
    run(stock_settings(tmp_path, pair_teacher["http"]), "test", None, Console(file=shown, width=300))
    text = shown.getvalue()
    assert "through its OpenAI interface; it is asked at temperature 1 alone" in text
    assert "does not tell its weights" in text
    for line in ("(stock OpenAI server through its OpenAI interface", "── score", "── thinking", "── non-thinking"):
        assert line in text


@pytest.mark.slow
def test_both_stages_train_and_go_on_with_the_same_scores(pair_teacher: dict[str, Any], tmp_path: Path) -> None:
    shown = io.StringIO()
    config = stock_settings(tmp_path, pair_teacher["http"], data={"max_examples": 8})
    run(config, "all", None, Console(file=shown, width=200))
    for row in ("teacher", "student before", "after stage 1", "after stage 2"):
        assert row in shown.getvalue()
    kept = [file.stat().st_size for file in sorted((tmp_path / "outputs").rglob("scores-*.idx"))]
    again = config.model_copy(update={"training": config.training.model_copy(update={"resume": True})})
    run(again, "all", None, Console(file=io.StringIO(), width=200))
    assert [file.stat().st_size for file in sorted((tmp_path / "outputs").rglob("scores-*.idx"))] == kept
    assert Mode.THINKING in config_modes(config)


def config_modes(config: Config) -> tuple[Mode, ...]:
    """The modes that the student's template knows."""
    return stock_model(describe(config, STUDENT), None, None).modes
