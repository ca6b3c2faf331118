"""Where the config groups and the jobs lie: in a checkout, or inside an installed package.

Only lists and finds; what stands in the files is read by `treadle.spec.compose`.
"""

from __future__ import annotations

from pathlib import Path

from treadle.errors import ConfigError, did_you_mean

__all__ = ["conf_folder", "find_job", "is_job", "list_groups", "list_jobs", "list_options", "short_path"]

_JOB_FILE = "job.yaml"


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _shared_folder(name: str) -> Path:
    """`conf` or `jobs` of the checkout this package runs from, else the copy inside the wheel."""
    checkout = _package().parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _package() / f"_{name}"


def conf_folder() -> Path:
    """The folder of base.yaml and the config groups.

    Raises:
        ConfigError: the installation is incomplete.
    """
    folder = _shared_folder("conf")
    if not (folder / "base.yaml").is_file():
        raise ConfigError(f"conf: got no base.yaml in {folder}, expected it there", hint="install treadle again")
    return folder


def list_jobs() -> dict[str, Path]:
    """The folder of every job that can be named, by name; ./jobs hides a shipped job of the same name."""
    found: dict[str, Path] = {}
    for jobs in (Path.cwd() / "jobs", _shared_folder("jobs")):
        for file in sorted(jobs.glob(f"*/{_JOB_FILE}")):
            found.setdefault(file.parent.name, file.parent)
    return dict(sorted(found.items()))


def find_job(job: str) -> Path:
    """The folder of a job, given its name or a path to a folder that holds job.yaml.

    Raises:
        ConfigError: there is none; the message lists the jobs that are.
    """
    jobs = list_jobs()
    if job in jobs:
        return jobs[job]
    path = Path(job).expanduser()
    if job and path.name == _JOB_FILE:
        path = path.parent
    if job and (path / _JOB_FILE).is_file():
        return path.resolve()
    known = ", ".join(jobs) or "none yet"
    raise ConfigError(
        f"job: got {job!r}, expected one of {known}, or a folder that holds {_JOB_FILE}{did_you_mean(job, jobs)}",
        hint=f"a new job is a folder jobs/NAME with a {_JOB_FILE}: copy one of {_shared_folder('jobs')}",
        problems=[{"key": "job", "got": repr(job), "expected": f"one of {known}"}],
    )


def is_job(job: str) -> bool:
    """Whether `find_job` finds it."""
    path = Path(job).expanduser()
    return bool(job) and (
        job in list_jobs() or (path / _JOB_FILE).is_file() or (path.name == _JOB_FILE and path.is_file())
    )


def list_groups() -> tuple[str, ...]:
    """The config groups: what can be switched as a whole, as in `model=gru`."""
    return tuple(sorted(entry.name for entry in conf_folder().iterdir() if entry.is_dir() and entry.name[0].isalpha()))


def list_options(group: str, job: Path | None = None) -> dict[str, Path]:
    """The file of every option of a group, by name; a job's own folder may add options or hide some."""
    folders = [folder / group for folder in (job, conf_folder()) if folder is not None]
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def short_path(path: Path) -> str:
    """`path` as a person in the current folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
