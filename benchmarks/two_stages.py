"""Does on-policy distillation beat the same number of further off-policy steps? The embedded pair, several seeds.

    python benchmarks/two_stages.py [--seeds 0 1 2] [--work DIR] [--page docs/results.md]

For every seed it runs both stages as `make demo` does and then, from stage 1's model and on stage 1's responses, as
many off-policy steps as stage 2 had, of the same batch size, at stage 2's peak learning rate and at twice that. It
reads each run's summary.json and writes one table. It runs the product's command line and knows nothing else of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "config/demo.yaml"


def run(work: Path, name: str, stage: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """One run of the trainer, unless its summary is there already; the rows of its table by name."""
    output = work / name
    summary = output / "summary.json"
    if not summary.exists():
        command = [sys.executable, "main_distillation.py", "--config", CONFIG, "--stage", stage, *arguments]
        command += [
            f"training.output_dir={output}",
            f"training.log_file={output}.log",
            "training.use_tensorboard=false",
        ]
        command += ["evaluation.every_epochs=0"]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return {row["model"]: row for row in json.loads(summary.read_text())["rows"]}


def one_seed(work: Path, seed: int) -> dict[str, dict[str, Any]]:
    """All rows of one seed."""
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    policy = config["policy_distillation"]
    rows = run(work, f"seed-{seed}", "all", f"training.seed={seed}")
    first = work / f"seed-{seed}" / "non_policy_distillation"
    for factor in (1, 2):
        rate = float(policy["learning_rate"]) * factor
        further = run(
            work,
            f"seed-{seed}-further-{rate:g}",
            "non_policy",
            "--pretrained_student",
            str(first / "best_model"),
            f"training.seed={seed + 1000}",
            f"non_policy_distillation.dataset_path={first / 'responses.parquet'}",
            f"non_policy_distillation.max_steps={policy['max_steps']}",
            f"non_policy_distillation.batch_size={policy['batch_size']}",
            f"non_policy_distillation.gradient_accumulation_steps={policy['gradient_accumulation_steps']}",
            f"non_policy_distillation.learning_rate={rate}",
        )
        rows[f"{policy['max_steps']} further off-policy steps, rate {rate:g}"] = further["after stage 1"]
    return rows


def cell(values: list[float]) -> str:
    """Mean and the single values, in percent."""
    return f"**{100 * statistics.mean(values):.1f} %** ({', '.join(f'{100 * v:.1f}' for v in values)})"


def page(seeds: list[int], tables: list[dict[str, dict[str, Any]]]) -> str:
    """The page with the table."""
    import torch
    import transformers

    lines = [
        "# Results on the embedded pair",
        "",
        "<!-- Written by benchmarks/two_stages.py. -->",
        "",
        f"Measured {datetime.date.today()} on two cores ({platform.machine()}, Python {platform.python_version()},",
        f"torch {torch.__version__}, transformers {transformers.__version__}):",
        f"`python benchmarks/two_stages.py --seeds {' '.join(map(str, seeds))}`.",
        "Greedy accuracy over 512 held-out problems in each mode: the mean over the seeds, and each seed's own. One",
        "standard error of a single accuracy is at most 2.2 points. KLs are nats a token on the teacher's answers.",
        "",
        "| model | thinking | non-thinking | forward KL | reverse KL |",
        "|---|---|---|---|---|",
    ]
    for name in tables[0]:
        rows = [table[name] for table in tables]
        kl = [f"{statistics.mean(r[key] for r in rows):.3f}" for key in ("forward_kl", "reverse_kl")]
        accuracy = [cell([r[f"accuracy_{mode}"] for r in rows]) for mode in ("thinking", "non_thinking")]
        lines.append(f"| {name} | {accuracy[0]} | {accuracy[1]} | {kl[0]} | {kl[1]} |")
    notes = ROOT / "benchmarks" / "two_stages_notes.md"
    return "\n".join(lines) + "\n\n" + (notes.read_text() if notes.exists() else "")


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("outputs/two_stages"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = page(arguments.seeds, [one_seed(work, seed) for seed in arguments.seeds])
    arguments.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
