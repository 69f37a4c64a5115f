"""`tune`: sweep chunk size x L1 size x policy over a log, and recommend one setting."""

from kvsim.tuner.points import Figures, Point, Times
from kvsim.tuner.pricing import Costs, KvSize, costs, kv_size
from kvsim.tuner.result import Alignment, LogSummary, TuneResult
from kvsim.tuner.rule import Choice, Rule, choose
from kvsim.tuner.run import tune
from kvsim.tuner.trial import Prices, Settled, Trial, Tried

__all__ = [
    "Alignment",
    "Choice",
    "Costs",
    "Figures",
    "KvSize",
    "LogSummary",
    "Point",
    "Prices",
    "Rule",
    "Settled",
    "Times",
    "Trial",
    "Tried",
    "TuneResult",
    "choose",
    "costs",
    "kv_size",
    "tune",
]
