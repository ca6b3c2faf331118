"""From row numbers to batches."""

__all__: list[str] = []
