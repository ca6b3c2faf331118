"""Recurrent layers, the network of a job, and its losses. Imports torch and nothing below it.

`RNN`, `LSTM`, `GRU`, `MinGRU` and `MinLSTM` take the arguments of `torch.nn.GRU`; all share one
call, one form of state and one treatment of rows of unlike length.
"""

from treadle.nn.cells import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.losses import classify_loss_sum, ctc_greedy, ctc_loss_sum
from treadle.nn.network import Network, build_network, count_parameters
from treadle.nn.rows import debug_checks
from treadle.nn.scan import ScanBackend, scan_backends

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "MinGRU",
    "MinLSTM",
    "Network",
    "ScanBackend",
    "build_network",
    "classify_loss_sum",
    "count_parameters",
    "ctc_greedy",
    "ctc_loss_sum",
    "debug_checks",
    "scan_backends",
]
