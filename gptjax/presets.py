"""Published models and recipes, as data: each function gives the whole configuration of a run.

`configs/` has a file for each. What a paper leaves open or contradicts is said where it is chosen. No recipe has
its authors' data, so that all but the article's ask for `data.path`; BPE vocabularies have the published size, and
`--tokenizer.path` takes the published files.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.errors import UserError
from gptjax.scaling.laws import STEP_LAW

WEB_TEXT = DataConfig(
    path=(),
    suggestion="your text, or hf://HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",
    validation_fraction=0.0005,  # as nanoGPT's of OpenWebText; more would be tokens that nobody learns from
)
SHAKESPEARE = DataConfig(
    path=(),
    suggestion="shakespeare.txt, which is data/tinyshakespeare/input.txt of karpathy/char-rnn on GitHub",
    validation_fraction=0.1,
    split="position",
)

GPT2_VOCAB_SIZE = 50257


def gpt1() -> Config:
    """GPT (Radford et al. 2018), 117M: post-norm, and dropout everywhere.

    Section 4.1: Adam, 2.5e-4 after 2000 steps of warm-up, cosine to 0, batches of 64 × 512 tokens, weight decay 0.01,
    40,000 merges. It ran 100 epochs of a corpus that is no longer to be had; a million steps are set here. One
    departure: the paper draws all weights from N(0, 0.02), while here, as everywhere in gptjax, those of projections
    into the residual stream are smaller by sqrt(2 · num_layers), which GPT-2 brought in.
    """
    return Config(
        model=ModelConfig(
            num_layers=12,
            model_dim=768,
            num_heads=12,
            context_length=512,
            norm_position="post",
            embedding_dropout=0.1,
            attention_dropout=0.1,
            residual_dropout=0.1,
        ),
        tokenizer=TokenizerConfig(vocab_size=40478),
        data=WEB_TEXT,
        optimizer=OptimizerConfig(
            peak_learning_rate=2.5e-4,
            warmup_steps=2000,
            final_learning_rate_fraction=0.0,
            beta2=0.999,
            weight_decay=0.01,
        ),
        training=TrainingConfig(steps=1_000_000, batch_size=64, micro_batch_size=32, eval_every_steps=5000),
        checkpoint=CheckpointConfig(every_steps=5000),
    )


class Shape(NamedTuple):
    """Depth, width and heads."""

    num_layers: int
    model_dim: int
    num_heads: int


GPT2_SHAPES = {  # Table 2 of the paper; the parameter counts there were corrected later
    "124M": Shape(12, 768, 12),
    "355M": Shape(24, 1024, 16),
    "774M": Shape(36, 1280, 20),
    "1558M": Shape(48, 1600, 25),
}
GPT2_LEARNING_RATES = {"124M": 6e-4, "355M": 3e-4, "774M": 2.5e-4, "1558M": 2e-4}


def gpt2(size: str) -> Config:
    """GPT-2 (Radford et al. 2019).

    The paper gives the batch, 512 sequences, and little else. Optimizer and schedule are nanoGPT's, 300 billion tokens
    with a warm-up of 2000 steps; learning rates are those of the GPT-3 of about that size. nanoGPT trains without
    dropout, where GPT-2 had 0.1.

    Raises:
        UserError: there is no such size.
    """
    shape = _of_size(GPT2_SHAPES, size, "GPT-2")
    return Config(
        model=ModelConfig(**shape._asdict(), context_length=1024),
        tokenizer=TokenizerConfig(vocab_size=GPT2_VOCAB_SIZE),
        data=WEB_TEXT,
        optimizer=OptimizerConfig(peak_learning_rate=GPT2_LEARNING_RATES[size], warmup_steps=2000),
        training=TrainingConfig(
            steps=572_205, batch_size=512, micro_batch_size=32, eval_every_steps=1000, sample_every_steps=1000
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


class GPT3Row(NamedTuple):
    """A row of Table 2.1, and what follows from it."""

    shape: Shape
    batch_size: int
    """Sequences of 2048 tokens."""
    peak_learning_rate: float
    batch_ramp_tokens: int
    steps: int
    """The fewest that see 300 billion tokens, the ramp's small batches included."""


# The table contradicts itself twice. XL has 24 heads of 128, which is not its width of 2048: 16 heads, as the
# 1,320 million parameters of Table D.1 ask for. 13B is 5140 wide, which 40 heads of 128 are not: 5120, which has the
# 12,850 million of Table D.1. Batches of 0.5, 1, 2 and 3.2 million tokens are the nearest multiples of 256 sequences
# of 2048. The batch grows "over the first 4-12 billion tokens, depending on the model size": by the batch here.
GPT3_ROWS = {
    "125M": GPT3Row(Shape(12, 768, 12), 256, 6.0e-4, 4 * 10**9, 591_581),
    "350M": GPT3Row(Shape(24, 1024, 16), 256, 3.0e-4, 4 * 10**9, 591_581),
    "760M": GPT3Row(Shape(24, 1536, 16), 256, 2.5e-4, 4 * 10**9, 591_581),
    "1.3B": GPT3Row(Shape(24, 2048, 16), 512, 2.0e-4, 6 * 10**9, 304_170),
    "2.7B": GPT3Row(Shape(32, 2560, 32), 512, 1.6e-4, 6 * 10**9, 304_170),
    "6.7B": GPT3Row(Shape(32, 4096, 32), 1024, 1.2e-4, 8 * 10**9, 157_562),
    "13B": GPT3Row(Shape(40, 5120, 40), 1024, 1.0e-4, 8 * 10**9, 157_562),
    "175B": GPT3Row(Shape(96, 12288, 96), 1536, 0.6e-4, 12 * 10**9, 111_355),
}
GPT3_RAMP_START = 16
"""Sequences of the first batches: 32 thousand tokens."""


def gpt3(size: str) -> Config:
    """GPT-3 (Brown et al. 2020): Table 2.1 and Appendix B.

    Adam 0.9 / 0.95 / 1e-8, clipped at 1, weight decay 0.1, warm-up over 375 million tokens, cosine to 10 % over 260
    billion and that until 300 billion. Dense and banded layers alternate; the width of the band is not published,
    256 is chosen. The ramp's start bounds the micro-batch: with more than 16 data-parallel devices raise both
    training.micro_batch_size and training.batch_ramp_start.

    Raises:
        UserError: there is no such size.
    """
    row = _of_size(GPT3_ROWS, size, "GPT-3")
    return Config(
        model=ModelConfig(
            **row.shape._asdict(), context_length=2048, attention_pattern=("dense", "local"), attention_window=256
        ),
        tokenizer=TokenizerConfig(vocab_size=GPT2_VOCAB_SIZE),
        data=WEB_TEXT,
        optimizer=OptimizerConfig(
            peak_learning_rate=row.peak_learning_rate, warmup_tokens=375 * 10**6, decay_tokens=260 * 10**9
        ),
        training=TrainingConfig(
            steps=row.steps,
            batch_size=row.batch_size,
            micro_batch_size=GPT3_RAMP_START,
            batch_ramp_start=GPT3_RAMP_START,
            batch_ramp_tokens=row.batch_ramp_tokens,
            eval_every_steps=1000,
            sample_every_steps=1000,
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def article_gpt35() -> Config:
    """The model of the article that gptjax was asked to make real, made right (`docs/article.md`).

    Its listing's 12 layers of width 512, 8 heads, ReLU feed-forward of 2048, dropout 0.1 and linear head; with what
    the listing lacks, from the paper that it cites (Vaswani et al. 2017): the causal mask, sinusoidal positions on
    embeddings scaled by sqrt(model_dim), and LayerNorm. It has 37,829,632 + 1025 · vocab_size parameters. It is for
    small texts, the standard library's own if none is given, read many times: of these 5 % are held out.
    """
    return Config(
        model=ModelConfig(
            num_layers=12,
            model_dim=512,
            num_heads=8,
            ffn_dim=2048,
            context_length=512,
            positions="sinusoidal",
            scale_embedding=True,
            feed_forward="relu",
            tie_embeddings=False,
            head_bias=True,
            embedding_dropout=0.1,
            attention_dropout=0.1,
            residual_dropout=0.1,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=6e-4, warmup_steps=500),
        training=TrainingConfig(
            steps=10_000, batch_size=32, eval_every_steps=500, sample_every_steps=500, sample_prompt="The cat sat"
        ),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def shakespeare_char_cpu() -> Config:
    """nanoGPT's Shakespeare on characters, as its README sets it for a CPU: some minutes on two cores."""
    return _shakespeare(
        Shape(4, 128, 4),
        context_length=64,
        dropout=0.0,
        training=TrainingConfig(steps=2000, batch_size=12, sample_prompt="\n"),
    )


def shakespeare_char_gpu() -> Config:
    """nanoGPT's Shakespeare on characters (`config/train_shakespeare_char.py` there): for one GPU."""
    return _shakespeare(
        Shape(6, 384, 6),
        context_length=256,
        dropout=0.2,
        training=TrainingConfig(steps=5000, batch_size=64, sample_prompt="\n"),
    )


def _shakespeare(shape: Shape, context_length: int, dropout: float, training: TrainingConfig) -> Config:
    return Config(
        model=ModelConfig(
            **shape._asdict(),
            context_length=context_length,
            feed_forward="gelu",
            bias=False,
            norm_bias=False,
            embedding_dropout=dropout,
            attention_dropout=dropout,
            residual_dropout=dropout,
        ),
        tokenizer=TokenizerConfig(kind="char"),
        data=SHAKESPEARE,
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        training=dataclasses.replace(training, eval_sequences=0),  # what the README compares is of the whole set
        checkpoint=CheckpointConfig(every_steps=250),
    )


MODERN_SHAPES = {
    "10M": Shape(8, 192, 3),
    "25M": Shape(8, 384, 6),
    "50M": Shape(10, 512, 8),
    "110M": Shape(12, 768, 12),
    "240M": Shape(16, 1024, 16),
    "440M": Shape(20, 1280, 10),
    "730M": Shape(24, 1536, 12),
    "1.5B": Shape(28, 2048, 16),
}
MODERN_CONTEXT = 2048
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022
MODERN_TEXT = dataclasses.replace(WEB_TEXT, validation_fraction=0.002)
"""The smallest rung sees 200 million tokens, of which less would be too few to tell its loss."""


def modern(size: str, optimizer: Literal["adamw", "muon"] = "adamw") -> Config:
    """A ladder of one architecture for scaling studies: RMSNorm, RoPE, SwiGLU, normalized queries and keys, no biases.

    Shapes but for the normalized queries and keys are Llama's (Touvron et al. 2023), embeddings are tied. Each rung
    sees 20 tokens per parameter (Hoffmann et al. 2022), with learning rate and batch by the Step Law (Li et al. 2025)
    and a schedule that decays over its last fifth, so that longer runs can start from its middle (Hägele et al. 2024).
    Muon's updates have AdamW's size, and take the learning rate of its law (Liu et al. 2025).

    Raises:
        UserError: there is no such size.
    """
    return modern_of_shape(_of_size(MODERN_SHAPES, size, "modern"), optimizer)


def modern_of_shape(shape: Shape, optimizer: Literal["adamw", "muon"] = "adamw") -> Config:
    """The same for any number of layers, width and heads."""
    model = ModelConfig(
        **shape._asdict(),
        context_length=MODERN_CONTEXT,
        norm="rmsnorm",
        positions="rope",
        feed_forward="swiglu",
        qk_norm=True,
        bias=False,
    )
    tokenizer = TokenizerConfig(vocab_size=2**15)
    D, F = model.model_dim, model.resolved_ffn_dim
    matrices = model.num_layers * (4 * D * D + 3 * D * F)
    tokens = TOKENS_PER_PARAMETER * (matrices + D * tokenizer.vocab_size)
    batch_size = _nearest_power_of_two(STEP_LAW.batch_tokens(matrices, tokens) / MODERN_CONTEXT)
    steps = math.ceil(tokens / (batch_size * MODERN_CONTEXT))
    return Config(
        model=model,
        tokenizer=tokenizer,
        data=MODERN_TEXT,
        optimizer=OptimizerConfig(
            kind=optimizer,
            peak_learning_rate=float(f"{STEP_LAW.learning_rate(matrices, tokens):.2g}"),
            schedule="wsd",
            warmup_steps=steps // 50,
            final_learning_rate_fraction=0.0,
        ),
        training=TrainingConfig(
            steps=steps, batch_size=batch_size, micro_batch_size=min(16, batch_size), eval_every_steps=500
        ),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def _of_size(rows: Mapping[str, NamedTuple], size: str, family: str) -> NamedTuple:
    if size not in rows:
        near = difflib.get_close_matches(size, rows, n=1, cutoff=0.0)
        raise UserError(f"there is no {family} of {size!r}, only of {', '.join(rows)}; did you mean {near[0]}?")
    return rows[size]


def _nearest_power_of_two(x: float) -> int:
    return 2 ** round(math.log2(x))
