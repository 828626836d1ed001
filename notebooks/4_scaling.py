# %% [markdown]
# # A scaling study, from plan to fit
#
# How good will a model be that we have not paid for yet? Larger models and more text lower the loss along curves so
# smooth that a few small runs tell what a large one will reach. This notebook goes the whole way: what a model costs,
# a law and how sure one can be of it, and then a study of our own, in which a model's loss is written down before it is
# trained. On two CPU cores it takes about two minutes.

# %%
# %matplotlib inline
import dataclasses
import os
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import gptjax
from gptjax.model.devices import named
from gptjax.parallel import platform
from gptjax.presets import gpt3
from gptjax.scaling.laws import CHINCHILLA, EPOCH, KAPLAN
from gptjax.scaling.optima import power_law

platform.configure()  # compiled programs are kept, so that the second time is quicker; before JAX's first array
STEPS = 400
folder = tempfile.TemporaryDirectory(prefix="gptjax-")

# %% [markdown]
# ## The plan
#
# `make_plan` is arithmetic: it needs no accelerator and takes no time. Here are all sizes of GPT-3 on 16 H100s at three
# dollars an hour each. Time rests on a share of the peak that good code reaches, which is an assumption; parameters,
# operations and memory are formulas.

# %%
sizes = ("125M", "350M", "760M", "1.3B", "2.7B", "6.7B", "13B")
plans = {size: gptjax.make_plan(gpt3(size), named("h100"), 16, price_usd_per_hour=3.0) for size in sizes}
for size, plan in plans.items():
    print(f"{size:>5}: {plan.days:6.2f} days, {plan.price_usd:9,.0f} USD, loss {plan.forecasts[0].loss:.2f}")

plan_figure = Figure(figsize=(10, 3.6), layout="constrained")
memory_axes, price_axes = plan_figure.subplots(1, 2)
bottom = np.zeros(len(sizes))
for part in ("parameters", "optimizer", "gradients", "copies", "activations", "logits"):
    height = np.array([getattr(plan.memory, part) / 1e9 for plan in plans.values()])
    memory_axes.bar(sizes, height, bottom=bottom, label=part)
    bottom += height
memory_axes.axhline(80, color="black", linewidth=1, linestyle="--")
memory_axes.set(title="what each of 16 H100s holds", xlabel="GPT-3", ylabel="GB")
memory_axes.legend(fontsize=8)
price_axes.plot([plan.price_usd for plan in plans.values()], [p.forecasts[0].loss for p in plans.values()], "o-")
price_axes.set(title="what a lower loss costs", xscale="log", xlabel="USD", ylabel="loss, nats a token")
plan_figure

# %% [markdown]
# ## A law, and how sure it is
#
# The law is L(N, D) = E + A / N^alpha + B / D^beta: a floor, and two terms that fall with parameters and with tokens.
# We make a table whose law we know, 60 models with noise of 0.3 percent in their losses, and fit it. The points are
# then drawn again with replacement, 200 times, and fitted again: how far these fits are apart is how little the table
# says. From each fit follows how a budget is best divided between parameters and tokens.

# %%
rng = np.random.default_rng(0)
N, D = np.exp(rng.uniform(np.log(7e7), np.log(1.6e10), 60)), np.exp(rng.uniform(np.log(5e9), np.log(5e11), 60))
measured = np.array([EPOCH.loss(n, d) for n, d in zip(N, D, strict=True)]) * np.exp(rng.normal(0, 0.003, 60))
fit = gptjax.fit_loss(N, D, measured, resamples=200)
for name in ("E", "A", "B", "alpha", "beta"):
    low, high = fit.interval(name)
    value, truth = getattr(fit.law, name), getattr(EPOCH, name)
    print(f"{name:>5}: {value:8.4g}, 90 % interval {low:.4g} to {high:.4g}; it was {truth:.4g}")

budgets = np.geomspace(1e18, 1e26, 40)
frontier_figure = Figure(figsize=(7, 4.2), layout="constrained")
axes = frontier_figure.subplots()
drawn = np.array([[law.compute_optimal(C)[0] for C in budgets] for law in fit.draws])
axes.fill_between(budgets, *np.quantile(drawn, [0.05, 0.95], axis=0), alpha=0.3, label="this fit, 90 %")
for law, style in ((CHINCHILLA, "--"), (EPOCH, ":"), (KAPLAN, "-.")):
    axes.plot(budgets, [law.compute_optimal(C)[0] for C in budgets], style, label=law.name)
axes.scatter(6 * N * D, N, s=8, color="0.5", label="the table")
axes.set(title="the best size for a budget", xscale="log", yscale="log", xlabel="training FLOPs", ylabel="parameters")
axes.legend(fontsize=8)
frontier_figure

# %% [markdown]
# ## A study of our own
#
# Now four models on the source code of Python's standard library, byte by byte, which differ in nothing but their
# width. The parametrization is µP, so that one learning rate is right for all. The three smaller ones are trained
# first. Through three points there is no room for a floor, so that we lay a power law through them, which is good for a
# short way; `python -m gptjax study` does it with more.

# %%
base = gptjax.Config(
    model=gptjax.ModelConfig(
        num_layers=2,
        num_heads=2,
        model_dim=32,
        head_dim=16,
        context_length=64,
        norm="rmsnorm",
        positions="rope",
        feed_forward="relu2",
        bias=False,
        parametrization="mup",
        base_head_dim=16,
        scan_layers=True,
    ),
    tokenizer=gptjax.TokenizerConfig(kind="byte"),
    data=gptjax.DataConfig(path="stdlib://", prepared_dir=f"{folder.name}/data"),
    optimizer=gptjax.OptimizerConfig(
        peak_learning_rate=4e-3, schedule="linear", warmup_steps=STEPS // 10, final_learning_rate_fraction=0.0
    ),
    training=gptjax.TrainingConfig(
        steps=STEPS,
        batch_size=16,
        log_every_steps=max(1, STEPS // 4),
        eval_every_steps=0,
        eval_sequences=512,
        sample_every_steps=0,
        sample_tokens=1,
        sample_prompt="def ",
    ),
    checkpoint=gptjax.CheckpointConfig(every_steps=0, keep_newest=1),
)


def loss_of_width(width: int) -> float:
    """Train a model of this width, and give its loss on text that it has not seen."""
    model = dataclasses.replace(base.model, model_dim=width, num_heads=width // 16)
    config = dataclasses.replace(base, model=model, run_dir=f"{folder.name}/width{width}")
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        return gptjax.train(config, console=gptjax.Console(nowhere))["val_loss"]


def matrices(width: int) -> int:
    """Parameters that a byte is multiplied with."""
    model = dataclasses.replace(base.model, model_dim=width, num_heads=width // 16, vocab_size=272)
    parts = gptjax.parameter_counts(model)
    return parts["attention"] + parts["feed_forward"] + parts["embedding"]


widths = (32, 48, 80)
losses = [loss_of_width(width) for width in widths]
law = power_law(np.array([[matrices(width)] for width in widths], float), np.array(losses))
predicted = law(matrices(128))
prediction = Path(folder.name, "prediction.txt")
prediction.write_text(f"width 128: {predicted:.4f} nats a byte\n", encoding="utf-8")
print("written down:", prediction.read_text(encoding="utf-8"), end="")

# %% [markdown]
# ## What came of it
#
# Only now the fourth is trained. Its star should lie on the line, or a little above: a power law without a floor
# promises too much in the long run. A study that is meant to be relied on has more sizes, several numbers of tokens,
# and an interval around what it says; `docs/scaling.md` has one.

# %%
found = loss_of_width(128)
print(f"predicted {predicted:.4f}, measured {found:.4f}: {100 * (predicted / found - 1):+.1f} %")
study_figure = Figure(figsize=(7, 4.2), layout="constrained")
axes = study_figure.subplots()
line = np.geomspace(matrices(32) * 0.8, matrices(128) * 1.2, 50)
axes.plot(line, [law(n) for n in line], label=f"power law, exponent {law.exponents[0]:.3f}")
axes.plot([matrices(width) for width in widths], losses, "o", label="fitted to")
axes.plot(matrices(128), found, "*", markersize=14, label="trained afterwards")
axes.set(title="loss over parameters", xscale="log", xlabel="parameters, with the head", ylabel="nats a byte")
axes.legend()
study_figure

# %% [markdown]
# ## What next
#
# `python -m gptjax study configs/studies/ladder.py` trains five widths for three budgets each and predicts the fifth,
# `python -m gptjax fit` fits any table, and `python -m gptjax plan` plans any run.

# %%
folder.cleanup()
