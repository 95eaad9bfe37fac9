"""`python -m student_trainer memory`: how much memory a run's nodes need, before any of them is rented.

Prints what student_trainer/memory estimates for the configured models and settings. Imports neither torch nor
transformers, and asks no network about the Qwen3 family.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

from student_trainer.commands.common import add_settings, command_parser, configuration
from student_trainer.config import STAGE_NAMES, Config
from student_trainer.errors import UserError
from student_trainer.memory.shapes import Shape, shape_of
from student_trainer.memory.student import Estimate, setup_of, student_memory
from student_trainer.memory.teacher import UTILIZATION, WEIGHT_BYTES, TeacherEstimate, teacher_memory

GIB = 2**30


def make_parser() -> argparse.ArgumentParser:
    """The command line of `memory`."""
    parser = command_parser(
        "memory", "Estimates the memory of a run's GPUs from the models' sizes and the settings (docs/models.md)."
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that train the student [default: 1]")
    parser.add_argument(
        "--gpu-gib", type=float, default=80, metavar="GIB", help="memory of one GPU in GiB [default: 80]"
    )
    parser.add_argument(
        "--teacher-gpus", type=int, default=0, metavar="N", help="GPUs of the teacher [default: as few as hold it]"
    )
    parser.add_argument(
        "--teacher-gpu-gib", type=float, default=80, metavar="GIB", help="memory of one of these in GiB [default: 80]"
    )
    parser.add_argument(
        "--teacher-form",
        choices=sorted(WEIGHT_BYTES),
        default="bfloat16",
        help="form of the teacher's weights under vLLM [default: bfloat16]",
    )
    add_settings(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_intermixed_args(arguments)
    for flag, number, least in (("--gpus", options.gpus, 1), ("--teacher-gpus", options.teacher_gpus, 0)):
        if number < least:
            raise UserError(f"{number} is no number of GPUs", flag, f"give {least} or more")
    for flag, size in (("--gpu-gib", options.gpu_gib), ("--teacher-gpu-gib", options.teacher_gpu_gib)):
        if size <= 0:
            raise UserError(f"{size:g} is no amount of memory", flag, "give the GiB of one GPU, such as 80")
    config = configuration(options.config, options.settings)
    for line in report(config, options):
        print(line)
    return 0


def report(config: Config, options: argparse.Namespace) -> Iterator[str]:
    """The lines that the command prints for its `options`: the student's node, then the teacher's."""
    student = shape_of(config.models.student_model)
    teacher: Shape | UserError
    try:
        teacher = shape_of(config.models.teacher_model, "models.teacher_model")
    except UserError as error:
        if config.wants_full("all"):
            raise
        teacher = error
    hidden = teacher.hidden if isinstance(teacher, Shape) else 0
    yield from _student(config, student, hidden, options.gpus, options.gpu_gib * GIB)
    yield ""
    if isinstance(teacher, UserError):
        yield f"Teacher: not estimated. {teacher}"
    else:
        size = options.teacher_gpu_gib * GIB
        found = teacher_memory(teacher, options.teacher_form, options.teacher_gpus, size)
        yield from _teacher(config, teacher, found, size)


def _student(config: Config, shape: Shape, teacher_hidden: int, gpus: int, gpu_bytes: float) -> Iterator[str]:
    setups = {stage: setup_of(config, stage, gpus, teacher_hidden) for stage in STAGE_NAMES}
    found = {stage: student_memory(shape, setup) for stage, setup in setups.items()}
    way = "shards on each" if setups["policy"].parallel == "sharded" else "all of it on each"
    place = f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs, {way}"
    yield f"Student {shape.name}: {_count(shape.weights)} weights, {place}; GiB on one GPU"
    yield from _table(
        list(STAGE_NAMES.values()),
        {name: [e.parts.get(name) for e in found.values()] for e in found.values() for name in e.parts},
    )
    yield "at its largest moments"
    moments = {name: [e.moments.get(name) for e in found.values()] for e in found.values() for name in e.moments}
    yield from _table(None, moments)
    yield from (_verdict(STAGE_NAMES[stage], estimate, gpu_bytes) for stage, estimate in found.items())
    if config.policy_distillation.rollout_engine == "vllm":
        share = float(config.policy_distillation.rollout_engine_args.get("gpu_memory_utilization", 0.4))
        yield f"While vLLM samples, it takes {share:.0%} of the GPU beside weights and optimiser states."
    setup = setups["policy"]
    yield (
        f"Host memory: {setup.weight_bytes * shape.weights * gpus / GIB:.1f} GiB while "
        f"{'each process loads' if gpus > 1 else 'it loads'} the student. "
        f"A checkpoint on disk: {_checkpoint(found['policy'], gpus, setup.parallel) / GIB:.1f} GiB."
    )


def _checkpoint(estimate: Estimate, gpus: int, parallel: str) -> float:
    parts = estimate.parts
    return (parts["weights"] + parts["optimiser states"]) * (gpus if parallel == "sharded" else 1)


def _verdict(name: str, estimate: Estimate, gpu_bytes: float) -> str:
    left = gpu_bytes - estimate.peak
    moment = max(estimate.moments, key=lambda m: estimate.moments[m])
    head = f"{name}: {estimate.peak / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB ({moment})"
    if left < 0:
        return f"{head}: does NOT fit; {_remedy(moment)}"
    if left < 0.08 * gpu_bytes:
        return f"{head}: tight, CUDA and fragmentation take some 5 to 8 %; {_remedy(moment)}"
    return f"{head}: fits"


def _remedy(moment: str) -> str:
    if moment in ("sampling", "measuring before training"):
        return "lower rollout_slots and evaluation.batch_size, or sample with rollout_engine=vllm"
    if moment == "backward pass ends":
        return "shard it (--gpus and training.parallel=fsdp), use models.lora_rank or models.torch_dtype=bfloat16"
    return "set training.gradient_checkpointing=true, or lower batch_size or data.max_length"


def _teacher(config: Config, shape: Shape, found: TeacherEstimate, gpu_bytes: float) -> Iterator[str]:
    active = f" ({_count(shape.active_weights)} active)" if shape.experts else ""
    gpus = f"{found.gpus} GPU{'s' if found.gpus > 1 else ''}"
    yield f"Teacher {shape.name}: {_count(shape.weights)} weights{active} in {found.form} on {gpus}; GiB on one GPU"
    yield from _table(None, {name: [size] for name, size in found.parts.items()})
    budget, length = UTILIZATION * gpu_bytes, config.data.max_length
    if not found.room_tokens:
        yield f"it does NOT fit: vLLM may take {budget / GIB:.1f} GiB of a GPU; use more GPUs, fp8 or int4"
        return
    yield (
        f"{(budget - found.fixed) / GIB:.1f} GiB are left of vLLM's {UTILIZATION:.0%} for keys and values: "
        f"{found.room_tokens:,} tokens, {found.room_tokens // length} sequences of {length}"
    )


def _table(heads: Sequence[str] | None, rows: Mapping[str, Sequence[float | None]]) -> Iterator[str]:
    if heads:
        yield f"  {'':34}" + "".join(f"{head:>21}" for head in heads)
    for name, sizes in rows.items():
        cells = ("–" if size is None else f"{size / GIB:.2f}" for size in sizes)
        yield f"  {name:34}" + "".join(f"{cell:>21}" for cell in cells)


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f}B" if weights >= 1e7 else f"{weights:,}"
