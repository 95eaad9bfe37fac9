"""`python -m teacher_server`: parses the configuration, then imports and runs the server; `keys` manages keys.

Exit codes: 0 stopped, 1 could not start or lost its engine for good, 2 the configuration cannot be used.
"""

from __future__ import annotations

import os
import sys

from teacher_server.settings import ConfigError, load, render, report


def main() -> int:
    """Runs one server until it is told to stop, or one command."""
    if sys.argv[1:2] == ["keys"]:
        from teacher_server.keys_command import main as keys

        return keys(sys.argv[2:])
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
