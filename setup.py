"""The long description of the package: README.md, with links that work outside the repository.

Relative links lead nowhere on a package index. With a `Source` among the project's urls they become links into it; without
one, their text stays and the link goes. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def long_description() -> str:
    """README.md for readers who do not have the repository."""
    source = tomllib.loads((HERE / "pyproject.toml").read_text())["project"].get("urls", {}).get("Source", "")
    link = rf"[\1]({source}/blob/main/\2)" if source else r"\1"
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", link, (HERE / "README.md").read_text())


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
