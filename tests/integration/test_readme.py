"""The README's commands, run as they stand.

They name the job `g2p`. Here `./jobs/g2p` is the shipped job over a hundredth of its words, and hides
the shipped one as any job in ./jobs does; nothing else about a command is changed but an address.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

SMALL = """
data: {name: g2p, limit: 1500, max_length: 64}
split: {test: 200, valid: 100}
train: {epochs: 1}
cluster: {workers: 0}
model: {bidirectional: true, hidden_size: 16, num_layers: 1, embedding_size: 16}
track: {wandb: disabled}
"""


@pytest.fixture
def small(treadle, root):
    """A folder whose job g2p is the shipped one, small."""
    folder = treadle.folder / "jobs" / "g2p"
    shutil.copytree(root / "jobs" / "g2p", folder)
    text = (folder / "job.yaml").read_text(encoding="utf-8")
    for key in ("data", "split", "train", "model"):
        text = re.sub(rf"^{key}:\n(?:[ #].*\n|\n(?= ))*", "", text, flags=re.MULTILINE)
    (folder / "job.yaml").write_text(text.rstrip() + "\n" + SMALL, encoding="utf-8")
    np.save(treadle.folder / "lengths.npy", np.arange(1, 2001))
    return treadle


def blocks(root) -> list[list[list[str]]]:
    """The `treadle` commands of each shell block of the README."""
    text = (root / "README.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines = [line.split("  #")[0].strip() for line in block.splitlines()]
        found.append([shlex.split(line)[1:] for line in lines if line.startswith("treadle ")])
    return [block for block in found if block]


def run(treadle, arguments):
    done = treadle(*arguments, timeout=200)
    assert done.code == 0, (arguments, done.err, done.out)
    return done


def started(treadle, arguments):
    """A command that stays in the foreground, and its first line."""
    process = treadle.start(*arguments, "--json")
    line = process.stdout.readline()
    assert line, process.communicate()
    return process, json.loads(line)


def stopped(process):
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_every_command_of_the_readme_runs(small, root, s3_server):
    ran = []
    for block in blocks(root):
        if any("ray" in command for command in block):
            continue  # test_ray_jobs.py runs that block on a real cluster
        background = None
        for command in block:
            if command[0] in {"serve", "store"}:
                background, answer = started(small, [*command])
                small.environment.update(answer.get("environment", {}))
            elif command[0] == "resume":
                # The run before it has finished; one that was stopped is resumed in test_inline.py.
                assert small(*command).code == 7
            elif command[0] == "models" and command[1] == "rollback":
                run(small, ["submit", "g2p"])
                run(small, ["models", "promote", "g2p@latest", "production"])
                run(small, command)
            else:
                run(small, command)
            ran.append(command[0])
        if background is not None:
            stopped(background)
            small.environment["TREADLE_STORE"] = str(small.folder.parent / "store")
    assert {
        "prepare",
        "plan",
        "submit",
        "ls",
        "status",
        "logs",
        "report",
        "models",
        "serve",
        "predict",
        "doctor",
        "data",
    } <= set(ran)


def job_of_the_readme(treadle, root, name):
    """The folder of a job as the README writes it."""
    text = (root / "README.md").read_text(encoding="utf-8")
    (body,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if f"\nname: {name}\n" in b]
    folder = treadle.folder / "jobs" / name
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(body, encoding="utf-8")
    return folder


def test_the_script_of_the_readme_prepares_a_job(treadle, root):
    folder = job_of_the_readme(treadle, root, "parity")
    (body,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (folder / "prepare.py").write_text(body, encoding="utf-8")
    treadle.ok("prepare", "parity")
    done = treadle.ok("submit", "parity", "track=disabled")
    assert done["metrics"]["test/accuracy"] > 0.95
    assert treadle.ok("predict", "parity@latest", "110", "1011")["outputs"][1]["label"] == "odd"


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


def test_the_table_of_the_readme_is_a_data_set_without_a_script(treadle, root):
    job_of_the_readme(treadle, root, "stays")
    (treadle.folder / "stays").mkdir()
    for number, start in enumerate((0, 200)):
        parquet.write_table(stays(400).slice(start, 200), treadle.folder / "stays" / f"{number}.parquet")
    made = treadle.ok("data", "build", "stays")
    assert sum(made["rows"].values()) == 399
    assert made["set_aside"] == 1
    facts = treadle.ok("data", "show", "stays")["dataset"]
    assert [channel["name"] for channel in facts["channels"]] == ["heart_rate", "spo2"]
    assert (facts["missing"], facts["target_per"], facts["labels"]) == ("indicator", "row", ["died", "lived"])
    assert treadle.ok("data", "audit", "stays")["findings"] == []
    # another split of the same rows: the shards are there already
    shards = set((treadle.folder.parent / "store" / "data" / "stays" / "shards").iterdir())
    other = treadle.ok("prepare", "stays", "split=stratified", "split.test=0.3")
    assert other["digest"] != made["digest"]
    assert set((treadle.folder.parent / "store" / "data" / "stays" / "shards").iterdir()) == shards
    assert [d["rows"] for d in treadle.ok("data", "ls")["datasets"]] == [399, 399]


def test_the_tables_of_the_readme_are_trained_on(treadle, root):
    job_of_the_readme(treadle, root, "stays")
    (treadle.folder / "stays").mkdir()
    parquet.write_table(stays(400), treadle.folder / "stays" / "all.parquet")
    treadle.ok("prepare", "stays")
    done = treadle.ok("submit", "stays", "train.epochs=8", "optim.lr=1e-2", "augment=light", "track=disabled")
    assert done["metrics"]["test/accuracy"] > 0.8


def test_the_events_of_the_readme_become_rows_by_time(treadle, root):
    job_of_the_readme(treadle, root, "visits")
    rng = np.random.default_rng(0)
    lines = [
        f"p{i},{minute},{rng.normal(80, 5):.1f},{rng.uniform(90, 100):.1f},{10 * i + 100},{('lived', 'died')[i % 2]}"
        for i in range(200)
        for minute in range(10 * i + 70, 10 * i + 100, 5)
    ]
    rng.shuffle(lines)
    head = "patient,minute,heart_rate,spo2,asked_at,outcome"
    (treadle.folder / "visits.csv").write_text("\n".join([head, *lines]) + "\n")
    made = treadle.ok("prepare", "visits")
    assert made["dropped"]["purged"] > 0
    assert sum(made["rows"].values()) + sum(made["dropped"].values()) == 200
    facts = treadle.ok("data", "show", "visits")["dataset"]
    assert (facts["timed"], facts["frames"]) == (True, 1200)
    assert facts["gap"]["name"] == "log(1 + gap)"


def test_the_explained_batches_of_the_readme_are_what_is_printed(treadle, root):
    text = (root / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- explain -->\n```text\n(.*?)\n```", text, re.DOTALL)
    (code,) = re.findall(r"^python -c \"(.*)\"$", text, re.MULTILINE)
    subprocess.run([sys.executable, "-c", code], cwd=treadle.folder, check=True, timeout=60)
    (command,) = re.findall(r"^treadle (data explain --lengths .*)$", text, re.MULTILINE)
    done = run(treadle, shlex.split(command))

    def steady(lines):
        return [line for line in lines.splitlines() if not line.startswith("planning")]

    assert steady(done.out.rstrip()) == steady(shown)


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_the_demo_walks_the_whole_road(small):
    """`make demo` is this command; here over few words and without Ray Train, served by Ray Serve."""
    done = small("demo", "--json", timeout=250)
    assert done.code == 0, done.err
    assert set(done.json["answers"]) == {"treadle", "kubernetes", "pytorch"}
    assert (small.folder / "report.html").is_file()
    assert [line for line in done.err.splitlines() if line.startswith("$ treadle")][:3] == [
        "$ treadle prepare g2p",
        "$ treadle plan g2p",
        "$ treadle submit g2p",
    ]
    mine = str(small.folder.parent)
    assert not [p for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])]


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
