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

import numpy as np
import psutil
import pytest

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
