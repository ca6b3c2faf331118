"""A disk that is soon full."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from treadle.errors import ConfigError

__all__ = ["small_disk"]


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """`folder` as a file system of its own with room for `size_bytes`; what it held is gone at the end.

    Raises:
        ConfigError: this process may not mount one.
    """
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if not sys.platform.startswith("linux") or mount is None or umount is None:
        raise ConfigError(f"disk: got {sys.platform} without mount, expected Linux")
    folder.mkdir(parents=True, exist_ok=True)
    command = [mount, "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"disk: got {done.stderr.strip()!r}, expected to mount a tmpfs", hint="run as root")
    try:
        yield folder
    finally:
        subprocess.run([umount, "-l", str(folder)], capture_output=True, check=True)
