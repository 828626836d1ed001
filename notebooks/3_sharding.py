# %% [markdown]
# # Sharding, seen
#
# A large model does not fit one device, and one device would take too long. So arrays are cut into pieces that lie on
# several devices, and the devices send each other what they lack. In JAX that is not another program: the same function
# is compiled for a mesh of devices, and the compiler puts in what has to be sent.
#
# All of it can be watched without an accelerator: JAX can take a CPU for eight devices. They are no faster than one,
# but cut, send and compute as eight would. That has to be said before JAX starts. On two CPU cores this notebook takes
# less than a minute.

# %%
# %matplotlib inline
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from gptjax.parallel import platform, sharding

platform.configure()

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gptjax import (
    GPT,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    bytes_by_kind,
    collectives,
    init_state,
    language_model_loss,
    make_mesh,
    make_optimizer,
    make_train_step,
    parameter_counts,
    presets,
    traffic,
)

STEPS = 30
assert jax.device_count() == 8, "JAX was used before its eight devices were asked for: restart the kernel"
jax.devices()

# %% [markdown]
# ## Meshes
#
# A mesh arranges devices along named axes. gptjax has four, and each cuts something else:
#
# | axis | what its devices share out | what each of them holds |
# |---|---|---|
# | `data` | the sequences of a batch | the whole model |
# | `fsdp` | the sequences, and the model's storage | a piece of each parameter, made whole just before it is used |
# | `context` | each sequence, and the model's storage | the same |
# | `tensor` | heads, feed-forward width and vocabulary | a piece of each matrix, and computes with that piece |
#
# The product of the axes is the number of devices. Five meshes, the first of one device to compare with:

# %%
MESHES = {
    "one device": MeshConfig(data=1, fsdp=1, tensor=1),
    "data 8": MeshConfig(data=8, fsdp=1, tensor=1),
    "fsdp 8": MeshConfig(data=1, fsdp=8, tensor=1),
    "tensor 8": MeshConfig(data=1, fsdp=1, tensor=8),
    "fsdp 2 × context 2 × tensor 2": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}


def mesh_of(name):
    return make_mesh(MESHES[name], jax.devices()[:1] if name == "one device" else None)


print(mesh_of("fsdp 2 × context 2 × tensor 2"))

# %% [markdown]
# Which dimension of which array is cut along which axis is one table. Modules name their dimensions ("embed" is the
# width of a stored parameter, "ffn" the width of the feed-forward layer), and nothing but this table knows the mesh.

# %%
for name, axes in sharding.TABLE.items():
    print(f"{name:10} {axes or 'not cut'}")

# %% [markdown]
# ## Where parameters lie
#
# Under `jax.set_mesh` a fresh state is born in its pieces: no device first holds all of it. The type of an array says
# how it is cut: `[256@tensor,64@(fsdp,context)]` has rows in as many pieces as `tensor` has devices, and columns in as
# many as `fsdp` and `context` have together. It is the same on every mesh; the pieces are not.

# %%
config = ModelConfig(num_layers=1, model_dim=64, num_heads=8, context_length=64, vocab_size=256)
model, optimizer = GPT(config), make_optimizer(OptimizerConfig())


def fresh_state(name):
    with jax.set_mesh(mesh_of(name)):
        return init_state(model, optimizer, seed=0)


states = {name: fresh_state(name) for name in MESHES}
print("type of the embedding:", jax.typeof(states["data 8"].params["embedding"]))
for name, state in states.items():
    print(f"{name:30} {state.params['embedding'].addressable_shards[0].data.shape} on each device")

# %% [markdown]
# The picture shows three parameters, each as the rectangle that it is, cut as it lies. In each piece stand the devices
# that hold it. With `data` all eight hold everything. With `fsdp` each holds an eighth, cut along the model's width,
# whichever dimension that is; `context` cuts the same dimension. With `tensor` the first matrix of the feed-forward
# layer is cut along its output and the second along its input: what a device computes with its piece of the first is
# just what it needs for its piece of the second. The mixed mesh does some of each.

# %%
PARAMETERS = {
    "embedding": ("embedding",),
    "feed-forward, up": ("blocks", "feed_forward", "up", "w"),
    "feed-forward, down": ("blocks", "feed_forward", "down", "w"),
}
COLORS = [f"C{device}" for device in range(8)]


def draw(panel, array):
    """The last two dimensions of an array, with the devices that hold each piece."""
    rows, columns = array.shape[-2:]
    pieces = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        (top, bottom, _), (left, right, _) = index[-2].indices(rows), index[-1].indices(columns)
        pieces.setdefault((left, top, right - left, bottom - top), []).append(device.id)
    for (left, top, width, height), devices in pieces.items():
        panel.add_patch(
            Rectangle((left, top), width, height, facecolor=COLORS[devices[0]], edgecolor="white", alpha=0.6)
        )
        text = " ".join(map(str, devices))
        panel.text(left + width / 2, top + height / 2, text, ha="center", va="center", fontsize=8)
    panel.set(xlim=(0, columns), ylim=(rows, 0), xticks=(0, columns), yticks=(0, rows))
    panel.tick_params(labelsize=7)


several = [name for name in MESHES if name != "one device"]
pieces_figure = Figure(figsize=(12, 6.5), layout="constrained")
panels = pieces_figure.subplots(len(PARAMETERS), len(several))
for row, (label, path) in zip(panels, PARAMETERS.items(), strict=True):
    for panel, name in zip(row, several, strict=True):
        array = states[name].params
        for key in path:
            array = array[key]
        draw(panel, array)
    row[0].set_ylabel(f"{label}\nrows")
for panel, name in zip(panels[0], several, strict=True):
    panel.set_title(name, fontsize=10)
for panel in panels[-1]:
    panel.set_xlabel("columns")
pieces_figure.suptitle("pieces of parameters, and the devices that hold them")
pieces_figure

# %% [markdown]
# What that saves is counted on the first device. The optimizer keeps two numbers for each parameter, its mean gradient
# and its mean squared gradient, which are cut as the parameter is. `tensor` leaves norms and positions whole, so that
# it keeps a little more than an eighth.


# %%
def bytes_on_first_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


memory_figure = Figure(figsize=(8, 2.8), layout="constrained")
axes = memory_figure.subplots()
for part, offset in (("params", -0.2), ("optimizer", 0.2)):
    sizes = [bytes_on_first_device(getattr(state, part)) / 1024 for state in states.values()]
    axes.bar(np.arange(len(states)) + offset, sizes, width=0.4, label=part)
    for place, size in enumerate(sizes):
        axes.text(place + offset, size, f"{size:.0f}", ha="center", va="bottom", fontsize=8)
axes.set_xticks(range(len(states)), states, fontsize=8)
axes.margins(y=0.12)
axes.set(ylabel="KiB on the first device", title=f"training state of {parameter_counts(config)['total']:,} parameters")
axes.legend(frameon=False)
memory_figure

# %% [markdown]
# ## What a step sends
#
# Now the train step is compiled for each mesh: the same Python function each time. The compiled program lists its
# collectives, the operations in which devices exchange something:
#
# - **all-reduce**: everybody gets the sum of what all have; for gradients, of which each device has those of its own
#   sequences, and for activations, of which with `tensor` each has a part of a sum;
# - **all-gather**: everybody gets all pieces; for parameters that lie in pieces, and for keys and values of a sequence
#   that does;
# - **reduce-scatter**: everybody gets its piece of the sum; for the gradients of keys and values. Those of `fsdp`
#   parameters are summed so on accelerators; for CPUs an all-reduce and a cut stand for it.
#
# The text is one of Python's own files, byte by byte. A batch is 8 sequences of 64 tokens, and the token after each.

# %%
BATCH, T = 8, config.context_length
text = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
starts = np.random.default_rng(0).integers(0, len(text) - T - 1, (STEPS, BATCH))
batches = text[starts[:, :, None] + np.arange(T + 1)]  # (step, sequence, token)


def arguments(step):
    """What a train step takes beside the state: one dispatch of one micro-batch, at a learning rate."""
    tokens = sharding.put_batch(batches[step][None, None])
    return {"tokens": tokens}, np.ones(1, np.int32), np.full(1, 3e-3, np.float32), 1


def compile_step(name):
    with jax.set_mesh(mesh_of(name)):
        step = make_train_step(language_model_loss(model), optimizer, dropout_seed=None, accumulates=False)
        return step.lower(states[name], *arguments(0)).compile()


compiled = {}
for name in MESHES:
    began = time.perf_counter()
    compiled[name] = compile_step(name)
    print(f"{name:30} {len(collectives(compiled[name].as_text())):3} collectives, {time.perf_counter() - began:.1f} s")

# %% [markdown]
# How many bytes must be sent can be derived by hand, and `gptjax.traffic` does so. On the left the bars are what the
# compiler's program sends, and the black marks what theory says: the compiler sends what it must, and nothing more.
#
# On the right is the same formula for GPT-2 (1558M) on eight devices, by batch size. Who holds copies sends gradients,
# which are as large as the model whatever the batch is; who computes in pieces sends activations, which grow with the
# batch. That is why `tensor` belongs where connections are fastest, and `data` between machines.

# %%
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
traffic_figure = Figure(figsize=(12, 3.6), layout="constrained")
left, right = traffic_figure.subplots(1, 2)
found = {name: bytes_by_kind(compiled[name].as_text()) for name in several}
start = np.zeros(len(several))
for kind in KINDS:
    sizes = np.array([found[name][kind] / 1024 for name in several])
    left.barh(range(len(several)), sizes, left=start, label=kind)
    start += sizes
theory = [traffic(config, MESHES[name], BATCH) for name in several]
expected = np.array([sum(t) + t.keys_values for t in theory]) / 1024  # keys and values go forth, their gradients back
left.plot(expected, range(len(several)), "k|", markersize=22, markeredgewidth=2, label="theory")
left.set_yticks(range(len(several)), several)
left.invert_yaxis()
left.set(xlabel="KiB to each device in a step", title="this model, as compiled")
left.legend(frameon=False, fontsize=8, markerscale=0.4)
left.margins(x=0.15)
np.testing.assert_allclose(start, expected, rtol=0.02)

large = ModelConfig(**(vars(presets.gpt2("1558M").model) | {"vocab_size": 50257, "compute_dtype": "bfloat16"}))
sequences = 8 * 2 ** np.arange(7)
for name in ("data 8", "fsdp 8", "tensor 8"):
    right.plot(
        sequences, [sum(traffic(large, MESHES[name], int(n))) / 2**30 for n in sequences], marker="o", label=name
    )
right.set_xscale("log", base=2)
right.set_yscale("log", base=2)
right.set(xlabel="sequences of a batch", ylabel="GiB to each device in a step", title="GPT-2 (1558M), by the formula")
right.legend(frameon=False)
right.grid(alpha=0.25)
traffic_figure

# %% [markdown]
# ## The losses agree
#
# The pieces are only worth something if they compute the same. The states began equal, since random numbers are drawn
# by place and not by device. Each mesh now trains on the same batches. Sums are taken in another order, so that the
# last digits differ, by a few times the gray band, which is the rounding of one float32; nothing else does.

# %%
losses = {}
for name in MESHES:
    state, losses[name] = states.pop(name), []
    with jax.set_mesh(mesh_of(name)):
        for step in range(STEPS):
            state, metrics = compiled[name](state, *arguments(step))
            losses[name].append(float(metrics["loss"][0]))

reference = np.array(losses["one device"])
loss_figure = Figure(figsize=(10, 3.4), layout="constrained")
left, right = loss_figure.subplots(1, 2)
for width, (name, values) in zip(np.linspace(6, 1, len(losses)), losses.items(), strict=True):
    left.plot(range(1, STEPS + 1), values, linewidth=width, label=name)
    if name != "one device":
        differences = 1e7 * (np.array(values) / reference - 1)
        right.plot(range(1, STEPS + 1), differences, ".", color=left.lines[-1].get_color(), label=name)
left.set(xlabel="step", ylabel="loss (nats per byte)", title="five lines, one on the other")
left.legend(frameon=False, fontsize=8)
right.axhspan(-1.2, 1.2, color="gray", alpha=0.2, label="rounding of one number")
right.set(xlabel="step", ylabel="relative difference (10⁻⁷)", title="difference from one device")
right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
loss_figure

# %%
for name, values in losses.items():
    np.testing.assert_allclose(values, reference, rtol=1e-5, err_msg=name)
    print(f"{name:30} loss {values[0]:.6f} → {values[-1]:.6f}")

# %% [markdown]
# `train.py` chooses a mesh by itself and says why; `--mesh.fsdp 4` and the like decide otherwise. `docs/distributed.md`
# tells how several machines become one mesh.
