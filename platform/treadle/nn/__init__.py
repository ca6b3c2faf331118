"""Recurrent layers, heads, losses and what belongs to them. Imports torch and nothing of treadle above `spec`.

`RNN`, `LSTM`, `GRU`, `MinGRU` and `MinLSTM` take the arguments of `torch.nn.GRU`; all share one
call, one form of state and one treatment of rows of unlike length. README.md beside this file says which to choose.
"""

from treadle.nn.attention import AttentionLayer
from treadle.nn.cell import State
from treadle.nn.cells import GRU, LSTM, RNN, MinGRU, MinLSTM, from_torch
from treadle.nn.compiled import compile_layers
from treadle.nn.feedforward import FeedForward
from treadle.nn.footprint import ChunkPlan, measure_footprint, plan_chunk
from treadle.nn.heads import ClassifyHead, CoxHead, CtcHead, HazardHead, RegressionHead, TagHead
from treadle.nn.hybrid import HybridStack
from treadle.nn.irregular import MissingValues, TimeDecay, TimeEmbedding
from treadle.nn.language import LanguageModelHead
from treadle.nn.long import TrainedRow, checkpointed, train_in_chunks
from treadle.nn.losses import (
    BLANK,
    binary_focal_loss_sum,
    class_weight_sum,
    classify_loss_sum,
    ctc_greedy,
    ctc_loss_sum,
    focal_loss_sum,
    gaussian_nll_sum,
    huber_loss_sum,
    logit_adjusted_loss_sum,
    pinball_loss_sum,
    squared_loss_sum,
    tag_loss_sum,
)
from treadle.nn.network import Network, build_network, count_parameters
from treadle.nn.pieces import PieceReader
from treadle.nn.pooling import AttentionPooling, segment_softmax
from treadle.nn.recompute import recompute_layers
from treadle.nn.rows import Rows, debug_checks
from treadle.nn.scan import ScanBackend, scan_backends
from treadle.nn.stack import RecurrentStack
from treadle.nn.survival import CoxBaseline, concordance_index, cox_loss_sum, hazard_loss_sum, to_intervals
from treadle.nn.transducer import transducer_loss_from_joint, transducer_loss_sum
from treadle.nn.transducer_decode import Hypothesis, StreamingDecoder, transducer_beam, transducer_greedy
from treadle.nn.transducer_model import Joint, Transducer

__all__ = [
    "BLANK",
    "GRU",
    "LSTM",
    "RNN",
    "AttentionLayer",
    "AttentionPooling",
    "ChunkPlan",
    "ClassifyHead",
    "CoxBaseline",
    "CoxHead",
    "CtcHead",
    "FeedForward",
    "HazardHead",
    "HybridStack",
    "Hypothesis",
    "Joint",
    "LanguageModelHead",
    "MinGRU",
    "MinLSTM",
    "MissingValues",
    "Network",
    "PieceReader",
    "RecurrentStack",
    "RegressionHead",
    "Rows",
    "ScanBackend",
    "State",
    "StreamingDecoder",
    "TagHead",
    "TimeDecay",
    "TimeEmbedding",
    "TrainedRow",
    "Transducer",
    "binary_focal_loss_sum",
    "build_network",
    "checkpointed",
    "class_weight_sum",
    "classify_loss_sum",
    "compile_layers",
    "concordance_index",
    "count_parameters",
    "cox_loss_sum",
    "ctc_greedy",
    "ctc_loss_sum",
    "debug_checks",
    "focal_loss_sum",
    "from_torch",
    "gaussian_nll_sum",
    "hazard_loss_sum",
    "huber_loss_sum",
    "logit_adjusted_loss_sum",
    "measure_footprint",
    "pinball_loss_sum",
    "plan_chunk",
    "recompute_layers",
    "scan_backends",
    "segment_softmax",
    "squared_loss_sum",
    "tag_loss_sum",
    "to_intervals",
    "train_in_chunks",
    "transducer_beam",
    "transducer_greedy",
    "transducer_loss_from_joint",
    "transducer_loss_sum",
]
