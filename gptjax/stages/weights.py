"""What a stage trains of a model: all of its parameters, or adapters beside them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model import lora
from gptjax.model.accounting import adapter_parameters
from gptjax.model.gpt import GPT, VALUE_HEAD, Params
from gptjax.stages import start
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.losses import Loss
from gptjax.training.state import TrainState, abstract, draw_params, draw_trained, state_of


class Weights(NamedTuple):
    """Parameters that are trained, those that are not, and how the two make a model."""

    frozen: Params | None
    """None: all are trained."""
    new: Callable[[], Params]
    """Those that are trained, as a run begins."""
    draw: Callable[[jax.Array], Params]
    """The same of a random key, for their shapes."""
    join: Callable[[Params, Params | None], Params]
    """What the model takes, from those that are trained and those that are not; in a compiled step."""
    whole: Callable[[Params], Params]
    """A model's parameters as any, from those that are trained: to evaluate, to sample, to be kept."""

    def loss(self, of_model: Loss) -> Loss:
        """A loss of a model's parameters as the train step takes it."""
        if self.frozen is None:
            return of_model
        return lambda params, batch, key: of_model(self.join(*params), batch, key)

    def new_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """The state of a run that begins."""
        return state_of(self.new(), optimizer)

    def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """Its shapes, types and shardings."""
        return abstract(lambda key: state_of(self.draw(key), optimizer))


def weights_of(config: Config, model: GPT, log: Callable[[str], None], tokenizer: Tokenizer | None = None) -> Weights:
    """What is trained of a model that begins as `model.init_from` says, under the current mesh.

    Args:
        tokenizer: for `model.init_embeddings`; None: of stages that do not begin with drawn parameters.

    Raises:
        UserError: adapters of a model that is drawn.
    """
    draw = functools.partial(draw_trained, model, config.lora)
    if not config.lora.rank:

        def new() -> Params:
            if config.model.init_from:
                return start.start_params(config, model, log)
            params = draw_params(model, config.training.seed)
            if not config.model.init_embeddings:
                return params
            if tokenizer is None:
                raise UserError(f"model.init_embeddings is of pretraining, and this is stage {config.stage}")
            return start.with_word_vectors(config.model.init_embeddings, tokenizer, params, log)

        return Weights(None, new, draw, lambda params, _: params, lambda params: params)
    if not config.model.init_from:
        raise UserError(
            "lora.rank adapts a model that has learned something: give --model.init-from RUN, or --lora.rank 0"
        )
    base = start.start_params(config, model, log)
    heads = {name: base[name] for name in VALUE_HEAD if name in base}

    def new_adapters() -> Params:
        adapters = jax.jit(lambda key: draw(key)["adapters"])(jax.random.key(config.training.seed))
        # Copies, for a state is donated, and the base stays.
        return {name: leaf + 0 for name, leaf in heads.items()} | {"adapters": adapters}

    def join(trained: Params, frozen: Params | None) -> Params:
        return lora.join(frozen, trained, config.lora)

    merged = jax.jit(lambda trained, frozen: lora.merge(join(trained, frozen)))
    log(
        f"adapters of rank {config.lora.rank}: {adapter_parameters(model.config, config.lora):,} parameters are trained"
    )
    return Weights(base, new_adapters, draw, join, lambda trained: merged(trained, base))
