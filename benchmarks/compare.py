"""Arms side by side: each a process of its own, all on the same cores or the same card, taking turns block by block.

A process is started, warmed up and then waits; blocks run one at a time in the order A-B-A-B, so that whatever else the
machine does meets all arms alike, and ratios are of blocks that ran next to each other. With `fresh`, processes take
turns instead, one on the machine at a time: for what does not fit into a device's memory together.
"""

import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure

from gptjax.checks import require
from gptjax.config import Config
from gptjax.errors import UserError

HERE = Path(__file__).parent
NO_DROPOUT = tuple(
    word for kind in ("embedding", "attention", "residual") for word in (f"--model.{kind}-dropout", "0.0")
)


@dataclasses.dataclass
class Arm:
    """A process to measure, and what it has said so far."""

    name: str
    dtype: str
    command: list[str]
    environment: dict[str, str]
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of a step, for each block."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process and wait until it is warm."""
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed with the arm
        # Side by side on one card, no process may take all of its memory at once.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | self.environment
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self._answer()

    def block(self) -> None:
        if self.process is not None:
            self.process.stdin.write("block\n")
            self.process.stdin.flush()
            answer = self._answer()
            if answer is not None:
                self.seconds.append(float(answer))

    def finish(self) -> None:
        """Let the process say its facts and end."""
        if self.process is not None:
            self.process.stdin.close()
            answer = self._answer()
            if answer is not None:
                self.facts = json.loads(answer)
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answer(self) -> str | None:
        """What the process says next. None: it has ended instead, and `error` says why."""
        for line in self.process.stdout:
            if line.startswith("@"):
                return line[1:].rstrip("\n")
        self.log.seek(0)
        text = self.log.read()
        said = [line for line in text.splitlines() if line.strip()]
        self.error = "no memory" if measure.is_out_of_memory(text) else (said or ["it ended without a word"])[-1]
        self.process = None
        return None


def make_arms(config: Config, options: Any, words: Sequence[str], batch_size: int) -> list[Arm]:
    """Ours first, in each type; then its variants; then what `--against` names.

    Args:
        config: with its vocabulary known.
        options: as train_speed.py parses them.
        words: the command line's overrides of the configuration, as they were written.
    """
    dtypes = options.dtypes or [config.model.compute_dtype or "float32"]
    arms = []
    for dtype in dtypes:
        arms.append(_gptjax(f"ours {dtype}", HERE.parent, dtype, options, words, batch_size))
        for variant in options.variant or []:
            name, colon, rest = variant.partition(":")
            require(bool(colon), f"--variant {variant!r} has no colon; write NAME: FLAG=VALUE --section.field value")
            arms.append(
                _gptjax(f"{name} {dtype}", HERE.parent, dtype, options, [*words, *shlex.split(rest)], batch_size)
            )
        for other in options.against or []:
            kind, _, path = other.partition("=")
            if kind == "nanogpt":
                require((Path(path) / "model.py").is_file(), f"{path or other} is no checkout of nanoGPT: no model.py")
                arms += [_nanogpt(config, Path(path), dtype, mode, options, batch_size) for mode in options.modes]
            elif kind == "gptjax":
                require((Path(path) / "gptjax").is_dir(), f"{path or other} is no checkout of gptjax: no gptjax/")
                arms.append(_gptjax(f"{Path(path).name} {dtype}", Path(path), dtype, options, words, batch_size))
            else:
                raise UserError(f"--against {other} is neither nanogpt=CHECKOUT nor gptjax=CHECKOUT")
    return arms


def _gptjax(name: str, root: Path, dtype: str, options: Any, words: Sequence[str], batch_size: int) -> Arm:
    """gptjax from a checkout, measured by its own script if that can wait for blocks, else by this one."""
    script, config = root / "benchmarks" / "train_speed.py", Path(options.config)
    if not script.is_file() or "--paced" not in script.read_text(encoding="utf-8"):
        script = HERE / "train_speed.py"
    config = root / config if not config.is_absolute() and (root / config).is_file() else config
    fixed = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    environment = dict(word.split("=", 1) for word in words if word not in fixed)
    command = [sys.executable, str(script), str(config), "--paced", "--batch-sizes", str(batch_size)]
    command += ["--steps", str(options.steps), *NO_DROPOUT, "--model.compute-dtype", dtype, *fixed]
    if options.vocab_size:
        command += ["--vocab-size", str(options.vocab_size)]
    if options.documents > 1:
        command += ["--documents", str(options.documents)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {environment.get('XLA_FLAGS', '')}".strip()
    path = os.pathsep.join(filter(None, [str(root.resolve()), os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path} | ({"XLA_FLAGS": flags} if flags else {})
    return Arm(name, dtype, command, environment)


def _nanogpt(config: Config, checkout: Path, dtype: str, mode: str, options: Any, batch_size: int) -> Arm:
    m, o = config.model, config.optimizer
    differing = {
        "model.positions": m.positions != "learned",
        "model.norm": m.norm != "layernorm" or m.norm_position != "pre",
        "model.norm_bias": m.norm_bias != m.bias,
        "model.qkv_bias": m.resolved_qkv_bias != m.bias,
        "model.ffn_bias": m.resolved_ffn_bias != m.bias,
        "model.feed_forward": m.gated or m.feed_forward not in ("gelu", "gelu_tanh"),
        "model.ffn_dim": m.resolved_ffn_dim != 4 * m.model_dim,
        "model.num_kv_heads": m.resolved_num_kv_heads != m.num_heads,
        "model.head_dim": m.resolved_head_dim * m.num_heads != m.model_dim,
        "model.tie_embeddings": not m.tie_embeddings,
        "model.attention_pattern": any(m.layer_windows),
        "model.qk_norm": m.qk_norm,
        "model.head_bias": m.head_bias,
        "optimizer.epsilon": o.epsilon != 1e-8,
        "training.sequence_length": config.sequence_length != m.context_length,
    }
    wrong = [name for name, differs in differing.items() if differs]
    require(not wrong, f"nanoGPT has no model like this one: {', '.join(wrong)}; configs/gpt2_124m.py has one")
    shape = {
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_embd": m.model_dim,
        "block_size": m.context_length,
        "bias": m.bias,
        # As its train.py has them: GPT-2's vocabulary padded to 50304, that of a data set as it is.
        "vocab_size": m.padded_vocab_size if m.vocab_size == 50257 else m.vocab_size,
    }
    recipe = {
        "learning_rate": o.peak_learning_rate,
        "weight_decay": o.weight_decay,
        "betas": [o.beta1, o.beta2],
        "clip": o.clip_norm,
        "vocab_size": m.vocab_size,
    }
    steps = options.steps * config.training.steps_per_dispatch
    command = [options.against_python or sys.executable, str(HERE / "nanogpt_arm.py"), str(checkout)]
    command += ["--shape", json.dumps(shape), "--optimizer", json.dumps(recipe), "--batch-size", str(batch_size)]
    command += ["--steps", str(steps), "--mode", mode, "--dtype", dtype]
    return Arm(f"nanogpt {mode} {dtype}", dtype, command, {})


def compare(
    config: Config, options: Any, words: Sequence[str], batch_size: int, before: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of all arms at one batch size, ours first; written as JSON after every round, behind those `before`."""
    arms = make_arms(config, options, words, batch_size)

    def figures(arm: Arm) -> dict[str, Any]:
        model = dataclasses.replace(config.model, compute_dtype=arm.dtype)
        return {"block_step_ms": [round(1000 * seconds, 3) for seconds in arm.seconds]} | measure.speed(
            model, (batch_size, config.sequence_length), arm.seconds, arm.facts.get("device", ""), 1
        )

    return take_turns(arms, options, words, before, lambda arm: {"batch_size": batch_size} | figures(arm))


def take_turns(
    arms: Sequence[Arm],
    options: Any,
    words: Sequence[str],
    before: Sequence[dict[str, Any]],
    figures: Callable[[Arm], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of all arms after `options.rounds` turns of each, with their ratios to the first of their type."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: the machine is not idle (load {load:.1f})", file=sys.stderr)
    common = {
        "config": str(options.config) if not Path(options.config).is_absolute() else Path(options.config).name,
        "overrides": " ".join(words),
        "cores": sorted(os.sched_getaffinity(0)),
        "load_before": load,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "fresh": options.fresh,
    }

    def rows() -> list[dict[str, Any]]:
        return [common | _row(arm, arms, figures) for arm in arms]

    with ExitStack() as opened:
        for arm in arms:
            opened.callback(arm.stop)
            if not options.fresh:
                arm.start()
        for _ in range(options.rounds):
            for arm in arms:
                if options.fresh and not arm.error:
                    arm.start()
                for _ in range(getattr(options, "blocks", 1)):
                    arm.block()
                if options.fresh:
                    arm.finish()
            measure.write([*before, *rows()], options.json)
        for arm in arms:
            arm.finish()
    return rows()


def require_known(against: Sequence[str]) -> None:
    """
    Raises:
        UserError: what decoding is to be compared with is unknown, or no checkout.
    """
    for other in against:
        kind, _, path = other.partition("=")
        require(
            kind in ("nanogpt", "transformers", "gptfast"),
            f"--against {other} is neither nanogpt=CHECKOUT, transformers nor gptfast=CHECKOUT",
        )
        if kind != "transformers":
            require((Path(path) / "model.py").is_file(), f"{path or other} is no checkout of {kind}: no model.py")


def _row(arm: Arm, arms: Sequence[Arm], figures: Callable[[Arm], dict[str, Any]]) -> dict[str, Any]:
    reference = next(other for other in arms if other.dtype == arm.dtype)
    row = {"arm": arm.name, "dtype": arm.dtype, **arm.facts}
    row["flags"] = " ".join(f"{k}={v}" for k, v in arm.environment.items() if k != "PYTHONPATH")
    if arm.error or not arm.seconds:
        return row | {"tokens_per_second": None, "mfu": None, "error": arm.error}
    row |= figures(arm)
    if arm is not reference and reference.seconds:
        # Ours over the other: of tokens a second, so that more than 1 is good for ours.
        pairs = [theirs / ours for theirs, ours in zip(arm.seconds, reference.seconds, strict=False)]
        low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
        row |= {"ratio": statistics.median(pairs), "ratio_quartiles": [low, high]}
    return row


COLUMNS = {
    "arm": "s",
    "batch_size": "d",
    "tokens_per_second": ",.0f",
    "step_ms": ".2f",
    "step_ms_min": ".2f",
    "step_ms_max": ".2f",
    "mfu": ".3f",
    "ratio": ".3f",
    "steps": "d",
    "loss": ".4f",
    "compile_seconds": ".1f",
}


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each type one line: ours against the fastest arm that is nanoGPT. And what arms have failed of."""
    lines = [f"{row['arm']}: {row['error']}" for row in rows if row.get("error")]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        theirs = [row for row in rows if row["dtype"] == dtype and row["arm"].startswith("nanogpt") and "ratio" in row]
        if theirs:
            best = min(theirs, key=lambda row: row["ratio"])
            low, high = best["ratio_quartiles"]
            lines.append(
                f"ours {dtype} trains at {best['ratio']:.3f} × the tokens a second of nanoGPT's best "
                f"({best['arm']}), quartiles {low:.3f} – {high:.3f}"
            )
    return lines
