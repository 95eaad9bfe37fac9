"""Errors that users cause, each as one line: what, where, and what to do next.

`UserError` is raised where the cause is known; `explain` finds the line for what libraries, the system and the teacher
raise. An error that it does not know is a bug and keeps its traceback. It imports no heavy library: their errors are
told by class name and text.
"""

from __future__ import annotations

import errno
import re

from protos import errors as teacher_errors


class UserError(Exception):
    """Something that the user can mend: `what` is wrong, `where` (file, key, address), and the `next_step`."""

    def __init__(self, what: str, where: str = "", next_step: str = "") -> None:
        self.what, self.where, self.next_step = what, where, next_step
        line = f"{where}: {what}" if where else what
        super().__init__(f"{line}; {next_step}" if next_step else line)


class Interrupted(KeyboardInterrupt):
    """Signal `number` (SIGINT, SIGTERM) ended the run; `what` says what was saved. Its exit status is 128 + number."""

    def __init__(self, number: int, what: str = "interrupted; what was saved is valid, go on with --resume") -> None:
        self.number, self.what = number, what
        super().__init__(what)


EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


def one_line(text: str, limit: int = 400) -> str:
    """`text` without line breaks, cut at `limit` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def explain(exc: BaseException) -> str | None:
    """The line for an error that a user can mend, or None for a bug. Looks through the chain of causes.

    A configuration with several faults has one line for each.
    """
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        for rule in (_ours, _teacher, _memory, _disk, _hub, _missing_module, _system):
            line = rule(current)
            if line:
                return "\n".join(one_line(part, 2000) for part in line.splitlines() if part.strip())
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return None


def _ours(exc: BaseException) -> str | None:
    if isinstance(exc, UserError):
        return str(exc)
    if isinstance(exc, Interrupted):
        return exc.what
    if isinstance(exc, KeyboardInterrupt):
        return "interrupted; what was saved is valid, go on with --resume"
    return None


_TEACHER_STEPS: dict[type[teacher_errors.TeacherError], str] = {
    teacher_errors.Unavailable: "start the teacher, check teacher.endpoint, or wait longer with teacher.patience",
    teacher_errors.Overloaded: "wait longer with teacher.patience or lower teacher.max_in_flight",
    teacher_errors.DeadlineExceeded: "raise teacher.timeout_s or ask for less at once (max_new_tokens, max_length)",
    teacher_errors.TeacherMismatch: "the teacher was changed: start the one this run began with, or begin a new run",
    teacher_errors.Unauthenticated: "give a key that this teacher knows",
    teacher_errors.PermissionDenied: "ask the teacher's operator for access",
    teacher_errors.TooLarge: "lower data.max_length or top_k, or raise the teacher's limits",
    teacher_errors.Unsupported: "use another loss or another teacher",
    teacher_errors.TeacherFailed: "read the teacher's log (teacher.log in output_dir for the embedded one)",
    teacher_errors.InvalidRequest: "the trainer asked for what this teacher refuses; compare both versions",
}


def _teacher(exc: BaseException) -> str | None:
    if not isinstance(exc, teacher_errors.TeacherError):
        return None
    step = next((s for kind, s in _TEACHER_STEPS.items() if isinstance(exc, kind)), "read the teacher's log")
    return f"teacher: {exc.message} ({type(exc).__name__}); {step}"


def _memory(exc: BaseException) -> str | None:
    text = str(exc)
    if type(exc).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        return (
            f"the GPU's memory is full: {one_line(text, 160)}; lower batch_size or data.max_length and raise"
            " gradient_accumulation_steps, or set training.gradient_checkpointing=true"
        )
    if isinstance(exc, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return (
            f"memory is full: {one_line(text, 160) or 'MemoryError'}; lower batch_size or data.max_length, or use a"
            " smaller model"
        )
    return None


_FULL = re.compile(
    r"No space left on device|os error (28|27)\b|File too large|Disk quota exceeded"
    # torch.save says no more than this, in its two shapes
    r"|PytorchStreamWriter failed writing|basic_ios::clear: iostream error|inline_container.*unexpected pos"
)


def is_disk_full(exc: BaseException) -> bool:
    """Whether something could not be written for want of room, here or in the chain of causes."""
    current: BaseException | None = exc
    while current is not None:
        if _is_full(current):
            return True
        current = current.__cause__ or current.__context__
    return False


def _is_full(exc: BaseException) -> bool:
    number = exc.errno if isinstance(exc, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or bool(_FULL.search(str(exc)))


def _disk(exc: BaseException) -> str | None:
    if _is_full(exc):
        where = f"{exc.filename}: " if isinstance(exc, OSError) and exc.filename else ""
        return (
            f"{where}the disk is full; free space or set training.output_dir to another disk (training.save_total_limit"
            " keeps fewer checkpoints), then go on with --resume"
        )
    return None


_HUB_CLASSES = {
    "RepositoryNotFoundError",
    "GatedRepoError",
    "LocalEntryNotFoundError",
    "RevisionNotFoundError",
    "EntryNotFoundError",
    "OfflineModeIsEnabled",
    "HFValidationError",
    "HfHubHTTPError",
}
_HUB_TEXT = re.compile(
    r"is not a valid model identifier|is not a local folder|Can't load (the )?(tokenizer|configuration|model|config)"
    r"|couldn't connect to|does not appear to have a file named|Unrecognized model|not a valid JSON file"
    r"|Error no file named|model type `.*` but Transformers does not recognize"
)


def _hub(exc: BaseException) -> str | None:
    name, text = type(exc).__name__, str(exc)
    if name == "SafetensorError":
        return f"the weights are broken: {one_line(text, 200)}; copy or download the model's files again"
    if name in _HUB_CLASSES or (isinstance(exc, (OSError, ValueError)) and _HUB_TEXT.search(text)):
        return (
            f"a model could not be loaded: {one_line(text, 240)}; check models.student_model, models.teacher_model and"
            " --pretrained_student, the network, or name a mirror with HF_ENDPOINT"
        )
    return None


_EXTRAS = {
    "wandb": "wandb",
    "trackio": "trackio",
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets",
    "math_verify": "math",
    "reasoning_gym": "reasoning-gym",
    "peft": "trainer",
    "deepspeed": "deepspeed",
    "vllm": "vllm",
    "torch": "trainer",
    "transformers": "trainer",
    "accelerate": "trainer",
    "pyarrow": "trainer",
    "rich": "trainer",
    "tensorboard": "trainer",
}


def _missing_module(exc: BaseException) -> str | None:
    if not isinstance(exc, ModuleNotFoundError):
        return None
    extra = _EXTRAS.get((exc.name or "").partition(".")[0])
    return f"{exc.name} is not installed; run: pip install 'strong2weak[{extra}]'" if extra else None


_SYSTEM_STEPS = {
    errno.ENOENT: ("no such file or folder", "check the path; relative paths start at the current directory"),
    errno.EACCES: ("permission denied", "check the rights of the file and its folder"),
    errno.EPERM: ("permission denied", "check the rights of the file and its folder"),
    errno.EROFS: ("the file system is read-only", "set training.output_dir to a writable folder"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("a folder where a file is expected", "check the path"),
    errno.EADDRINUSE: ("the address is in use", "stop the other process or choose another port"),
    errno.EMFILE: ("too many open files", "raise the limit with `ulimit -n`"),
}


def _system(exc: BaseException) -> str | None:
    if not isinstance(exc, OSError) or exc.errno not in _SYSTEM_STEPS:
        return None
    what, step = _SYSTEM_STEPS[exc.errno]
    return f"{exc.filename}: {what}; {step}" if exc.filename else f"{what}; {step}"
