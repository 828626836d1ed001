"""Pictures of what a model does. Figures are drawn without pyplot, so that they touch no global state.

Shape suffixes: T tokens, S tokens looked at, N heads, L layers.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.inside import Lens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 64
"""More do not fit a picture: their labels could not be read."""
MAX_PANELS = 192
"""Heads of a picture."""
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS"),
    *("Noto Sans CJK JP", "Droid Sans Fallback"),
)
"""Fonts with Chinese characters; the first that is installed is used where matplotlib's own has none."""


def plot_attention(
    weights_LNTS: np.ndarray, labels: Sequence[str], path: str | os.PathLike | None = None, layers: Sequence[int] = ()
) -> "Figure":
    """Every head's attention: a row of panels for each layer, a panel for each head.

    Args:
        labels: the tokens, as they are to be shown.
        path: where to write the figure as well.
        layers: numbers of the layers, counted from 0; none: all.

    Raises:
        UserError: matplotlib is missing, or more tokens or heads than fit a picture.
    """
    require_matplotlib()
    layers = [*layers] or [*range(len(weights_LNTS))]
    labels = [_drawable(label) for label in labels]
    num_heads, T = weights_LNTS.shape[1], len(labels)
    require_fits(T)
    require_panels(len(layers), num_heads)
    side = max(1.6, 0.13 * T)
    figure = new_figure(num_heads * side + 1.2, len(layers) * side + 0.9)
    axes = figure.subplots(len(layers), num_heads, squeeze=False)
    size = 7 if T <= 24 else 4.5
    for row, layer in enumerate(layers):
        for head in range(num_heads):
            panel = axes[row, head]
            # The root shows small weights, too; the scale is the same everywhere. What comes later is white.
            seen_TS = np.where(np.tri(T, dtype=bool), np.sqrt(weights_LNTS[layer, head]), np.nan)
            image = panel.imshow(seen_TS, cmap="magma_r", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_linewidth(0.4)
            if row == 0:
                panel.set_title(f"head {head}", fontsize=8)
            if row == len(layers) - 1:
                panel.set_xticks(range(T), labels, rotation=90, fontsize=size, family=_fonts())
            if head == 0:
                panel.set_yticks(range(T), labels, fontsize=size, family=_fonts())
                panel.set_ylabel(f"layer {layer}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.01)
    marks = (0, 0.01, 0.1, 0.25, 0.5, 1)
    bar.set_ticks([math.sqrt(mark) for mark in marks], labels=[f"{mark:g}" for mark in marks], fontsize=7)
    figure.suptitle("attention: each row is a token, its columns the tokens that it looks at", fontsize=9)
    return saved(figure, path)


def plot_logit_lens(
    lens: Lens,
    labels: Sequence[str],
    predicted_LT: Sequence[Sequence[str]],
    path: str | os.PathLike | None = None,
    layers: Sequence[int] = (),
) -> "Figure":
    """What each layer would predict after each token, coloured by its probability, the last layer at the top.

    Args:
        labels: the tokens, as they are to be shown.
        predicted_LT: the predicted tokens, as they are to be shown.
        layers: what the rows are called; none: 0, 1, 2 and on.

    Raises:
        UserError: matplotlib is missing, or more tokens than fit a picture.
    """
    require_matplotlib()
    L, T = lens.probability_LT.shape
    labels = [_drawable(label) for label in labels]
    require_fits(T)
    figure = new_figure(0.75 * T + 1.8, 0.32 * L + 1.5)
    axes = figure.subplots()
    image = axes.imshow(lens.probability_LT, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer in range(L):
        for t in range(T):
            dark = lens.probability_LT[layer, t] < 0.6
            text = _drawable(predicted_LT[layer][t])
            text = text if len(text) <= 9 else text[:8] + "…"
            place = {"ha": "center", "va": "center", "fontsize": 6.5, "family": _fonts()}
            axes.text(t, layer, text, color="white" if dark else "black", **place)
    axes.set_xticks(range(T), labels, rotation=60, ha="right", fontsize=7, family=_fonts())
    axes.set_yticks(range(L), [f"after layer {layer}" for layer in layers or range(L)], fontsize=7)
    axes.set_title("the next token that each layer would predict, and its probability", fontsize=9)
    figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=7)
    return saved(figure, path)


def plot_positions(losses: Mapping[str, Sequence[float | None]], path: str | os.PathLike | None = None) -> "Figure":
    """Loss in nats a token against the number of tokens before, one line for each name.

    Args:
        losses: by name the loss with 0, 1, 2, ... tokens before; None is unknown, as the first always is.
        path: where to write the figure as well.

    Raises:
        UserError: matplotlib is missing.
    """
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot(xlabel="tokens before, in the window", ylabel="loss (nats per token)")
    for name, values in losses.items():
        points = [(t, value) for t, value in enumerate(values) if value is not None]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return saved(figure, path)


def require_fits(num_tokens: int, context_length: int = MAX_TOKENS) -> None:
    """
    Raises:
        UserError: more tokens than fit a picture, or the context of the model.
    """
    if num_tokens > min(MAX_TOKENS, context_length):
        which = "that fit a picture" if context_length >= MAX_TOKENS else "of the model's context"
        raise UserError(
            f"the text has {num_tokens} tokens, more than the {min(MAX_TOKENS, context_length)} {which}; shorten it"
        )


def require_panels(num_layers: int, num_heads: int) -> None:
    """
    Raises:
        UserError: more heads than fit a picture.
    """
    panels = num_layers * num_heads
    if panels > MAX_PANELS:
        raise UserError(
            f"{num_layers} layers of {num_heads} heads are {panels} panels, more than the {MAX_PANELS} that fit a "
            f"picture; choose at most {max(1, MAX_PANELS // num_heads)} with --layer"
        )


def require_picture(path: str | os.PathLike) -> None:
    """
    Raises:
        UserError: matplotlib is missing, or it draws no picture of this file's kind.
    """
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if os.path.splitext(path)[1].removeprefix(".").lower() not in kinds:
        raise UserError(f"{path} names no kind of picture; its name may end in .{', .'.join(sorted(kinds))}")


def require_matplotlib() -> None:
    """
    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('pictures need matplotlib: pip install "gptjax[log]"')


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this many inches.

    Raises:
        UserError: matplotlib is missing.
    """
    require_matplotlib()

    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@functools.cache
def _fonts() -> list[str]:
    """matplotlib's own font, and one with Chinese characters where one is installed."""
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]


@functools.cache
def _drawable(text: str) -> str:
    """The text, with what no font of `_fonts` can draw as the number of its character."""
    from matplotlib import font_manager

    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in _fonts()]
    # A dollar sign would start a formula.
    shown = (c if any(font.get_char_index(ord(c)) for font in fonts) else f"U+{ord(c):04X}" for c in text)
    return "".join(shown).replace("$", r"\$")


def saved(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    """The figure, written to a file if one is named.

    Raises:
        UserError: it cannot be written.
    """
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {path}: {error}") from error
    return figure
