"""The Triton scan: its kernels through the interpreter, its compiled form, and how it cuts up the work.

The interpreter checks arithmetic and indices, not races, alignment or speed; tests/gpu repeats the
invariants on a device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton_driver import CASES  # noqa: E402

from treadle.errors import ConfigError  # noqa: E402
from treadle.nn import triton_kernels  # noqa: E402
from treadle.nn.triton_scan import Cut, choose_cut  # noqa: E402

H100 = 132


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver found, all cases in one process."""
    driver = Path(__file__).with_name("triton_driver.py")
    home = str(tmp_path_factory.mktemp("home"))
    env = {**os.environ, "TRITON_INTERPRET": "1", "HOME": home, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, driver], capture_output=True, text=True, env=env, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_close(errors: dict[str, float], *, narrow: bool = False) -> None:
    """In spacings of each output's own format.

    fp32 and float64 come to 3.1; bf16 to 1.4, since the interpreter cuts off where a device rounds. States between
    pieces, and their gradients, are fp32 beside bf16, and held to that.
    """
    limits = dict.fromkeys(("h", "dpre", "ddecay"), 2.0) if narrow else {}
    assert all(error <= limits.get(name, 6.0) for name, error in errors.items()), errors


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_a_float64_loop_and_its_gradients(found: dict[str, Any], name: str) -> None:
    assert_close(found["cases"][name], narrow=CASES[name].dtype.itemsize == 2)


@pytest.mark.parametrize("form", range(3))
def test_gates_at_their_extremes(found: dict[str, Any], form: int) -> None:
    assert_close(found["extremes"][form])


def test_tanh_keeps_its_precision_near_zero(found: dict[str, Any]) -> None:
    assert found["tanh"] <= 2.0


@pytest.mark.parametrize("cut", ["rows", "chunks"])
def test_what_is_not_a_number_stays_in_its_row_and_before_the_next_start(found: dict[str, Any], cut: str) -> None:
    assert all(found["broken"][cut].values()), found["broken"][cut]


def test_pieces_of_a_row_give_the_bits_of_the_whole(found: dict[str, Any]) -> None:
    assert found["pieces"]


def test_an_empty_row_passes_its_state_on(found: dict[str, Any]) -> None:
    assert found["empty row"]


def test_addresses_beyond_32_bits(found: dict[str, Any]) -> None:
    assert len(found["addresses"]) == 16
    assert not any(found["addresses"])


@pytest.mark.parametrize(
    ("rows", "length", "longest", "chunked"),
    [
        (256, 512, 512, False),  # enough rows for every scheduler
        (64, 128, 128, False),  # short: three more launches would cost more than they save
        (16, 4096, 4096, True),  # few and long
        (1, 100_000, 100_000, True),
        (600, 100, 4096, True),  # one long row among many short ones
        (600, 100, 150, False),
        (6000, 100, 4096, False),  # the same long row no longer takes longest
        (1, 100, 100, False),
    ],
)
def test_rows_are_cut_where_they_are_few_and_long(rows: int, length: int, longest: int, chunked: bool) -> None:
    cut = choose_cut(rows, rows * length, 256, max_length=longest, multiprocessors=H100)
    assert bool(cut.chunk) is chunked


def test_an_unknown_longest_row_is_taken_to_be_as_long_as_it_can_be() -> None:
    assert choose_cut(64, 64 * 1000, 256, max_length=0, multiprocessors=H100).chunk
    assert not choose_cut(64, 70, 256, max_length=0, multiprocessors=H100).chunk


def test_the_cut_depends_on_channels_and_device_too() -> None:
    args = {"num_rows": 64, "num_frames": 64 * 400, "max_length": 400}
    assert choose_cut(**args, hidden=64, multiprocessors=H100).chunk
    assert not choose_cut(**args, hidden=1024, multiprocessors=20).chunk
    assert choose_cut(**args, hidden=5, multiprocessors=H100).channels == 8


def test_a_chunk_is_whole_tiles() -> None:
    with pytest.raises(ConfigError, match="chunk: got 100, expected a multiple of frames, 8"):
        Cut(chunk=100)


# Pointers by what they point to; "D" as wide as the pre-activations. The others are compile-time constants.
POINTERS = {
    **dict.fromkeys(("pre", "decay", "h", "grad_h", "dpre", "ddecay"), "D"),
    **dict.fromkeys(("init", "reset", "last", "h0", "dh0", "dreset_CH", "a_CH", "b_CH", "carry_CH"), "*fp32"),
    "offsets": "*i64",
    "rows_C": "*i32",
    "starts": "*u8",
}
SIZES = {"H": 256, "CHUNK": 128, "FORM": 0, "CANDIDATE": 0, "REVERSE": True, "BACK": True}
SIZES |= {"BLOCK_T": 8, "BLOCK_D": 64, "STAGES": 4, "BLOCK": 128}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name: str) -> str:
    """A kernel's PTX for sm_80, of bf16 and with every option."""
    kernel = getattr(triton_kernels, name)
    types, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in POINTERS:
            types[argument] = POINTERS[argument].replace("D", "*bf16")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[argument] = "constexpr"
            constants[argument] = SIZES[argument]
    options = {"num_warps": 1, "enable_fp_fusion": True}
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel", "forward_summary", "backward_summary"])
def test_compiled_tiles_need_no_exchange_between_threads_and_load_ahead(name: str) -> None:
    ptx = compiled(name)
    assert "shfl.sync" not in ptx  # a column of a tile stays in one thread
    assert len(re.findall(r"cp\.async\.c[ag]", ptx)) >= 3 * 8  # tiles are on their way while one is worked on


@pytest.mark.parametrize("name", ["carry_kernel", "chunk_rows"])
def test_the_small_kernels_compile(name: str) -> None:
    assert "st.global" in compiled(name)
