"""Configuration: sources and their order, the documented defaults, one line for everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.settings import _all_keys, create_config, load_config, to_yaml
from student_trainer.teacher_section import TeacherRoute

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def lines(**arguments: Any) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(UserError) as caught:
        load_config(arguments.get("file"), arguments.get("overrides", []), arguments.get("environment", {}))
    return str(caught.value).splitlines()


DOCUMENT = """
models:
  teacher_model: "Qwen/Qwen3-235B-A22B"    # teacher
  student_model: "Qwen/Qwen3-8B"
  load_in_4bit: true
  torch_dtype: "bfloat16"
data:
  data_path: "dataset/train-00000-of-00001-cae87f8e074b4b5d.json"
  max_length: 2048
  val_ratio: 0.1
non_policy_distillation:
  num_epochs: 3
  batch_size: 4
  learning_rate: 5e-5
  temperature: 3.0
  alpha: 0.7
  beta: 0.3
policy_distillation:
  num_epochs: 5
  learning_rate: 1e-5
  temperature: 2.0
  thinking_prob: 0.5
training:
  use_wandb: false
  wandb_project: "qwen3-distillation"
"""


def test_the_defaults_are_those_of_the_users_document(folder: Path) -> None:
    assert load_config(write(folder, DOCUMENT), [], {}) == Config() == load_config(None, [], {})


def test_numbers_with_an_exponent_and_no_point_are_numbers(folder: Path) -> None:
    file = write(folder, "training:\n  extra:\n    adam_epsilon: 1e-7\n    optim_args: 1:30\n")
    assert load_config(file, [], {}).training.extra == {"adam_epsilon": 1e-7, "optim_args": "1:30"}


def test_the_command_line_wins_over_environment_over_file_over_defaults(folder: Path) -> None:
    file = write(folder, "policy_distillation:\n  learning_rate: 1e-6\n  temperature: 1\n  top_k: 3\n")
    environment = {
        "STRONG2WEAK_POLICY_DISTILLATION__LEARNING_RATE": "2e-6",
        "STRONG2WEAK_POLICY_DISTILLATION__TEMPERATURE": "1.5",
        "PATH": "/bin",
    }
    got = load_config(file, ["policy_distillation.learning_rate=3e-6"], environment).policy_distillation
    assert (got.learning_rate, got.temperature, got.top_k, got.num_epochs) == (3e-6, 1.5, 3, 5)


def test_lambda_goes_by_its_name_wherever_a_configuration_is_kept(folder: Path) -> None:
    config = load_config(write(folder, "policy_distillation: {lambda: 0.25}"), [], {})
    assert config.policy_distillation.on_policy_share == 0.25
    assert config.model_dump(mode="json")["policy_distillation"]["lambda"] == 0.25


def test_flags_win_over_settings(folder: Path) -> None:
    config = load_config(None, ["training.resume=false"], {}, {("training", "resume"): "outputs/x"})
    assert config.training.resume == "outputs/x"


def test_the_default_file_is_read_where_it_exists(folder: Path) -> None:
    (folder / "config").mkdir()
    write(folder / "config", "training: {seed: 7}", "distillation_config.yaml")
    assert load_config(None, [], {}).training.seed == 7


@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c.conf"])
def test_json_is_read_whatever_its_name(folder: Path, name: str) -> None:
    file = write(folder, json.dumps({"training": {"seed": 7}, "teacher": {"endpoint": ["a:1", "b:2"]}}), name)
    config = load_config(file, [], {})
    assert (config.training.seed, config.teacher.endpoint) == (7, ["a:1", "b:2"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("teacher.endpoint=127.0.0.1:50051", "127.0.0.1:50051"),
        ("teacher.endpoint=[grpc://a:1, http://b:2]", ["grpc://a:1", "http://b:2"]),
        ("teacher.endpoint=null", None),
        ("teacher.routes=[{endpoint: a:1, mode: thinking}]", [TeacherRoute(endpoint="a:1", mode="thinking")]),
        ("data.system_prompt=You are: helpful # really", "You are: helpful # really"),
        ('data.system_prompt="a\\nb"', "a\nb"),
        ("data.data_path=my data/x=1.json", "my data/x=1.json"),
        ("data.data_path=2024", "2024"),
        ("training.use_wandb=true", True),
        ("training.extra.optim=adafactor", {"optim": "adafactor"}),
        ("training.save_total_limit=null", None),
    ],
)
def test_values_of_the_command_line_mean_what_they_say(folder: Path, text: str, value: Any) -> None:
    section, key = text.partition("=")[0].split(".")[:2]
    assert getattr(getattr(load_config(None, [text], {}), section), key) == value


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("policy_distilation.learning_rate", "did you mean policy_distillation.learning_rate?"),
        ("policy_distillation.learning_rat", "did you mean policy_distillation.learning_rate?"),
        ("model", "did you mean models?"),
        ("training.epochs", "did you mean non_policy_distillation.num_epochs or policy_distillation.num_epochs?"),
        ("max_length", "did you mean data.max_length?"),
        ("qqq", "--create_config writes a file with every key"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(folder: Path, key: str, near: str) -> None:
    (line,) = lines(overrides=[f"{key}=1"])
    assert line.startswith(f"command line: unknown key {key}")
    assert line.endswith(near)


def test_every_source_is_named(folder: Path) -> None:
    file = write(folder, "trainin: {}\ndata:\n  max_lenght: 3\n")
    got = lines(file=file, overrides=["x", "data.q=1"], environment={"STRONG2WEAK_DATA__VAL_RATO": "1"})
    assert [line.partition(": ")[0] for line in got] == [
        "command line",
        str(file),
        str(file),
        "environment STRONG2WEAK_DATA__VAL_RATO",
        "command line",
    ]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("non_policy_distillation.alpha=-1", "non_policy_distillation.alpha: should be greater than or equal to 0"),
        ("policy_distillation.thinking_prob=1.5", "should be less than or equal to 1, got 1.5"),
        ("policy_distillation.temperature=0", "should be greater than 0, got 0"),
        ("policy_distillation.temperature=.inf", "should be a finite number"),
        ("policy_distillation.loss=kl", "should be 'reverse_kl', 'forward_kl', 'jsd' or 'policy_gradient'"),
        ("policy_distillation.batch_size=true", "a number is expected, got true"),
        ("policy_distillation.batch_size=1.5", "should be a valid integer"),
        ("data.val_ratio=1", "should be less than 1"),
        ("data.data_path=null", "should be a valid string"),
        ("training.use_wandb=perhaps", "should be a valid boolean"),
        ("teacher.endpoint=3.5x: y", None),
        ("teacher.endpoint={a: 1}", "should be a valid string or should be a valid list"),
        ("teacher.endpoint=[]", "an address is empty"),
        ("teacher.routes=[{endpoint: a:1}]", "teacher.routes.0: a route needs a mode, a domain or both"),
        ("teacher.routes=[{mode: thinking}]", "teacher.routes.0.endpoint: field required"),
        ("teacher.routes=[{endpoint: '', domain: a}]", "teacher.routes.0.endpoint: an address is empty"),
        (
            "teacher.routes=[{endpoint: a:1, mode: both}]",
            "teacher.routes.0.mode: should be 'thinking' or 'non_thinking'",
        ),
        ("teacher.routes=[{endpoint: a:1, domian: a}]", "teacher.routes.0.domian: extra inputs are not permitted"),
        (
            "teacher.routes=[{endpoint: a:1, domain: m}, {endpoint: b:1, domain: m}]",
            "two routes are for mode any and domain m; keep one of them, or give it both addresses as replicas",
        ),
        ("policy_distillation.lambda=1.5", "policy_distillation.lambda: should be less than or equal to 1, got 1.5"),
        ("policy_distillation.on_policy_share=1", "unknown key policy_distillation.on_policy_share"),
        ("policy_distillation={a: 1}", "unknown key policy_distillation.a"),
    ],
)
def test_wrong_values_are_refused_in_one_line_with_source_and_key(folder: Path, text: str, wrong: str | None) -> None:
    if wrong is None:
        load_config(None, [text], {})
        return
    (line,) = lines(overrides=[text])
    assert line.startswith("command line: ")
    assert text.partition("=")[0] in line
    assert wrong in line


def test_combinations_that_make_no_sense_are_refused(folder: Path) -> None:
    (line,) = lines(overrides=["non_policy_distillation.alpha=0", "non_policy_distillation.beta=0"])
    assert line == (
        "command line: non_policy_distillation: alpha and beta are both 0, nothing would be learnt;"
        " set one of them above 0"
    )
    for name, value in (("support", "student"), ("loss", "policy_gradient")):
        (line,) = lines(overrides=["policy_distillation.distribution=full", f"policy_distillation.{name}={value}"])
        assert f"{name} {value} estimates what distribution full knows exactly" in line
        (line,) = lines(overrides=["policy_distillation.lambda=0.5", f"policy_distillation.{name}={value}"])
        assert f"{name} {value} is an estimate on tokens that the student sampled, lambda 0.5 trains on" in line
    off = "non_policy_distillation"
    (line,) = lines(overrides=[f"{off}.distribution=full", f"{off}.alpha=0", f"{off}.beta=1"])
    assert "alpha is 0, so the teacher's distribution is not used" in line
    (line,) = lines(overrides=["policy_distillation.support=student", "policy_distillation.loss=jsd"])
    assert "reverse_kl alone, loss is jsd" in line
    (line,) = lines(file=write(folder, "models: {load_in_4bit: true, load_in_8bit: true}"))
    assert line.endswith("load_in_4bit and load_in_8bit are both true; set one of them to false")


def test_eight_bits_replace_the_default_of_four(folder: Path) -> None:
    models = load_config(None, ["models.load_in_8bit=true"], {}).models
    assert (models.load_in_4bit, models.load_in_8bit) == (False, True)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "the configuration file is empty"),
        ("just text", "sections with keys are expected"),
        ("training:\n  seed: [1\n", "line 3: not valid YAML"),
        ("training:\n  seed: 1\n  seed: 2\n", "line 3: not valid YAML: the key seed is given twice"),
        ("training: 5", "training: should be a valid dictionary"),
        ("- a\n- b\n", "sections with keys are expected"),
        ("training:\n  seed: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_broken_files_are_told_in_one_line(folder: Path, text: str, wrong: str) -> None:
    (line,) = lines(file=write(folder, text))
    assert line.startswith(str(folder / "c.yaml"))
    assert wrong in line


def test_a_broken_json_file_names_the_line(folder: Path) -> None:
    (line,) = lines(file=write(folder, '{"training":\n {"seed": }}', "c.json"))
    assert "c.json, line 2: not valid JSON" in line


def test_a_missing_file_and_a_binary_one_are_told(folder: Path) -> None:
    assert "no such configuration file" in lines(file=folder / "nowhere.yaml")[0]
    (folder / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in lines(file=folder / "b.yaml")[0]


def test_every_field_is_documented() -> None:
    for name, field in Config.model_fields.items():
        assert field.description, name
        assert isinstance(field.annotation, type)
        assert field.annotation.__doc__
        for key, inner in field.annotation.model_fields.items():
            assert inner.description, f"{name}.{key}"
            assert inner.description.endswith("."), f"{name}.{key}"


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().training.seed = 3  # type: ignore[misc]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "training.seed": st.integers(0, 2**40),
            "training.weight_decay": st.floats(0, 1e3, allow_nan=False),
            "policy_distillation.learning_rate": st.floats(1e-300, 1, exclude_min=True),
            "data.system_prompt": st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
            "training.resume": st.booleans() | st.just("a: b # c"),
            "teacher.endpoint": st.none() | st.lists(st.just("h:1"), min_size=1),
            "teacher.routes": st.lists(
                st.fixed_dictionaries({"endpoint": st.just("h:1"), "domain": st.sampled_from(["a: b", "null", "1"])}),
                max_size=1,
            ),
            "policy_distillation.lambda": st.floats(0, 1),
            "training.extra": st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False, allow_infinity=False)),
        },
    )
)
def test_what_is_printed_loads_back_equal(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    config = Config.model_validate(values)
    for comments in (False, True):
        text = to_yaml(config, comments)
        assert Config.model_validate(yaml.safe_load(text)) == config  # other programs' YAML 1.1 reads it too


def test_the_created_file_names_every_key_and_is_never_overwritten(folder: Path) -> None:
    file = folder / "sub" / "c.yaml"
    assert create_config(file) == f"wrote {file} with every setting and its default"
    assert load_config(file, [], {}) == Config()
    text = file.read_text()
    assert all(f"{key.rpartition('.')[2]}:" in text for key in _all_keys())
    assert create_config(file) == f"{file} is there already and holds the defaults"
    file.write_text("training: {seed: 1}\n")
    with pytest.raises(
        UserError, match=r"was changed; it is left as it is; move it away, or write another one: --create"
    ):
        create_config(file)
    assert file.read_text() == "training: {seed: 1}\n"


@pytest.mark.parametrize("path", sorted((ROOT / "config").iterdir()), ids=lambda p: p.name)
def test_every_configuration_file_of_the_tree_loads(path: Path) -> None:
    assert load_config(path, [], {}) is not None


def test_the_default_configuration_file_is_fresh(folder: Path) -> None:
    create_config(folder / "c.yaml")
    committed = ROOT / "config" / "distillation_config.yaml"
    assert committed.read_text() == (folder / "c.yaml").read_text(), "remove it and run --create_config"
