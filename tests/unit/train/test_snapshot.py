"""A snapshot holds what its sources were at `begin`, as the bytes of a safetensors file."""

from __future__ import annotations

import threading

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import InternalError
from treadle.train import snapshot as snapshot_module
from treadle.train.snapshot import Snapshot

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def snapshot():
    made = Snapshot()
    yield made
    made.close()


def copied(snapshot, sources, **options):
    snapshot.begin(sources, **options)
    snapshot.join()
    return {file: bytes(data) for file, data in snapshot.contents().items()}


def packed(tensors):
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def tensor_of(dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@given(
    files=st.dictionaries(
        st.sampled_from(["model.safetensors", "optim.safetensors"]),
        st.dictionaries(
            st.text('abA"/\\é.', min_size=1, max_size=5),
            st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 9)),
            max_size=6,
        ),
    )
)
def test_the_bytes_are_those_that_safetensors_writes(files) -> None:
    sources = {file: {name: tensor_of(*told) for name, told in tensors.items()} for file, tensors in files.items()}
    made = Snapshot()
    try:
        assert copied(made, sources) == {file: packed(tensors) for file, tensors in sources.items()}
    finally:
        made.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_sources_are_laid_out_anew(snapshot, dtype) -> None:
    whole = tensor_of(dtype, (6, 8))
    sources = {"f": {"turned": whole.t(), "part": whole[1::2, 2:5], "wide": whole[:1].expand(3, 8), "one": whole[2, 3]}}
    assert copied(snapshot, sources) == {"f": packed(sources["f"])}


def test_what_asks_for_gradients_and_shares_memory_is_copied(snapshot) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    found = safetensors.torch.load(copied(snapshot, {"f": {"in": weight, "out": weight}})["f"])
    assert torch.equal(found["in"], weight)
    assert torch.equal(found["out"], weight)


def test_buffers_are_used_again_and_made_anew_for_another_form(snapshot) -> None:
    ones, twos = {"f": {"w": torch.ones(5)}}, {"f": {"w": torch.full((5,), 2.0)}}
    copied(snapshot, ones)
    before = snapshot.contents()["f"]
    assert copied(snapshot, twos) == {"f": packed(twos["f"])}
    assert bytes(before) == packed(twos["f"])  # the same memory
    for other in (torch.ones(6), torch.ones(5, 1), torch.ones(5).double()):
        assert copied(snapshot, {"f": {"w": other}}) == {"f": packed({"w": other})}
    assert copied(snapshot, {"g": ones["f"]}) == {"g": packed(ones["f"])}


def test_sources_may_change_after_join_and_the_copy_does_not(snapshot) -> None:
    source = torch.randn(1000)
    expected = packed({"w": source})
    snapshot.begin({"f": {"w": source}})
    snapshot.join()
    source.zero_()
    assert bytes(snapshot.contents()["f"]) == expected


def test_inline_tensors_may_change_at_once(snapshot, monkeypatch) -> None:
    go = threading.Event()
    copy = snapshot_module._copy_on_host
    monkeypatch.setattr(snapshot_module, "_copy_on_host", lambda pairs: (go.wait(10), copy(pairs)))
    moved, still = torch.ones(3), torch.ones(3)
    snapshot.begin({"f": {"moved": moved, "still": still}}, inline={"moved"})
    moved.zero_()
    go.set()
    snapshot.join()
    found = safetensors.torch.load(bytes(snapshot.contents()["f"]))
    assert torch.equal(found["moved"], torch.ones(3))


def test_begin_returns_while_the_copy_runs_and_join_waits_for_it(snapshot, monkeypatch) -> None:
    go = threading.Event()
    copy = snapshot_module._copy_on_host
    monkeypatch.setattr(snapshot_module, "_copy_on_host", lambda pairs: (go.wait(10), copy(pairs)))
    source = {"f": {"w": torch.ones(3)}}
    snapshot.begin(source)
    joined = threading.Thread(target=snapshot.join)
    joined.start()
    joined.join(0.05)
    assert joined.is_alive()
    go.set()
    joined.join(10)
    assert not joined.is_alive()
    assert snapshot.waited_s >= 0.05
    snapshot.join()  # nothing in flight: at once
    assert bytes(snapshot.contents()["f"]) == packed(source["f"])


def test_nothing_in_flight_is_nothing_to_join(snapshot) -> None:
    snapshot.join()
    assert snapshot.contents() == {}
    assert snapshot.nonfinite() == []


def test_begin_needs_the_join_before(snapshot) -> None:
    snapshot.begin({"f": {"w": torch.ones(3)}})
    with pytest.raises(InternalError, match="begin twice"):
        snapshot.begin({"f": {"w": torch.zeros(3)}})
    snapshot.join()
    snapshot.begin({"f": {"w": torch.zeros(3)}})
    snapshot.join()


def test_what_the_copy_raises_is_raised_to_both_who_ask(snapshot) -> None:
    quantized = torch.zeros(3, dtype=torch.complex128)
    snapshot.begin({"f": {"w": quantized}})
    for act in (snapshot.join, snapshot.contents, snapshot.nonfinite):
        with pytest.raises(InternalError, match=r"f: got w \(torch.complex128\)"):
            act()
    assert copied(snapshot, {"f": {"w": torch.ones(1)}})  # and the next one is none the worse


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_one_value_that_is_not_finite_is_found_and_named(snapshot, monkeypatch, dtype, bad) -> None:
    monkeypatch.setattr(snapshot_module, "_CHECKED", 16)
    for at in (0, 15, 16, 40, 99):
        ill = torch.randn(100).to(dtype)
        ill[at] = bad
        copied(snapshot, {"f": {"well": torch.randn(7).to(dtype), "ill": ill}, "g": {"count": torch.arange(3)}})
        assert snapshot.nonfinite() == ["f: ill"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_finite(snapshot, dtype) -> None:
    if dtype.is_complex or dtype is torch.bool:
        values = torch.ones(4).to(dtype)
    else:
        info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        values = torch.tensor([info.max, info.min], dtype=dtype).repeat(50)  # their squares and sums are not
    copied(snapshot, {"f": {"w": values, "none": values[:0], "one": values[0]}})
    assert snapshot.nonfinite() == []
