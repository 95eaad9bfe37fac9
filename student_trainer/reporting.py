"""What a run says: console and log file, a live line while it works, TensorBoard, W&B, and the table at its end.

Knows how to show numbers, not what they mean. Only rank 0 shows anything; the others log warnings.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from . import trackio_report
from .config import Training
from .errors import UserError
from .storage import write_json

if TYPE_CHECKING:
    from .metrics_server import Metrics

log = logging.getLogger("student_trainer")

PLAIN_SECONDS = 10.0
"""Seconds between two lines of progress where there is no terminal."""

Update = Callable[[int, str], None]


class _ConsoleHandler(logging.Handler):
    """Log records as lines of a rich console, so that they stand above a live line."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if self.console.is_terminal and getattr(record, "on_live_line", False):
            return
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def logging_to(log_file: str, console: Console, main: bool) -> Iterator[None]:
    """Everything of the trainer goes to `log_file` and, from INFO up, to `console`, until the block ends."""
    package, library = logging.getLogger("student_trainer"), logging.getLogger("transformers")
    level, propagate = package.level, package.propagate
    handlers: list[logging.Handler] = []
    if main:
        Path(log_file).expanduser().parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(log_file).expanduser(), encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        library.addHandler(file)
        handlers = [file, _ConsoleHandler(console)]
    disable_progress_bar()
    package.setLevel(logging.DEBUG if main else logging.WARNING)
    package.propagate = not main
    for handler in handlers:
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        package.propagate = propagate
        for handler in handlers:
            package.removeHandler(handler)
            library.removeHandler(handler)
            handler.close()


class Reporter:
    """The console of one process."""

    def __init__(self, console: Console, *, main: bool = True) -> None:
        self.console, self.main = console, main
        self._waited = time.monotonic()

    def waiting(self, line: str) -> None:
        """Says what is waited for, at most every PLAIN_SECONDS; the log file gets every line. For any thread."""
        due = time.monotonic() - self._waited >= PLAIN_SECONDS
        if due:
            self._waited = time.monotonic()
        log.log(logging.INFO if due else logging.DEBUG, "%s", line)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Update]:
        """A function (done, text) that shows how far the block is: live on a terminal, else a line now and then."""
        if not self.main:
            yield _nothing
        elif self.console.is_terminal:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(8), MofNCompleteColumn()
            text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
            with Progress(
                *columns, TimeElapsedColumn(), text, console=self.console, transient=True, expand=True
            ) as bar:
                task = bar.add_task(label, total=total, text="")

                def show(done: int, text: str = "") -> None:
                    bar.update(task, completed=done, text=text)

                yield show
        else:
            last = time.monotonic()

            def line(done: int, text: str = "") -> None:
                nonlocal last
                if time.monotonic() - last >= PLAIN_SECONDS:
                    last = time.monotonic()
                    log.info("%s: %d of %d %s", label, done, total, text)

            yield line


def _nothing(done: int, text: str = "") -> None:
    """The update of a process that shows nothing."""


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """The live line of a stage's training. Where there is no terminal, one line for each set of metrics; the log file
    gets these in any case.
    """

    def __init__(self, reporter: Reporter, label: str) -> None:
        self.reporter, self.label = reporter, label
        self._context: Any = None
        self._update: Update | None = None
        self._began, self._first = 0.0, 0
        self._numbers = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the live line."""
        self._began, self._first = time.monotonic(), state.global_step
        self._context = self.reporter.progress(self.label, state.max_steps)
        self._update = self._context.__enter__()
        self._update(state.global_step, "")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the live line; the metrics on it are the last ones, the time left goes by this run's steps."""
        if self._update is not None:
            each = (time.monotonic() - self._began) / (state.global_step - self._first)
            left = f"{duration(each * (state.max_steps - state.global_step))} left"
            self._update(state.global_step, f"{left}, {self._numbers}" if self._numbers else left)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes one line for the metrics of a step; evaluations have lines of their own."""
        if self.reporter.main and logs and "loss" in logs:
            self._numbers = live_text(logs)
            line, seen = "%s step %d/%d: %s", {"on_live_line": True}
            log.info(line, self.label, state.global_step, state.max_steps, step_line(logs), extra=seen)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the live line."""
        self.close()

    def close(self) -> None:
        """Closes the live line, also after an error."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = self._update = None


def step_line(logs: Mapping[str, Any]) -> str:
    """The metrics of a training step in words, as far as they are there."""
    words = [
        ("loss", "loss {:.4f}"),
        ("soft_loss", "soft {:.4f}"),
        ("cross_entropy", "cross-entropy {:.4f}"),
        ("forward_kl", "forward KL {:.4f}"),
        ("reverse_kl", "reverse KL {:.4f}"),
        ("tail_share", "tail {:.2%}"),
        ("learning_rate", "rate {:.2e}"),
        ("tokens_per_second", "{:.0f} tokens/s"),
    ]
    text = ", ".join(form.format(logs[key]) for key, form in words if key in logs)
    times = ("sampling", "teacher", "training", "saving")
    spent = ", ".join(f"{name} {logs[f'seconds_{name}']:.2f} s" for name in times if f"seconds_{name}" in logs)
    return f"{text} ({spent})" if spent else text


def live_text(logs: Mapping[str, Any]) -> str:
    """The metrics of a training step as far as they are there, short: what matters most comes first."""
    words = [
        ("loss", "loss {:.3f}"),
        ("forward_kl", "KL forward {:.3f}"),
        ("reverse_kl", "reverse {:.3f}"),
        ("tail_share", "tail {:.2%}"),
    ]
    parts = [form.format(logs[key]) for key, form in words if key in logs]
    whole = sum(v for k, v in logs.items() if k.startswith("seconds_"))
    if whole > 0 and "seconds_teacher" in logs:
        parts.append(f"waiting {logs['seconds_teacher'] / whole:.0%}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as `1 h 02 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def tensorboard(folder: Path) -> Any:
    """A Trainer callback that writes to `folder`; it writes only when the Trainer logs."""
    if not find_spec("tensorboard"):
        raise UserError("tensorboard is not installed", "training.use_tensorboard", "install it or set this to false")
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder), flush_secs=30))


def report_to(training: Training) -> list[str]:
    """The integrations that the Trainer sets up itself: W&B where it is asked for."""
    if not training.use_wandb:
        return []
    if not find_spec("wandb"):
        raise UserError("wandb is not installed", "training.use_wandb", "run: pip install 'strong2weak[wandb]'")
    os.environ["WANDB_PROJECT"] = training.wandb_project
    return ["wandb"]


def check_reports(training: Training) -> None:
    """Makes sure, before anything is begun, that all which metrics are to go to is installed; a UserError if not."""
    report_to(training)
    if training.use_trackio:
        trackio_report.check()
    if training.metrics_port is not None and not find_spec("prometheus_client"):
        how = "run: pip install 'strong2weak[metrics]', or set this to null"
        raise UserError("prometheus-client is not installed", "training.metrics_port", how)


def open_metrics(training: Training, stack: ExitStack) -> Metrics | None:
    """The run's numbers, served to Prometheus until `stack` is closed; None where they are not asked for."""
    if training.metrics_port is None:
        return None
    from .metrics_server import Metrics, serve

    metrics = Metrics(Path(training.output_dir).name)
    serve(metrics, training.metrics_host, training.metrics_port, stack)
    log.info("metrics are at http://%s:%d/metrics", training.metrics_host, training.metrics_port)
    return metrics


def finish_reports(training: Training) -> None:
    """Ends the run that W&B has open, so that the next stage, whose steps begin at 0 again, is a run of its own."""
    if training.use_wandb:
        import wandb

        wandb.finish()


COLUMNS: Sequence[tuple[str, str, str]] = (
    ("accuracy_thinking", "accuracy thinking", "{:.1%}"),
    ("accuracy_non_thinking", "accuracy non-thinking", "{:.1%}"),
    ("forward_kl", "forward KL", "{:.4f}"),
    ("reverse_kl", "reverse KL", "{:.4f}"),
    ("tail_share", "tail share", "{:.2%}"),
    ("seconds", "seconds", "{:.0f}"),
)
"""Key, heading and format of the columns of the final table."""


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the final table as text."""
    return [str(row["model"]), *("–" if row.get(k) is None else form.format(row[k]) for k, _, form in COLUMNS)]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The final table in Markdown."""
    heads = ["model", *(title for _, title, _ in COLUMNS)]
    lines = [heads, ["---", *("--:" for _ in COLUMNS)], *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def final_table(console: Console, rows: Sequence[Mapping[str, Any]], output_dir: Path, notes: Sequence[str]) -> None:
    """Shows the final table and writes it to summary.json and summary.md; every row has a `model` and some COLUMNS."""
    table = Table("model", title="Strong to weak")
    for _, title, _ in COLUMNS:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "summary.json", {"rows": list(rows), "notes": list(notes)})
    text = markdown_table(rows) + "".join(f"\n{note}\n" for note in notes)
    (output_dir / "summary.md").write_text(text, encoding="utf-8")
    log.debug("final table:\n%s", text)


def default_console() -> Console:
    """A console on standard output, 120 columns wide where it is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
