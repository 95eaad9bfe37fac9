"""What does a teacher do when it is asked for up to four times what it can? One command, one table.

    python benchmarks/load.py --out benchmarks/results/load/load.json --page docs/reliability.md
    python benchmarks/load.py --read benchmarks/results/load/load.json --page docs/reliability.md
    python benchmarks/load.py --quick

A real server process, first with an engine of a set speed, then with a tiny Qwen3, and K clients of it on this
process's event loop; see docs/reliability.md. It takes about nine minutes. The exit code is 1 where a bar was missed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.under_load import plan, report, run


def main() -> int:
    """Measures, or reads what was measured; shows it and writes the page."""
    arguments, planned = plan.parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    if arguments.read:
        result = json.loads(arguments.read.read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory(prefix="load-") as work:
            names = arguments.only or [plan.THEORY, plan.TINY]
            result = run.everything(planned, names, Path(work))
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(report.text(result))
    if arguments.page:
        arguments.page.write_text(report.with_result(arguments.page.read_text("utf-8"), result), "utf-8")
    return int(report.missed(result))


if __name__ == "__main__":
    sys.exit(main())
