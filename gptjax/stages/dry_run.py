"""The first rows that a run would train on, as it would see them; nothing is written but prepared data."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gptjax.config import Config
from gptjax.stages import start
from gptjax.stages.stage import Data
from gptjax.stages.train import STAGES


class FirstRows(NamedTuple):
    """Rows and what of them is learned."""

    config: Config
    """With the shape that the run would have."""
    data: Data
    tokens_BT: np.ndarray
    """(B, T + 1), the row whole: its first T tokens are inputs, its last T labels."""
    loss_mask_BT: np.ndarray
    """(B, T + 1) whether a token is a label."""


def first_rows(config: Config, num_rows: int = 2, log: Callable[[str], None] = print) -> FirstRows:
    """Prepare the data, or find it prepared, and take the rows with which step 0 begins.

    Raises:
        UserError: as the stage's `load_data`, and where there is not one row.
    """
    stage = STAGES[config.stage]
    config = stage.configure(start.inherit(config, log=log))
    data = stage.load_data(config, None, log)
    return FirstRows(config, data, *stage.example_rows(config, data, num_rows))
