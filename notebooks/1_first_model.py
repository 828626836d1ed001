# %% [markdown]
# # A first model
#
# We train a small GPT on real text, let it write, and look inside: where its heads look, and what each of its
# layers would predict. The text is the source code of Python's own standard library, which is on every machine that
# runs this notebook. On two CPU cores all of it takes about a minute.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import gptjax
from gptjax.parallel import platform

platform.configure()  # compiled programs are kept, so that the second time is quicker; before JAX's first array
STEPS = 300
folder = tempfile.TemporaryDirectory(prefix="gptjax-")

# %% [markdown]
# ## Training
#
# A run is described by one `Config`. What is not named here has a default, and what only the text or the machine can
# tell, such as the vocabulary or the number of devices, is filled in when the run starts. Muon is an optimizer that
# needs fewer steps than the usual AdamW; `scan_layers` compiles one layer and repeats it, which saves waiting.
#
# The model reads 128 tokens at a time. A token is a piece of text that is frequent enough to get a number of its own:
# `def`, a space with a word, sometimes a single letter. Which pieces these are is learned from the text first.

# %%
config = gptjax.Config(
    model=gptjax.ModelConfig(
        num_layers=3,
        model_dim=128,
        num_heads=4,
        context_length=128,
        norm="rmsnorm",
        positions="rope",
        feed_forward="relu2",
        qk_norm=True,
        bias=False,
        scan_layers=True,
    ),
    tokenizer=gptjax.TokenizerConfig(vocab_size=2048),
    data=gptjax.DataConfig(path="stdlib://", prepared_dir=f"{folder.name}/data"),
    optimizer=gptjax.OptimizerConfig(
        kind="muon",
        peak_learning_rate=1e-2,
        schedule="linear",
        warmup_steps=STEPS // 10,
        final_learning_rate_fraction=0.0,
    ),
    training=gptjax.TrainingConfig(
        steps=STEPS,
        batch_size=8,
        log_every_steps=max(1, STEPS // 30),
        eval_every_steps=max(20, STEPS // 3),
        eval_sequences=100,
        sample_every_steps=0,
        sample_prompt="def ",
        sample_tokens=40,
    ),
    checkpoint=gptjax.CheckpointConfig(every_steps=0),
    run_dir=f"{folder.name}/run",
)
summary = gptjax.train(config)

# %% [markdown]
# The loss is the surprise at the next token, in nats: a model that knows nothing guesses among 2048 tokens and has
# ln 2048 ≈ 7.6. It falls fast while the model learns how frequent each token is, and slower when it learns which
# token follows which. The dots are the loss of text that was held out. They lie on the training curve: in so few steps
# the model reads less than a tenth of the text, and nothing twice, so that it can learn nothing by heart.

# %%
loss_figure = gptjax.plot_loss(config.run_dir)
loss_figure.axes[0].axhline(np.log(2048), color="gray", linestyle=":", linewidth=1)
loss_figure.axes[0].annotate("knows nothing: ln 2048", (STEPS, np.log(2048)), ha="right", va="bottom", color="gray")
loss_figure

# %% [markdown]
# ## Sampling
#
# A GPT writes by drawing one token, appending it, and asking again. `temperature` divides the logits before the draw:
# at 0 the likeliest token is taken each time, which soon repeats itself; at 1 the model's own probabilities are kept,
# with all its doubts; somewhat below is what people like to read. So small a model knows the look of Python, not its
# sense.

# %%
run = gptjax.load_run(config.run_dir)
model = (run.config.model, run.params, run.tokenizer)
for temperature in (0.0, 0.8):
    sampling = gptjax.SamplingConfig(max_tokens=60, temperature=temperature)
    (completion,) = gptjax.generate(*model, ["    def __init__(self"], sampling)
    print(f"--- temperature {temperature}\n{completion.prompt}{completion.text}\n")

# %% [markdown]
# What was drawn from is a distribution, and it can be looked at. `run.model.apply` takes token ids, a batch of
# sequences, and gives logits: for each position one number for each token of the vocabulary. Softmax makes
# probabilities of them. `jax.jit` compiles the call into one program. Texts of a batch must be equally long, so that
# short ones are filled up at the end, which changes nothing: no token sees what comes after it.
#
# After `import` a name must come; after `raise` a kind of error.

# %%
labels = gptjax.token_labels(run.tokenizer)
prompts = ("\nimport", "    for i in", "        raise", "        return self")
apply = jax.jit(lambda tokens_BT: run.model.apply({"params": run.params}, tokens_BT)[0])
ids = [run.tokenizer.encode(prompt) for prompt in prompts]
longest = max(map(len, ids))
logits_BTV = apply(jnp.array([row + [0] * (longest - len(row)) for row in ids]))

next_figure = Figure(figsize=(10, 2.8), layout="constrained")
panels = next_figure.subplots(1, len(prompts))
for panel, prompt, row, logits_TV in zip(panels, prompts, ids, logits_BTV, strict=True):
    probability_V = jax.nn.softmax(logits_TV[len(row) - 1])
    top = np.argsort(-probability_V)[:8]
    panel.barh(range(len(top)), probability_V[top])
    panel.set_yticks(range(len(top)), [labels[i] for i in top])
    panel.invert_yaxis()
    panel.set(title=f"after “{prompt.strip()}”", xlabel="probability")
next_figure

# %% [markdown]
# ## Where the heads look
#
# Attention is how a token gets to know the ones before it. Each head of each layer gives every earlier token a weight;
# the weights of a row sum to 1. Below is a line of code. A row is the token that looks, a column the token that is
# looked at; the upper right is empty, because no token may look at what comes after it.


# %%
def inside(text):
    """The tokens of a text as labels, and the attention weights (L, N, T, S) of every layer and head."""
    token_ids = run.tokenizer.encode(text)
    return [labels[i] for i in token_ids], gptjax.attention_weights(run.config.model, run.params, token_ids)


code_tokens, code_weights = inside("def area(self, width, height):\n    return width *")
code_figure = gptjax.plot_attention(code_weights, code_tokens)
code_figure

# %% [markdown]
# Many heads have a habit. A dark diagonal is a head that looks at its own token, a dark line beside it one that reads
# the token before, and a dark column one that many later tokens look at, such as the end of a line. The picture below
# measures the three habits over 40 pieces of held-out text: the average weight that each head gives. In its title is
# what a head without any habit would give, one that looks at all earlier tokens alike.

# %%
held_out = gptjax.prepare(config.data, config.tokenizer, log=lambda line: None).tokens("validation")
T = 64
earlier_TS = np.tri(T, dtype=bool)
breaks_V = np.array(["\n" in run.tokenizer.decode([i]) for i in range(run.tokenizer.vocab_size)])
totals = []
for start in range(0, 40 * 500, 500):
    piece = held_out[start : start + T]
    masks = {
        "to itself": np.eye(T, dtype=bool),
        "to the token before": np.eye(T, k=-1, dtype=bool),
        "to line breaks": earlier_TS & breaks_V[piece],
    }
    mask_3TS = np.stack(list(masks.values()))[:, 8:]  # without the first rows, which have few tokens to choose from
    weights_LNTS = gptjax.attention_weights(run.config.model, run.params, piece)[:, :, 8:]
    equal_TS = (earlier_TS / earlier_TS.sum(axis=1, keepdims=True))[8:]
    every = np.concatenate([weights_LNTS.reshape(-1, *equal_TS.shape), equal_TS[None]])
    totals.append(np.einsum("mts,hts->mh", mask_3TS, every) / (T - 8))
shares_3H = np.mean(totals, axis=0)

habit_figure = Figure(figsize=(10, 3.4), layout="constrained")
panels = habit_figure.subplots(1, 3)
for panel, name, (*shares, equal) in zip(panels, masks, shares_3H, strict=True):
    share_LN = np.reshape(shares, (config.model.num_layers, config.model.num_heads))
    image = panel.imshow(share_LN, cmap="magma_r", vmin=0, vmax=0.6)
    for (layer, head), share in np.ndenumerate(share_LN):
        panel.text(head, layer, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.3 else "black")
    panel.set(title=f"{name}\n(without a habit {equal:.2f})", xlabel="head", ylabel="layer")
    panel.set(xticks=range(config.model.num_heads), yticks=range(config.model.num_layers))
habit_figure.colorbar(image, ax=panels, label="average weight")
habit_figure

# %% [markdown]
# ## The case: "The cat sat on the mat"
#
# The article that this project began with (`docs/article.md`) describes in words how each word of this sentence weighs
# the others. Here it is for a model that was really trained. It has read code and comments, hardly any cats, so that
# rare words come in pieces.

# %%
sentence = "The cat sat on the mat"
cat_tokens, cat_weights = inside(sentence)
cat_figure = gptjax.plot_attention(cat_weights, cat_tokens)
cat_figure

# %% [markdown]
# The row of "sat", averaged over the heads of each layer: what this token takes from "The", from "cat" and from itself.
# Nothing goes to "on the mat", which comes later.

# %%
sat = len(run.tokenizer.encode("The cat sat")) - 1
sat_figure = Figure(figsize=(8, 3), layout="constrained")
axes = sat_figure.subplots()
for layer, weights_NTS in enumerate(cat_weights):
    places = np.arange(len(cat_tokens)) + 0.25 * (layer - 1)
    axes.bar(places, weights_NTS[:, sat].mean(axis=0), width=0.23, label=f"layer {layer}")
axes.set_xticks(range(len(cat_tokens)), cat_tokens)
axes.set(title=f"attention of {cat_tokens[sat]!r}, token {sat}", xlabel="token looked at", ylabel="mean weight")
axes.legend(frameon=False)
sat_figure

# %% [markdown]
# A warning that the article lacks: a large weight says where a head reads, not why the model answers as it does. What a
# token does to the answer can be measured: exchange it, and see how far the prediction at the end moves. Below each
# token but the last is exchanged for 50 others in turn. The distance is the Kullback-Leibler divergence from the
# prediction for the text as it is. Beside it is the weight that the last token gives it, averaged over all heads. The
# two agree on some tokens; on others much is looked at that changes little.

# %%
ids = np.array(run.tokenizer.encode(sentence))
others = np.random.default_rng(0).integers(300, run.tokenizer.vocab_size, 50)
exchanged = np.repeat(ids[None, None, :], len(ids) - 1, axis=0).repeat(len(others), axis=1)
for place in range(len(ids) - 1):
    exchanged[place, :, place] = others
batch_BT = np.concatenate([ids[None, :], exchanged.reshape(-1, len(ids))])
log_p_BV = jax.nn.log_softmax(apply(jnp.array(batch_BT))[:, -1, : run.tokenizer.vocab_size])
moved = (jnp.exp(log_p_BV[:1]) * (log_p_BV[:1] - log_p_BV[1:])).sum(-1).reshape(len(ids) - 1, -1).mean(-1)

effect_figure = Figure(figsize=(8, 3), layout="constrained")
left, right = effect_figure.subplots(1, 2)
names = [f"{token} ({place})" for place, token in enumerate(cat_tokens[:-1])]
left.barh(names, cat_weights[:, :, -1, :-1].mean(axis=(0, 1)))
left.set(title=f"where {cat_tokens[-1]!r} looks", xlabel="mean weight")
right.barh(names, moved, color="tab:orange")
right.set(title="what moves the prediction after it", xlabel="divergence (nats)")
for panel in (left, right):
    panel.invert_yaxis()
effect_figure

# %% [markdown]
# ## The logit lens
#
# Each layer adds something to a running sum, the residual stream, and only the last sum is read by the head that
# predicts. The logit lens reads it earlier: what would the model say if it ended after this layer? Read a column
# upwards. After the first layer it is mostly what often follows this one token; the later layers use what attention
# brought, change their mind where the text before demands it, and grow surer.

# %%
lens_ids = run.tokenizer.encode("    def __init__(self, name):\n        self.name =")
lens = gptjax.logit_lens(run.config.model, run.params, lens_ids)
predicted = [[labels[i] for i in layer] for layer in lens.token_ids_LT]
lens_figure = gptjax.plot_logit_lens(lens, [labels[i] for i in lens_ids], predicted)
lens_figure

# %% [markdown]
# ## What next
#
# More steps bring more: `python train.py` runs four times as many. Your own text goes into `data.path`, and with
# `run_dir="runs/mine"` the run stays. `2_anatomy.py` takes the model apart.

# %%
files = sorted(path.name for path in Path(config.run_dir).iterdir())
print(f"{summary['val_bits_per_byte']:.2f} bits per byte after {summary['wall_seconds']:.0f} s; the run's folder has")
print(", ".join(files))
folder.cleanup()
