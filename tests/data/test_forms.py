"""Conversations, ranked answers and tasks out of records, whatever their fields are called."""

import pytest

from gptjax.config import TokenizerConfig
from gptjax.data.forms import conversation_of, ranked_answers_of, require_right_answer, task_of
from gptjax.data.records import Record
from gptjax.errors import UserError
from gptjax.text.chat import Message, chat_format
from gptjax.text.tokenizer_training import train_tokenizer

ASK, ANSWER = Message("user", "2+2?"), Message("assistant", "4")


def record(values):
    return Record(values, "file.jsonl:7")


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "id": 3},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "2+2?", "completion": "4<|endoftext|>\n"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"question": "2+2?", "answer": "4"},
    ],
    ids=lambda values: "+".join(values),
)
def test_forms_of_conversations(values):
    assert conversation_of(record(values)).messages == (ASK, ANSWER)


def test_alpaca_input_follows_its_instruction():
    found = conversation_of(record({"instruction": "Sum up.", "input": "a b", "output": "c"}))
    assert found.messages[0].content == "Sum up.\n\na b"


@pytest.mark.parametrize(
    ("values", "answers", "ranks"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, ("4", "5"), (0, 1)),
        ({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, ("4", "5"), (0, 1)),
        ({"prompt": "2+2?", "answers": ["4", "four", "5"]}, ("4", "four", "5"), (0, 1, 2)),
        ({"prompt": "2+2?", "answers": ["5", "4", "IV"], "scores": [1, 7.5, 7.5]}, ("5", "4", "IV"), (1, 0, 0)),
        (
            {
                "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
                "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}],
            },
            ("4", "5"),
            (0, 1),
        ),
    ],
)
def test_forms_of_ranked_answers(values, answers, ranks):
    found = ranked_answers_of(record(values))
    assert (found.prompt, found.answers, found.ranks) == ((ASK,), answers, ranks)


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"question": "2+2?", "answer": "4"}, "4"),
        ({"prompt": "2+2?"}, ""),
        ({"messages": [{"role": "user", "content": "2+2?"}]}, ""),
        ({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, "4"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "4"),
    ],
)
def test_forms_of_tasks(values, answer):
    found = task_of(record(values))
    assert (found.prompt, found.answer) == ((ASK,), answer)


@pytest.mark.parametrize(
    ("of", "values", "expected"),
    [
        (conversation_of, {"text": "hi"}, "no conversation among the fields text"),
        (conversation_of, {"messages": "hi"}, "field messages is str, not a list"),
        (conversation_of, {"messages": []}, "not a list of messages, or has none"),
        (conversation_of, {"messages": ["hi"]}, "message 1 of messages is str"),
        (conversation_of, {"messages": [{"role": "tool", "content": "x"}]}, "by 'tool'; known are"),
        (conversation_of, {"messages": [{"role": "user"}]}, "field value is missing"),
        (conversation_of, {"prompt": "a", "completion": None}, "no conversation among the fields prompt;"),
        (conversation_of, {"prompt": "a", "completion": "  "}, "answer 1 of the conversation is empty"),
        (conversation_of, {"prompt": 3, "completion": "b"}, "field prompt is int, not a text"),
        (
            conversation_of,
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "message 2 .* roles alternate",
        ),
        (ranked_answers_of, {"prompt": "a", "chosen": "b", "rejected": "b"}, "all the same text"),
        (ranked_answers_of, {"prompt": "a", "chosen": "b", "rejected": ""}, "a ranked answer is empty"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", "c"], "scores": [1, 1]}, "ranked alike"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", "c"], "scores": [1]}, "one number for each of 2"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b"]}, "two are the fewest"),
        (ranked_answers_of, {"prompt": "a"}, "no ranked answers among the fields prompt"),
        (task_of, {"text": "a"}, "no prompt among the fields text"),
    ],
)
def test_what_is_none_is_refused_with_its_place(of, values, expected):
    with pytest.raises(UserError, match=f"^file.jsonl:7: .*{expected}"):
        of(record(values))


TURNS = [{"role": "user", "content": "2+2?"}]
FOUR, FIVE = {"from": "gpt", "value": "4"}, {"role": "model", "content": "5"}
HH = "\n\nHuman: Hello\n\nAssistant: Hi.\nYes?\n\nHuman: 2+2?\n\nAssistant: "


@pytest.mark.parametrize(
    ("values", "before"),
    [
        ({"system": "Rhyme.", "conversations": [{"from": "human", "value": "2+2?"}]}, [("system", "Rhyme.")]),
        ({"system": "Rhyme.", "instruction": "2+2?", "input": ""}, [("system", "Rhyme.")]),
        ({"system_prompt": "Rhyme.", "question": "2+2?"}, [("system", "Rhyme.")]),
        ({"system": "", "history": [], "prompt": "2+2?", "messages": None}, []),
        ({"system": "Rhyme.", "messages": [{"role": "system", "content": "Rhyme."}, *TURNS]}, [("system", "Rhyme.")]),
        (
            {"system": "Rhyme.", "history": [["a", "b"], ["c", "d"]], "instruction": "2+2?"},
            [("system", "Rhyme."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            {"history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": TURNS},
            [("user", "a"), ("assistant", "b")],
        ),
        ({"messages": [{"role": "developer", "content": "Rhyme."}, *TURNS]}, [("system", "Rhyme.")]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}
                ]
            },
            [],
        ),
    ],
    ids=range(9),
)
def test_nothing_beside_the_turns_is_lost(values, before):
    """Not the system message, nor earlier turns, in any form: in conversations, ranked answers and tasks."""
    expected = (*(Message(*said) for said in before), ASK)
    assert task_of(record(values | {"ground_truth": 4})) == (expected, "4", "file.jsonl:7")
    ranked = ranked_answers_of(record(values | {"chosen": "4", "rejected": "5"}))
    assert (ranked.prompt, ranked.answers) == (expected, ("4", "5"))
    for name in ("messages", "conversations"):
        if values.get(name):
            said = [*values[name], {"from": "gpt", "value": "4"}]
            assert conversation_of(record(values | {name: said})).messages == (*expected, ANSWER)
            break
    else:
        assert conversation_of(record(values | {"output": "4"})).messages == (*expected, ANSWER)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        (
            {"messages": TURNS, "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
            (ASK,),
        ),
        (
            {
                "prompt": TURNS,
                "chosen": [{"role": "assistant", "content": "4"}],
                "rejected": [{"role": "model", "content": "5"}],
            },
            (ASK,),
        ),
        (
            {"chosen": f"{HH}4", "rejected": f"{HH}5"},
            (Message("user", "Hello"), Message("assistant", "Hi.\nYes?"), ASK),
        ),
        ({"chosen": "2+2?\n\n4", "rejected": "2+2?\n\n5", "prompt": "2+2?"}, None),
        (
            {"chosen": "Ask: 2+2?\nAnswer: 4", "rejected": "Ask: 2+2?\nAnswer: 5"},
            (Message("user", "Ask: 2+2?\nAnswer:"),),
        ),
    ],
    ids=range(5),
)
def test_prompts_of_ranked_answers(values, prompt):
    """Beside the answers, or within them, where both begin with it."""
    found = ranked_answers_of(record(values))
    if prompt is not None:
        assert (found.prompt, found.answers) == (prompt, ("4", "5"))


def test_answers_may_be_read_and_not_learned():
    """Flags of single messages: what is not learned is still context; a record that teaches nothing is refused."""
    answers = [{"role": "assistant", "content": "4", "weight": 0}, {"role": "assistant", "content": "4", "train": True}]
    messages = [*TURNS, answers[0], *TURNS, answers[1]]
    found = conversation_of(record({"messages": messages})).messages
    assert [m.learned for m in found] == [True, False, True, True]
    tokenizer = train_tokenizer(["2+2? 4"], TokenizerConfig(kind="byte"))
    form = chat_format(tokenizer)
    (whole,), (all_learned,) = form.rows(found), form.rows([m._replace(learned=True) for m in found])
    assert whole.token_ids == all_learned.token_ids
    assert sum(whole.learned) == sum(all_learned.learned) / 2 > 0
    assert not any(whole.learned[: len(form.prompt(found[:3]))])
    for flag, said in (
        ({"weight": 0}, "no answer of the conversation is to be learned"),
        ({"weight": 0.5}, "weight is 0.5"),
    ):
        with pytest.raises(UserError, match=said):
            conversation_of(record({"messages": [*TURNS, {"role": "assistant", "content": "4"} | flag]}))


@pytest.mark.parametrize(
    ("of", "values", "expected"),
    [
        (conversation_of, {"system": "a", "messages": [{"role": "system", "content": "b"}]}, "two different system"),
        (conversation_of, {"history": "a", "prompt": "b", "completion": "c"}, "field history is str, not a list"),
        (conversation_of, {"history": [["a"]], "prompt": "b", "completion": "c"}, "turn 1 of history is no pair"),
        (
            conversation_of,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "part of type image_url",
        ),
        (conversation_of, {"prompt": "a\udc00", "completion": "b"}, "field prompt holds half a surrogate pair"),
        (conversation_of, {"messages": [{"role": ["user"], "content": "a"}]}, "it is by .*; known are"),
        (ranked_answers_of, {"chosen": "yes", "rejected": "no"}, "there is no prompt: no field instruction, prompt"),
        (ranked_answers_of, {"chosen": "I think yes", "rejected": "I think no"}, "there is no prompt"),
        (ranked_answers_of, {"prompt": "a", "chosen": "b", "rejected": TURNS}, "must both be texts"),
        (
            ranked_answers_of,
            {"prompt": "a", "answers": ["b", "c"], "scores": [1, None]},
            "score 2 is null, not a number",
        ),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", "c"], "scores": ["N/A", 1]}, "score 1 is 'N/A'"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", "c"], "scores": [1, float("nan")]}, "score 2 is nan"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", None], "scores": [1, 2]}, "field 2 is missing"),
        (
            ranked_answers_of,
            {
                "prompt": "a",
                "chosen": [*TURNS, {"from": "gpt", "value": "x"}, *TURNS, {"from": "gpt", "value": "4"}],
                "rejected": [*TURNS, {"from": "gpt", "value": "y"}, *TURNS, {"from": "gpt", "value": "5"}],
            },
            "answer different prompts",
        ),
        (task_of, {"prompt": "a", "solution": {"b": 1}}, "known are"),
    ],
    ids=range(15),
)
def test_what_cannot_be_meant_is_refused_by_name(of, values, expected):
    with pytest.raises(UserError, match=f"^file.jsonl:7: .*{expected}") as error:
        of(record(values))
    assert "\n" not in str(error.value)


def test_right_answers_have_many_names():
    for values in (
        {"ground_truth": "4"},
        {"solution": "4"},
        {"reward_model": {"ground_truth": "4", "style": "rule"}},
        {"answer": 4},
    ):
        for prompt in ({"prompt": "2+2?"}, {"messages": TURNS}, {"prompt": TURNS}):
            assert task_of(record(prompt | values))[:2] == ((ASK,), "4")
    with pytest.raises(
        UserError, match=r"^file.jsonl:7: there is no right answer to judge by; its field .* ground_truth"
    ):
        require_right_answer(task_of(record({"prompt": "2+2?"})))


def test_scores_may_be_written_as_text():
    values = {"prompt": "2+2?", "answers": ["5", "4", "3"], "scores": ["10", "9", 9.5]}
    assert ranked_answers_of(record(values)).ranks == (0, 2, 1)
