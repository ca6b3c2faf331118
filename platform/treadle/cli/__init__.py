"""`treadle <verb>`: parses, imports late, and maps errors to exit codes.

Standard output is the answer, standard error the story. `main` is the console script.
"""

from treadle.cli.main import main

__all__ = ["main"]
