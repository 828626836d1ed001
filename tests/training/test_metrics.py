import io
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.training.metrics import Console, MetricsLog, plot_loss, read_metrics

TRAINING = {
    "step": 120,
    "tokens": 983_040,
    "loss": 3.2141,
    "learning_rate": 6e-4,
    "grad_norm": 0.821,
    "tokens_per_second": 21_345.2,
    "mfu": None,
    "data_wait_fraction": 0.0012,
    "seconds": 60.0,
}
EVALUATION = {"step": 250, "tokens": 1, "val_loss": 2.8713, "val_bits_per_byte": 1.431, "val_perplexity": 17.66}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_written_is_read_and_stays_json_whatever_the_loss(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": jnp.float32(0.5), "tokens": np.int64(2**40), "text": "é"})
    log.write({"step": 2, "loss": jnp.float32(math.nan), "val_loss": -math.inf, "mfu": None})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "tokens": 2**40, "text": "é"},
        {"step": 2, "loss": None, "val_loss": None, "mfu": None},
    ]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("rest", ['{"step": 2, "lo', '{"step": 2}', "\xff"])
def test_a_last_line_without_its_end_is_left_out(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + rest.encode("latin-1"))
    assert read_metrics(path) == [{"step": 1}]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .* is not JSON"):
        read_metrics(path)
    with pytest.raises(UserError, match="there are no metrics at"):
        read_metrics(tmp_path / "none.jsonl")


def test_plain_lines_where_there_is_no_terminal():
    file = io.StringIO()
    with Console(file) as console:
        console.log(TRAINING | {"step": 20, "seconds": 10.0, "tokens_per_second": None}, 1000)
        console.log(TRAINING | {"mfu": 0.4123}, 1000)
        console.log_evaluation(EVALUATION)
        console.message("[bold]as it is[/bold]")
    first, second, third, fourth = file.getvalue().splitlines()
    assert first == (
        "step   20/1000  loss 3.214  unknown tok/s  MFU unknown  ETA unknown  lr 6.0e-04  grad 0.82  data wait 0.1 %"
    )
    # 100 steps took 50 seconds, and 880 are left.
    assert second == (
        "step  120/1000  loss 3.214  21,345 tok/s  MFU 41.2 %  ETA 7:20  lr 6.0e-04  grad 0.82  data wait 0.1 %"
    )
    assert third == "step 250  validation 2.871 nats/token  1.43 bits/byte  perplexity 17.7"
    assert fourth == "[bold]as it is[/bold]"
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize(("seconds", "shown"), [(4.6, "0:05"), (83, "1:23"), (725, "12:05"), (7205, "2:00:05")])
def test_the_time_left_is_written_as_a_clock(seconds, shown):
    file = io.StringIO()
    console = Console(file)
    for step, now in ((0, 0.0), (1, seconds)):
        console.log(TRAINING | {"step": step, "seconds": now}, 2)
    assert f"  ETA {shown}  " in file.getvalue()


@pytest.mark.parametrize("columns", ["80", "160"])
def test_a_bar_at_a_terminal_gives_the_cursor_back(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    file = Terminal()
    with Console(file) as console:
        console.message("[red]literal[/red]")
        console.log(TRAINING, 1000)
        console.log_evaluation(EVALUATION)
    shown = file.getvalue()
    assert "[red]literal[/red]\n" in shown
    assert "validation 2.871 nats/token" in shown
    assert "step  120/1000  loss 3.214  21,345 tok/s  MFU unknown  ETA unknown" in shown
    assert "━" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # cursor shown after it was hidden


def test_the_loss_curve_holds_every_point_and_its_units(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, loss in ((10, 4.0), (20, math.nan), (30, 3.0)):
        log.write({"step": step, "loss": loss})
    log.write({"step": 30, "val_loss": 3.5})
    figure = plot_loss(tmp_path, tmp_path / "loss.png")
    (axes,) = figure.axes
    training, validation = axes.lines
    np.testing.assert_array_equal(training.get_xydata(), [[10, 4], [20, np.nan], [30, 3]])
    np.testing.assert_array_equal(validation.get_xydata(), [[30, 3.5]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(plot_loss(read_metrics(tmp_path / "metrics.jsonl")).axes[0].lines) == 2


def test_plotting_touches_no_global_state_and_needs_no_display():
    code = "import sys; from gptjax.training.metrics import plot_loss; plot_loss([{'step': 1, 'loss': 2.0}]); "
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"DISPLAY": ""})


def test_what_stops_a_plot_is_said(monkeypatch):
    with pytest.raises(UserError, match="nothing was logged yet"):
        plot_loss([])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "gptjax\[log\]"'):
        plot_loss([{"step": 1, "loss": 2.0}])
