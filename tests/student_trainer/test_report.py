"""The page that shows a run: what is on it, that it needs nothing, and that nothing a model wrote becomes markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from protos.scores import Field, Limits, Mode, TeacherInfo
from student_trainer.config import Config
from student_trainer.history import History, read
from student_trainer.report import RunReport
from student_trainer.report.charts import Line, line_chart, share_bar, thinned, ticks
from student_trainer.report.timing import time_spent
from tests.student_trainer.test_stages import Run, go  # noqa: F401

HOSTILE = "</td><script>alert(1)</script> <img src=x onerror=alert(1)> & \"quoted\" 'single'"

INFO = TeacherInfo(
    name="teacher <1>",
    fingerprint="f00d" * 16,
    tokenizer_hash="t",
    template_hash="c",
    vocab_size=305,
    normalized_size=305,
    eos_token_ids=(2,),
    limits=Limits(512, 64, 64, 8192, 64),
    modes=(Mode.THINKING, Mode.NON_THINKING),
    fields=frozenset({Field.TOKEN_LOGPROBS}),
    can_generate=True,
    engine="transformers 5.23.0",
    dtype="float32",
    quantization="",
)


class Page(HTMLParser):
    """Tags and the text of a page; complains about tags that are not closed in order."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def a_report(folder: Path) -> RunReport:
    config = Config.model_validate({"training": {"output_dir": str(folder)}})
    report = RunReport(config, "all", {"": INFO}, ["python", "main_distillation.py", "a b"])
    report.rows += [
        {"model": "teacher", "accuracy_thinking": 0.9, "accuracy_non_thinking": 0.5},
        {"model": "student before", "forward_kl": 2.0, "accuracy_thinking": 0.1, "accuracy_non_thinking": 0.0},
    ]
    report.before = [("thinking", "2+2", HOSTILE)]
    return report


def metrics(folder: Path) -> None:
    history = History(folder)
    history.begin(0)
    for step in (10, 20):
        times = {"seconds_sampling": 1.0, "seconds_teacher": 0.5, "seconds_saving": 0.1, "seconds_training": 2.0}
        history.add(step, {"steps": 10, "loss": 1 / step, "forward_kl": 0.5, "reverse_kl": 0.4, **times})
        held = {"eval_loss": 0.7, "eval_forward_kl_thinking": 0.3, "eval_forward_kl_non_thinking": 0.2}
        history.add(step, {**held, "eval_accuracy_thinking": 0.6, "eval_accuracy_non_thinking": 0.4, "eval_seconds": 3})
        history.add(step, {"samples": [["thinking", "2+2", f"four at {step} {HOSTILE}"]]})
    history.add(20, {"saving": 2.0})


def test_the_page_shows_curves_times_samples_teacher_and_configuration(tmp_path: Path) -> None:
    report, folder = a_report(tmp_path), tmp_path / "non_policy_distillation"
    metrics(folder)
    report.begin_stage("stage 1, off-policy", folder, 3.0)
    report.write()
    page = Page(report.path.read_text())
    text = " ".join(page.words)
    assert page.tags.count("figure") == 4  # loss, two divergences, accuracy; no tail share was logged
    for words in ("Stage 1, off-policy", "training batches, T = 3", "held-out thinking, T = 1", "after stage 1"):
        assert words in text
    assert f"four at 20 {HOSTILE}" in text
    assert "four at 10" not in text
    assert INFO.fingerprint in text
    assert "python main_distillation.py 'a b'" in text
    assert "seed: 42" in text
    assert "waiting for the teacher 12.5%" in text


def test_what_a_model_wrote_is_text_and_the_page_loads_nothing(tmp_path: Path) -> None:
    report, folder = a_report(tmp_path), tmp_path / "s"
    metrics(folder)
    report.begin_stage("stage 1", folder, 1.0)
    report.notes.append(HOSTILE)
    report.write()
    raw = report.path.read_text()
    page = Page(raw)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onerror", "onload", "style"}
    assert not re.search(r"https?://|url\(|@import", raw.replace("Content-Security-Policy", ""))
    assert "default-src 'none'" in raw


def test_a_run_that_stops_keeps_what_it_measured_and_says_how_it_ended(tmp_path: Path) -> None:
    for error, words in ((KeyboardInterrupt(), "interrupted"), (RuntimeError("<b>"), "stopped: RuntimeError: <b>")):
        report = a_report(tmp_path)
        with pytest.raises(type(error)), report.kept():
            raise error
        assert words in Page(report.path.read_text()).words


def test_a_run_that_measured_nothing_leaves_an_older_report_alone(tmp_path: Path) -> None:
    report = a_report(tmp_path)
    report.rows.clear()
    report.path.write_text("older")
    with pytest.raises(KeyboardInterrupt), report.kept():
        raise KeyboardInterrupt
    assert report.path.read_text() == "older"


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    report = a_report(tmp_path / "file" / "outputs")
    report.write()
    assert "could not be written" in caplog.text


def test_metrics_survive_a_crash_and_a_stage_that_goes_on_drops_what_came_after_its_step(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.begin(0)
    for step in (2, 4, 6):
        history.add(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in read(tmp_path)] == [2, 4, 6]
    history.add(8, {"loss": 8.0})  # joins what was cut off
    history.add(10, {"loss": 10.0})
    assert [line["step"] for line in read(tmp_path)] == [2, 4, 6, 10]
    History(tmp_path).begin(4)
    assert [line["step"] for line in read(tmp_path)] == [2, 4]
    History(tmp_path).begin(0)
    assert read(tmp_path) == []
    assert read(tmp_path / "nowhere") == []


def test_metrics_that_cannot_be_written_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    history = History(Path("/dev/full"))  # below a file nothing can be
    history.add(3, {"loss": 1.0})
    assert "the metrics of step 3 are missing from /dev/full/metrics.jsonl" in caplog.text


def test_time_is_means_times_steps_and_what_was_saved_at_the_end(tmp_path: Path) -> None:
    metrics(tmp_path)
    spent = time_spent(read(tmp_path))
    expected = {"sampling": 20.0, "teacher": 10.0, "training": 40.0, "saving": 4.0, "measuring": 6.0}
    assert spent == pytest.approx(expected)


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert ticks(0, 32) == [0, 10, 20, 30, 40]
    assert ticks(0.013, 0.087) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
    for low, high in ((0, 0), (3, 3), (-1, 1), (0, 1e-9), (0, 151936)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 8
        assert found[0] <= low
        assert found[-1] >= high


def test_a_chart_leaves_out_what_is_no_number_and_groups_long_lines() -> None:
    assert line_chart("t", [Line("a", [(1, math.nan)], 1)], str) == ""
    assert "nan" not in line_chart("t", [Line("a", [(1, math.nan), (2, 1.0), (3, math.inf)], 1)], str)
    long = thinned([(float(i), 2.0 * i) for i in range(10_001)])
    assert len(long) <= 300
    assert all(y == pytest.approx(2 * x) for x, y in long)
    Page(line_chart("<t>", [Line("<a>", [(0, 1.0), (5, 1.0)], 1)], str) + share_bar([("<a>", 1.0), ("b", 3.0)]))


def test_runs_leave_a_report_finished_interrupted_or_of_one_stage(
    go: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from student_trainer.on_policy import RolloutFeed
    from student_trainer.schedule import Step

    path, sample = tmp_path / "outputs" / "report.html", RolloutFeed.announce

    def stop(feed: RolloutFeed, step: Step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt
        sample(feed, step)

    monkeypatch.setattr(RolloutFeed, "announce", stop)
    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.setattr(RolloutFeed, "announce", sample)
    words = Page(path.read_text()).words
    assert {"interrupted", "Stage 1, off-policy", "Stage 2, on-policy", "after stage 1"} <= set(words)
    lines = read(tmp_path / "outputs" / "policy_distillation")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    go(training={"resume": True})
    assert {"finished", "after stage 2"} <= set(Page(path.read_text()).words)
    lines = read(tmp_path / "outputs" / "policy_distillation")
    assert [(line["step"], line["steps"]) for line in lines if "loss" in line] == [(s, 1) for s in (1, 2, 3, 4)]
    assert "saving" in lines[-1]
    measured = json.loads((tmp_path / "outputs" / "summary.json").read_text())["rows"][-1]
    assert {"forward_kl_thinking", "reverse_kl_non_thinking"} <= measured.keys()
    go("policy")
    words = Page(path.read_text()).words
    assert {"Stage 1, off-policy (an earlier run)", "Stage 2, on-policy", "finished"} <= set(words)
