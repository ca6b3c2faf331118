"""From a model version to answers over HTTP.

`treadle.serve.deploy` is the only importer of Ray Serve; the rest runs under any ASGI server. Only
the client is imported from here: it needs neither torch nor Ray.
"""

from treadle.serve.client import ask

__all__ = ["ask"]
