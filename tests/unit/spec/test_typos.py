"""Every kind of mistake is caught, many in one run, most with the right suggestion."""

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.errors import ConfigError
from treadle.spec.compose import compose_job

# Argument, the key that the message must name, the suggestion it must make ("" for none).
ARGUMENTS = [
    # unknown keys, in every form an override has
    ("modle.num_layers=3", "modle.num_layers", "model.num_layers"),
    ("model.hiden_size=3", "model.hiden_size", "model.hidden_size"),
    ("model.hidden=3", "model.hidden", "model.hidden_size"),
    ("hidden=3", "hidden", "model.hidden_size"),
    ("num_layers=3", "num_layers", "model.num_layers"),
    ("model.layers=3", "model.layers", "model.num_layers"),
    ("model.lstm_dropout=0.3", "model.lstm_dropout", "model.dropout"),
    ("model.dropuot=0.3", "model.dropuot", "model.dropout"),
    ("model.bidirection=true", "model.bidirection", "model.bidirectional"),
    ("model.embeding_size=3", "model.embeding_size", "model.embedding_size"),
    ("model.Norm=true", "model.Norm", "model.norm"),
    ("+optim.lrr=1e-3", "optim.lrr", "optim.lr"),
    ("++optim.lr_=1e-3", "optim.lr_", "optim.lr"),
    ("~optim.wieght_decay", "optim.wieght_decay", "optim.weight_decay"),
    ("learning_rate=0.1", "learning_rate", "optim.lr"),
    ("trainer.learning_rate=0.1", "trainer.learning_rate", "optim.lr"),
    ("optm.lr=0.1", "optm.lr", "optim.lr"),
    ("optimizer.lr=0.1", "optimizer.lr", "optim.lr"),
    ("optim.clip-norm=1", "optim.clip-norm", "optim.clip_norm"),
    ("optim.warmup=0.1", "optim.warmup", "optim.warmup_share"),
    ("+train={epoch: 3}", "train.epoch", "train.epochs"),
    ("+batch={max_slot: 3}", "batch.max_slot", "batch.max_slots"),
    ("batch_size=64", "batch_size", "batch.max_slots"),
    ("data.batch_size=64", "data.batch_size", "batch.max_slots"),
    # keys of earlier versions
    ("batch.slots=512", "batch.slots", "batch.max_slots"),
    ("data.valid=0.1", "data.valid", "split.valid"),
    ("data.test=500", "data.test", "split.test"),
    ("data.seed=3", "data.seed", "split.seed"),
    ("batch.max_row=3", "batch.max_row", "batch.max_rows"),
    ("data.lanes=3", "data.lanes", "batch.lanes"),
    ("data.max_len=3", "data.max_len", "data.max_length"),
    ("data.validation=3", "data.validation", "split.valid"),
    ("split.validate=3", "split.validate", "split.valid"),
    ("split.n_splits=3", "split.n_splits", "split.folds"),
    ("splits.by=time", "splits.by", "split.by"),
    ("columns.input=[a]", "columns.input", "columns.inputs"),
    ("columns.features=[a]", "columns.features", "columns.inputs"),
    ("column.entity=a", "column.entity", "columns.entity"),
    ("columns.targets=[a]", "columns.targets", "columns.target"),
    ("augment.time_mask=1", "augment.time_mask", "augment.time_masks"),
    ("augmentation.jitter=1", "augmentation.jitter", "augment.jitter"),
    ("data.on_bad_rows=fail", "data.on_bad_rows", "data.on_bad_row"),
    ("chekpoint.every=30s", "chekpoint.every", "checkpoint.every"),
    ("checkpoint.keep=3", "checkpoint.keep", "checkpoint.keep_last"),
    ("train.max_epochs=3", "train.max_epochs", "train.epochs"),
    ("train.evaluate=3", "train.evaluate", "train.evaluate_every"),
    ("cluster.num_workers=3", "cluster.num_workers", "cluster.workers"),
    ("cluster.gpus=1", "cluster.gpus", "cluster.gpus_per_worker"),
    ("trak.project=x", "trak.project", "track.project"),
    ("wandb=offline", "wandb", "track.wandb"),
    ("store.url=s3://b/p", "store.url", "store.uri"),
    ("task.label=phone", "task.label", "task.label_name"),
    ("model.kind=gru", "model.kind", "model=OPTION"),
    ("modell=gru", "modell", "model"),
    ("precison=bf16", "precison", "precision"),
    # enumerations
    ("optim.schedule=cosin", "optim.schedule", "cosine"),
    ("track.wandb=of", "track.wandb", "offline"),
    ("precision.mode=bfloat16", "precision.mode", "bf16"),
    ("split.by=walk-forward", "split.by", "walk_forward"),
    ("data.on_bad_row=quarantin", "data.on_bad_row", "quarantine"),
    ("columns.target_per=frames", "columns.target_per", "frame"),
    ("data.allow_leaks=[entity,contents]", "data.allow_leaks", "content"),
    # types and ranges
    ("model.hidden_size=abc", "model.hidden_size", ""),
    ("model.embedding_size=1.5", "model.embedding_size", ""),
    ("model.num_layers=true", "model.num_layers", ""),
    ("model.bidirectional=2", "model.bidirectional", ""),
    ("model.residual=maybe", "model.residual", ""),
    ("model.dropout=1", "model.dropout", ""),
    ("model.conv_size=1", "model.conv_size", "2 taps"),
    ("model.mlp_factor=-1", "model.mlp_factor", ""),
    ("model.candidate=relu", "model.candidate", "model=mingru"),
    ("model.expansion=2", "model.expansion", "model=minlstm"),
    ("optim.lr=-1", "optim.lr", ""),
    ("optim.weight_decay=inf", "optim.weight_decay", ""),
    ("optim.final_lr_share=nan", "optim.final_lr_share", ""),
    ("optim.beta1=null", "optim.beta1", ""),
    ("batch.max_slots=lots", "batch.max_slots", ""),
    ("columns.symbols=a", "columns.symbols", ""),
    ("columns.labels=[a,true]", "columns.labels", ""),
    ("columns.lower={hr: low}", "columns.lower", ""),
    ("columns.upper.hr=inf", "columns.upper", ""),
    ("split.train_rows=0", "split.train_rows", ""),
    ("split.fold=5", "split.fold", "split.folds = 5"),
    ("augment.scale=1", "augment.scale", ""),
    ("serve.port=70000", "serve.port", ""),
    ("data.sha256=[a]", "data.sha256", ""),
    ("train.epochs={a: 1}", "train.epochs", ""),
    ("checkpoint.every=0s", "checkpoint.every", ""),
    ("train.log_every=9q", "train.log_every", ""),
    ("serve.max_body=much", "serve.max_body", ""),
    ("name=A_B", "name", ""),
    ("data.name=''", "data.name", ""),
    ("summary=on", "", ""),  # the word, not a flag: stands
    ("track.entity=true", "track.entity", ""),
    # forms
    ("batch.noise=0.1,0.2", "batch.noise", ""),
    ("serve.replicas=choice(1,2)", "serve.replicas", ""),
    ("serve.max_rows=range(1,3)", "serve.max_rows", ""),
    ("batch.max_rows=interval(1,3)", "batch.max_rows", ""),
    ("data.limit=[1,", "data.limit", ""),
    ("data.source=https://host/a?b=c", "data.source", ""),
    ("train.seed", "argument", "train.seed=VALUE"),
    ("train.sede", "argument", "train.seed"),
    ("--serve.host=::1", "serve.host", ""),
    ("", "argument", ""),
    ("=3", "argument", ""),
    ("~model.norm", "model.norm", ""),
    ("+train.evaluate_every=3", "train.evaluate_every", ""),
    ("+model=gru", "model", ""),
    ("task@here=ctc", "task", ""),
    ("schema/model=lstm", "schema/model", ""),
    # what would run code or read secrets
    ("_target_=os.system", "_target_", ""),
    ("model._target_=os.system", "model._target_", ""),
    ("+model._args_=[1]", "model._args_", ""),
    ("+data.sha256={_target_: x}", "data.sha256._target_", ""),
    ("data.max_length=${oc.env:HOME}", "data.max_length", ""),
    ("track.project='${oc.env:SECRET,x}'", "track.project", ""),
    ("split.test='${data.${name}}'", "split.test", ""),
    ("split.valid='${split.tset}'", "split.valid", "split.test"),
    ("hydra.run.dir=x", "hydra.run.dir", ""),
    ("hydra/launcher=joblib", "hydra/launcher", ""),
    ("+hydra.verbose=true", "hydra.verbose", ""),
]

SWITCHES = [
    ("model=lsmt", "model", "lstm"),
    ("model=GRU", "model", "gru"),
    ("model=min-gru", "model", "mingru"),
    ("model=minlstn", "model", "minlstm"),
    ("model=transformer", "model", ""),
    ("task=classification", "task", "classify"),
    ("optim=adam", "optim", "adamw"),
    ("optim=SGD", "optim", "sgd"),
    ("precision=bf61", "precision", "bf16"),
    ("cluster=lap-top", "cluster", "laptop"),
    ("cluster=gpux", "cluster", "gpu"),
    ("track=ofline", "track", "offline"),
    ("batch=lagre", "batch", "large"),
    ("serve=local", "serve", ""),
    ("data=al", "data", "all"),
    ("checkpoint=steadi", "checkpoint", "steady"),
    ("split=strat", "split", "stratified"),
    ("split=random", "split", ""),
    ("augment=spec_augment", "augment", "specaugment"),
    ("augment=off", "augment", ""),
    ("batch=automatic", "batch", "auto"),
    ("model=null", "model", ""),
    ("optim=[adamw,sgd]", "optim", ""),
]

JOB = """\
defaults:
  - /base
  - override /model: lstn
  - override /optimm: sgd
  - override /hydra/launcher: joblib
  - something
  - override /precision: bf16
  - override /precision: fp32
  - _self_
name: typo
sumary: x
model:
  hiden_size: 3
  num_layers: none
  dropout: 2
  _target_: os.system
batch: small
cluster:
train.epochs: 3
optim:
  lr: 3e-3x
  schedule: linaer
  betas: {one: 1}
  weight_decay: .nan
data:
  name: typo
  source: ${oc.env:HOME}
  valid: 100
  sha256: {a.b: {c: d}}
  sede: 1
hydra: {run: {dir: x}}
chekpoint: {every: 3s}
track:
  wandb: no
  project: off
serve:
  port: -1
  max_body: 1XB
store:
  uri: s3://user:hunter2@host/bucket
split:
  valid: ${split.tset}
  by: tme
columns:
  inputs: hr
  lower: {hr: none}
  labels: [yes, no]
augment: light
"""

# Line, key, suggestion.
LINES = [
    (3, "model", "lstm"),
    (4, "optimm", "optim"),
    (5, "hydra/launcher", ""),
    (6, "defaults", ""),
    (8, "precision", ""),
    (11, "sumary", "summary"),
    (13, "model.hiden_size", "model.hidden_size"),
    (14, "model.num_layers", ""),
    (15, "model.dropout", ""),
    (16, "model._target_", ""),
    (17, "batch", ""),
    (18, "cluster", ""),
    (19, "train.epochs", ""),
    (21, "optim.lr", ""),
    (22, "optim.schedule", "linear"),
    (23, "optim.betas.one", "optim.beta"),
    (24, "optim.weight_decay", ""),
    (27, "data.source", ""),
    (28, "data.valid", "split.valid"),
    (29, "data.sha256", ""),
    (30, "data.sede", ""),
    (31, "hydra.run.dir", ""),
    (32, "chekpoint.every", "checkpoint.every"),
    (34, "track.wandb", ""),
    (35, "track.project", ""),
    (37, "serve.port", ""),
    (38, "serve.max_body", ""),
    (40, "store.uri", ""),
    (42, "split.valid", "split.test"),
    (43, "split.by", "time"),
    (45, "columns.inputs", ""),
    (46, "columns.lower", ""),
    (47, "columns.labels", ""),
    (48, "augment", "light"),
]


def _problems(job: str, overrides: list[str]) -> tuple[str, list[dict[str, str]]]:
    with pytest.raises(ConfigError) as caught:
        compose_job(job, overrides, default_store="/store")
    return caught.value.message, caught.value.context["problems"]


def _suggests(message: str, place: str, suggestion: str) -> bool:
    lines = [line for line in message.splitlines() if f"({place})" in line or line.startswith(f"{place}: ")]
    return any(f"did you mean '{suggestion}" in line for line in lines)


def _misses(found: tuple[str, list[dict[str, str]]], expected: list[tuple[str, str, str]]) -> tuple[list[str], int]:
    """The expected (place, key, suggestion) that were not reported, and the number of wrong suggestions."""
    message, problems = found
    reported = {(p["place"] or p["key"], p["key"]) for p in problems}
    missed = [
        f"{place}: {key}"
        for place, key, _ in expected
        if (place, key) not in reported and (key != "argument" or (place, place) not in reported)
    ]
    wrong = [(place, s) for place, _, s in expected if s and not _suggests(message, place, s)]
    return missed + [f"suggestion: {w}" for w in wrong], len(wrong)


def test_every_mistaken_argument_is_caught_in_one_run() -> None:
    arguments = [text for text, *_ in ARGUMENTS]
    found = _problems("g2p", arguments)
    expected = [(f"argument {n}", key, near) for n, (_, key, near) in enumerate(ARGUMENTS, start=1) if key]
    missed, wrong = _misses(found, expected)
    suggestions = sum(bool(near) for *_, near in expected)
    assert len(expected) >= 60
    assert [m for m in missed if not m.startswith("suggestion")] == []
    assert wrong <= 0.1 * suggestions, missed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch.slots", "batch.max_slots"),
        ("data.valid", "split.valid"),
        ("data.test", "split.test"),
        ("data.seed", "split.seed"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_the_new_one(old: str, new: str) -> None:
    message, _ = _problems("g2p", [f"{old}=3"])
    assert message == (f"{old}: got an unknown key, expected a key of the job (argument 1) - did you mean '{new}'?")


def test_a_right_argument_among_wrong_ones_is_not_blamed() -> None:
    _, problems = _problems("g2p", ["model.hidden_size=64", "optim=sgd", "optim.momentum=0.5", "optim.lrr=1"])
    assert [p["key"] for p in problems] == ["optim.lrr"]


def test_every_mistaken_option_is_caught() -> None:
    rounds: list[list[tuple[str, str, str]]] = []
    for case in SWITCHES:  # one switch of a group in a run
        for batch in rounds:
            if case[1] not in {key for _, key, _ in batch}:
                batch.append(case)
                break
        else:
            rounds.append([case])
    misses = []
    for batch in rounds:
        expected = [(f"argument {n}", key, near) for n, (_, key, near) in enumerate(batch, start=1)]
        misses += _misses(_problems("vowels", [text for text, *_ in batch]), expected)[0]
    assert misses == []


def test_every_mistake_in_a_file_is_caught_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs" / "typo").mkdir(parents=True)
    (tmp_path / "jobs" / "typo" / "job.yaml").write_text(JOB)
    found = _problems("typo", [])
    expected = [(f"jobs/typo/job.yaml:{line}", key, near) for line, key, near in LINES]
    assert _misses(found, expected)[0] == []
    assert "hunter2" not in found[0] + str(found[1])


@pytest.mark.parametrize(
    "argument", ["++optim.lrr=1", "optim.lr=-1", "optim=adam", "optim.lr=x", "checkpoint.every=0s"]
)
def test_one_mistake_alone_is_one_line(argument: str) -> None:
    message, problems = _problems("g2p", [argument])
    assert len(message.splitlines()) == len(problems) == 1
    assert problems[0]["place"] == "argument 1"
    assert message.startswith(f"{problems[0]['key']}: got {problems[0]['got']}, expected {problems[0]['expected']}")
