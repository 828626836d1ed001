"""PPO and GRPO: what they learn, that a stopped run goes on to the same bits, and that nothing compiles twice."""

import io
import json
import logging
from unittest import mock

import jax
import numpy as np
import pytest

from gptjax.data.forms import Task
from gptjax.errors import UserError
from gptjax.evaluation.rewards import find_reward
from gptjax.evaluation.rewards import judge as judge_answers
from gptjax.stages import rl
from gptjax.stages.train import train
from gptjax.text.chat import Message
from gptjax.training import losses
from gptjax.training.checkpoint import restore_params
from gptjax.training.load import load_run
from gptjax.training.metrics import Console, read_metrics

RL = {"reward": "exact", "answers": 32, "answer_tokens": 6}


def of_steps(run, timed=("seconds", "tokens_per_second", "data_wait_fraction")):
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in timed and not k.endswith("_seconds")} for r in records]


@pytest.fixture(scope="session")
def config(stage_config, talker):
    """Makes a short run of reinforcement."""

    def make(stage, run, **sections):
        merged = {"rl": RL | sections.pop("rl", {}), "training": {"steps": 8} | sections.pop("training", {})}
        return stage_config(stage, run, model={"init_from": str(talker)}, **merged | sections)

    return make


FULL_PPO = {"kl_target": 0.5, "kl_horizon_answers": 100.0, "ema_decay": 0.5, "whiten_rewards": True}
FULL_PPO |= {"pretraining_rows": 2}


@pytest.fixture(scope="session")
def ppo(config, lessons, judge):
    """Makes a short run of PPO with everything on."""

    def make(run, **training):
        text = (str(lessons / "text.txt"),)
        return config(
            "ppo",
            run,
            rl={"reward": str(judge), "inner_epochs": 2},
            ppo=FULL_PPO | {"pretraining_path": text},
            training={"steps": 12} | training,
        )

    return make


@pytest.fixture(scope="session")
def through(once, ppo):
    """The folder of a run that was not stopped, two iterations of four steps long."""
    return once("through", lambda folder: train(ppo(folder, steps=8)))


def test_a_stopped_ppo_run_goes_on_to_the_same_bits(ppo, through, tmp_path):
    """With everything that it carries along: an average of the policy, a steered penalty, a critic, text in a mix."""
    for steps in (4, 8):
        train(ppo(tmp_path / "stopped", steps=steps))
    runs = through, tmp_path / "stopped"
    one, other = ([record for record in of_steps(run) if "reward" in record] for run in runs)
    assert [record["step"] for record in one] == [4, 8]
    assert one == other
    one, other = map(load_run, runs)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_what_a_ppo_run_reports_and_keeps(through, talker):
    first, second = [r for r in read_metrics(through / "metrics.jsonl") if "reward" in r]
    names = {"reward", "kl", "entropy", "answer_tokens", "clip_fraction", "explained_variance", "pretraining_loss"}
    assert names <= set(first)
    assert abs(first["kl"]) < 1e-4, "the policy begins as its reference"
    assert first["kl_coefficient"] == pytest.approx(0.02)
    after = pytest.approx(0.02 * (1 - 0.2 * 32 / 100))
    assert second["kl_coefficient"] == after, "near the reference: 32 of 100 answers, learned from twice"
    run, start = load_run(through), load_run(talker)
    assert jax.tree.structure(run.params) == jax.tree.structure(start.params), "what is used is a language model"
    assert "assistant:" in (through / "samples.md").read_text()


def test_the_average_of_the_policy_is_used(config, talker, tmp_path):
    """After two steps it is d² θ0 + d(1-d) θ1 + (1-d) θ2: with d = 0.999 hardly another than at the start."""
    train(config("ppo", tmp_path / "run", ppo={"ema_decay": 0.999}, training={"steps": 2}))
    start, used = load_run(talker), load_run(tmp_path / "run")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start.params)
    policy = restore_params(tmp_path / "run" / "checkpoints", 2, shapes, ("params", "policy"))

    def apart(params):
        return max(
            float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (params, start.params)), strict=True)
        )

    assert apart(policy) > 1e-3
    assert 0 < apart(used.params) < 0.01 * apart(policy)


def test_what_is_evaluated_is_evenly_spaced_and_said(config, tmp_path, monkeypatch):
    """Every evaluation reads the same prompts, from the first of the held-out ones to the last, not the first few."""
    asked, drawn_to = [], rl.draw

    def draw(config, data, reward, params, prompts, *rest):
        if rest[1] == 0.0:  # the temperature of an evaluation
            asked.append(([prompt.task.origin for prompt in prompts], data.content.validation))
        return drawn_to(config, data, reward, params, prompts, *rest)

    monkeypatch.setattr(rl, "draw", draw)
    limited = {"steps": 4, "eval_every_steps": 2, "eval_sequences": 3}
    train(config("grpo", tmp_path / "run", training=limited), console=Console(shown := io.StringIO()))
    (one, held_out), (other, _) = asked
    places = [[prompt.task.origin for prompt in held_out].index(origin) for origin in one]
    assert places == [0, len(held_out) // 3, 2 * len(held_out) // 3]
    assert other == one
    said = f"evaluation: 3 of {len(held_out)} held-out prompts, evenly spaced (training.eval_sequences)"
    assert said in shown.getvalue()


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_logits_are_made_in_chunks_where_asked(config, tmp_path, monkeypatch, stage):
    """By the step and by the reference: what is reported stays what it is."""
    calls, chunked = [], losses.chunked_cross_entropy
    monkeypatch.setattr(losses, "chunked_cross_entropy", lambda *a: calls.append(a[1]) or chunked(*a))
    for name, chunk in (("whole", 0), ("chunks", 64)):
        training = {"steps": 2, "eval_every_steps": 0, "loss_chunk_tokens": chunk}
        train(config(stage, tmp_path / name, training=training, grpo={"kl_coefficient": 0.04}))
        assert set(calls) == ({chunk} - {0})
    one, other = (next(r for r in of_steps(tmp_path / name) if "reward" in r) for name in ("whole", "chunks"))
    for name in ("loss", "entropy", "grad_norm", "kl" if stage == "ppo" else "kl_reference"):
        assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)


def test_pretraining_text_is_learned_as_in_pretraining(config, lessons, tmp_path):
    """Its documents do not see each other where that is asked for, which changes the loss of the same rows."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(120):
        (folder / f"{number}.txt").write_text(f"user {number % 10}{number % 7}{number % 3}\n")
    found = []
    for separate in (False, True):
        sections = {"ppo": {"pretraining_path": (str(folder),)}, "data": {"separate_documents": separate}}
        train(config("ppo", tmp_path / str(separate), training={"steps": 1, "batch_size": 32}, **sections))
        found.append(next(r for r in of_steps(tmp_path / str(separate)) if "reward" in r))
    assert found[0]["policy_loss"] == pytest.approx(found[1]["policy_loss"], abs=1e-4)
    assert abs(found[0]["pretraining_loss"] - found[1]["pretraining_loss"]) > 1e-3


def test_grpo_goes_on_to_the_same_bits(config, tmp_path):
    """With every correction on."""
    options = {"aggregate": "constant", "kl_coefficient": 0.04, "clip_high": 0.28}
    options |= {"dynamic_sampling": True, "divide_by_deviation": False}

    def of(name, steps):
        return config("grpo", tmp_path / name, grpo=options, training={"steps": steps})

    train(of("through", 4))
    train(of("stopped", 2))
    train(of("stopped", 4))
    one, other = ([r for r in of_steps(tmp_path / name) if "reward" in r] for name in ("through", "stopped"))
    assert one == other
    assert "kl_reference" in one[0]


def test_rewards_are_learned_and_shuffled_ones_are_not(config, tmp_path):
    """A reward for long answers is found in a few iterations; with the rewards of other answers it is not."""
    (tmp_path / "mine.py").write_text("def long(task, answer):\n    return len(answer) / 6\n")
    gains = []
    for shuffled in (False, True):
        made = config(
            "grpo",
            tmp_path / f"{shuffled}",
            rl={"reward": f"{tmp_path / 'mine.py'}:long", "answers": 64, "shuffle_rewards": shuffled},
            optimizer={"peak_learning_rate": 5e-3},
            training={"steps": 25, "eval_every_steps": 0, "batch_size": 64},
            checkpoint={"every_steps": 0},
        )
        train(made)
        rewards = [r["reward"] for r in read_metrics(tmp_path / f"{shuffled}" / "metrics.jsonl") if "reward" in r]
        gains.append(np.mean(rewards[-3:]) - rewards[0])
    assert gains[0] > 0.2
    assert gains[1] < 0.15


def test_nothing_compiles_after_the_first_iteration(ppo, tmp_path, caplog):
    logger = logging.getLogger("jax")
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        seen = []

        class Handler(logging.Handler):
            def emit(self, record):
                if record.getMessage().startswith("Compiling "):
                    seen.append(record.getMessage().split(" with ")[0])

        handler = Handler()
        logger.addHandler(handler)
        try:
            from gptjax.stages.rl import AnswerStream

            take, marks = AnswerStream.take, []

            def marked(self, num_rows, state):
                marks.append(len(seen))
                return take(self, num_rows, state)

            with mock.patch.object(AnswerStream, "take", marked):
                train(ppo(tmp_path / "run", steps=16, eval_every_steps=0))
        finally:
            logger.removeHandler(handler)
    assert len(marks) == 4
    assert marks[1] > marks[0]
    assert seen[marks[1] : marks[3]] == []


def test_a_mesh_learns_as_one_device_does(config, tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.stages.rl.sampler", lambda *_: lambda state, progress: None)  # costs as much again
    found, every = [], jax.devices()
    for axes in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}):
        devices = int(np.prod([*axes.values()]))
        run = tmp_path / str(len(found))

        with (
            mock.patch("jax.devices", lambda *_, found=every[:devices]: found),
            mock.patch("jax.device_count", lambda n=devices: n),
        ):
            train(config("grpo", run, mesh=axes, training={"steps": 4}))
        found.append(
            [(r["reward"], r["loss"], r["entropy"]) for r in read_metrics(run / "metrics.jsonl") if "reward" in r]
        )
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3, atol=2e-4)


TASK = Task((Message("user", "2+2?"),), "so 2+2 = 1,004\n#### 1,004", "gsm.jsonl:3")


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("number", "It is 1004.0", 1.0),
        ("number", "1004 or 5", 0.0),
        ("number", "#### 1004", 1.0),
        ("number", "none", 0.0),
        ("exact", " so 2+2 = 1,004\n#### 1,004 ", 1.0),
        ("exact", "4", 0.0),
        ("json", '{"a": [1]}', 1.0),
        ("json", "4", 0.0),
        ("json", '{"a": ', 0.0),
        (r"regex:\d+ apples", "12 apples", 1.0),
        (r"regex:\d+ apples", "12 apples!", 0.0),
        ("length:4", "a b c d", 1.0),
        ("length:4", "a b", 0.5),
        ("length:4", "", 0.0),
    ],
)
def test_verifiable_rewards(name, answer, expected):
    assert judge_answers(find_reward(name), [TASK], [answer]) == [expected]


def test_what_a_reward_does_wrong_names_the_prompt(tmp_path):
    code = "def bad(task, answer): return 1 / 0\ndef nan(task, answer): return float('nan')\nx = 3\n"
    (tmp_path / "r.py").write_text(code)
    for function, expected in (("bad", "raised ZeroDivisionError"), ("nan", "is nan, which is no number")):
        with pytest.raises(UserError, match=rf"'2\+2\?' \(gsm.jsonl:3\) {expected}"):
            judge_answers(find_reward(f"{tmp_path}/r.py:{function}"), [TASK], ["4"])
    for name, expected in (
        ("", "names no reward; there are number, exact, json"),
        ("nummber", "names no reward"),
        ("regex:(", "no regular expression"),
        ("length:x", "needs a number of words"),
        (f"{tmp_path}/none.py:f", "there is no such file"),
        (f"{tmp_path}/r.py:x", "has no function 'x'"),
    ):
        with pytest.raises(UserError, match=expected):
            find_reward(name)


@pytest.mark.parametrize(
    ("stage", "sections", "expected"),
    [
        ("ppo", {"model": {"init_from": ""}, "tokenizer": {"path": "T"}}, "give --model.init-from RUN"),
        ("ppo", {"rl": {"reward": "TALKER"}}, "has no reward.json: it is no finished reward model"),
        ("grpo", {"rl": {"reward": "nummber"}}, "rl.reward nummber names no reward"),
        ("grpo", {"rl": {"answer_tokens": 47}}, "the prompt has .* leaves 1 beside"),
        ("grpo", {"rl": {"answer_tokens": 50}}, "leaves no room for a prompt"),
        ("sft", {"model": {"init_from": ""}}, "stage sft starts from a run: give --model.init-from"),
        ("sft", {"model": {"num_layers": 5}}, "model.num_layers is 5, but the model of .* has 2"),
        ("sft", {"model": {"init_from": "TALKER/none"}}, "is not a run"),
        ("dpo", {}, "no ranked answers among the fields prompt, completion"),
        ("sft", {"data": {"path": ()}}, "there are no examples to learn from"),
    ],
)
def test_what_does_not_fit_is_refused(stage_config, lessons, talker, tmp_path, stage, sections, expected):
    def filled(value):
        if isinstance(value, dict):
            return {name: filled(v) for name, v in value.items()}
        known = {"T": str(lessons / "tokenizer.json")}
        return known.get(value, value.replace("TALKER", str(talker))) if isinstance(value, str) else value

    base = {"model": {"init_from": str(talker)}, "rl": RL, "grpo": {"kl_coefficient": 0.0}}
    for name, fields in filled(sections).items():
        base[name] = base.get(name, {}) | fields
    with pytest.raises(UserError, match=expected):
        train(stage_config(stage, tmp_path / "run", **base))
    assert not (tmp_path / "run").exists(), "a refusal leaves nothing"


def test_a_reward_model_with_another_tokenizer_is_refused(config, judge, tmp_path):
    import shutil

    other = tmp_path / "judge"
    shutil.copytree(judge, other)
    text = (other / "tokenizer.json").read_text().replace("<|reserved_11|>", "<|reserved_x|>")
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"the reward model .* has another tokenizer"):
        train(config("grpo", tmp_path / "run", rl={"reward": str(other)}))


def test_a_run_finds_what_it_leans_on_from_another_folder(config, judge, talker, tmp_path, monkeypatch):
    """Paths that were given relative to where it began are kept whole."""
    monkeypatch.chdir(judge.parent)
    train(config("ppo", tmp_path / "run", rl={"reward": judge.name}, training={"steps": 2}))
    monkeypatch.chdir(tmp_path)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["rl"]["reward"] == str(judge)
