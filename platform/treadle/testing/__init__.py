"""The test kit that ships: real parts, small enough for a unit test."""

from treadle.testing.clock import SkewedClock
from treadle.testing.disk import small_disk
from treadle.testing.faults import Died, FaultBlobs
from treadle.testing.memory import MemoryBlobs
from treadle.testing.powercut import Disk, Lost, said_in
from treadle.testing.processes import stopped
from treadle.testing.proxy import Fault, FaultProxy, Rule
from treadle.testing.syscalls import CHANGES, LOOKS, Call, Outcome, Victims

__all__ = [
    "CHANGES",
    "LOOKS",
    "Call",
    "Died",
    "Disk",
    "Fault",
    "FaultBlobs",
    "FaultProxy",
    "Lost",
    "MemoryBlobs",
    "Outcome",
    "Rule",
    "SkewedClock",
    "Victims",
    "said_in",
    "small_disk",
    "stopped",
]
