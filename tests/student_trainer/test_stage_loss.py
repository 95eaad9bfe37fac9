"""From scores to a loss: parity of equal models over both transports, and the shift by one that must break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from protos.scores import Field, FinishReason, Message, Mode, Prompt, Sampling, TeacherInfo
from student_trainer.batches import Padded, Row, pad
from student_trainer.config import Config, NonPolicyDistillation, PolicyDistillation
from student_trainer.full_distribution import TeacherHead, tensor
from student_trainer.losses import Head
from student_trainer.models import load_student, load_tokenizer
from student_trainer.modes import render
from student_trainer.objective_forward import accept_objective
from student_trainer.stage_loss import METRICS, StageLoss
from student_trainer.teacher_client import TeacherClient, connect
from tests.student_trainer.conftest import STUDENT

CONFIG = Config.model_validate(
    {"models": {"student_model": str(STUDENT), "torch_dtype": "float32", "load_in_4bit": False}}
)


@pytest.fixture(scope="module")
def model() -> Any:
    return accept_objective(load_student(CONFIG)).eval()


@pytest.fixture(scope="module")
def other_student() -> Any:
    """A model that is not the teacher: the student with noise in its weights."""
    other = accept_objective(load_student(CONFIG)).eval()
    noise = torch.Generator().manual_seed(1)
    for weight in other.parameters():
        weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=noise)
    return other


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(CONFIG, STUDENT)


@pytest.fixture(scope="module", params=["grpc", "http"])
def client(request: pytest.FixtureRequest, student_as_teacher: dict[str, Any]) -> Iterator[TeacherClient]:
    with connect(student_as_teacher[request.param]) as connected:
        yield connected


@pytest.fixture(scope="module", params=list(Mode), ids=lambda mode: mode.value)
def rows(request: pytest.FixtureRequest, client: TeacherClient, tokenizer: Any) -> list[Row]:
    """Completions of the student in one mode, sampled hot, with ends and without."""
    prompts = [render(tokenizer, (Message("user", f"Calculate\n{i}+{i + 9}"),), request.param) for i in range(8)]
    asked = [Prompt(token_ids=p, mode=request.param) for p in prompts]
    found = client.generate(asked, Sampling(12, temperature=2.0, seed=3))
    assert {c[0].finish_reason for c in found} <= set(FinishReason)
    return [Row(np.concatenate([p, c[0].token_ids]), len(p)) for p, c in zip(prompts, found, strict=True)]


def measure(model: Any, loss: StageLoss, client: TeacherClient, rows: list[Row], shift: int = 0) -> dict[str, float]:
    """METRICS as means, with the hidden states' places moved by `shift`."""
    padded = pad(rows, 0)
    padded = Padded(padded.input_ids, padded.places + shift, padded.targets)
    scores = client.score([r.tokens() for r in rows], loss.spec)
    targets = loss.targets(padded.targets, scores, loss.spec.temperatures)
    with torch.no_grad():
        _, sums = model(
            input_ids=torch.from_numpy(padded.input_ids),
            places=torch.from_numpy(padded.places),
            objective=loss.on(targets),
        )
    return dict(zip(METRICS, (sums / len(padded.targets)).tolist(), strict=True))


def off(info: TeacherInfo, **options: Any) -> StageLoss:
    return StageLoss.off_policy(NonPolicyDistillation(**{"alpha": 1.0, "beta": 0.0, **options}), info.normalized_size)


def on(info: TeacherInfo, **options: Any) -> StageLoss:
    return StageLoss.on_policy(PolicyDistillation(**options), info.normalized_size)


def whole(client: TeacherClient) -> TeacherHead:
    """The teacher's head, fetched into memory."""
    head = client.head()
    return TeacherHead(Head(tensor(head.weight, head.dtype)), client.teacher().hidden_dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7, "beta": 0.3, "temperature": 3.0},
        {"loss": "reverse_kl", "temperature": 1.0},
        {"loss": "jsd", "jsd_beta": 0.3, "temperature": 2.0, "t_squared": True},
    ],
    ids=lambda o: f"{o.get('loss', 'forward_kl')} at {o['temperature']}",
)
def test_the_whole_distribution_gives_what_a_top_k_of_the_whole_vocabulary_gives(
    client: TeacherClient, rows: list[Row], other_student: Any, options: dict[str, Any]
) -> None:
    info, head = client.teacher(), whole(client)
    bucketed = off(info, top_k=info.vocab_size, **options)
    full = StageLoss.off_policy(
        NonPolicyDistillation(**{"alpha": 1.0, "beta": 0.0, "distribution": "full", **options}), 0, head
    )
    assert full.spec.fields(0) == {Field.HIDDEN_STATES}
    assert full.vocab_size == info.vocab_size == 305
    want, found = (measure(other_student, loss, client, rows) for loss in (bucketed, full))
    assert found["soft_loss"] > 0.03
    for metric in METRICS:
        assert found[metric] == pytest.approx(want[metric], abs=1e-5), metric


def test_a_loss_over_the_whole_distribution_needs_the_head(client: TeacherClient) -> None:
    with pytest.raises(ValueError, match="needs the teacher's LM head"):
        StageLoss.on_policy(PolicyDistillation(distribution="full"), client.teacher().normalized_size)


MAKERS: dict[str, Callable[[TeacherInfo], StageLoss]] = {
    "forward_kl at 3": lambda info: off(info, top_k=16),
    "jsd at 1": lambda info: off(info, loss="jsd", temperature=1.0, top_k=16),
    "reverse_kl at 2": lambda info: on(info, top_k=16),
    "reverse_kl over the vocabulary": lambda info: on(info, top_k=1000),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_student_that_is_the_teacher_has_no_divergence(
    model: Any, client: TeacherClient, rows: list[Row], name: str
) -> None:
    found = measure(model, MAKERS[name](client.teacher()), client, rows)
    for metric in ("soft_loss", "forward_kl", "reverse_kl"):
        assert abs(found[metric]) < 1e-5, (metric, found)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_is_noticed(model: Any, client: TeacherClient, rows: list[Row], shift: int) -> None:
    found = measure(model, on(client.teacher(), top_k=16), client, rows, shift)
    assert found["reverse_kl"] > 0.05


def test_stage_1_is_alpha_soft_plus_beta_hard(model: Any, client: TeacherClient, rows: list[Row]) -> None:
    found = measure(model, off(client.teacher(), alpha=0.7, beta=0.3, top_k=8), client, rows)
    assert found["loss"] == pytest.approx(0.7 * found["soft_loss"] + 0.3 * found["cross_entropy"], rel=1e-5)
    padded = pad(rows, 0)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(padded.input_ids)).logits.flatten(0, 1)[padded.places]
    size = client.teacher().normalized_size
    plain = torch.nn.functional.cross_entropy(logits[:, :size], torch.from_numpy(padded.targets))
    assert found["cross_entropy"] == pytest.approx(float(plain), rel=1e-4)


def test_without_alpha_the_teacher_is_asked_for_no_alternatives(client: TeacherClient) -> None:
    assert off(client.teacher(), alpha=0.0, beta=1.0).spec.top_k == 0


def test_an_objective_changes_nothing_where_none_is_given(model: Any, rows: list[Row]) -> None:
    ids = torch.from_numpy(pad(rows, 0).input_ids)
    plain = load_student(CONFIG).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
