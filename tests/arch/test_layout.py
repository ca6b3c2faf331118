"""The shape of the repository: the fixed top level, layers, names, what a module may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

FIXED = {"pyproject.toml", "README.md", "platform", "jobs", "conf", "infra", "tests", "k8s", "LICENSE", "CHANGELOG.md"}
# vendor -> the only places of the package that import it
IMPORTERS = {
    "hydra": {"spec/compose.py"},
    "boto3": {"store/s3.py"},
    "botocore": {"store/s3.py"},
    "wandb": {"track/wandb.py"},
    "pyarrow": {"data/"},
    "ray": {"launch/", "serve/", "cluster.py"},
    "torch": {"nn/", "train/", "launch/", "serve/", "cli/doctor.py", "testing/"},
    "triton": {"nn/"},
    "onnx": {"nn/"},
    "onnxruntime": {"nn/"},
    "safetensors": {"train/"},
    "starlette": {"serve/"},
    "uvicorn": {"serve/"},
    "click": {"cli/"},
}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "core", "misc", "manager", "util", "helper"}


def tracked(root):
    done = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def modules(root):
    return sorted((root / "platform" / "treadle").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_top_level_is_the_one_agreed(root):
    found = {name.split("/", 1)[0] for name in tracked(root)}
    assert {name for name in found if not name.startswith(".")} <= FIXED | {"Makefile"}
    assert FIXED - {"k8s"} <= found


def test_platform_never_shadows_the_standard_library(root):
    assert not list((root / "platform").glob("*.py"))
    # In a subprocess at the root: pytest's own import mode would hide the trap.
    done = subprocess.run([sys.executable, "-c", "import platform; print(platform.system())"], cwd=root, timeout=30)
    assert done.returncode == 0


def test_each_vendor_has_its_importers(root):
    package = root / "platform" / "treadle"
    wrong = []
    for path in modules(root):
        place = path.relative_to(package).as_posix()
        for name in imports(path):
            allowed = IMPORTERS.get(name.split(".", 1)[0])
            if allowed is not None and not any(place.startswith(prefix) for prefix in allowed):
                wrong.append(f"{place} imports {name}")
    assert not wrong


def test_no_module_has_a_name_that_says_nothing(root):
    names = {part for path in modules(root) for part in path.relative_to(root / "platform").with_suffix("").parts}
    assert not names & FORBIDDEN_NAMES


def test_every_module_says_what_it_is_for(root):
    silent = [str(p) for p in modules(root) if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not silent


def test_every_package_has_a_public_surface(root):
    package = root / "platform" / "treadle"
    for init in package.rglob("__init__.py"):
        names = {
            t.id
            for n in ast.walk(ast.parse(init.read_text()))
            if isinstance(n, ast.Assign | ast.AnnAssign)
            for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
            if isinstance(t, ast.Name)
        }
        assert "__all__" in names, init


def test_import_contracts_hold(root):
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_pickle_and_no_doubles(root):
    pattern = re.compile(
        r"(?<!safetensors\.)\b(torch\.load|torch\.save|pickle\.(?:loads?|dumps?)|import pickle|unittest\.mock"
        r"|allow_pickle|yaml\.load\()"
    )
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in [*modules(root), *(root / "jobs").rglob("*.py")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert not found


def test_jobs_import_only_what_packages_export(root):
    for path in (root / "jobs").rglob("*.py"):
        for name in imports(path):
            assert not name.startswith("treadle.") or name in {"treadle.data", "treadle.errors", "treadle.spec"}, (
                path,
                name,
            )


def test_every_job_has_its_card(root):
    for folder in (root / "jobs").iterdir():
        for name in ("job.yaml", "prepare.py", "README.md"):
            assert (folder / name).is_file(), folder / name


def test_constraints_pin_every_dependency(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=! ]", d, maxsplit=1)[0].lower().replace("_", "-") for d in wanted}
    names -= {"treadle", "triton"}  # itself, and what torch's CUDA wheels pin to a version of their own
    lines = (root / "infra" / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pinned
    assert "torch==2.13.0" in lines
