"""Prints what pyproject.toml says a run needs, without torch: for the environment of `make gpu-rehearsal`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
names = (re.match(r"[\w-]+", requirement).group() for requirement in project["dependencies"])  # type: ignore[union-attr]
print(*(name for name in names if name != "torch"))
