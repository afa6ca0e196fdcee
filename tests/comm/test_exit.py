"""How processes end: scripts that stop after their last step exit cleanly, messages in flight or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ports import free_port

SCRIPT = """
import torch
import fusedfog

fusedfog.init()
model = torch.nn.Linear(8, 8)
optimizer = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring", {option})
for _ in range(4):
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
{last}
"""


THROUGH_MEMORY = """
from torch.distributed.device_mesh import init_device_mesh
model = torch.nn.Linear(8, 8)
optimizer = fusedfog.SGD(model.parameters(), lr=0.1, mesh=init_device_mesh("cpu", (1, 3)))
for _ in range(2):
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("last", "option"),
    [
        ("", ""),
        pytest.param("", "asynchronous=True", marks=pytest.mark.slow),
        pytest.param("", "fused_backward=True", marks=pytest.mark.slow),
        pytest.param("torch.distributed.destroy_process_group()", "", marks=pytest.mark.slow),
        # Rank 0 hosts the store, and ends first.
        pytest.param("import time; time.sleep(3.0 * (fusedfog.rank() > 0))", "", marks=pytest.mark.slow),
        pytest.param("import os; os.fork() or os._exit(0); print(fusedfog.mean(1.0))", "", marks=pytest.mark.slow),
        pytest.param(THROUGH_MEMORY, "", marks=pytest.mark.slow),
    ],
)
def test_a_script_that_just_ends_exits_with_status_zero(tmp_path: Path, last: str, option: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(last=last, option=option))
    base = os.environ | {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], env=base | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
        assert "Exception" not in errors
