"""The coordinate check tells a parametrization that carries over from one that does not."""

import dataclasses
import json

import numpy as np
import pytest

from gptjax.__main__ import main
from gptjax.config import ModelConfig, OptimizerConfig
from gptjax.errors import UserError
from gptjax.scaling.coordinates import Coordinate, coordinates, resized, slopes

CONFIG = ModelConfig(
    num_layers=1, num_heads=2, model_dim=32, context_length=16, vocab_size=64, norm="rmsnorm", bias=False,
    positions="rope", base_model_dim=64, base_head_dim=16,
)  # fmt: skip
ROWS = np.random.default_rng(0).integers(0, 64, (1, 17)).astype(np.int32)


def test_mup_is_flat_over_widths_and_standard_is_not():
    found = {}
    for name in ("standard", "mup"):
        config, rate = dataclasses.replace(CONFIG, parametrization=name), OptimizerConfig(peak_learning_rate=0.01)
        records = list(coordinates(config, rate, ROWS, "width", (32, 128), steps=4, seeds=(0,)))
        assert {record.step for record in records} == set(range(5))
        assert all(record.change == 0 for record in records if record.step == 0)
        found[name] = slopes(records, 4)
    assert abs(found["mup"]["last block"]) < 0.3
    assert found["standard"]["last block"] > 0.8
    assert set(found["mup"]) == {"embedding", "first block", "middle block", "last block", "logits"}


def test_slopes_are_those_of_logarithms():
    records = [
        Coordinate("mup", "width", size, seed, 3, "logits", 1.0, 2.0 * size**-0.5)
        for size in (8, 16, 64)
        for seed in (0, 1)
    ]
    assert slopes(records, 3) == {"logits": pytest.approx(-0.5)}


def test_widths_keep_the_heads_size():
    wide = resized(dataclasses.replace(CONFIG, num_kv_heads=1, ffn_dim=48), "width", 128)
    assert (wide.num_heads, wide.num_kv_heads, wide.resolved_head_dim, wide.ffn_dim) == (8, 4, 16, 192)
    assert resized(CONFIG, "depth", 7).num_layers == 7
    with pytest.raises(UserError, match=r"width 100 is no multiple of 16.*the nearest that is one is 96"):
        resized(CONFIG, "width", 100)


def test_the_command_draws_and_tells(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200, encoding="utf-8")
    (tmp_path / "c.py").write_text(
        "from gptjax.config import *\nconfig = Config(model=ModelConfig(num_layers=1, num_heads=2, model_dim=32), "
        "tokenizer=TokenizerConfig(kind='byte'), data=DataConfig(path='text.txt'))\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    options = "--axis depth --sizes 1 2 --steps 1 --seeds 1 --parametrizations completep --out a.png --json a.json"
    assert main(["coordinates", "c.py", *options.split()]) == 0
    assert "completep" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 1000
    card = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert set(card["slopes"]["completep"]) == {"embedding", "middle block", "last block", "logits"}
    with pytest.raises(UserError, match="a slope needs two different ones"):
        main(["coordinates", "c.py", "--sizes", "64"])
