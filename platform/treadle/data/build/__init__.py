"""From a source to shards and a manifest, out of core."""

__all__: list[str] = []
