"""Streams on a CUDA device: the outputs of the CPU, and states that come back from a checkpoint as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from treadle.spec import LstmSpec, MinGruSpec, ModelSpec
from treadle.train import World, pack
from treadle.train.carry import CARRY_FILE

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "train"))
from streams_rig import StreamToy, stream_spec

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MODELS = [
    LstmSpec(hidden_size=8, embedding_size=8, conv_size=3),
    MinGruSpec(hidden_size=8, embedding_size=8, attention_every=1, attention_heads=1, attention_window=5),
]


@pytest.mark.parametrize("model", MODELS, ids=["lstm", "window"])
def test_chunks_on_a_device_are_those_on_a_host(model: ModelSpec) -> None:
    toy = StreamToy(stream_spec(model=model))
    found: dict[str, list[torch.Tensor]] = {}
    for device in (CPU, CUDA):
        world = World(device=device)
        network = toy.network().to(device).eval()
        carry = toy.carry(network, world)
        logits = found.setdefault(device.type, [])
        with torch.no_grad():
            for update in toy.stream_feed(world).starting_at(0, 0):
                if update.epoch:
                    break
                if update.index == 4:
                    files = pack(carry.tensors(at=(0, 4)))
                    carry = toy.carry(network, world)
                    carry.load(files, at=(0, 4))
                    assert CARRY_FILE in files
                logits += [carry.logits(network, micro, device).cpu() for micro in update.micros]
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
