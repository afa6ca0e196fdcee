"""The benches of the GPU path work where there is no GPU, so that a typo does not cost the time of one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.stub_driver import unavailable

BENCH = Path(__file__).parents[1] / "bench"
MOST_SECONDS = 8.5 * 60

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"the benches were NOT tried: {unavailable()}")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """bench/gpu.py, which finds its neighbours by their names: none of them is another file's here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_sections_end_in_time_and_the_kernels_come_first(gpu: ModuleType) -> None:
    assert sum(section.most for section in gpu.SECTIONS) <= MOST_SECONDS
    assert gpu.SECTIONS[0].name == "passes"
    assert {"loopback", "speed", "graphs", "memory"} <= {section.name for section in gpu.SECTIONS}


@pytest.mark.slow
def test_every_section_runs_without_a_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    done = run("gpu.py", "--dry-run", "--out", str(tmp_path))
    report = json.loads((tmp_path / "gpu.json").read_text())
    bad: dict[str, Any] = {
        name: (section["status"], section["found"].get("failures"), section["log"])
        for name, section in report["sections"].items()
        if section["status"] != "ok"
    }
    assert bad == {}
    assert done.returncode == 0
    names = [section.name for section in gpu.SECTIONS]
    assert list(report["sections"]) == names
    assert done.stdout.splitlines()[-1] == f"PASSED {len(names)} of {len(names)}: {', '.join(names)}"
    found = {name: section["found"] for name, section in report["sections"].items()}
    assert found["passes"]["cases"] > 50
    assert found["loopback"]["works of a batch of 32"] == 1
    assert [part["result"] for part in found["loopback"]["parts"]] == ["ok"] * 7
    assert {row["rule"] for row in found["speed"]["rows"]} >= {"mix", "sgd", "adamw", "tracking"}
    # Those of the kernels' launches that were kept on the stub: nothing ran without its kernel being compiled.
    assert all(row["registers"] is not None for row in found["speed"]["rows"] if row["K"] == 1)
    assert found["counters"]["DRAM bytes per element"]


def test_a_section_that_fails_costs_itself_and_is_named(gpu: ModuleType, tmp_path: Path) -> None:
    broken = gpu.Section("no_such_section", "gpu_sections", 300)
    entry = gpu.perform(broken, tmp_path, time.time() + 310, False)
    assert entry["status"] == "process 0 failed with exit status 2"
    assert "invalid choice" in entry["log"]
    line = importlib.import_module("gpu_notes").verdict({"passes": {"status": "ok"}, "speed": entry})
    assert line == "PASSED 1 of 2: passes; NOT PASSED: speed (process 0 failed with exit status 2)"


def test_host_time_is_compared_with_torchs() -> None:
    done = run("host.py", "--steps", "3", "--no-save")
    assert done.returncode == 0, done.stderr
    assert "torch.optim.AdamW(fused=True)" in done.stdout
    launches = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in done.stdout.splitlines()[2:]}
    assert launches["torch.optim.AdamW(fused=True)"] == "0"
    assert launches["local"] == "1" and launches["awc, one neighbour"] == "3"  # the pass, and two looks at samples
