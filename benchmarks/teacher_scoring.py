"""How fast does a teacher score, measured at its trainers' end of the wire? One command, one table.

    python benchmarks/teacher_scoring.py --shape qwen3-8b --out result.json --plot result.svg
    python benchmarks/teacher_scoring.py --read result.json --page docs/performance.md

It starts the engine alone, then the real server, then vLLM's own server, one after the other, each with random weights
of the named shape, and asks the servers from client processes over loopback; see docs/performance.md. The exit code is
1 where a bar was missed.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scoring import plan, report
from benchmarks.scoring.run import Run


def main() -> int:
    """Measures, or reads what was measured; shows it, draws it, and writes the page."""
    arguments, planned = plan.parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines end too
    if arguments.read:
        results = [json.loads(path.read_text("utf-8")) for path in arguments.read]
    else:
        with tempfile.TemporaryDirectory(prefix="teacher-scoring-") as temporary:
            work = arguments.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            run = Run(planned, work.resolve(), arguments.out)
            run.all()
        results = [run.result]
    for result in results:
        print(report.text(result))
    if arguments.page:
        page = arguments.page.read_text("utf-8")
        arguments.page.write_text(report.with_results(page, results), "utf-8")
    if arguments.plot:
        from benchmarks.scoring import plot

        plot.draw(results, arguments.plot)
    return int(any(bar.verdict == "FAIL" for result in results for bar in report.bars(result)))


if __name__ == "__main__":
    sys.exit(main())
