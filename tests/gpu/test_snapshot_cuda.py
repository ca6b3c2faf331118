"""A snapshot of a CUDA device is taken on a stream of its own, and holds what was there at `begin`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import safetensors.torch
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from treadle.train.snapshot import Snapshot

DEVICE = torch.device("cuda")


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    made = Snapshot()
    yield made
    made.close()


def found(snapshot: Snapshot) -> dict[str, Tensor]:
    return safetensors.torch.load(bytes(snapshot.contents()["f"]))


def test_the_copy_is_of_what_the_stream_had_made_by_then(snapshot: Snapshot) -> None:
    weights = [torch.zeros(1 << 22, device=DEVICE) for _ in range(8)]
    for update in range(1, 6):
        for _ in range(50):  # the device is behind the host: kernels that change the weights are still queued
            for weight in weights:
                weight.add_(1)
        snapshot.begin({"f": {str(i): weight for i, weight in enumerate(weights)}})
        snapshot.join()
        for weight in weights:
            weight.add_(0.5)  # queued behind the copy
        assert all(bool((tensor == 50.5 * (update - 1) + 50).all()) for tensor in found(snapshot).values())


def test_the_files_of_two_devices_are_those_of_one(snapshot: Snapshot) -> None:
    torch.manual_seed(0)
    here = {"w": torch.randn(33, 7), "turned": torch.randn(5, 9).t(), "half": torch.randn(11).bfloat16()}
    there = {name: tensor.to(DEVICE) for name, tensor in here.items()}
    count = torch.tensor(3.0)
    snapshot.begin({"f": there | {"count": count}})
    snapshot.join()
    expected = {name: tensor.contiguous() for name, tensor in here.items()} | {"count": count}
    assert bytes(snapshot.contents()["f"]) == safetensors.torch.save(expected)
    assert snapshot.nonfinite() == []


def test_inline_tensors_are_read_before_their_memory_is_given_away(snapshot: Snapshot) -> None:
    running = torch.full((1 << 20,), 7.0, device=DEVICE)
    snapshot.begin({"f": {"running": running}}, inline={"running"})
    running.zero_()
    other = [torch.zeros(1 << 20, device=DEVICE) for _ in range(20)]  # would take the clone's memory
    snapshot.join()
    assert bool((found(snapshot)["running"] == 7).all())
    del other


def test_a_value_that_is_not_finite_is_found(snapshot: Snapshot) -> None:
    weight = torch.ones(1000, device=DEVICE)
    weight[999] = float("inf")
    snapshot.begin({"f": {"w": weight}})
    snapshot.join()
    assert snapshot.nonfinite() == ["f: w"]
