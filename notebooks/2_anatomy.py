# %% [markdown]
# # The anatomy of a GPT
#
# What is inside a GPT, how large are its parts, what do they cost, and how few lines compute it? Nothing is trained
# here. On two CPU cores this takes less than a minute.
#
# Arrays carry their dimensions in their names, one letter each: B sequences of a batch, T tokens, S tokens looked at,
# D width of the model, N heads, H width of a head, F width of the feed-forward layer, V vocabulary, L layers. So
# `x_BTD` is a vector of D numbers for each of T tokens of B sequences.

# %%
# %matplotlib inline
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from gptjax import GPT, ModelConfig, parameter_counts, presets, training_flops_per_token
from gptjax.model.attention import Placement
from gptjax.model.gpt import Block
from gptjax.parallel import platform

platform.configure()  # compiled programs are kept, so that the second time is quicker; before JAX's first array

# %% [markdown]
# ## Shapes
#
# A model in JAX is a function of parameters and tokens, and parameters are a plain dictionary of arrays. `eval_shape`
# runs a function with shapes instead of numbers: here it tells what GPT-2 (124M) consists of, and allocates nothing.
#
# Parameters of the blocks are stacked: their first dimension is the layer, twelve here.

# %%
gpt2 = dataclasses.replace(presets.gpt2("124M").model, vocab_size=presets.GPT2_VOCAB_SIZE)
tokens_BT = jax.ShapeDtypeStruct((1, 8), jnp.int32)
params = jax.eval_shape(GPT(gpt2).init, jax.random.key(0), tokens_BT)["params"]
for path, leaf in jax.tree.leaves_with_path(params):
    print(f"{jax.tree_util.keystr(path, simple=True, separator=' / '):34} {leaf.shape!s:18} {leaf.size:>12,}")

# %% [markdown]
# The embedding has 50,304 rows, though GPT-2 knows 50,257 tokens: the rows are rounded up to a multiple of 128, which
# hardware likes better. The extra ones are never predicted, and are not counted below.
#
# ## Parameters by part
#
# Each block has four matrices of D × D in its attention and two of D × 4D in its feed-forward layer, 12 D² together.
# The embedding has V · D. Depth and width grow, the vocabulary does not: two thirds of the smallest model below are
# blocks, and nearly all of the largest. Of what is in the blocks a third is attention, two thirds are feed-forward
# layers.

# %%
models = {f"GPT-2 {size}": presets.gpt2(size).model for size in ("124M", "355M", "774M", "1558M")}
models |= {f"GPT-3 {size}": presets.gpt3(size).model for size in ("6.7B", "175B")}
models = {name: dataclasses.replace(m, vocab_size=presets.GPT2_VOCAB_SIZE) for name, m in models.items()}
counts = {name: parameter_counts(model) for name, model in models.items()}

parts_figure = Figure(figsize=(9, 3.2), layout="constrained")
axes = parts_figure.subplots()
start = np.zeros(len(models))
for part in ("embedding", "positions", "attention", "feed_forward", "norms"):
    share = np.array([count[part] / count["total"] for count in counts.values()])
    axes.barh(range(len(models)), share, left=start, label=part.replace("_", "-"))
    start += share
axes.set_yticks(range(len(models)), list(models))
axes.invert_yaxis()
axes.set(xlabel="share of the parameters", xlim=(0, 1))
axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=5, frameon=False)
parts_figure

# %% [markdown]
# ## What a token costs
#
# A weight is used once per token: one multiplication and one addition going forward. The backward pass needs twice as
# many, for the gradient of its input and for its own. That makes 6 floating-point operations (FLOPs) for each weight
# and training token. Attention adds what does not belong to any weight: each query meets each key, 12 · D · T for each
# layer. So it is the context that decides whether attention is dear: at 1,024 tokens it is a small part, and it is half
# where T is about 6 D, or a little more for the head's sake.

# %%
contexts = 2 ** np.arange(8, 18)
flops_figure = Figure(figsize=(9, 3.4), layout="constrained")
left, right = flops_figure.subplots(1, 2)
for name in ("GPT-2 124M", "GPT-2 1558M", "GPT-3 175B"):
    flops = [training_flops_per_token(models[name], int(T)) for T in contexts]
    left.plot(contexts, [f.total for f in flops], label=name)
    right.plot(contexts, [f.attention / f.total for f in flops], label=name)
left.set(xlabel="context (tokens)", ylabel="FLOPs per training token", xscale="log", yscale="log")
right.set(xlabel="context (tokens)", ylabel="share of attention", xscale="log", ylim=(0, 1))
for panel in (left, right):
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.25)
left.legend(frameon=False)
flops_figure

# %% [markdown]
# Is the formula right? The compiler knows what it has compiled. Below it counts the forward pass of a small model, and
# forward and backward together. It also counts norms, activations and the softmax, which the formula leaves out, so
# that it finds a little more.

# %%
small = ModelConfig(num_layers=2, model_dim=256, num_heads=4, context_length=256, vocab_size=1024)
tokens_BT = jax.ShapeDtypeStruct((2, 256), jnp.int32)
params = jax.eval_shape(GPT(small).init, jax.random.key(0), tokens_BT)["params"]


def total(params, tokens_BT):
    """A number to differentiate, that depends on all logits."""
    return jnp.square(GPT(small).apply({"params": params}, tokens_BT)[0]).sum()


formula = training_flops_per_token(small).total * tokens_BT.size
for name, function, share in (("forward", total, 1 / 3), ("forward and backward", jax.grad(total), 1)):
    counted = jax.jit(function).lower(params, tokens_BT).compile().cost_analysis()["flops"]
    print(f"{name:21} formula {share * formula:.3e}   compiler {counted:.3e}   ratio {counted / (share * formula):.3f}")

# %% [markdown]
# With the cost of a token comes the cost of a model, here in days of one H100. It can do 989 · 10¹² operations a second
# in bfloat16, of which a good program gets some 40 %.

# %%
for name, tokens in (("GPT-2 124M", 10e9), ("GPT-2 1558M", 30e9), ("GPT-3 175B", 300e9)):
    flops = training_flops_per_token(models[name]).total * tokens
    print(
        f"{name:12} {tokens / 1e9:4.0f} billion tokens: {flops:.1e} FLOPs, {flops / (0.4 * 989e12) / 86400:,.1f} days"
    )

# %% [markdown]
# ## A GPT by hand
#
# A block is two steps, each of which adds something to its input. Attention brings in what other tokens know; the
# feed-forward layer works on each token alone. Both look at the input through a norm, which gives every vector mean 0
# and variance 1. Here it is in plain `jax.numpy`, with the parameters of the module.


# %%
def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["b"]


def linear(p, x):
    return x @ p["w"] + p["b"]


def block(p, x_BTD, num_heads, causal=True):
    y_BTD = norm(p["attention_norm"], x_BTD)
    B, T, D = y_BTD.shape
    q, k, v = (linear(p["attention"][name], y_BTD).reshape(B, T, num_heads, -1) for name in ("q", "k", "v"))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(q.shape[-1])
    if causal:
        scores_BNTS = jnp.where(jnp.tri(T, dtype=bool), scores_BNTS, -jnp.inf)  # no token sees what comes after it
    weights_BNTS = jax.nn.softmax(scores_BNTS)
    mixed_BTD = jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v).reshape(B, T, D)
    x_BTD = x_BTD + linear(p["attention"]["out"], mixed_BTD)
    h_BTF = jax.nn.gelu(linear(p["feed_forward"]["up"], norm(p["feed_forward_norm"], x_BTD)))
    return x_BTD + linear(p["feed_forward"]["down"], h_BTF)


def layer(params, index):
    return jax.tree.map(lambda w: w[index], params["blocks"])


# %% [markdown]
# The module's block gets the same input. `Placement` tells it at which positions the tokens stand. Both must agree but
# for rounding, which differs where sums are taken in another order.

# %%
T = 16
config = ModelConfig(
    num_layers=3, model_dim=64, num_heads=4, context_length=T, vocab_size=128, tie_embeddings=False
)  # on a CPU all is computed in float32
key = jax.random.key(0)
tokens_BT = jax.random.permutation(key, config.vocab_size)[None, :T]  # each token another one
params = jax.jit(GPT(config).init)(key, tokens_BT)["params"]

x_BTD = jax.random.normal(key, (1, T, config.model_dim))
positions_BT = jnp.arange(T)[None, :]
place = Placement(positions_BT, positions_BT)
module = jax.jit(lambda x_BTD: Block(config, window=None).apply({"params": layer(params, 0)}, x_BTD, place)[0])
module_BTD = module(x_BTD)
by_hand_BTD = block(layer(params, 0), x_BTD, config.num_heads)
np.testing.assert_allclose(by_hand_BTD, module_BTD, rtol=1e-4, atol=1e-5)
print(f"largest difference: {jnp.abs(by_hand_BTD - module_BTD).max():.1e} of numbers up to {jnp.abs(x_BTD).max():.1f}")

# %% [markdown]
# The rest of a GPT is one line before the blocks and one after them: a token's row of the embedding and its position's
# row are added; after the last block a norm and a product with the head make a logit for each token of the vocabulary.


# %%
def gpt(params, tokens_BT, causal=True):
    x_BTD = params["embedding"][tokens_BT] + params["positions"][: tokens_BT.shape[1]]
    for index in range(config.num_layers):
        x_BTD = block(layer(params, index), x_BTD, config.num_heads, causal)
    return norm(params["final_norm"], x_BTD) @ params["head"].T


logits_BTV, _ = GPT(config).apply({"params": params}, tokens_BT)
np.testing.assert_allclose(gpt(params, tokens_BT), logits_BTV, rtol=1e-4, atol=1e-5)
print(f"logits {logits_BTV.shape} agree")

# %% [markdown]
# ## Causality, seen by gradient
#
# A GPT must not see the token that it is to predict. Whether it does can be asked of the whole program, without reading
# it: the gradient of one token's logits towards another token says whether the one depends on the other at all. Each
# token of our text is another one, so that its row of the embedding is used at its place and nowhere else: the gradient
# towards that row is the gradient towards that place.
#
# Three models: ours; one whose layers see only the last 4 tokens; and the one by hand with its mask left out.


# %%
def influence(apply):
    """(T, S): how strongly the logits after token t depend on token s; 0 is not at all."""
    direction_V = jax.random.normal(key, (config.vocab_size,))  # one mixture of all logits
    jacobian = jax.jacrev(lambda table: apply(params | {"embedding": table})[0] @ direction_V)
    jacobian_TVD = jax.jit(jacobian)(params["embedding"])
    return np.linalg.norm(jacobian_TVD[:, tokens_BT[0]], axis=-1)


local = dataclasses.replace(config, attention_pattern="local", attention_window=4)
seen = {
    "GPT": influence(lambda p: GPT(config).apply({"params": p}, tokens_BT)[0]),
    "GPT, each layer sees 4 tokens": influence(lambda p: GPT(local).apply({"params": p}, tokens_BT)[0]),
    "by hand, without the mask": influence(lambda p: gpt(p, tokens_BT, causal=False)),
}
causal_figure = Figure(figsize=(10, 3.8), layout="constrained")
panels = causal_figure.subplots(1, 3, sharey=True)
for panel, (name, influence_TS) in zip(panels, seen.items(), strict=True):
    with np.errstate(divide="ignore"):
        image = panel.imshow(np.log10(influence_TS), cmap="viridis", vmin=-2, vmax=1.5)
    panel.set(title=name, xlabel="depends on token")
panels[0].set_ylabel("logits after token")
causal_figure.colorbar(image, ax=panels, shrink=0.7, label="log₁₀ of the gradient's norm")
causal_figure

# %% [markdown]
# White is exactly zero, not small: no path leads there. The upper right of the first picture is white, and its lower
# left is not: a test that only asked for zeros would be content with a model that sees nothing. In the second picture
# each of three layers reaches 3 tokens further back, so that logits depend on 10 tokens: a stack of local layers sees
# more than each of them. The third picture is why the mask is not optional: that model reads the answer off the
# question, its loss falls far, and it can write nothing.

# %%
later_TS = np.triu(np.ones((T, T), dtype=bool), 1)
assert not seen["GPT"][later_TS].any()
assert seen["GPT"][~later_TS].all()
within_TS = ~later_TS & (np.arange(T)[:, None] - np.arange(T)[None, :] < 1 + 3 * config.num_layers)
np.testing.assert_array_equal(seen["GPT, each layer sees 4 tokens"] > 0, within_TS)
assert seen["by hand, without the mask"].all()
print("causality holds, and so does its opposite")
