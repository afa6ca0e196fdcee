"""What `pip install .` installs is all that lies in the packages' folders, from an archive without git's list of files too."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def setuptools() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder(package: str) -> Path:
    return ROOT / setuptools()["package-dir"].get(package, package.replace(".", "/"))


def test_every_package_is_installed() -> None:
    named = {folder(package) for package in setuptools()["packages"]}
    assert named == {file.parent for top in ("fusedfog", "kernels") for file in (ROOT / top).rglob("__init__.py")}


def test_every_file_of_the_packages_is_installed() -> None:
    data = setuptools()["package-data"]
    wanted = [(folder(package), ["*.py", *data["*"], *data.get(package, [])]) for package in setuptools()["packages"]]
    installed = {file for place, patterns in wanted for pattern in patterns for file in place.glob(pattern)}
    made = ("*.pyc", "*.egg-info/*", "*/.ipynb_checkpoints/*")
    files = {file for top in ("fusedfog", "kernels") for file in (ROOT / top).rglob("*") if file.is_file()}
    assert {file for file in files if not any(fnmatch(str(file), pattern) for pattern in made)} <= installed
