"""What the cheap verbs load: a help page must not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "hydra", "omegaconf", "boto3", "wandb", "pyarrow", "pydantic", "numpy"]


def loaded(code: str) -> set[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["submit", "--help"], ["models", "--help"], ["data", "--help"], ["jobs"]]
)
def test_help_loads_nothing_heavy(arguments):
    assert loaded(f"from treadle.cli import main; main({arguments!r})") <= (
        {"numpy"} if arguments == ["jobs"] else set()
    )


@pytest.mark.parametrize("package", ["treadle", "treadle.errors", "treadle.units", "treadle.wire", "treadle.spec"])
def test_the_lower_layers_load_nothing_heavy(package):
    assert loaded(f"import {package}") == set()


def test_planning_needs_numpy_at_most():
    assert loaded("import treadle.plan") == {"numpy"}


@pytest.mark.parametrize(
    "arguments", [["ls"], ["status", "x"], ["models", "ls"], ["logs", "x"], ["stop", "x"], ["data", "ls"]]
)
def test_looking_loads_neither_torch_nor_ray(arguments, tmp_path):
    assert not loaded(f"from treadle.cli import main; main([*{arguments!r}, '--store', {str(tmp_path)!r}])") & {
        "torch",
        "ray",
        "hydra",
        "boto3",
        "wandb",
    }


def test_explaining_lengths_loads_numpy_alone(tmp_path):
    import numpy as np

    np.save(tmp_path / "l.npy", np.arange(1, 100))
    arguments = ["data", "explain", "--lengths", str(tmp_path / "l.npy"), "--ranks", "2", "--json"]
    found = loaded(f"from treadle.cli import main; main({arguments!r})")
    assert found == {"numpy"}


def test_a_worker_needs_neither_hydra_nor_click():
    assert not loaded("import treadle.launch.worker, treadle.launch.driver, treadle.train") & {"hydra", "omegaconf"}
