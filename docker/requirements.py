"""Print what the service is made of but for torch, one requirement a line: it answers queries without it.

    python3 docker/requirements.py pyproject.toml

The runner has torch, for it is the one that probes; without it the service's image is a twentieth of the size.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print the requirements of the project that the one argument names."""
    project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    sys.stdout.write("".join(f"{line}\n" for line in wanted if not line.startswith("torch")))


if __name__ == "__main__":
    main()
