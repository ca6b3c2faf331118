"""The README's jobs, made from its text: the script, the tables, the events; and what its package holds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
from pyarrow import parquet


def job_of_the_readme(treadle, root, name):
    """The folder of a job as the README writes it."""
    text = (root / "README.md").read_text(encoding="utf-8")
    (body,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if f"\nname: {name}\n" in b]
    folder = treadle.folder / "jobs" / name
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(body, encoding="utf-8")
    return folder


def test_the_script_of_the_readme_prepares_a_job(treadle, here, root):
    folder = job_of_the_readme(here, root, "parity")
    (body,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (folder / "prepare.py").write_text(body, encoding="utf-8")
    here.ok("prepare", "parity")
    done = treadle.ok("submit", "parity", "track=disabled")
    assert done["metrics"]["test/accuracy"] > 0.95
    assert here.ok("predict", "parity@latest", "110", "1011")["outputs"][1]["label"] == "odd"


def stays(num):
    """Two stays of each patient; in the third of all a heart beats backwards."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num):
        is_ill, length = i % 3 == 0, int(rng.integers(3, 40))
        # Of each person another rate, or the audit would say that the mean gives the outcome away.
        rate = rng.normal(91 if is_ill else 75, 6) + rng.normal(0, 3, length)
        oxygen = rng.uniform(88, 100, length)
        oxygen[rng.random(length) < 0.1] = np.nan
        if i == 2:
            rate[1] = -1
        outcome = "died" if is_ill else "lived"
        rows.append({"patient": f"p{i // 2}", "heart_rate": rate.tolist(), "spo2": oxygen.tolist(), "outcome": outcome})
    return pa.Table.from_pylist(rows)


def test_the_table_of_the_readme_is_a_data_set_without_a_script(here, root):
    job_of_the_readme(here, root, "stays")
    (here.folder / "stays").mkdir()
    for number, start in enumerate((0, 200)):
        parquet.write_table(stays(400).slice(start, 200), here.folder / "stays" / f"{number}.parquet")
    made = here.ok("data", "build", "stays")
    assert sum(made["rows"].values()) == 399
    assert made["set_aside"] == 1
    facts = here.ok("data", "show", "stays")["dataset"]
    assert [channel["name"] for channel in facts["channels"]] == ["heart_rate", "spo2"]
    assert (facts["missing"], facts["target_per"], facts["labels"]) == ("indicator", "row", ["lived", "died"])
    assert here.ok("data", "audit", "stays")["findings"] == []
    # another split of the same rows: the shards are there already
    shards = set((here.folder.parent / "store" / "data" / "stays" / "shards").iterdir())
    other = here.ok("prepare", "stays", "split=stratified", "split.test=0.3")
    assert other["digest"] != made["digest"]
    assert set((here.folder.parent / "store" / "data" / "stays" / "shards").iterdir()) == shards
    assert [d["rows"] for d in here.ok("data", "ls")["datasets"]] == [399, 399]


def test_the_tables_of_the_readme_are_trained_on(treadle, here, root):
    job_of_the_readme(here, root, "stays")
    (here.folder / "stays").mkdir()
    parquet.write_table(stays(400), here.folder / "stays" / "all.parquet")
    here.ok("prepare", "stays")
    done = treadle.ok("submit", "stays", "train.epochs=8", "optim.lr=1e-2", "augment=light", "track=disabled")
    assert done["metrics"]["test/accuracy"] > 0.8


def test_the_events_of_the_readme_become_rows_by_time(here, root):
    job_of_the_readme(here, root, "visits")
    rng = np.random.default_rng(0)
    lines = [
        f"p{i},{minute},{rng.normal(80, 5):.1f},{rng.uniform(90, 100):.1f},{10 * i + 100},{('lived', 'died')[i % 2]}"
        for i in range(200)
        for minute in range(10 * i + 70, 10 * i + 100, 5)
    ]
    rng.shuffle(lines)
    head = "patient,minute,heart_rate,spo2,asked_at,outcome"
    (here.folder / "visits.csv").write_text("\n".join([head, *lines]) + "\n")
    made = here.ok("prepare", "visits")
    assert made["dropped"]["purged"] > 0
    assert sum(made["rows"].values()) + sum(made["dropped"].values()) == 200
    facts = here.ok("data", "show", "visits")["dataset"]
    assert (facts["timed"], facts["frames"]) == (True, 1200)
    assert facts["gap"]["name"] == "log(1 + gap)"


def test_the_explained_batches_of_the_readme_are_what_is_printed(here, root):
    text = (root / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- explain -->\n```text\n(.*?)\n```", text, re.DOTALL)
    (code,) = re.findall(r"^python -c \"(.*)\"$", text, re.MULTILINE)
    subprocess.run([sys.executable, "-c", code], cwd=here.folder, check=True, timeout=60)
    (command,) = re.findall(r"^treadle (data explain --lengths .*)$", text, re.MULTILINE)
    done = here(*shlex.split(command))
    assert done.code == 0, done.err

    def steady(lines):
        return [line for line in lines.splitlines() if not line.startswith("planning")]

    assert steady(done.out.rstrip()) == steady(shown)


def test_a_wheel_works_outside_the_checkout(root, tmp_path, treadle):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", root],
        check=True,
        capture_output=True,
        timeout=100,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    treadle.environment["PYTHONPATH"] = str(site)
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import treadle; print(treadle.__file__)"],
        env=treadle.environment,
        cwd=treadle.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    assert {"g2p", "vowels"} <= set(treadle.ok("jobs")["jobs"])
    overrides = ["data.limit=600", "split.test=60", "split.valid=30", "cluster=inline", "train.epochs=1"]
    overrides += ["model.hidden_size=8", "track=disabled"]
    treadle.ok("prepare", "g2p", *overrides)
    assert treadle.ok("submit", "g2p", *overrides)["status"] == "finished"
