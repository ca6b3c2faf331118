"""From plans to processes: drivers and ranks, on this machine or on a Ray cluster.

Names are taken from the modules, which import Ray and torch only where they start something.
"""

__all__: list[str] = []
