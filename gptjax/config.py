"""The configuration of a run: frozen dataclasses, and what a run leaves open.

The model's section stands in `model_config.py`, those of stages after pretraining in `tuning_config.py`, and those of
what keeps a run safe in `safety_config.py`. Only the standard library is imported here, so that a command line is
parsed and a plan is made without loading JAX. Conventions: a field's unit is in its name; 0 or an empty text turns an
optional effect off; `None` means *derived from other fields*, and the field's doc says from which. `resolve.py` fills
every `None`, and a saved configuration has none left.
"""

import datetime
import math
from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import MAX_INT, require, require_range, require_types
from gptjax.errors import UserError
from gptjax.model_config import ModelConfig
from gptjax.safety_config import CheckpointConfig, GuardConfig
from gptjax.tuning_config import GrpoConfig, LoraConfig, PpoConfig, PreferenceConfig, RlConfig, Stage


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bpe", "byte", "char"] = "bpe"
    """bpe: byte-level byte-pair encoding trained on the data; byte: UTF-8 bytes; char: the data's characters."""
    vocab_size: int = 8192
    """Tokens of a bpe tokenizer, special ones included."""
    path: str = ""
    """A tokenizer.json, or GPT-2's folder (encoder.json, vocab.bpe), to use as it is. Empty: kind and data decide."""

    def __post_init__(self):
        require_types("tokenizer.", self)
        low = 256 + 16  # every byte and the reserved special tokens
        require_range("tokenizer.", self, low, 2**24, "vocab_size")


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    path: tuple[str, ...] = ("stdlib://",)
    """Files, folders, globs, hf://OWNER/NAME[/glob], or a prepared folder. stdlib:// is Python's own library."""
    suggestion: str = ""
    """What a recipe that leaves path empty is meant for; said where path is missing."""
    weights: tuple[float, ...] = ()
    """Share of the training tokens that each entry of path gives, in proportion. Empty: they are one source."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, that holds the text."""
    on_error: Literal["stop", "skip"] = "stop"
    """A file or line that cannot be read stops the run, or is counted and skipped."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    split: Literal["auto", "hash", "position"] = "auto"
    """Which documents are held out: by hash of their text, or the last ones. auto: position below 100 documents."""
    prepared_dir: str = "data"
    """Folder under which token shards are kept, and found again when nothing changed."""
    separate_documents: bool = False
    """Documents packed into one sequence do not see each other, and each starts at position 0."""
    on_long: Literal["stop", "truncate", "skip"] = "stop"
    """A conversation longer than training.sequence_length stops the run, or is cut or left out, and counted."""
    chat_template: str = ""
    """Jinja file, as Hugging Face models have it, that lays out conversations. Empty: the first run's, else ChatML."""
    chat_date: str | None = None
    """Date, YYYY-MM-DD, that templates which ask for one get in training. None: that on which the run begins."""

    def __post_init__(self):
        if isinstance(self.path, str):  # one path is the common case in a configuration file
            object.__setattr__(self, "path", (self.path,))
        require_types("data.", self)
        for number, weight in enumerate(self.weights):
            source = f" for {self.path[number]}" if number < len(self.path) else ""
            require(
                0 < weight < math.inf,
                f"data.weights has {weight:g}{source}, but each must be a positive number; to leave a source out, "
                "leave it out of data.path",
            )
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction:g}, but must lie between 0 and 1",
        )
        if self.chat_date is not None:
            try:
                datetime.date.fromisoformat(self.chat_date)
            except ValueError:
                raise UserError(
                    f"data.chat_date is {self.chat_date!r}, but must be a date such as 2026-11-30"
                ) from None


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. The product of the axes is the number of devices."""

    data: int | None = None
    """Copies of the model that share a batch. None: the devices that the other axes leave over."""
    fsdp: int | None = None
    """Devices that share a batch and split parameters and optimizer state. None: the fewest whose memory suffices."""
    context: int = 1
    """Devices that split each sequence, and parameters like fsdp: for long contexts."""
    tensor: int | None = None
    """Devices that split heads, feed-forward width and vocabulary. None: 1, or what fsdp alone cannot hold."""
    expert: int = 1
    """Reserved for mixtures of experts, which gptjax does not have."""

    def __post_init__(self):
        require_types("mesh.", self)
        require_range("mesh.", self, 1, math.inf, "data", "fsdp", "context", "tensor")
        require(
            self.expert == 1,
            f"mesh.expert is {self.expert}, but is reserved: no model of gptjax has experts; 1 works",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon makes the updates of the blocks' weight matrices orthogonal; what else there is stays AdamW's."""
    peak_learning_rate: float = 6e-4
    """Learning rate after warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up; wsd is constant, then linear over the last wsd_decay_fraction."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up, instead of warmup_steps."""
    decay_steps: int | None = None
    """Step at which the schedule reaches its end. None: training.steps."""
    decay_tokens: int = 0
    """Tokens at which the schedule reaches its end, instead of decay_steps."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the schedule's end, as a share of the peak."""
    wsd_decay_fraction: float = 0.2
    """Share of the schedule over which wsd decays."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_update_rms: float = 0.2
    """Root mean square of Muon's updates; AdamW's is near 0.2, so that one learning rate serves both."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    clip_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down. 0: off."""

    def __post_init__(self):
        require_types("optimizer.", self)
        require_range(
            "optimizer.",
            self,
            0,
            math.inf,
            *("peak_learning_rate", "warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens"),
            *("epsilon", "weight_decay", "clip_norm"),
        )
        require_range("optimizer.", self, 0, 1, "final_learning_rate_fraction", "wsd_decay_fraction")
        require_range("optimizer.", self, 0, 0.999999, "beta1", "beta2", "muon_momentum")
        require_range("optimizer.", self, 1e-6, math.inf, "muon_update_rms")
        require(
            not (self.warmup_steps and self.warmup_tokens),
            f"optimizer.warmup_steps {self.warmup_steps} and optimizer.warmup_tokens {self.warmup_tokens} "
            "are both set; give one",
        )


def foreign_row_tokens(model: ModelConfig) -> int:
    """Of a row where a model of another program is tuned and nobody says how many: a context of 131,072 is what a model
    can read, and no length for every row."""
    return min(model.context_length, 2048)


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int | None = 1000
    """Optimizer steps. None: those that epochs and the data make."""
    epochs: float = 1.0
    """Passes over the rows of the data, where steps is None."""
    batch_size: int = 32
    """Sequences of an optimizer step, over all devices."""
    sequence_length: int | None = None
    """Tokens of a sequence. None: those of the run in model.init_from, of a foreign model ≤ 2048; else the context."""
    micro_batch_size: int | None = None
    """Sequences computed at once, over all devices; gradients accumulate up to batch_size. None: batch_size."""
    batch_ramp_start: int | None = None
    """Sequences of the first steps, growing linearly to batch_size. None: batch_size (no ramp)."""
    batch_ramp_tokens: int = 0
    """Tokens over which the batch grows."""
    z_loss: float = 0.0
    """Weight of log²Z, which keeps logits near zero (PaLM used 1e-4)."""
    loss_chunk_tokens: int = 0
    """Tokens, over all devices, whose logits are held at once and computed again in the backward pass. 0: all."""
    seed: int = 0
    """Seed of initialization, dropout and the order of the data."""
    log_every_steps: int = 10
    """Steps between lines of metrics."""
    eval_every_steps: int = 250
    """Steps between evaluations. 0: only at the end."""
    eval_sequences: int | None = None
    """Held-out sequences that an evaluation reads, evenly spaced. 0: all. None: what 5 % of the run's FLOPs pay."""
    sample_every_steps: int = 250
    """Steps between generated samples. 0: only at the end."""
    sample_prompt: str = "\n"
    """What the samples continue."""
    sample_tokens: int = 120
    """Tokens of a sample."""
    steps_per_dispatch: int = 1
    """Optimizer steps handed to the device at once; more helps when a step takes about a millisecond."""
    deterministic: bool = False
    """Ask the GPU for bit-reproducible kernels, at some cost in speed. CPU runs always are."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go beside metrics.jsonl; each needs its own package."""
    profile_steps: str = ""
    """A:B writes a Perfetto trace of the steps after A up to B, and prints the largest kernels. Empty: none."""

    def __post_init__(self):
        require_types("training.", self)
        require_range(
            "training.",
            self,
            1,
            math.inf,
            *("steps", "batch_size", "sequence_length", "micro_batch_size", "batch_ramp_start"),
            *("log_every_steps", "steps_per_dispatch", "sample_tokens"),
        )
        require_range(
            "training.",
            self,
            0,
            math.inf,
            *(
                "batch_ramp_tokens",
                "z_loss",
                "loss_chunk_tokens",
                "eval_every_steps",
                "eval_sequences",
                "sample_every_steps",
            ),
        )
        require_range("training.", self, 0, MAX_INT, "seed")
        require(0 < self.epochs < math.inf, f"training.epochs is {self.epochs:g}, but must be above 0")
        micro = self.resolved_micro_batch_size
        for name in ("batch_size", "batch_ramp_start"):
            size = getattr(self, name)
            if size is not None and size % micro:
                raise UserError(
                    f"training.{name} {size} is not a multiple of training.micro_batch_size {micro}; "
                    f"the nearest is {max(1, round(size / micro)) * micro}"
                )
        if self.profile_steps and self.profile_window is None:
            last = max(2, min(23, self.steps or 23))
            raise UserError(
                f"training.profile_steps is {self.profile_steps!r}, but must be A:B with 1 ≤ A < B ≤ training.steps "
                f"{self.steps}, such as {max(1, last - 3)}:{last}; step 1 compiles"
            )
        start = self.resolved_batch_ramp_start
        require(
            start <= self.batch_size,
            f"training.batch_ramp_start {start} is larger than training.batch_size {self.batch_size}",
        )
        require(
            start == self.batch_size or self.batch_ramp_tokens > 0,
            f"training.batch_ramp_start {start} needs training.batch_ramp_tokens, which is 0",
        )

    def resolved_sequence_length(self, model: ModelConfig) -> int:
        return self.sequence_length or model.context_length

    @property
    def resolved_micro_batch_size(self) -> int:
        return self.micro_batch_size or self.batch_size

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The last step before those of profile_steps, and the last of these; None where there are none."""
        first, colon, last = self.profile_steps.partition(":")
        if not (
            colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) < int(last) <= (self.steps or MAX_INT)
        ):
            return None
        return int(first), int(last)

    @property
    def resolved_batch_ramp_start(self) -> int:
        return self.batch_ramp_start or self.batch_size


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. A configuration file assigns one to `config`."""

    stage: Stage = "pretrain"
    """What is learned: text, conversations (sft), a reward, preferences (dpo), or by reinforcement (ppo, grpo)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    run_dir: str | None = None
    """Folder of the run. None: the next free name under runs/, after the configuration file."""

    def __post_init__(self):
        require_types("", self)

    @property
    def sequence_length(self) -> int:
        """Tokens of a training row; `model.context_length` is what the model can read."""
        return self.training.resolved_sequence_length(self.model)

    @property
    def separates_documents(self) -> bool:
        """Whether rows hold several texts that do not see each other."""
        return self.data.separate_documents or self.stage == "sft"
