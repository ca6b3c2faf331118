"""treadle: train, keep and serve recurrent sequence models on a Ray cluster.

The package root holds the version and nothing heavier: importing `treadle` loads
neither torch, Ray, Hydra, boto3, wandb nor pyarrow (tests/arch/test_imports.py).
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
