"""Print what pip must install to work on understudy: its dependencies, the lab's, developers'.

Source: pyproject.toml.  Invariant: names nothing that pyproject.toml does not name.
"""

import sys
import tomllib
from pathlib import Path


def requirements(text: str) -> list[str]:
    """Requirement lines for pip, from the text of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    return [*project["dependencies"], *extras.get("dev", []), *extras.get("lab", [])]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]).read_text(encoding="utf-8"))))
