"""Composition gives what Hydra gives, from anywhere, and nothing that is wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from treadle import wire
from treadle.errors import ConfigError
from treadle.spec import AugmentSpec, GruSpec, JobSpec, Leak, LstmSpec, MinGruSpec, MinLstmSpec, SgdSpec, SplitBy
from treadle.spec.compose import compose_job
from treadle.spec.places import conf_folder, find_job, list_groups, list_options

STORE = "/somewhere/store"


def make(job: str, *overrides: str) -> JobSpec:
    return compose_job(job, overrides, default_store=STORE)


def write_job(folder: Path, name: str, body: str = "", choices: str = "") -> Path:
    """A small job in `folder`/jobs/`name`."""
    place = folder / "jobs" / name
    place.mkdir(parents=True)
    text = f"defaults:\n  - /base\n{choices}  - _self_\nname: {name}\ndata:\n  name: {name}\n{body}"
    (place / "job.yaml").write_text(text)
    return place


def refusal(job: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make(job, *overrides)
    return caught.value.message


def untagged(value: Any) -> Any:
    """An encoded spec without the `kind` tags, which Hydra does not have."""
    if isinstance(value, dict):
        return {key: untagged(item) for key, item in value.items() if key != "kind"}
    return value


def test_g2p_is_as_written() -> None:
    spec = make("g2p")
    assert type(spec.model) is LstmSpec
    assert (spec.model.hidden_size, spec.model.bidirectional, spec.optim.lr) == (96, True, 4e-3)
    assert (spec.split.test, spec.split.valid, spec.data.max_length) == (12000, 2000, 64)
    assert (spec.batch.max_slots, spec.batch.slots) == ("512", 512)
    assert spec.store.uri == STORE


def test_vowels_keeps_file_names_with_dots() -> None:
    spec = make("vowels")
    assert type(spec.model) is GruSpec
    assert set(spec.data.sha256) == {"JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"}
    assert spec.cluster.workers == 0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=mingru", "optim=sgd", "optim.lr=0.1", "cluster=inline", "store.uri=s3://bucket/prefix"],
        ["split.seed=${train.seed}", "train.seed=3", "train={epochs: 3}", "++batch.lanes=null", 'summary="a, b"'],
    ],
)
def test_result_equals_hydras_own(overrides: list[str]) -> None:
    with initialize_config_dir(str(find_job("g2p")), version_base="1.3"):
        node = compose("job", [f"hydra.searchpath=[file://{conf_folder()}]", *overrides])
    if OmegaConf.is_missing(node.store, "uri"):
        node.store.uri = STORE
    assert untagged(wire.encode(make("g2p", *overrides))) == OmegaConf.to_container(
        node, resolve=True, enum_to_str=True
    )


@pytest.mark.parametrize("job", ["g2p", "vowels"])
def test_every_option_composes_and_survives_the_wire(job: str) -> None:
    # Each sets values that only its own task has.
    own = {"g2p": "ctc", "vowels": "classify"}[job]
    groups = [[f"{g}={o}" for o in list_options(g) if g != "task" or o == own] for g in list_groups()]
    for overrides in zip_longest(*groups):
        spec = make(job, *filter(None, overrides))
        again = wire.unrecord(JobSpec, wire.record("job", 1, spec), kind="job", schema=1, where="test")
        assert again == spec
        assert [type(v) for v in vars(again).values()] == [type(v) for v in vars(spec).values()]
        assert again.digest == spec.digest


@pytest.mark.parametrize("task", ["language", "tag"])
def test_tasks_of_frames_compose_with_streams(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, "frames", choices=f"  - override /task: {task}\n  - override /batch: streams\n")
    spec = make("frames", "batch.streams=4", "batch.chunk=32")
    assert (spec.task.kind, spec.batch.streams, spec.batch.chunk) == (task, 4, 32)


@pytest.mark.parametrize(
    ("written", "slots"), [("8k", 8000), ("8192", 8192), ("1.5k", 1500), ("1e3", 1000), ("'2 k'", 2000)]
)
def test_slots_are_a_quantity(written: str, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make("g2p", f"batch.max_slots={written}").batch.slots == slots
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, "quantity", f"batch: {{max_slots: {written}}}\n")
    assert make("quantity").batch.slots == slots


def test_slots_may_be_left_to_the_device() -> None:
    batch = make("g2p", "batch=auto", "batch.max_slots=auto").batch
    assert batch.is_auto
    with pytest.raises(ConfigError, match=r"^batch\.max_slots: got auto, expected a number here"):
        _ = batch.slots


@pytest.mark.parametrize("written", ["lots", "0", "8.5", "-3", "8q"])
def test_slots_that_are_no_quantity(written: str) -> None:
    assert refusal("g2p", f"batch.max_slots={written}") == (
        f"batch.max_slots: got '{written}', expected a count such as 8192 or 8k, or auto (argument 1)"
    )


def test_lists_and_mappings_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(
        tmp_path,
        "listed",
        "  allow_leaks: [entity, window]\n"
        "columns: {inputs: [hr, spo2], lower: {hr: 0}, target: [died], symbols: [1, x]}\n"
        "split: {by: time, horizon: 30, test: 0.2}\n",
    )
    spec = make("listed", "columns.lower.spo2=0.5", "data.allow_leaks=[content]")
    assert spec.data.allow_leaks == [Leak.content]
    assert make("listed").data.allow_leaks == [Leak.entity, Leak.window]
    assert spec.columns.inputs == ["hr", "spo2"]
    assert spec.columns.symbols == ["1", "x"]
    assert spec.columns.lower == {"hr": 0.0, "spo2": 0.5}
    assert (spec.split.by, spec.split.horizon, spec.split.test) == (SplitBy.time, 30.0, 0.2)


def test_one_text_where_a_list_is_asked() -> None:
    assert "- did you mean [text]?" in refusal("g2p", "columns.inputs=text")
    assert "- did you mean columns.inputs=[a,b]?" in refusal("g2p", "columns.inputs=a,b")
    assert "- did you mean 'entity'?" in refusal("g2p", "data.allow_leaks=[window,entitty]")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["split.valid=1.5"], "split.valid: got 1.5, expected a share below 1 or a whole number (argument 1)"),
        (["split=walk_forward", "split.fold=5"], "split.fold: got 5, expected below split.folds = 5 (argument 2)"),
        (["split.window=rolling"], "split.train_rows: got null, expected a number of rows beside split.window=rolling"),
    ],
)
def test_rules_of_a_split(overrides: list[str], words: str) -> None:
    assert refusal("g2p", *overrides) == words


def test_options_of_split_and_augmentation() -> None:
    spec = make("g2p", "split=walk_forward", "augment=specaugment")
    assert (spec.split.by, spec.split.folds, spec.split.valid) == (SplitBy.walk_forward, 5, 2000)
    assert (spec.augment.time_masks, spec.augment.channel_masks, spec.augment.shortens) == (2, 2, False)
    assert make("g2p").augment == AugmentSpec()


def test_a_switch_keeps_the_jobs_values() -> None:
    spec = make("g2p", "model=mingru", "optim=sgd")
    assert type(spec.model) is MinGruSpec
    assert spec.model.hidden_size == 96
    assert type(spec.optim) is SgdSpec
    assert spec.optim.lr == 4e-3


def test_keys_of_a_variant() -> None:
    spec = make("g2p", "model=minlstm", "model.normalize_gates=false")
    assert isinstance(spec.model, MinLstmSpec)
    assert not spec.model.normalize_gates
    message = refusal("g2p", "model.normalize_gates=false")
    assert message == (
        "model.normalize_gates: got a key that only model=minlstm has, expected a key of model=lstm (argument 1)"
    )


def test_a_jobs_value_that_the_new_variant_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, "plain", "model:\n  nonlinearity: relu\n", "  - override /model: rnn\n")
    assert make("plain").model.kind == "rnn"
    assert refusal("plain", "model=lstm") == (
        "model.nonlinearity: got a key that only model=rnn has, expected a key of model=lstm (jobs/plain/job.yaml:9)"
    )


def test_items_of_a_mapping() -> None:
    spec = make("vowels", "data.sha256={x.ts: abc}", "+data.sha256.y=def")
    assert {"x.ts": "abc", "y": "def"}.items() <= spec.data.sha256.items()


def test_jobs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = tmp_path / "a 'b\", c=d"
    place = write_job(strange, "mine", "train: {epochs: 3}\n")
    monkeypatch.chdir(strange)
    assert make("mine").train.epochs == 3
    monkeypatch.chdir(tmp_path)
    assert make(str(place)).name == "mine"
    assert make(str(place / "job.yaml")).name == "mine"


def test_a_job_brings_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = write_job(tmp_path, "own", choices="  - override /model: wide\n")
    (place / "model").mkdir()
    (place / "model" / "wide.yaml").write_text("defaults:\n  - gru\n  - _self_\nhidden_size: 999\n")
    spec = make("own")
    assert type(spec.model) is GruSpec
    assert spec.model.hidden_size == 999
    (place / "model" / "bare.yaml").write_text("hidden_size: 999\nhiden: 3\n")
    message = refusal("own", "model=bare")
    assert "model=bare: got no schema in its defaults" in message
    assert "model.hiden: got an unknown key" in message
    assert "jobs/own/model/bare.yaml:2" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [1,\n", "jobs/bad/job.yaml: got "),
        ("name: a: b\n", "expected YAML (jobs/bad/job.yaml:1)"),
        ("- a\n", "jobs/bad/job.yaml: got no mapping"),
        ("text\n", "jobs/bad/job.yaml: got no mapping"),
        ("name: !!python/name:os.system x\n", "expected YAML (jobs/bad/job.yaml:1)"),
        ("name: a\nname: b\n", "got name twice, expected each key once (jobs/bad/job.yaml:2)"),
        ("a: &a\n  b: *a\n", "expected YAML"),
        ("# @package _global_\nname: a\n", "got a @package line"),
        ("", "defaults: got nothing, expected a list that starts with /base and ends with _self_"),
        ("defaults: [/base]\n", "defaults: got ['/base'], expected a list"),
        ("defaults: /base\n", "got defaults: '/base', expected a list"),
        ("defaults: [_self_, /base]\n", "expected a list that starts with /base and ends with _self_"),
        ("defaults: [/base, _self_]\n", "data.name: got nothing, expected text that is not empty"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, "bad")
    (tmp_path / "jobs" / "bad" / "job.yaml").write_text(text)
    assert line in refusal("bad", "optim.lrr=1")


def test_a_broken_file_still_has_its_overrides_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, "bad", "x: [\n")
    message = refusal("bad", "optim.lrr=1")
    assert "optim.lrr: got an unknown key" in message
    assert "data.name" not in message  # nobody can say whether it is there


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.max_rows='${batch.max_rows}'", "Recursive interpolation"),
        ("batch.max_rows='${data.name}'", "batch.max_rows: got '${data.name}'"),
        ("batch.max_slots='${data.name}'", "batch.max_slots: got 'g2p', expected a count such as 8192 or 8k, or auto"),
        ("optim.lr='${batch.max_rows}'", "optim.lr: got 4096.0, expected a number > 0 and <= 100"),
        ("data.sha256='${data.name}'", "data.sha256: got '${data.name}', expected a mapping of text"),
        ("data.name=???", "data.name: got 'data.name=???', expected a value"),
    ],
)
def test_references_are_checked_for_what_they_give(override: str, words: str) -> None:
    assert words in refusal("g2p", override)


def test_secrets_are_refused_and_not_repeated() -> None:
    message = refusal("g2p", "store.uri=s3://key:hunter2@host/b", "data.source=https://h/a?X-Amz-Signature=hunter2")
    assert message.count("\n") == 1
    assert "hunter2" not in message


def test_duplicates_name_both_arguments() -> None:
    message = refusal("g2p", "train.seed=1", "train={seed: 2}", "model=gru", "model=lstm")
    assert "train.seed: got two values, argument 1 and argument 2, expected one" in message
    assert "model: got two values, argument 3 and argument 4, expected one" in message


def test_unknown_job_lists_the_jobs() -> None:
    message = refusal("g2q")
    assert "expected one of " in message
    assert "vowels" in message
    assert "did you mean 'g2p'?" in message


def test_composes_quietly_again_and_again_and_from_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = make("g2p", "model=gru")
    monkeypatch.chdir(tmp_path)
    found: list[JobSpec | ConfigError] = []

    def work(*overrides: str) -> None:
        try:
            found.append(make("g2p", *overrides))
        except ConfigError as error:
            found.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work, args=(o,)) for o in ("model=gru", "model=gru", "model=x", "optim=x")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found.count(expected) == 2
    assert sum(isinstance(f, ConfigError) for f in found) == 2
    assert capfd.readouterr() == ("", "")
    assert not GlobalHydra.instance().is_initialized()


def test_leaves_someone_elses_hydra_alone() -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        make("g2p")
        assert GlobalHydra.instance().hydra is outer


def test_specs_are_read_without_hydra() -> None:
    code = (
        "import sys, treadle.spec, treadle.spec.reference as r; r.config_markdown(); "
        "print({'hydra', 'omegaconf', 'pydantic', 'torch', 'ray', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.conv_size=4"], "model.conv_size: got 4 beside bidirectional"),
        (["model.attention_every=9"], r"model.attention_every: got 9, expected at most num_layers (2)"),
        (["model.attention_every=1", "model.attention_heads=5"], "model.attention_heads: got 5"),
        (["model.attention_every=1", "model.attention_window=8"], "model.attention_window: got 8 beside bidirectional"),
    ],
)
def test_options_of_a_model_that_exclude_one_another(overrides: list[str], words: str) -> None:
    assert words in refusal("g2p", *overrides)
