"""`python -m teacher_server`: parses the configuration, then imports and runs the server, or runs one command.

`keys` manages keys; `ping`, `score` and `top` ask a running teacher. Exit codes of the server: 0 stopped, 1 could not
start or lost its engine for good, 2 the configuration cannot be used.
"""

from __future__ import annotations

import importlib
import os
import sys

from teacher_server.settings import ConfigError, load, render, report

COMMANDS = {
    "keys": "teacher_server.keys_command",
    "ping": "teacher_server.commands.ping",
    "score": "teacher_server.commands.score",
    "top": "teacher_server.commands.top",
}


def main() -> int:
    """Runs one server until it is told to stop, or one command."""
    module = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if module is not None:
        return int(importlib.import_module(module).main(sys.argv[2:]))
    try:
        config, dry_run = load(sys.argv[1:])
    except ConfigError as error:
        report(error)
        return 2
    if dry_run:
        print(render(config), end="")
        return 0
    # gRPC's core writes a line for each stranger's failed handshake; read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from teacher_server.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
