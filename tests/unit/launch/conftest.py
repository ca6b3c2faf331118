"""What starts real ranks."""

from agents_rig import nursery  # noqa: F401
