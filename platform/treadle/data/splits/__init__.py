"""Which rows are trained on, what is fitted on them, and whether they leak."""

__all__: list[str] = []
