"""Tables of questions, answered batch by batch: alone, or on many machines by Ray Data. Needs the extra ``ray``."""

from .asking import AskBatch
from .tables import answer_table

__all__ = ["AskBatch", "answer_table"]
