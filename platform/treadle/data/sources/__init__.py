"""From files, tables and scripts to rows in columns."""

__all__: list[str] = []
