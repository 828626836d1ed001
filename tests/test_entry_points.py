"""The command lines: what they parse, what they import, and how they refuse."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.config import Config
from gptjax.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("recipe_"))
QUICKSTART = ROOT / "configs" / "quickstart.py"


def run_python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_help_lists_every_field_without_jax(config):
    """With JAX unimportable `--help` still works, so it cannot wait for JAX; every field is there with its doc."""
    code = BLOCK.format(names={"jax", "numpy", "flax"}) + "import train; train.main(sys.argv[1:])"
    result = run_python(code, str(config), "--help")
    assert result.returncode == 0, result.stderr
    for section in dataclasses.fields(Config):
        fields = dataclasses.fields(section.type) if dataclasses.is_dataclass(section.type) else []
        for name in [f"{section.name}.{field.name}" for field in fields] or [section.name]:
            assert f"--{name.replace('_', '-')} " in result.stdout.replace(",", " ").replace("\n", " ")
    assert "Transformer blocks." in result.stdout


@pytest.mark.parametrize("module", ["sample", "gptjax.__main__"])
def test_other_help_works_without_jax(module):
    code = BLOCK.format(names={"jax", "numpy"}) + f"import importlib; m = importlib.import_module({module!r})\n"
    assert run_python(code + "m.main(['--help'])").returncode == 0


def test_core_imports_without_the_packages_that_gpu_images_lack():
    """Model, step, optimizer and decoding need neither loader, command line, tokenizer library nor rich.

    Flax itself imports rich, so it is loaded first, and rich taken away from what follows.
    """
    code = "import sys, flax.linen\nfor n in [n for n in sys.modules if n.startswith('rich')]: del sys.modules[n]\n"
    code += BLOCK.format(names={"grain", "tyro", "tokenizers", "rich", "filelock"}) + (
        "import gptjax.config, gptjax.model.gpt, gptjax.model.accounting, gptjax.training.step, gptjax.training.loop\n"
        "import gptjax.training.optimizer, gptjax.training.state, gptjax.training.losses, gptjax.sampling.decode\n"
        "import gptjax.sampling.generate, gptjax.parallel.mesh, gptjax.evaluation.perplexity\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_package_is_lazy_and_complete():
    """`import gptjax` loads nothing heavy, and each name of its face can be had."""
    code = (
        "import sys, gptjax\n"
        "assert not {'jax', 'numpy', 'flax', 'tyro'} & set(sys.modules), sys.modules\n"
        "for name in gptjax.__all__: getattr(gptjax, name)\n"
        "try: gptjax.nothing\n"
        "except AttributeError: print('ok')\n"
    )
    result = run_python(code)
    assert result.stdout.strip() == "ok", result.stderr


def test_overrides_change_the_named_field_only():
    config, name, *_ = cli.parse_train(["--model.num-layers", "2", "--data.path", "a.txt", "b"], QUICKSTART)
    default, *_ = cli.parse_train([], QUICKSTART)
    assert name == "quickstart"
    assert (config.model.num_layers, config.data.path) == (2, ("a.txt", "b"))
    assert config.optimizer == default.optimizer
    assert config.training == default.training


def test_unknown_override_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as error:
        cli.parse_train(["--model.num-layer", "2"], QUICKSTART)
    assert error.value.code == 2
    assert "--model.num-layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.num-heads", "7"], ["128", "7", "nearest"]),
        (["configs/quickstat.py"], ["quickstart.py"]),
        (["--training.batch-size", "0"], ["training.batch_size is 0"]),
        (["--training.micro-batch-size", "5"], ["not a multiple", "nearest"]),
        (["tests"], ["no run"]),
        (["tests/test_entry_points.py"], ["does not assign"]),
    ],
)
def test_bad_configuration_is_one_line(arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        cli.parse_train(arguments, QUICKSTART)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in expected), str(error.value)


def test_errors_become_one_line_and_exit_status_2(capsys, monkeypatch):
    def main(arguments):
        raise UserError("what, the values, what works")

    with pytest.raises(SystemExit) as exit_:
        cli.run_command(main)
    assert exit_.value.code == cli.EXIT_USER_ERROR == 2
    assert capsys.readouterr().err == "error: what, the values, what works\n"


def test_sample_needs_a_run():
    with pytest.raises(UserError, match="no run given"):
        cli.parse_sample(["--prompt", "x"])


def test_prepare_command_writes_what_train_opens(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 50, encoding="utf-8")
    command = [sys.executable, "-m", "gptjax", "prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ["--tokenizer.kind", "char", "--json", "-"]
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert '"split_rule": "position"' in result.stdout
    assert (tmp_path / "out" / "index.json").is_file()
    missing = subprocess.run(
        [*command[:4], str(tmp_path / "texd.txt")], capture_output=True, text=True, env=environment, check=False
    )
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "text.txt" in missing.stderr


def test_the_largest_weights_are_shares_as_any(tmp_path):
    """Their sum is no number that a computer has, so that each would be told as 0 %."""
    from gptjax.stages.messages import _epochs

    lines = [*_epochs({"a": range(10), "b": range(30)}, (1e308, 1e308), sequences=60, sequence_tokens=4)]
    assert lines == ["  50 % from a: 40 tokens, 3 epochs", "  50 % from b: 120 tokens, 1 epochs"]
    assert [line[:7] for line in _epochs({"a": range(10), "b": range(30)}, (1.0, 3.0), 60, 4)] == ["  25 % ", "  75 % "]
