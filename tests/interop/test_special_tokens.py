"""Special tokens are carried, never guessed: from a model's files into prompts, rows, windows and what is exported."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from gptjax.config import Config, DataConfig, ModelConfig, TrainingConfig
from gptjax.data.prepare import prepare
from gptjax.errors import UserError
from gptjax.evaluation.documents import split_documents
from gptjax.interop import huggingface
from gptjax.interop.transfer import export_run, import_model
from gptjax.model.gpt import GPT
from gptjax.sampling.chat import chat
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.generate import generate
from gptjax.sampling.rows import generate_tokens
from gptjax.stages import callbacks, chats
from gptjax.text.chat import CHATML, Message
from gptjax.text.files import load_tokenizer
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.load import load_run
from gptjax.training.losses import language_model_loss
from gptjax.training.state import draw_params

NAMES = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<pad>")
BOS, EOS, IM_END, PAD = 0, 1, 3, 4
TOKENIZER_CONFIG = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "special": True}, "pad_token": "<pad>"}
GENERATION = {"bos_token_id": BOS, "eos_token_id": [EOS, IM_END], "temperature": 0.6, "do_sample": True}
GREEDY = SamplingConfig(max_tokens=6, temperature=0)


def backend(adds_bos: bool = True) -> tokenizers.Tokenizer:
    """Bytes, in the manner of Llama 3: the post-processor puts BOS before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate((*NAMES, *alphabet))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in NAMES])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return made


@pytest.fixture
def directory(tmp_path):
    """A model as its makers publish it."""
    folder = tmp_path / "hf"
    folder.mkdir()
    config = ModelConfig(
        num_layers=1,
        model_dim=16,
        num_heads=2,
        context_length=64,
        vocab_size=len(NAMES) + 256,
        norm="rmsnorm",
        positions="rope",
        bias=False,
        feed_forward="swiglu",
        initializer_std=0.3,
    )
    huggingface.write_model(folder, config, draw_params(GPT(config), 0), generation=GENERATION)
    backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG | {"chat_template": CHATML}))
    return folder


def test_roles_are_what_files_say(directory):
    """The post-processor says what begins a text; ids and names of all files together, what ends it."""
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.opening, tokenizer.end_of_text_id, tokenizer.padding_id) == ((BOS,), EOS, PAD)
    assert tokenizer.stop_ids == (EOS, IM_END)
    assert tokenizer.named_tokens == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (directory / "generation_config.json").unlink()
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": IM_END}))
    assert load_tokenizer(directory).stop_ids == (IM_END, EOS)
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert load_tokenizer(directory).end_of_text_id == IM_END
    backend(adds_bos=False).save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).opening == ()
    (directory / "special_tokens_map.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "add_bos_token": True}))
    assert load_tokenizer(directory).opening == (BOS,)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json is not JSON"):
        load_tokenizer(directory)


def test_prompts_begin_as_texts_do(directory):
    """With BOS before the text's own tokens, an empty one with BOS alone; in a chat where the template writes it."""
    run = load_run(directory)
    model = run.config.model, run.params
    found = generate(*model, run.tokenizer, ["river", ""], GREEDY)
    for completion in found:
        row = [BOS, *run.tokenizer.encode(completion.prompt)]
        (chunk,) = next(generate_tokens(*model, [row], GREEDY, run.tokenizer.stop_ids))
        assert completion.token_ids == chunk.token_ids
    form = chats.layout_of_run(directory, run.tokenizer)
    assert BOS not in form.prompt([Message("user", "river")])
    (directory / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    form = chats.layout_of_run(directory, run.tokenizer)
    assert form.prompt([Message("user", "river")])[:2] == [BOS, 2]
    assert form.stop_ids == (IM_END, EOS)


@pytest.mark.parametrize("stop", [EOS, IM_END])
def test_each_token_that_ends_does(directory, stop):
    """In texts, in answers and with guesses: the reason is stop, and the token is no part of the text."""
    run = load_run(directory)
    sure = jax.tree.map(np.zeros_like, run.params) | {"final_norm": {"scale": np.ones(16, np.float32)}}
    embedding = np.zeros_like(run.params["embedding"])
    embedding[:, 0], embedding[stop, 0] = 1.0, 2.0
    model = run.config.model, sure | {"embedding": embedding}, run.tokenizer
    (text,) = generate(*model, ["river"], GREEDY)
    assert (text.token_ids, text.finish_reason) == ([], "stop")
    form = chats.layout_of_run(directory, run.tokenizer)
    assert chat(*model, form, [[Message("user", "river")]], GREEDY) == [""]


def test_import_and_export_say_what_was_said(directory, tmp_path):
    """Twice round, everything is the same; and a template's own end joins those of the files."""
    import_model(directory, tmp_path / "run", print)
    export_run(load_run(tmp_path / "run"), tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "again", print)
    first, second = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.tokenizer.texts() == second.tokenizer.texts()
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    values = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")
    }
    assert [values["config"][name] for name in ("bos_token_id", "eos_token_id")] == [BOS, [EOS, IM_END]]
    assert TOKENIZER_CONFIG.items() <= values["tokenizer_config"].items()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION


def test_a_chat_of_ours_says_where_answers_end(directory, tmp_path):
    """A model that ended texts with one token, and has learned to end answers with another, names both."""
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    import_model(directory, tmp_path / "run", print)
    export_run(load_run(tmp_path / "run"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [IM_END, EOS]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    again = load_tokenizer(tmp_path / "out")
    assert (again.end_of_text_id, set(again.stop_ids)) == (EOS, {EOS, IM_END})


def test_a_template_that_cannot_be_laid_out_is_carried_all_the_same(directory, tmp_path):
    """Only which token ends an answer is not known then, and that is said."""
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    import_model(directory, tmp_path / "run", print)
    said = []
    export_run(load_run(tmp_path / "run"), tmp_path / "out", log=said.append)
    assert (tmp_path / "out" / "chat_template.jinja").read_text().startswith("{% for m in messages %}")
    assert "ends answers with no special token" in said[0]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION


def test_documents_begin_as_texts_do(tmp_path):
    """In rows of training; nothing is to predict BOS, and documents that are kept apart begin at it."""
    tokenizer = Tokenizer.of_backend(backend(), "here", {"tokenizer_config.json": TOKENIZER_CONFIG})
    texts = [f"text {n}" for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(DataConfig(path=(str(tmp_path / "a.jsonl"),)), tokenizer, tmp_path / "data", progress=False)
    assert prepared.tokenizer.opening == (BOS,)
    tokens = prepared.tokens("train")
    tokens = np.asarray(tokens[0 : len(tokens)])
    documents = list(split_documents(tokens, tokenizer))
    assert {tokenizer.decode(document.token_ids) for document in documents} <= set(texts)
    np.testing.assert_array_equal(tokens, [t for d in documents for t in (BOS, *d.token_ids, EOS)])
    assert callbacks.separator(Config(data=DataConfig(separate_documents=True)), tokenizer) == BOS
    config = ModelConfig(num_layers=1, model_dim=16, num_heads=2, vocab_size=261, compute_dtype="float32")
    params, batch = draw_params(GPT(config), 0), {"tokens": tokens[None, :41].astype(np.int32)}
    _, plain = language_model_loss(GPT(config))(params, batch, None)
    _, masked = language_model_loss(GPT(config), opening=BOS)(params, batch, None)
    assert plain["weight"] - masked["weight"] == (tokens[1:41] == BOS).sum() > 0
    mask = (batch["tokens"] != BOS).astype(np.float32)
    _, expected = language_model_loss(GPT(config))(params, batch | {"loss_mask": mask}, None)
    np.testing.assert_allclose(masked["loss"], expected["loss"], rtol=1e-6)


def test_other_openings_are_other_data(tmp_path):
    """Shards without BOS are not taken for shards with it."""
    plain, opened = (Tokenizer.of_backend(backend(adds), "here") for adds in (False, True))
    assert plain.fingerprint != opened.fingerprint


def test_a_tokenizer_without_any_end(directory, tmp_path):
    """Sampling works, and length alone ends it; what needs an end says which file should name one."""
    values = json.loads((directory / "tokenizer.json").read_text().replace("<eos>", "<x>").replace("<|im_end|>", "<y>"))
    (directory / "tokenizer.json").write_text(json.dumps(values))
    (directory / "tokenizer_config.json").unlink()
    (directory / "generation_config.json").unlink()
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    said = []
    run = load_run(directory, log=said.append)
    assert "tokenizer_config.json should have eos_token" in " ".join(said)
    (found,) = generate(run.config.model, run.params, run.tokenizer, ["river"], GREEDY)
    assert (len(found.token_ids), found.finish_reason) == (6, "length")
    (tmp_path / "a.txt").write_text("text " * 99)
    with pytest.raises(UserError, match=r"tokenizer_config.json .* should name one as eos_token"):
        prepare(DataConfig(path=(str(tmp_path / "a.txt"),)), run.tokenizer, tmp_path / "data", progress=False)


def test_tokens_beyond_the_table(directory):
    """[PAD] of many fine-tunes: it is said, texts that have it are refused, and all else works."""
    grown = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    grown.add_tokens(["[MORE]"])
    grown.save(str(directory / "tokenizer.json"))
    said = []
    run = load_run(directory, log=said.append)
    assert "the model has no row for [MORE]" in said[0]
    model = run.config.model, run.params, run.tokenizer
    assert run.tokenizer.vocab_size == run.config.model.vocab_size
    assert len(run.tokenizer.token_bytes()) == run.config.model.vocab_size
    generate(*model, ["river"], GREEDY)
    with pytest.raises(UserError, match=r"the token '\[MORE\]', id 261, but the model has rows for 261 ids only"):
        generate(*model, ["river [MORE]"], GREEDY)


def test_a_run_keeps_them(directory, tmp_path, monkeypatch):
    """Tuned further, a run has the model's roles in its own folder, whatever becomes of the directory."""
    from gptjax.stages.train import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 99)
    config = Config(
        model=ModelConfig(init_from=str(directory)),
        data=DataConfig(path=(str(tmp_path / "a.txt"),), prepared_dir=str(tmp_path / "data")),
        training=TrainingConfig(steps=1, batch_size=8, eval_every_steps=0, sample_every_steps=0, sample_tokens=2),
        run_dir=str(tmp_path / "run"),
    )
    train(config)
    directory.rename(tmp_path / "gone")
    kept = load_run(tmp_path / "run").tokenizer
    assert (kept.opening, kept.stop_ids) == ((BOS,), (EOS, IM_END))
    assert dataclasses.asdict(load_run(tmp_path / "run").config.data)["chat_date"]
