"""Published scaling laws as data: where each is from, in which range it was measured, and how it counts parameters.

N is parameters, D training tokens, C = 6 N D training FLOPs (Kaplan et al. 2020), losses are nats per token. Losses of
different laws are not comparable: each holds for its own data and tokenizer. What a law says of how loss changes is.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.accounting import parameter_counts

PF_DAY = 8.64e19
"""FLOPs of a petaflop/s-day, Kaplan's unit of compute."""

Counting = Literal["total", "non_embedding", "non_embedding_and_head"]
"""Which parameters N is: all; without both vocabulary matrices and positions; or the latter and the head, tied or not,
which is what a token is multiplied with."""


def counted_parameters(config: ModelConfig, counts: Counting) -> int:
    """Parameters of a model the way a law counts them."""
    parts = parameter_counts(config)
    if counts == "total":
        return parts["total"]
    blocks = parts["attention"] + parts["feed_forward"] + parts["norms"]
    return blocks + (config.vocab_size * config.model_dim if counts == "non_embedding_and_head" else 0)


def short(value: float) -> str:
    """A count as people write it: 1.3B, 70M, 768."""
    if not math.isfinite(value):
        return str(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}" if value < 999.5 * unit else f"{value / unit:.3e}{name}"
    return f"{value:.3g}"


def power(exponents: tuple[float, float, float], N: float, D: float) -> float:
    """c N^n D^d, of (c, n, d)."""
    c, n, d = exponents
    return c * N**n * D**d


def require_positive(**values: float) -> None:
    """
    Raises:
        UserError: a value is not a positive finite number.
    """
    for name, value in values.items():
        if not (0 < value < math.inf):
            raise UserError(f"{name} is {value}, but must be a positive number")


@dataclass(frozen=True)
class Measured:
    """Where a law is from. A range is that of the runs behind it, None where the source bounds something else."""

    _: KW_ONLY
    name: str
    source: str
    counts: Counting
    parameters_range: tuple[float, float] | None = None
    tokens_range: tuple[float, float] | None = None
    flops_range: tuple[float, float] | None = None

    def outside(self, N: float | None = None, D: float | None = None) -> str | None:
        """A warning with the measured range where the law is extrapolated; None inside it."""
        values = (
            ("parameters", N, self.parameters_range),
            ("tokens", D, self.tokens_range),
            ("FLOPs", None if N is None or D is None else 6 * N * D, self.flops_range),
        )
        asked, measured = [], []
        for what, value, bounds in values:
            show = (lambda x: f"{x:.2g}") if what == "FLOPs" else short
            # One part in a thousand is rounding, not extrapolation.
            if value is not None and bounds and not bounds[0] * 0.999 <= value <= bounds[1] * 1.001:
                asked.append(f"{show(value)} {what}")
                measured.append(f"{show(bounds[0])} to {show(bounds[1])} {what}")
        if not asked:
            return None
        return f"{self.name} was measured with {' and '.join(measured)}: {' and '.join(asked)} is extrapolation"


@dataclass(frozen=True)
class LossLaw(Measured):
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    @property
    def frontier_exponent(self) -> float:
        """a in N* ∝ C^a; D* ∝ C^(1 - a)."""
        return self.beta / (self.alpha + self.beta)

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss among those with 6 N D = flops (Hoffmann et al. 2022, equation 4)."""
        require_positive(flops=flops)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (flops / 6) ** self.frontier_exponent
        return N, flops / 6 / N

    def optimal_parameters(self, D: float) -> float:
        """N for which D tokens are compute-optimal."""
        return (self.alpha * self.A / (self.beta * self.B) * D**self.beta) ** (1 / self.alpha)

    def optimal_tokens(self, N: float) -> float:
        """Compute-optimal tokens for N parameters."""
        return (self.beta * self.B / (self.alpha * self.A) * N**self.alpha) ** (1 / self.beta)

    def tokens_for(self, N: float, loss: float) -> float:
        """Tokens after which N parameters reach a loss.

        Raises:
            UserError: no number of tokens is enough.
        """
        left = loss - self.E - self.A / N**self.alpha
        if not left > 0:
            least = self.E + self.A / N**self.alpha
            raise UserError(f"{self.name}: {short(N)} parameters get no lower than {least:.4g}, so never to {loss:.4g}")
        return (self.B / left) ** (1 / self.beta)

    def cheapest(self, loss: float) -> tuple[float, float]:
        """(N, D) that reach a loss with the fewest FLOPs.

        Raises:
            UserError: the loss is not above E.
        """
        if not loss > self.E:
            raise UserError(f"{self.name}: no model gets below E = {self.E:.4g}, so none to {loss:.4g}")
        # At the optimum alpha A / N^alpha = beta B / D^beta, so that both terms follow from the first.
        N = (self.A * (1 + self.alpha / self.beta) / (loss - self.E)) ** (1 / self.alpha)
        return N, self.optimal_tokens(N)


@dataclass(frozen=True)
class KaplanLaw(Measured):
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, and N* = N_e C^p with C in PF-days."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float
    N_e: float
    frontier_exponent: float

    def loss(self, N: float, D: float) -> float:
        return ((self.N_c / N) ** (self.alpha_N / self.alpha_D) + self.D_c / D) ** self.alpha_D

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """(N, D): the published N*, and the tokens that C = 6 N D leaves for it."""
        require_positive(flops=flops)
        N = self.N_e * (flops / PF_DAY) ** self.frontier_exponent
        return N, flops / 6 / N


@dataclass(frozen=True)
class OneTermLaw(Measured):
    """L(x) = (scale / x)^exponent of parameters or of tokens alone, the other being plenty."""

    of: Literal["parameters", "tokens"]
    scale: float
    exponent: float

    def loss(self, x: float) -> float:
        return (self.scale / x) ** self.exponent


@dataclass(frozen=True)
class Frontier(Measured):
    """N* = at_parameters · (C / at_flops)^frontier_exponent: a published exponent through a row of its table."""

    frontier_exponent: float
    at_flops: float
    at_parameters: float

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) with 6 N D = flops."""
        require_positive(flops=flops)
        N = self.at_parameters * (flops / self.at_flops) ** self.frontier_exponent
        return N, flops / 6 / N


@dataclass(frozen=True)
class DataConstrainedLaw:
    """`base` with U unique tokens seen more than once (Muennighoff et al. 2023, equation 5).

    Repeated tokens and parameters beyond those that U can use are worth less the more there are: x repetitions count
    as R* (1 - exp(-x / R*)).
    """

    base: LossLaw
    repeats_tokens: float = 15.387756
    """R*_D: tokens' repetitions after which their worth has fallen by 1 - 1/e."""
    excess_parameters: float = 5.309743
    """R*_N, the same for parameters, in multiples of the compute-optimal number for U."""

    def effective(self, N: float, D: float, unique: float) -> tuple[float, float]:
        """(N', D'): what N parameters and D tokens, of which `unique` are different, are worth."""
        require_positive(parameters=N, tokens=D, unique_tokens=unique)
        U_D = min(D, unique)
        U_N = min(N, self.base.optimal_parameters(U_D))
        return _decayed(U_N, N / U_N - 1, self.excess_parameters), _decayed(U_D, D / U_D - 1, self.repeats_tokens)

    def loss(self, N: float, D: float, unique: float) -> float:
        return self.base.loss(*self.effective(N, D, unique))


def _decayed(once: float, repeats: float, constant: float) -> float:
    return once + once * constant * (1 - math.exp(-repeats / constant))


@dataclass(frozen=True)
class TuningLaw(Measured):
    """Best peak learning rate and batch size, each (c, n, d) for c N^n D^d; a batch is counted in tokens."""

    learning_rate_power: tuple[float, float, float]
    batch_tokens_power: tuple[float, float, float]

    def learning_rate(self, N: float, D: float) -> float:
        return power(self.learning_rate_power, N, D)

    def batch_tokens(self, N: float, D: float) -> float:
        return power(self.batch_tokens_power, N, D)


_HOFFMANN = "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, arXiv:2203.15556"
_KAPLAN = "Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv:2001.08361"
_CHINCHILLA_RUNS = {"counts": "total", "parameters_range": (70e6, 16e9), "tokens_range": (5e9, 500e9)}
_KAPLAN_RUNS = {"counts": "non_embedding", "parameters_range": (768, 1.5e9), "tokens_range": (22e6, 23e9)}

CHINCHILLA = LossLaw(
    1.6934, 406.4, 410.7, 0.3392, 0.2849,
    name="Chinchilla 3", source=f"{_HOFFMANN}, approach 3, exponents with the digits of its source", **_CHINCHILLA_RUNS
)  # fmt: skip
CHINCHILLA_ROUNDED = LossLaw(
    1.69, 406.4, 410.7, 0.34, 0.28, name="Chinchilla 3, as printed", source=f"{_HOFFMANN}, equation 10",
    **_CHINCHILLA_RUNS
)  # fmt: skip
EPOCH = LossLaw(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658,
    name="Epoch", source="Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, arXiv:2404.10102",
    **_CHINCHILLA_RUNS,
)  # fmt: skip
MUENNIGHOFF = LossLaw(
    1.87, 521.0, 1488.0, 0.353, 0.353,
    name="Muennighoff", source="Muennighoff et al. 2023, Scaling Data-Constrained Language Models, arXiv:2305.16264",
    counts="total", parameters_range=(7e6, 9e9), tokens_range=(100e6, 900e9),
)  # fmt: skip
KAPLAN = KaplanLaw(
    6.4e13, 1.8e13, 0.076, 0.103, 1.3e9, 0.73,
    name="Kaplan", source=f"{_KAPLAN}, equation 1.5, tables 2 and 6", **_KAPLAN_RUNS
)  # fmt: skip
KAPLAN_PARAMETERS = OneTermLaw(
    "parameters", 8.8e13, 0.076, name="Kaplan L(N)", source=f"{_KAPLAN}, equation 1.1", **_KAPLAN_RUNS
)
KAPLAN_TOKENS = OneTermLaw(
    "tokens", 5.4e13, 0.095, name="Kaplan L(D)", source=f"{_KAPLAN}, equation 1.2", **_KAPLAN_RUNS
)
CHINCHILLA_1 = Frontier(
    0.50, 1.21e20, 1e9, name="Chinchilla 1", source=f"{_HOFFMANN}, approach 1, tables 2 and 3", **_CHINCHILLA_RUNS
)
CHINCHILLA_2 = Frontier(
    0.49, 1.20e20, 1e9, name="Chinchilla 2", source=f"{_HOFFMANN}, approach 2, tables 2 and A3", **_CHINCHILLA_RUNS
)
DATA_CONSTRAINED = DataConstrainedLaw(MUENNIGHOFF)

LOSS_LAWS: tuple[LossLaw | KaplanLaw, ...] = (EPOCH, CHINCHILLA, CHINCHILLA_ROUNDED, MUENNIGHOFF, KAPLAN)
"""Laws with `loss(N, D)` and `compute_optimal(flops)`; the first is the correction of those that followed it."""
FRONTIERS: tuple[LossLaw | KaplanLaw | Frontier, ...] = (KAPLAN, CHINCHILLA_1, CHINCHILLA_2, CHINCHILLA, EPOCH)
"""Laws with `compute_optimal(flops)` and `frontier_exponent`, as they are compared."""
PORIAN_EXPONENTS = {
    "Kaplan's recipe": 0.835,
    "with the head's FLOPs": 0.706,
    "with a shorter warmup": 0.602,
    "with a decay of the right length": 0.571,
    "with tuned optimizers": 0.497,
}
"""a in N* ∝ C^a as each of Kaplan's choices is corrected (Porian et al. 2024, arXiv:2406.19146)."""

STEP_LAW = TuningLaw(
    (1.79, -0.713, 0.307), (0.58, 0.0, 0.571),
    name="Step Law", source="Li et al. 2025, Predictable Scale: Part I, Step Law, arXiv:2503.04715",
    counts="non_embedding", parameters_range=(60e6, 1.07e9), tokens_range=(2e9, 100e9),
)  # fmt: skip
DEEPSEEK = TuningLaw(
    (0.3118 * 6**-0.125, -0.125, -0.125), (0.2920 * 6**0.3271, 0.3271, 0.3271),
    name="DeepSeek", source="DeepSeek-AI 2024, DeepSeek LLM, arXiv:2401.02954, equation 1, with its C as 6 N D",
    counts="non_embedding", flops_range=(1e17, 2e19),
)  # fmt: skip
TUNING_LAWS: tuple[TuningLaw, ...] = (STEP_LAW, DEEPSEEK)
