"""The test kit that ships: real parts, small enough for a unit test."""

from treadle.testing.faults import Died, FaultBlobs
from treadle.testing.memory import MemoryBlobs

__all__ = ["Died", "FaultBlobs", "MemoryBlobs"]
