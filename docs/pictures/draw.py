"""Writes the pages' pictures: `python docs/pictures/draw.py`; `--check` only says which are stale."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from svg import Picture

HERE = Path(__file__).resolve().parent


def shape() -> Picture:
    """The whole: trainers, people, one teacher."""
    p = Picture(860, 290, "Student trainers and people call one teacher server over gRPC or HTTP")
    for y, name, what, kind in (
        (28, "student trainer", "its own GPU, the student", "box"),
        (110, "student trainer", "its own GPU, the student", "box"),
        (192, "curl, a notebook", "JSON for people", "soft"),
    ):
        p.box(24, y, 190, 62, name, what, kind=kind)
        p.arrow((214, y + 31), (396, y + 31))
    p.text(305, 50, "gRPC or HTTP", "small", "middle")
    p.text(305, 132, "Score, Generate", "small", "middle")
    p.text(305, 214, "GetTeacher", "small", "middle")
    p.box(400, 24, 436, 234, kind="soft")
    p.text(418, 50, "teacher server, on its own GPU node", "bold")
    p.box(418, 68, 120, 148, "transports", "gRPC :50051", "HTTP :8000", "keys, TLS, limits")
    p.box(558, 68, 120, 148, "service", "checks", "fair queue", "score cache")
    p.box(698, 68, 120, 148, "backend", "vLLM", "or transformers", "many GPUs")
    p.arrow((538, 142), (556, 142))
    p.arrow((678, 142), (696, 142))
    p.text(418, 242, "arrays in, arrays out: never a Python object for a token", "small")
    return p


def two_stages() -> Picture:
    """What each stage asks of whom."""
    p = Picture(860, 400, "Stage 1 learns from the teacher's responses, stage 2 from the student's own completions")
    for y, name in ((20, "stage 1, off-policy"), (212, "stage 2, on-policy")):
        p.box(20, y, 820, 168, kind="soft")
        p.text(38, y + 26, name, "bold")
    p.box(38, 66, 130, 84, "prompts", "both modes")
    p.box(218, 66, 150, 84, "teacher", "writes responses", "(Generate)", kind="warm")
    p.box(418, 66, 150, 84, "teacher", "scores them", "(Score)", kind="warm")
    p.box(618, 66, 204, 84, "student learns", "alpha · forward KL at T", "+ beta · cross-entropy")
    p.box(38, 258, 130, 84, "prompts", "fresh, both modes")
    p.box(218, 258, 150, 84, "student", "samples completions", kind="cool")
    p.box(418, 258, 150, 84, "teacher", "scores those tokens", "(Score)", kind="warm")
    p.box(618, 258, 204, 84, "student learns", "reverse KL at T", "on its own tokens")
    for y in (108, 300):
        for x in (168, 368, 568):
            p.arrow((x, y), (x + 48, y))
    p.text(218, 172, "kept as Parquet: read it, filter it, use it again", "small")
    p.arrow((720, 342), (720, 362), (293, 362), (293, 344))
    p.text(506, 377, "the next completions are the improved student's", "small", "middle")
    return p


def request() -> Picture:
    """One Score call from the trainer to the engine and back."""
    p = Picture(
        860, 306, "A score request passes through checks, cache and fair queue to the engine, and rows stream back"
    )
    steps = [
        ("client", "cuts calls", "by the limits"),
        ("transport", "key, TLS,", "bytes to arrays"),
        ("checks", "ids, limits,", "fingerprint"),
        ("cache", "known? joined", "in flight?"),
        ("fair queue", "by tokens,", "client by client"),
        ("engine", "hidden states,", "read-out"),
    ]
    for i, lines in enumerate(steps):
        x = 20 + 139 * i
        p.box(x, 92, 122, 86, *lines, kind="warm" if lines[0] == "engine" else "box" if i else "cool")
        if i < len(steps) - 1:
            p.arrow((x + 122, 135), (x + 137, 135))
    p.text(20, 34, "trainer", "bold")
    p.text(159, 34, "teacher server", "bold")
    p.arrow((776, 92), (776, 66), (81, 66), (81, 90))
    p.text(430, 58, "rows of up to 1.25 MiB a message, as soon as a sequence is scored", "small", "middle")
    for at, x, first, second in (
        (359, 220, "refused before any work", "too large, wrong ids, another teacher"),
        (498, 474, "no engine step", "a known score costs nothing"),
        (637, 722, "Overloaded", "with the time that draining takes"),
    ):
        p.box(x - 115, 224, 230, 58, first, second, kind="soft")
        p.arrow((at, 178), (at, 200), (x, 200), (x, 222), dashed=True)
    return p


def score() -> Picture:
    """One position: the top K, the tail, the token that stands there, temperature."""
    p = Picture(
        860, 376, "A score at one position: the token's log-probability, the top K, the tail and the normaliser"
    )
    mass = [0.46, 0.21, 0.12, 0.07]
    tokens = ["'95'", "'94'", "'96'", "'9'"]
    tail = 1 - sum(mass)
    hot = [m**0.5 for m in mass]
    rest = 8 * (tail / 8) ** 0.5  # as if eight equal tokens made up the tail
    total = sum(hot) + rest
    p.text(28, 38, "the teacher's next-token distribution after  37+58=", "bold")
    for left, values, title in (
        (28, [*mass, tail], "T = 1"),
        (300, [*(h / total for h in hot), rest / total], "T = 2: l / 2 − C"),
    ):
        p.text(left, 66, title, "small")
        for i, value in enumerate(values):
            is_tail = i == len(mass)
            x = left + 46 * i + (16 if is_tail else 0)
            height = 330 * value
            p.bar(x, 250 - height, 34, height, "warm" if is_tail else "box")
            p.text(x + 17, 244 - height, f"{value:.2f}", "small", "middle")
            p.text(x + 17, 268, "tail" if is_tail else tokens[i], "small", "middle")
        p.line(left, 250, left + 246, 250)
        p.text(left, 296, "top K = 4", "small")
        p.text(left + 200, 296, "all others", "small", "middle")
    p.text(
        28,
        336,
        "A truncated top K with its tail is K + 1 outcomes that sum to 1, at every temperature that was asked for.",
        "small",
    )
    p.text(
        28,
        354,
        "C, the log-normaliser, needs all logits; it cannot be recovered from a top K. So the teacher computes it.",
        "small",
    )
    fields = [
        ("token_logprobs", "of the token that stands there"),
        ("top_token_ids, top_logprobs", "the K most likely"),
        ("tail_logprob", "log of the mass of all others, at each T"),
        ("log_normalizer", "C at each T"),
        ("candidate_logprobs", "of ids that the client named"),
        ("hidden_states", "the whole distribution, on request"),
    ]
    for i, (name, meaning) in enumerate(fields):
        p.text(580, 66 + 40 * i, name, "mono")
        p.text(580, 83 + 40 * i, meaning, "small")
    return p


def modes() -> Picture:
    """The two modes of one prompt, and which tokens are trained on."""
    p = Picture(860, 262, "In both modes the prompt and the template are masked, and the completion is trained on")
    rows = [
        (
            "thinking",
            [
                (300, "<|im_start|>user … <|im_start|>assistant", "soft"),
                (270, "<think> steps … </think>", "cool"),
                (130, "answer", "cool"),
                (84, "<|im_end|>", "cool"),
            ],
        ),
        (
            "non-thinking",
            [
                (300, "<|im_start|>user … <|im_start|>assistant", "soft"),
                (150, "<think> </think>", "soft"),
                (130, "answer", "cool"),
                (84, "<|im_end|>", "cool"),
            ],
        ),
    ]
    for i, (name, parts) in enumerate(rows):
        y = 30 + 94 * i
        p.text(24, y + 4, name, "bold")
        x = 24.0
        for width, text, kind in parts:
            p.bar(x, y + 16, width - 4, 44, kind)
            p.text(x + (width - 4) / 2, y + 43, text, "small", "middle")
            x += width
    p.bar(24, 222, 18, 14, "soft")
    p.text(50, 234, "prompt and template: masked, no loss", "small")
    p.bar(320, 222, 18, 14, "cool")
    p.text(346, 234, "completion: scored and trained on, the end of the turn too, if the model wrote it", "small")
    return p


def staleness() -> Picture:
    """What overlaps in stage 2 with max_staleness 0 and 1."""
    p = Picture(860, 352, "With max_staleness 1 the teacher scores step n + 1 while the student trains step n")
    for top, title in ((24, "max_staleness: 0"), (192, "max_staleness: 1")):
        p.text(24, top + 12, title, "bold")
        p.text(24, top + 48, "student's GPU", "small")
        p.text(24, top + 92, "teacher", "small")
    x = 130
    for n in (1, 2):
        p.box(x, 52, 120, 34, f"sample {n}", kind="cool")
        p.box(x + 74, 96, 150, 34, f"score {n}", kind="warm")
        p.box(x + 224, 52, 116, 34, f"train {n}", kind="box")
        p.line(x + 224, 96, x + 224, 86, dashed=True)
        x += 340
    p.text(308, 150, "the student's GPU waits from the end of sampling to the end of scoring", "small")
    spans = [("sample 1", 130, "cool"), ("sample 2", 246, "cool")]
    spans += [("train 1", 374, "box"), ("sample 3", 490, "cool"), ("train 2", 606, "box"), ("sample 4", 722, "cool")]
    for name, at, kind in spans:
        p.box(at, 220, 112, 34, name, kind=kind)
    for name, at in (("score 1", 200), ("score 2", 356), ("score 3", 560)):
        p.box(at, 264, 146, 34, name, kind="warm")
    p.text(
        130,
        322,
        "sampling goes on with the weights of that moment; a rollout of one step before is weighed by how likely",
        "small",
    )
    p.text(
        130,
        338,
        "its prefix has become, so the gradient stays that of the present student (the weights are cut at 2)",
        "small",
    )
    return p


def fairness() -> Picture:
    """One queue a client, one budget, turns by tokens."""
    p = Picture(
        860, 300, "Each client has its own queue, turns are by tokens, and little is given to the engine at a time"
    )
    clients = [("trainer a", 2), ("trainer b", 9), ("evaluation, weight 0.5", 3)]
    for i, (name, calls) in enumerate(clients):
        y = 40 + 76 * i
        p.text(24, y + 4, name, "bold")
        for j in range(calls):
            p.bar(24 + 34 * (8 - j), y + 14, 28, 26, "box")
        p.arrow((334, y + 27), (432, 150))
    p.box(
        436,
        106,
        150,
        88,
        "turns by tokens",
        "deficit round robin,",
        "score and generate",
        "on one account",
        kind="soft",
    )
    p.arrow((586, 150), (640, 150))
    p.box(644, 106, 190, 88, "engine", "about two batches of", "scoring ahead, no more", kind="warm")
    p.text(436, 226, "so the order is decided late, and is the service's", "small")
    p.text(
        24,
        276,
        "Eight clients with a call each and a ninth with 64 in flight get equal shares; what nobody uses, others get.",
        "small",
    )
    return p


def growth() -> Picture:
    """From one machine to many nodes."""
    p = Picture(
        860, 250, "One laptop, one GPU node and a trainer, replicas behind a list or a proxy, one engine over nodes"
    )
    steps = [
        ("a laptop", ["trainer starts", "the tiny teacher"], ["make demo"]),
        ("teacher + trainer", ["two machines,", "keys and TLS"], ["Compose, or", "two commands"]),
        ("several trainers", ["one teacher,", "weights by key"], ["fair queue,", "shared cache"]),
        ("replicas", ["a list, a DNS", "name, a proxy"], ["fail-over,", "one fingerprint"]),
        ("over nodes", ["one engine by", "vLLM and Ray"], ["for models that", "fit no node"]),
    ]
    for i, (name, what, how) in enumerate(steps):
        x = 20 + 167 * i
        p.box(x, 56, 146, 84, name, *what, kind="soft" if i == 0 else "box")
        for j, line in enumerate(how):
            p.text(x + 73, 168 + 18 * j, line, "small", "middle")
        if i < len(steps) - 1:
            p.arrow((x + 146, 98), (x + 165, 98))
    p.text(20, 36, "the same trainer, the same settings; teacher.endpoint changes", "bold")
    p.text(
        20, 226, "Nothing is rewritten on the way: each step is an address, a key or an engine argument more.", "small"
    )
    return p


PICTURES = {
    "shape": shape,
    "two-stages": two_stages,
    "request": request,
    "score": score,
    "modes": modes,
    "staleness": staleness,
    "fairness": fairness,
    "growth": growth,
}


def main() -> int:
    """Writes every picture, or with --check names the stale ones and returns 1."""
    found = {HERE / f"{name}.svg": make().svg() for name, make in PICTURES.items()}
    if "--check" in sys.argv:
        stale = [p.name for p, text in found.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        print("\n".join(f"{name} is stale; run python docs/pictures/draw.py" for name in stale) or "all are fresh")
        return bool(stale)
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(found)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
