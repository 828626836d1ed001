"""How initialization, learning rates and multipliers change with width and depth, so that settings carry over.

In the standard parametrization the best learning rate falls as models grow. Under µP (Yang et al. 2022) what is best at
`model.base_model_dim` stays so at any width, and under CompleteP (Dey et al. 2025, their table 1 with α = 1) at any
depth, too. With m = model_dim / base_model_dim and d = num_layers / base_num_layers:

| | standard | mup | completep |
|---|---|---|---|
| hidden weights, initial deviation | σ | σ / √m | σ / √m |
| ... of the two that end a sublayer | over √(2 num_layers) | over √(2 num_layers) | over √(2 base_num_layers) |
| hidden weights, learning rate | η | η / m | η / m |
| hidden weights, weight decay | λ | λ m | λ m |
| Adam's epsilon | ε | ε / m | ε / m, in blocks ε / (m d) |
| attention logits | q·k / √H | q·k √base_head_dim / H | q·k √base_head_dim / H |
| output of a sublayer | 1 | 1 | 1 / d |
| output logits | 1 | 1 / m | 1 / m |

Embeddings, norms and biases keep σ, η and λ. Decay is multiplied by the learning rate, so that λ m keeps it where it
is. Muon's updates have a spectral norm that grows as √m and not as m, so that its hidden weights learn at η / √m and
decay by λ √m. A model of the base width, depth and head size is the standard one.

Only the standard library is imported.
"""

from typing import NamedTuple

from gptjax.config import ModelConfig


class Multipliers(NamedTuple):
    """What a model's size makes of the settings; all 1 in the standard parametrization."""

    hidden_std: float = 1.0
    """Initial deviation of the blocks' weight matrices."""
    ending_std: float = 1.0
    """That of the matrices that end a sublayer, beside the above and 1/√(2 num_layers)."""
    hidden_rate: float = 1.0
    """Learning rate of the blocks' weight matrices under AdamW; their weight decay is divided by it."""
    hidden_rate_muon: float = 1.0
    """The same under Muon."""
    epsilon: float = 1.0
    """Adam's epsilon."""
    block_epsilon: float = 1.0
    """Adam's epsilon of parameters in blocks."""
    attention: float = 1.0
    """Attention logits, beside 1/√head_dim."""
    sublayer: float = 1.0
    """What attention and feed-forward add to the residual stream."""
    logits: float = 1.0
    """Output logits."""


STANDARD = Multipliers()


def multipliers(config: ModelConfig) -> Multipliers:
    """The table above for this model."""
    if config.parametrization == "standard":
        return STANDARD
    width = config.model_dim / config.base_model_dim
    depth = config.num_layers / config.base_num_layers if config.parametrization == "completep" else 1.0
    return Multipliers(
        hidden_std=width**-0.5,
        ending_std=depth**0.5,
        hidden_rate=1 / width,
        hidden_rate_muon=width**-0.5,
        epsilon=1 / width,
        block_epsilon=1 / (width * depth),
        attention=(config.base_head_dim / config.resolved_head_dim) ** 0.5,
        sublayer=1 / depth,
        logits=1 / width,
    )
