"""Instruction tuning, reward models, preferences: runs as a user makes them, and the conversations after."""

import io
import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest

import sample
from gptjax.config import DataConfig
from gptjax.data.conversations import read_items
from gptjax.data.forms import task_of
from gptjax.errors import UserError
from gptjax.evaluation.calibration import agreement
from gptjax.sampling import terminal
from gptjax.sampling.chat import chat, fit_to_context
from gptjax.stages import judges
from gptjax.stages.chats import layout_of_run
from gptjax.stages.dpo import REFERENCE_FILE
from gptjax.stages.dry_run import first_rows
from gptjax.stages.train import train
from gptjax.text.chat import Message
from gptjax.training.load import load_run
from gptjax.training.metrics import read_metrics


def test_a_tuned_run_can_be_talked_to(stage_config, talker, capsys):
    records = read_metrics(talker / "metrics.jsonl")
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    config = json.loads((talker / "config.json").read_text())
    rows = first_rows(stage_config("sft", "x", model={"init_from": str(talker)}), log=lambda line: None)
    assert config["training"]["steps"] == -(-8 * rows.data.num_rows // 16), "eight epochs of rows"
    assert sample.main([str(talker), "--message", "312", "99", "--temperature", "0", "--json", "-"]) == 0
    said = [json.loads(line)["messages"] for line in capsys.readouterr().out.splitlines()]
    assert [messages[0]["content"] for messages in said] == ["312", "99"]
    assert sample.main([str(talker), "--message", "312", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == said[0][1]["content"].strip()
    assert sample.main([str(talker), "--prompt", "312", "--max-tokens", "3", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "312", "its text goes on as any run's"


def test_the_first_rows_show_what_is_learned(stage_config, talker):
    rows = first_rows(stage_config("sft", "x", model={"init_from": str(talker)}), log=lambda line: None)
    tokenizer, (tokens, mask) = rows.data.tokenizer, (rows.tokens_BT[0], rows.loss_mask_BT[0])
    shown = tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=False)
    answers = shown.split("<|im_end|>")[:-1]
    assert answers
    assert all(answer == "".join(sorted(answer)) for answer in answers)


@pytest.mark.parametrize(
    ("stage", "file"), [("sft", "talk"), ("reward", "ranked"), ("dpo", "ranked"), ("grpo", "talk")]
)
def test_what_the_tokenizer_cannot_encode_is_a_records_fault(lessons, stage_config, talker, tmp_path, stage, file):
    """It stops the run by file and line, or is left out and counted, like what cannot be read."""
    lines = (lessons / f"{file}.jsonl").read_text().splitlines()
    lines.insert(2, json.dumps(json.loads(lines[0]) | {"prompt": "QQQ"}))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    sections = {
        "model": {"init_from": str(talker)},
        "data": {"path": (str(path),)},
        "rl": {"reward": "number", "answer_tokens": 8},
    }
    with pytest.raises(UserError, match=r"data.jsonl:3: .*'Q'.* \(--data.on-error skip leaves such out\)$"):
        first_rows(stage_config(stage, "x", **sections), log=lambda line: None)
    sections["data"]["on_error"] = "skip"
    first_rows(stage_config(stage, "x", **sections), log=(said := []).append)
    assert any("1 records that cannot be laid out" in line for line in said)


@pytest.mark.parametrize("reward", ["number", "exact"])
def test_a_task_without_an_answer_is_not_judged_by_it(stage_config, talker, tmp_path, reward):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "answer": None if n == 2 else n}) + "\n" for n in range(40)))
    sections = {
        "model": {"init_from": str(talker)},
        "data": {"path": (str(path),)},
        "rl": {"reward": reward, "answer_tokens": 8},
    }
    with pytest.raises(UserError, match=r"tasks.jsonl:3: there is no right answer to judge by; .*ground_truth"):
        first_rows(stage_config("grpo", "x", **sections), log=lambda line: None)
    sections["rl"]["reward"] = "json"
    first_rows(stage_config("grpo", "x", **sections), log=lambda line: None)


@pytest.fixture
def form(talker):
    return layout_of_run(talker, load_run(talker).tokenizer)


def test_a_conversation_at_the_terminal(stage_config, tmp_path):
    """History, commands, an answer that is stopped, one that is empty, and one that is refused."""
    lines = iter(["31", "/nothing", "", f"/save {tmp_path / 'talk.jsonl'}", "20", "5", "/reset", "1", "no", "/save"])
    asked, shown = [], []

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    def answer(said):
        asked.append([message.content for message in said])
        if said[-1].content == "no":
            raise UserError("too long")

        def pieces():
            yield "13" if said[-1].content == "31" else ""
            if said[-1].content == "20":
                yield "02"
                raise KeyboardInterrupt

        return pieces(), 0

    said = terminal.converse(answer, "Sort.", read=read, write=shown.append)
    assert asked == [
        ["Sort.", "31"],
        ["Sort.", "31", "13", "20"],
        ["Sort.", "31", "13", "20", "02", "5"],
        *[["Sort.", x] for x in ("1", "no")],
    ]
    assert said == [Message("system", "Sort.")], "a question without an answer was not asked"
    text = "".join(shown)
    assert "/nothing is no command" in text
    assert "[stopped]" in text
    assert "error: too long" in text
    assert "/save needs the name of a file" in text
    (kept,) = read_items(DataConfig(path=str(tmp_path / "talk.jsonl")), task_of, Counter())
    assert [m.content for m in kept.prompt] + [kept.answer] == ["Sort.", "31", "13"]


def test_old_turns_make_room(form):
    said = [Message("system", "1"), *[Message(("user", "assistant")[i % 2], str(i % 10)) for i in range(9)]]
    kept, dropped = fit_to_context(form, said, 60, 16)
    assert 0 < dropped < 9
    assert dropped % 2 == 0
    assert kept == [said[0], *said[1 + dropped :]]
    assert len(form.prompt(kept)) <= 44 < len(form.prompt([said[0], *said[dropped - 1 :]]))
    with pytest.raises(UserError, match=r"the last message takes .* of a context of 30"):
        fit_to_context(form, [Message("user", "1" * 40)], 30, 10)


def test_chat_answers_a_batch_as_it_does_each(talker, form):
    from gptjax.sampling.config import SamplingConfig

    run = load_run(talker)
    model, sampling = (run.config.model, run.params, run.tokenizer, form), SamplingConfig(max_tokens=6, temperature=0)
    asked = [[Message("user", text)] for text in ("312", "99", "5")]
    assert chat(*model, asked, sampling) == [chat(*model, [one], sampling)[0] for one in asked]


def test_a_reward_model_agrees_with_people(judge):
    found = json.loads((judge / "reward.json").read_text())
    assert found["accuracy"] > 0.8
    low, high = found["interval"]
    assert low < found["accuracy"] <= high
    assert (judge / "calibration.png").stat().st_size > 5000
    summary = json.loads((judge / "summary.json").read_text())
    assert summary["val_accuracy"] == found["accuracy"]
    assert summary["val_perplexity"] is None


def test_process_0_alone_asks_a_reward_function(stage_config, monkeypatch):
    """A judge that differs from call to call would give processes different batches, and costs once, not for each."""
    asked = []
    monkeypatch.setattr(judges, "find_reward", lambda name: lambda task, answer: asked.append(answer) or 0.5)
    monkeypatch.setattr(judges.distributed, "from_first", lambda make: [7.0])  # as on the other processes
    reward = judges.make_judge(stage_config("grpo", "unused"), None, None, 1)
    assert (reward([None], ["an answer"], None, None), asked) == ([7.0], [])


def test_agreement_counts_pairs():
    scores = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 9.0], [5.0, 5.0, 5.0]])
    ranks = np.array([[0, 1, 2], [0, 1, -1], [0, 0, 1]])
    found = agreement(scores, ranks)
    assert found.pairs == 6
    assert found.accuracy == pytest.approx((3 + 0 + 2 / 2) / 6)
    losses = [np.log1p(np.exp(-np.array(leads, float))).mean() for leads in ([1, 2, 1], [-1], [0, 0])]
    assert found.loss == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_preferences_are_learned(stage_config, talker, tmp_path, loss):
    options = {"loss": loss, "beta": 2.0 if loss == "simpo" else 0.5}
    config = stage_config("dpo", tmp_path / "run", "ranked.jsonl", model={"init_from": str(talker)}, preference=options)
    train(config)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (*_, last) = [record for record in records if "val_accuracy" in record]
    assert last["val_accuracy"] > 0.7
    assert last["val_chosen_logprob"] < 0
    assert (tmp_path / "run" / REFERENCE_FILE).exists() == (loss != "simpo")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_run_goes_on_without_what_it_started_from(stage_config, talker, tmp_path):
    """The reference's judgement is kept: a DPO run is continued where its start is gone, to the bits of one that ran
    through."""
    source = tmp_path / "source"
    shutil.copytree(talker, source)
    for name, stops in (("through", [4]), ("stopped", [2, 4])):
        for steps in stops:
            config = stage_config(
                "dpo", tmp_path / name, "ranked.jsonl", model={"init_from": str(source)}, training={"steps": steps}
            )
            if (tmp_path / name).exists():
                shutil.move(source, tmp_path / "gone")
            train(config)
    last = [
        [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["step"] == 4]
        for name in ("through", "stopped")
    ]
    for one, other in zip(*last, strict=True):
        timed = ("seconds", "tokens_per_second", "data_wait_fraction")
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_a_tuned_run_is_tuned_further_with_its_own_shape(stage_config, talker, tmp_path):
    shown = {"training": {"sample_every_steps": 4}, "model": {"init_from": str(talker)}}
    source, _ = load_run(talker), train(stage_config("sft", tmp_path / "more", **shown))
    samples = (tmp_path / "more" / "samples.md").read_text()
    assert [line for line in samples.splitlines() if line.startswith("##")] == ["## step 0", "## step 4"]
    more = load_run(tmp_path / "more")
    assert more.config.model.num_layers == 2
    assert more.tokenizer.fingerprint == source.tokenizer.fingerprint
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), more.params, source.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1, "it began where the other ended"


def test_the_console_line_of_an_evaluation(talker):
    from gptjax.training.metrics import Console

    shown = io.StringIO()
    Console(shown).log_evaluation({"step": 3, "tokens": 5, "val_reward": 0.51234, "val_answer_tokens": None})
    assert shown.getvalue() == "step 3  validation  reward 0.5123\n"


def test_adapters_are_saved_alone_and_merged_when_used(lessons, talker, stage_config, tmp_path):
    """A run of adapters holds nothing else, in its optimizer neither, and goes on to the bits of one that ran through;
    what is loaded is the model with them."""
    adapters = {"model": {"init_from": str(talker)}, "lora": {"rank": 2}}
    for name, stops in (("through", [4]), ("stopped", [2, 4])):
        for steps in stops:
            train(stage_config("sft", tmp_path / name, training={"steps": steps}, **adapters))
    one, other, start = (load_run(path) for path in (tmp_path / "through", tmp_path / "stopped", talker))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), one.params, start.params)
    assert moved["blocks"]["attention"]["q"]["w"] > 0
    assert moved["embedding"] == 0
    records = read_metrics(tmp_path / "through" / "metrics.jsonl")
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[-1] < losses[0]

    def saved_bytes(run):
        folder = run / "checkpoints" / str(load_run(run).step) / "state"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert saved_bytes(tmp_path / "through") < 0.4 * saved_bytes(talker)
    shutil.move(talker, tmp_path / "moved")
    try:
        with pytest.raises(UserError, match="is not a run"):
            load_run(tmp_path / "through")
    finally:
        shutil.move(tmp_path / "moved", talker)


@pytest.mark.parametrize(("stage", "file"), [("reward", "ranked.jsonl"), ("ppo", "talk.jsonl")])
def test_every_stage_has_adapters(talker, stage_config, tmp_path, stage, file):
    train(
        stage_config(
            stage,
            tmp_path / "run",
            file,
            model={"init_from": str(talker)},
            lora={"rank": 2},
            rl={"reward": "exact", "answers": 16, "answer_tokens": 6},
            training={"steps": 2},
        )
    )
    run, start = load_run(tmp_path / "run"), load_run(talker)
    assert set(run.params) - set(start.params) == ({"value_head", "value_bias"} if stage == "reward" else set())
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), run.params["blocks"], start.params["blocks"])
    assert max(jax.tree.leaves(moved)) > 0
