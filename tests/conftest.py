"""Eight fake CPU devices, strict broadcasting, one compilation cache, and the small models of the tests."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Compiling is most of the tests' time: LLVM's costly passes make programs faster, and no more correct.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS]).strip()

import jax
import pytest

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
