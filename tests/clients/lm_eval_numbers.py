"""Log-likelihoods by lm-eval's `hf` model and by its `local-completions` at a server, as JSON on the last line.

`python lm_eval_numbers.py CHECKPOINT BASE_URL FOLDER`; the tasks and their data are written into FOLDER first. A
program of its own, because lm-eval warns of much and a test takes warnings for errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

QUESTIONS = ["2-1", "86-67-2+85", "10-3+15", "82+52", "12+2", "95+4+74+74", "8+75", "59+87+45"]
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_text: "Calculate {{question}}="
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
TEXTS = """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


def write_tasks(folder: Path) -> None:
    """Two tasks over local JSON: choices after a question, and whole texts."""
    rows: dict[str, list[dict[str, Any]]] = {"choices": [], "texts": []}
    for index, question in enumerate(QUESTIONS):
        rows["choices"].append({"question": question, "choices": [str(index), str(10 * index + 7), "132"]})
        rows["texts"].append({"text": f"Calculate {question} = {index} \u2013 or not"})
    for name, task in {"choices": CHOICES, "texts": TEXTS}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = f'dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: "{data}"}}}}\n'
        (folder / f"{name}.yaml").write_text(task + files)


def main(checkpoint: str, base_url: str, folder: Path) -> None:
    """Prints the log-likelihoods of each model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_tasks(folder)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    local: dict[str, Any] = {"model": "teacher", "base_url": f"{base_url}/v1/completions", "max_length": 512}
    local |= {"tokenizer_backend": "huggingface", "tokenizer": checkpoint}
    models: dict[str, tuple[str, dict[str, Any]]] = {
        "hf": ("hf", {"pretrained": checkpoint, "dtype": "float32", "device": "cpu", "batch_size": 8}),
        "tokens": ("local-completions", local | {"tokenized_requests": True, "batch_size": 8}),
        "text": ("local-completions", local | {"tokenized_requests": False, "batch_size": 1}),
    }
    found = {}
    for name, (model, arguments) in models.items():
        results = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["choices", "texts"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
        samples = results["samples"]
        found[name] = {
            "choices": [[float(answer[0]) for answer in one["filtered_resps"]] for one in samples["choices"]],
            "greedy": [[answer[1] in (True, "True") for answer in one["filtered_resps"]] for one in samples["choices"]],
            "texts": [float(one["filtered_resps"][0]) for one in samples["texts"]],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
