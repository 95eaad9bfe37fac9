"""Every example of the README and of docs/ is checked, and run unless its page says why not; see examples.py."""

from __future__ import annotations

import pytest

from tests.docs.bodies import check_json, check_yaml
from tests.docs.commands import check
from tests.docs.desk import Desk
from tests.docs.examples import Example, examples, pages, problems, unfenced
from tests.docs.programs import Wrong

EXAMPLES = [example for page in pages() for example in examples(page)]


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_is_an_example_that_can_be_checked(page: str) -> None:
    wrong = [f"{e.name} {problem}" for e in examples(page) for problem in problems(e)]
    assert not wrong
    assert not unfenced(page)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_an_example_is_what_the_programs_understand(example: Example) -> None:
    script = example.why if example.how == "beside" else example.text
    if example.language == "bash" or example.how == "beside":
        try:
            check(script, frozenset(e.title for e in examples(example.page)))
        except Wrong as error:
            pytest.fail(f"{example.name}: {error}")
    elif example.language == "yaml":
        assert not check_yaml(example.text) or example.how == "not run", check_yaml(example.text)
    elif example.language == "json":
        assert not check_json(example.text) or example.how == "not run", check_json(example.text)
    if example.language == "python":
        compile(example.text, example.name, "exec")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("python -m teacher_server --model M --grpc-prot 1", "unknown argument --grpc-prot"),
        ("python -m teacher_server ping --adress x", "unrecognized arguments"),
        ("python main_distillation.py --stages all", "unrecognized arguments"),
        ("python main_distillation.py data.max_lenght=5", "max_length"),
        ("torchrun --nproc_per_node=2 main_distillation.py data.max_length=many", "max_length"),
        ("docker compose --profile gpu up teacher", "no profile gpu"),
        ("docker compose up student", "no service student"),
        ("pip install -e '.[servers]'", "no extra servers"),
        ("make tests", "no target tests"),
        ("curl http://127.0.0.1:8000/v2/score", "no route /v2/score"),
        ("""curl http://127.0.0.1:8000/v1/score -d '{"sequence": []}'""", "/v1/score"),
        ("""curl http://127.0.0.1:8000/tokenize -d '{"text": 1}'""", "/tokenize"),
        ("python benchmarks/load.py --quik", "no option --quik"),
        ("frobnicate --all", "nothing is known"),
    ],
)
def test_a_mistake_in_a_command_is_found(example: str, message: str) -> None:
    with pytest.raises(Wrong, match=message):
        check(example)


def test_a_mistake_in_settings_and_bodies_is_found() -> None:
    assert "max_lenght" in check_yaml("data: {max_lenght: 5}")
    assert "grpc_prot" in check_yaml("grpc_prot: 5")
    assert check_json('{"nothing": 1}')
    assert problems(examples("page.md", "<!-- not run: x -->\n```bash\nls\n```\n")[0])
    assert problems(examples("page.md", "<!-- run by tests/nowhere.py -->\n```bash\nls\n```\n")[0])
    assert problems(examples("page.md", "```\nls\n```\n")[0])


def is_run(example: Example) -> bool:
    """Whether the tests of this file run a block, or write it as a file, or compare it with what was printed."""
    if example.language in ("bash", "python"):
        return example.how in ("", "slow", "serves", "beside")
    return bool(example.title)


def run_page(desk: Desk, page: str, with_slow: bool) -> None:
    """Runs a page's blocks in order; those after a slow one that are not slow themselves do not need it."""
    printed: str | None = None
    for example in filter(is_run, examples(page)):
        if example.title == "prints":
            assert printed is None or printed.strip() == example.text.strip(), example.name
        elif example.title:
            target = desk.folder(page) / example.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(desk.as_written(example), encoding="utf-8")
        elif example.how == "serves":
            desk.serve(example)
        elif example.how == "slow" and not with_slow:
            printed = None
        else:
            if example.how == "beside":
                desk.serve(example)
            printed = desk.run(example)


RUN = [page for page in pages() if any(map(is_run, examples(page)))]
SLOW = [page for page in RUN if any(e.how == "slow" for e in examples(page))]


@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run_as_written(page: str, desk: Desk) -> None:
    run_page(desk, page, with_slow=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", SLOW)
def test_the_slow_examples_of_a_page_run_as_written(page: str, desk: Desk) -> None:
    run_page(desk, page, with_slow=True)
