"""Every Triton that fusedfog promises to run on: fetched, unpacked beside the environment, and tests run with it.

    python tests/support/triton_versions.py [--full] [version ...]

prints a line for each version. pip finds wheels by name, and they stay unpacked in build/triton. A version stands first on
the PYTHONPATH of a process of its own: all else, torch and numpy too, is the environment's. What runs needs no GPU: what the
compiler makes of every rule, and what the launcher packs. All six take four minutes on two cores; with `--full`, an hour.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

VERSIONS = ("3.5.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
"""Oldest first: torch 2.9 brings 3.5.0, 2.10 3.5.1 or 3.6.0, 2.11 3.6.0, 2.12 3.7.1, 2.14 3.8.0 and 2.15 3.9.0."""

TESTS = (
    "tests/kernels/test_kernel_codegen.py",
    "tests/kernels/test_codegen_lossy.py",
    "tests/kernels/test_launch_path.py",
    "tests/kernels/test_launcher.py",
)
"""What runs with each version."""

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build" / "triton"


class Unavailable(Exception):
    """A version's wheel can't be had, as when there is no network."""


@functools.cache
def unpacked(version: str) -> Path:
    """The folder that holds a version's `triton`, fetched and unpacked if it isn't there yet.

    Raises:
        Unavailable: if pip finds no wheel for this Python.
    """
    # A wheel is for one Python: build/triton may serve several.
    folder = HOME / f"{version}-{sys.implementation.cache_tag}"
    if folder.exists():
        return folder
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as name:
        wheels, fresh = Path(name) / "wheels", Path(name) / "unpacked"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
        command += [
            "--timeout=20",
            "--quiet",
            "--disable-pip-version-check",
            "--dest",
            str(wheels),
            f"triton=={version}",
        ]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            raise Unavailable(f"pip finds no triton {version}: {found.stderr.strip()[-500:]}")
        _unpack(next(wheels.glob("*.whl")), fresh)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.exists():  # Else another process was faster.
                raise
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = Path(archive.extract(member, folder))
            # zipfile forgets permissions, and ptxas must be executable.
            if member.external_attr >> 16 & 0o111:
                path.chmod(0o755)


def run(version: str, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """pytest with a version of Triton and these arguments, from the repository's root.

    Raises:
        Unavailable: as `unpacked`.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(unpacked(version)), *_path()])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def _path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def counts(output: str) -> dict[str, int]:
    """What pytest's last line says: {"passed": 155, "skipped": 1}."""
    lines = output.strip().splitlines() or [""]
    return {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1])}


def main(arguments: Sequence[str]) -> int:
    """Run the tests with each version named, or with all; the number of versions that failed."""
    parser = argparse.ArgumentParser(description="run the compile-only tests with every supported Triton")
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument(
        "--full", action="store_true", help="every rule with all numbers of neighbours, dtypes and GPUs"
    )
    options = parser.parse_args(arguments)
    failed = 0
    for version in options.versions:
        began = time.perf_counter()
        try:
            found = run(
                version, *TESTS, *([] if options.full else ["-m", "not slow"]), "-v", "--no-header", "--tb=short"
            )
        except Unavailable as problem:
            failed += 1
            print(f"triton {version}: not tested: {problem}", flush=True)
            continue
        encoded = ", ".join(f"{number} {what}" for what, number in counts(found.stdout).items())
        print(f"triton {version}: {encoded or 'nothing ran'} in {time.perf_counter() - began:.0f} s", flush=True)
        if found.returncode:
            failed += 1
            print(found.stdout[-8000:], found.stderr[-2000:], sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
