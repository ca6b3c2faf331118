"""What cannot be done where the network is spread over the ranks."""

from __future__ import annotations

from treadle.errors import ConfigError
from treadle.spec import JobSpec, LongRows, Parallel

__all__ = ["check_parallel"]


def check_parallel(spec: JobSpec) -> None:
    """Nothing, where the job can be trained as `cluster.parallel` says.

    Ranks that hold the network together gather a part of it when it is called, all of them equally often. Pieces of a
    row and streams call parts of it on their own and go back through it several times.

    Raises:
        ConfigError: a line for each option that does not go beside it.
    """
    if spec.cluster.parallel is Parallel.data:
        return
    problems: list[str] = []
    if spec.batch.long_rows is LongRows.chunk:
        problems.append("batch.long_rows: got chunk, expected refuse")
    if spec.batch.streams is not None:
        problems.append(f"batch.streams: got {spec.batch.streams}, expected null")
    if spec.optim.ema is not None:
        problems.append(f"optim.ema: got {spec.optim.ema:g}, expected null")
    if spec.train.compile:
        problems.append("train.compile: got true, expected false")
    if problems:
        raise ConfigError(
            "cluster.parallel: got sharded, which does not go with\n" + "\n".join(problems),
            hint="cluster.parallel=data",
        )
