"""A whole run on what a user brings: a mixture, a tokenizer, documents that do not see each other, TensorBoard."""

import json
import re
from pathlib import Path

import train
from gptjax.config import TokenizerConfig
from gptjax.text.tokenizer_training import train_tokenizer
from gptjax.training.metrics import read_metrics


def losses(directory: Path) -> list[tuple]:
    records = read_metrics(directory / "metrics.jsonl")
    return [(record["step"], record.get("loss"), record.get("val_loss")) for record in records]


def test_a_mixture_with_a_tokenizer_file_goes_on_without_the_file(inside, capsys):
    """Two sources by weight, documents apart, metrics to TensorBoard: epochs per source are told, and a continued run
    needs neither the tokenizer's file nor its own command line, and has the losses of one that went through."""
    (inside / "words.jsonl").write_text(
        "".join(json.dumps({"text": f"the dog number {n} ran"}) + "\n" for n in range(120)), encoding="utf-8"
    )
    given = inside / "given.json"
    texts = [path.read_text(encoding="utf-8") for path in sorted((inside / "corpus").iterdir())]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=290))
    tokenizer.save(given)
    options = ["--data.path", "corpus", "words.jsonl", "--data.weights", "1", "3", "--tokenizer.path", "given.json"]
    options += ["--data.separate-documents", "--training.log-to", "tensorboard"]
    assert train.main(["tiny.py", *options, "--run-dir", "runs/whole", "--training.steps", "4"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"25 % from 1: .*corpus: [\d,]+ tokens, [\d.]+ epochs", output), output
    assert re.search(r"75 % from 2: .*words.jsonl: [\d,]+ tokens, [\d.]+ epochs", output), output
    options += ["--optimizer.decay-steps", "4"]
    assert train.main(["tiny.py", *options, "--run-dir", "runs/halves", "--training.steps", "2"]) == 0
    given.unlink()
    assert train.main(["runs/halves", "--training.steps", "4"]) == 0
    assert losses(inside / "runs" / "halves")[-2:] == losses(inside / "runs" / "whole")[-2:]
    assert any((inside / "runs" / "halves" / "tensorboard").iterdir())
    together = ["tiny.py", *[o for o in options if o != "--data.separate-documents"], "--run-dir", "runs/together"]
    tokenizer.save(given)
    assert train.main([*together, "--training.steps", "1"]) == 0
    assert losses(inside / "runs" / "together")[0] != losses(inside / "runs" / "whole")[0]
