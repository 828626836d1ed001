"""Two real models do here what they do in transformers: texts, answers, log-probabilities, tuning, and back again."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

if not os.environ.get("GPTJAX_REAL_MODELS"):
    pytest.skip("GPTJAX_REAL_MODELS names no folder with the real models", allow_module_level=True)

import jax
import numpy as np
import torch
import transformers

import sample
from gptjax.__main__ import main as gptjax_main
from gptjax.interop import huggingface
from gptjax.interop.places import template_of
from gptjax.parallel.mesh import one_device_mesh
from gptjax.text.chat import Message, chat_format
from gptjax.training.load import Run, load_run

ROOT = Path(__file__).parents[2]
PROMPTS = {
    "smollm2": ["The capital of France is", "def fibonacci(n):\n", "Once upon a time"],
    "gemma3": ["The capital of France is", "</body>\n</html>\n", "Il était une fois"],
}
QUESTIONS = ["What is the capital of France?", "Name three colours."]
PAGE = "中文字符 é 🙂\n\n".join((ROOT / name).read_text(encoding="utf-8")[:1200] for name in ("README.md", "sample.py"))
NEW_TOKENS = 32


@pytest.fixture(scope="session")
def run(theirs, tmp_path_factory) -> Run:
    """The GGUF file, imported."""
    folder = tmp_path_factory.mktemp("runs") / theirs.name
    assert gptjax_main(["import", str(theirs.gguf), str(folder)]) == 0
    with jax.set_mesh(one_device_mesh()):
        return load_run(folder)


def generated(theirs, ids: list[int], most: int = NEW_TOKENS, model=None) -> list[int]:
    """What transformers continues these ids with, as its own files say when to stop; without the token that stops."""
    found = (
        (model or theirs.model)
        .generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=most, do_sample=False)[
            0, len(ids) :
        ]
        .tolist()
    )
    stops = theirs.model.generation_config.eos_token_id
    return found[:-1] if found[-1] in (stops if isinstance(stops, list) else [stops]) else found


def sampled(capsys, *arguments) -> list[dict]:
    """What `python sample.py ... --json -` prints."""
    capsys.readouterr()
    assert sample.main([*map(str, arguments), "--temperature", "0", "--json", "-"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("form", ["gguf", "directory"])
def test_texts_go_on_as_in_transformers(theirs, form, capsys):
    """From the file and from the directory, with what the tokenizer puts before a text."""
    prompts = PROMPTS[theirs.name]
    found = sampled(capsys, getattr(theirs, form), "--prompt", *prompts, "--max-tokens", NEW_TOKENS)
    for completion, prompt in zip(found, prompts, strict=True):
        expected = generated(theirs, theirs.tokenizer(prompt)["input_ids"])
        assert completion["token_ids"] == expected, theirs.tokenizer.decode(expected)
        assert completion["finish_reason"] == ("length" if len(expected) == NEW_TOKENS else "stop")
    assert "stop" in {completion["finish_reason"] for completion in found}


def test_weights_are_those_of_transformers(theirs, run):
    config = huggingface.read_config(theirs.directory)
    with jax.set_mesh(one_device_mesh()):
        jax.tree.map(np.testing.assert_array_equal, run.params, huggingface.read_params(theirs.directory, config))


def test_log_probabilities_of_a_page(theirs, run):
    """More than a window of Gemma's, prose and code: each token's within 1e-4 of transformers'."""
    ids = theirs.tokenizer(PAGE)["input_ids"]
    assert len(ids) > 512
    with torch.no_grad():
        expected = torch.log_softmax(theirs.model(torch.tensor([ids])).logits[0, :-1], -1).numpy()
    with jax.set_mesh(one_device_mesh()):
        logits, _ = jax.jit(run.model.apply)({"params": run.params}, np.array([ids], np.int32))
        found = np.asarray(jax.nn.log_softmax(logits[0, :-1, : run.config.model.vocab_size]))
    labels = np.array(ids[1:])[:, None]
    ours, others = (np.take_along_axis(x, labels, 1) for x in (found, expected))
    np.testing.assert_allclose(ours, others, atol=1e-4)


def test_evaluate_reads_a_page_as_the_model_expects_it(theirs, run, tmp_path, capsys):
    """At its defaults, of a model with a context of 8,192 or 32,768: BOS first, where the model has one."""
    (tmp_path / "page.txt").write_text(PAGE, encoding="utf-8")
    capsys.readouterr()
    assert gptjax_main(["evaluate", str(run.directory), "--data", str(tmp_path / "page.txt"), "--json", "-"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    ids = [run.tokenizer.document_start[-1], *run.tokenizer.encode(PAGE)]
    with torch.no_grad():
        logits = theirs.model(torch.tensor([ids])).logits[0, :-1]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))
    assert found["nats_per_token"] == pytest.approx(expected, abs=1e-4)
    assert run.tokenizer.document_start[-1] == (run.tokenizer.opening or (run.tokenizer.end_of_text_id,))[-1]


def test_answers_are_those_of_transformers_and_stop(theirs, capsys):
    if theirs.tokenizer.chat_template is None:
        pytest.skip("a base model, which has learned no conversations")
    found = sampled(capsys, theirs.gguf, "--message", *QUESTIONS, "--max-tokens", 48)
    stopped = 0
    for talk, question in zip(found, QUESTIONS, strict=True):
        asked = [{"role": "user", "content": question}]
        ids = theirs.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        answer = generated(theirs, ids, 48)
        stopped += len(answer) < 48
        assert talk["messages"][-1]["content"] == theirs.tokenizer.decode(answer, skip_special_tokens=True)
        assert "<|" not in talk["messages"][-1]["content"]
    assert stopped, "none of the answers ends"


def test_what_is_exported_is_the_same_model_in_transformers(theirs, run, tmp_path):
    """It continues texts and stops as before; its tokenizer and template give the same ids; and it comes back whole."""
    assert gptjax_main(["export", str(run.directory), str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in PROMPTS[theirs.name]:
        ids = tokenizer(prompt)["input_ids"]
        assert ids == [*run.tokenizer.opening, *run.tokenizer.encode(prompt)] == theirs.tokenizer(prompt)["input_ids"]
        assert generated(theirs, ids, model=model) == generated(theirs, ids)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(tokenizer, name) for name in names] == [getattr(theirs.tokenizer, name) for name in names]
    template = template_of(run.directory)
    if template is not None:
        form, asked = chat_format(run.tokenizer, *template), [{"role": "user", "content": QUESTIONS[0]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ids == form.prompt([Message("user", QUESTIONS[0])])
        stops = model.generation_config.eos_token_id
        assert set(form.stop_ids) == set(stops if isinstance(stops, list) else [stops])
    assert gptjax_main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    with jax.set_mesh(one_device_mesh()):
        again = load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    assert again.tokenizer.texts() == run.tokenizer.texts()
    assert template_of(again.directory) == template or template_of(again.directory)[0] == template[0]


READ = """
import sys
from pathlib import Path
import jax
from gptjax.interop.huggingface import read_config, read_params
def now(name):  # of this process alone: what getrusage says begins with what the parent had
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))
config = read_config(Path(sys.argv[1]))
jax.numpy.zeros(8).block_until_ready()
before = now("VmRSS")
params = jax.block_until_ready(read_params(Path(sys.argv[1]), config))
print(now("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
FILES = 2**28
"""What mapped files and the allocator may take beside."""


def test_reading_takes_at_most_twice_the_weights(theirs):
    found = subprocess.run(
        [sys.executable, "-c", READ, str(theirs.gguf)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    used, weights = map(int, found.stdout.split())
    assert used <= 2 * weights + FILES, f"{used / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights"


def test_adapters_learn_on_short_rows(theirs, tmp_path):
    """SmolLM2 on rows of 256 tokens: ten steps lower the held-out loss, in seconds each, and in little memory."""
    if theirs.name != "smollm2":
        pytest.skip("one model is enough")
    sums = [(a, b) for a in range(9) for b in range(9)]
    talks = [{"prompt": f"What is {a} plus {b}?", "completion": f"The sum is {a + b}, arr!"} for a, b in sums]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    words = f"--model.init-from {theirs.gguf} --data.path {tmp_path / 'talks.jsonl'} --run-dir {tmp_path / 'run'}"
    words += " --lora.rank 8 --training.sequence-length 256 --training.steps 10"
    words += " --training.batch-size 2"
    words += " --training.eval-every-steps 1 --training.eval-sequences 2 --training.log-every-steps 1"
    words += " --training.loss-chunk-tokens 256"
    words += " --training.sample-every-steps 0 --training.sample-tokens 8 --optimizer.warmup-steps 2"
    words += " --model.residual-dropout 0"
    command = [sys.executable, "train.py", "configs/sft.py", *words.split()]
    with subprocess.Popen(command, cwd=ROOT) as process:
        peaks = [0]
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peaks.append(1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM"))))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
    assert process.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1, losses
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    assert 2 * 256 / statistics.median(speeds) <= 15
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"] == 10 * 2 * 256
    assert max(peaks) <= 6e9, f"{max(peaks) / 1e9:.1f} GB"
