"""Prints what extras of pyproject.toml need, one requirement a line: `requirements.py server bitsandbytes`.

An image installs these before it gets the code, so that a change of the code installs nothing again.
With `--only torch` it prints that one alone, for a layer that images share.
"""

import argparse
import re
import tomllib
from pathlib import Path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--file", type=Path, default=Path("pyproject.toml"))
    parser.add_argument("--only")
    options = parser.parse_args()
    project = tomllib.loads(options.file.read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in options.extras:
        wanted += project["optional-dependencies"][extra]
    for requirement in dict.fromkeys(wanted):
        name = re.match(r"[\w.-]+", requirement)
        if options.only is None or (name and name[0] == options.only):
            print(requirement)


if __name__ == "__main__":
    main()
