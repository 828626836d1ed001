"""Eight fake CPU devices, strict broadcasting, one compilation cache, and the small models of the tests."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# GPTJAX_TEST_PLATFORM=cuda pytest tests/model/test_kernels.py: the kernels that only an accelerator has.
os.environ["JAX_PLATFORMS"] = os.environ.get("GPTJAX_TEST_PLATFORM", "cpu")
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Compiling is most of the tests' time: LLVM's costly passes make programs faster, and no more correct.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Two thirds of compiling is lowering each fusion by MLIR. Later jaxlibs know no other way, and no such flag.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS]).strip()

import jax
import pytest
from filelock import FileLock

from gptjax import cli
from gptjax.config import MeshConfig, ModelConfig
from gptjax.parallel.mesh import make_mesh

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's cache folder, for pytest-xdist's workers, subprocesses and the next run."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        folder = str(config.cache.mkdir("jax"))
    else:
        folder = tempfile.mkdtemp(prefix="gptjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # JAX does not write entries atomically: what another worker is still writing is compiled again.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


MOST_MAPPINGS = 25_000
"""Linux gives a process 65,530; the compiled programs of all tests have more, and LLVM dies where it is refused one."""


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs after a module when their memory is in too many pieces."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def tiny() -> ModelConfig:
    """A model that compiles in a moment; its vocabulary is no multiple of 128."""
    return ModelConfig(
        num_layers=2, model_dim=32, num_heads=4, context_length=16, vocab_size=61, compute_dtype="float32"
    )


@pytest.fixture
def switched_on() -> ModelConfig:
    """A small model with nearly every switch away from its default, and eight key/value heads to split."""
    return ModelConfig(
        num_layers=3,
        model_dim=32,
        num_heads=16,
        num_kv_heads=8,
        head_dim=4,
        ffn_dim=64,
        context_length=16,
        vocab_size=61,
        norm="rmsnorm",
        positions="rope",
        rope_fraction=0.5,
        feed_forward="swiglu",
        attention_pattern=("dense", "local"),
        attention_window=5,
        qk_norm=True,
        attention_softcap=20.0,
        logit_softcap=30.0,
        tie_embeddings=False,
        head_bias=True,
        scale_embedding=True,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
        scan_layers=True,
        remat="full",
        compute_dtype="float32",
    )


@pytest.fixture
def mesh():
    """The current mesh: data 2 × fsdp 2 × tensor 2."""
    current = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(current):
        yield current


@pytest.fixture
def equations() -> Callable[[Any], Iterator[Any]]:
    """All equations of a jaxpr, and of those inside it."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return walk


TINY = """
from gptjax.config import *
config = Config(
    model=ModelConfig(num_layers=2, model_dim=32, num_heads=4, context_length=16, residual_dropout=0.1),
    tokenizer=TokenizerConfig(vocab_size=300),
    data=DataConfig(path="corpus"),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=3),
    training=TrainingConfig(
        steps=12, batch_size=16, micro_batch_size=8, log_every_steps=1, eval_every_steps=4, sample_every_steps=0,
        sample_tokens=8, sample_prompt="the ",
    ),
    checkpoint=CheckpointConfig(every_steps=4),
)
"""


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Fills a folder once for all of pytest-xdist's workers: the first to come does, others wait for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def fill_once(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                folder.mkdir()
                try:
                    fill(folder)
                except BaseException:
                    shutil.rmtree(folder)
                    raise
        return folder

    return fill_once


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with a corpus of 150 documents and a configuration for it."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "corpus").mkdir()
    draw = random.Random(0)
    words = "the cat dog sat ran on under a mat tree and then it was 12 345 , . \n".split(" ")
    for number in range(150):
        text = " ".join(draw.choices(words, k=draw.randint(20, 60)))
        (folder / "corpus" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    (folder / "tiny.py").write_text(TINY, encoding="utf-8")
    return folder


@pytest.fixture
def refusal(capsys, monkeypatch) -> Callable[..., str]:
    """Runs a command that the user has to mend: the one line on stderr; no traceback, exit status 2."""

    def run(main: Callable[[Sequence[str]], int], *arguments: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.run_command(main)
        error = capsys.readouterr().err
        assert exit_.value.code == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def inside(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace
