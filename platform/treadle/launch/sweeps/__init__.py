"""Sweeps: many runs of one job with different values, compared on its validation rows."""

__all__: list[str] = []
