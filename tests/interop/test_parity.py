"""What transformers computes, is computed here: families with odd shapes, and models that were trained here."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gptjax.config import MeshConfig, ModelConfig, TokenizerConfig  # noqa: E402  after what may be missing
from gptjax.config_files import load_config  # noqa: E402
from gptjax.interop import huggingface  # noqa: E402
from gptjax.interop.transfer import export_run, import_model  # noqa: E402
from gptjax.parallel.mesh import make_mesh, one_device_mesh  # noqa: E402
from gptjax.sampling.config import SamplingConfig  # noqa: E402
from gptjax.sampling.rows import generate_tokens  # noqa: E402
from gptjax.stages.train import train  # noqa: E402
from gptjax.training.load import load_run  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import parity  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# Whose switches others have, too; `benchmarks/parity.py` has them all.
LEFT_OUT = (
    *("gpt2, untied head", "llama, biases of attention", "llama, biases", "llama, longrope", "mistral, linear"),
    *("qwen3, some local", "gpt_neox, serial", "gpt_neox, no biases"),
)


@pytest.mark.parametrize("name", [name for name in parity.MADE if name not in LEFT_OUT])
def test_a_family(name, tmp_path):
    """Logits, gradients, greedy text of padded rows, and weights bit for bit after import and export."""
    (tmp_path / "ours").mkdir()
    row = parity.compare(name, tmp_path)
    assert row["float32"] < 1e-5
    assert row["bfloat16"] < max(3e-2, 2 * row["theirs"])
    assert row["gradient"] < 1e-4
    assert row["greedy"] == parity.NEW_TOKENS
    assert row["keys"] == 0
    assert row["bits"]


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("gpt_neox", {"fsdp": 2, "tensor": 2}),
        ("qwen3", {"fsdp": 2, "tensor": 2}),
        ("gpt2, 25 heads", {"fsdp": 2}),  # heads that no tensor axis divides
    ],
)
def test_weights_go_into_their_shards(name, axes, tmp_path):
    """Each device reads its own pieces, of fused, interleaved and transposed tensors."""
    parity.made(name).save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    whole = huggingface.read_params(tmp_path, config)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **axes), jax.devices()[: math.prod(axes.values())])):
        split = huggingface.read_params(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(split), jax.device_get(whole))
    assert not split["blocks"]["attention"]["q"]["w"].is_fully_replicated


def test_a_trained_run_goes_on_as_transformers_does(inside, tmp_path):
    """The exported quickstart continues a text as it does here; its tokenizer has the same ids there, special ones
    included."""
    words = "--data.path corpus --tokenizer.vocab-size 300".split()
    words += "--training.steps 20 --training.eval-every-steps 0 --training.sample-every-steps 0".split()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    command = [sys.executable, str(ROOT / "train.py"), *words, "--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    with jax.set_mesh(one_device_mesh()):
        run = load_run(tmp_path / "run")
        assert export_run(run, tmp_path / "hf") == "apertus"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the cat sat on 12 mats 中文 é\n"
    assert tokenizer(text)["input_ids"] == run.tokenizer.encode(text)
    for name, number in run.tokenizer.special_token_ids.items():
        assert tokenizer.convert_tokens_to_ids(name) == number
    prompt = run.tokenizer.encode("the cat ")
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    with jax.set_mesh(one_device_mesh()):
        chunks = generate_tokens(
            run.config.model, run.params, [prompt], SamplingConfig(max_tokens=40, temperature=0), ()
        )
        found = [token for (chunk,) in chunks for token in chunk.token_ids]
    assert found == expected


def test_a_directory_is_a_run(inside, tmp_path):
    """Read directly, or imported first, it is the same model; and it can be tuned."""
    directory = made_with_tokenizer(tmp_path / "hf", rows=5)
    said = []
    with jax.set_mesh(one_device_mesh()):
        direct = load_run(directory, log=said.append)
        import_model(directory, tmp_path / "run", said.append)
        imported = load_run(tmp_path / "run")
    assert "5 rows of the model stand for no token" in said[0]
    assert imported.config.model == direct.config.model
    jax.tree.map(np.testing.assert_array_equal, imported.params, direct.params)
    config = load_config("tiny.py")
    training = dataclasses.replace(config.training, steps=2, batch_size=8, micro_batch_size=8, eval_every_steps=0)
    model = ModelConfig(init_from=str(directory))
    config = dataclasses.replace(
        config, model=model, training=training, tokenizer=TokenizerConfig(), run_dir=str(tmp_path / "tuned")
    )
    assert train(config)["stopped"] == "finished"
    with jax.set_mesh(one_device_mesh()):
        tuned = load_run(tmp_path / "tuned")
    assert dataclasses.replace(tuned.config.model, init_from="") == direct.config.model
    assert tuned.config.model.vocab_size == tuned.tokenizer.vocab_size


def made_with_tokenizer(directory: Path, rows: int) -> Path:
    from gptjax.text.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat " * 60], TokenizerConfig(vocab_size=300))
    config = transformers.Qwen3Config(
        **parity.SHAPE | {"vocab_size": tokenizer.vocab_size + rows, "max_position_embeddings": 64}
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save(directory / "tokenizer.json")
    return directory
