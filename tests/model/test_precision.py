"""Float32 means float32: which products leave their precision to the backend, which would round to ten bits or less."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import OptimizerConfig
from gptjax.model import lora
from gptjax.model.cache import empty_cache
from gptjax.model.gpt import GPT
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.policy_losses import judge_values, policy_loss
from gptjax.training.preference_losses import scores
from gptjax.training.state import draw_trained, init_params
from gptjax.tuning_config import LoraConfig, RlConfig

ADAPT = LoraConfig(rank=2)
B, T = 8, 16


def of_tokens():
    """A batch with all that any of the losses below reads."""
    names = ("loss_mask", "old_logprobs", "reference_logprobs", "advantages", "token_weight", "old_values", "returns")
    batch = {name: jnp.ones((B, T + 1)) for name in names}
    return batch | {"tokens": jnp.ones((B, T + 1), jnp.int32), "row_weight": jnp.ones(B), "ends": jnp.ones((B, T))}


def programs(config):
    """Functions of parameters, adapters and a batch, by what they are."""
    model, critic = GPT(dataclasses.replace(config, value_head=False)), GPT(config)
    optimizer = make_optimizer(OptimizerConfig(kind="muon"))

    def joined(params, trained):
        return lora.join(params, trained, ADAPT)

    def reinforced(params, trained, batch):
        params = {"policy": joined(params, trained), "critic": params}
        options = {"critic": critic, "policy_of": lambda params: params["policy"], "kl_coefficient": 0.1}
        return policy_loss(model, RlConfig(), clip_high=0.2, chunk_tokens=16, **options)(params, batch, None)[0]

    def decoded(params, _, batch):
        tokens_BT = batch["tokens"][:, :4]
        _, cache = model.apply({"params": params}, tokens_BT, cache=empty_cache(model.config, B, T))
        return model.apply({"params": params}, tokens_BT[:, :1], cache=cache)[0]

    return {
        "text": jax.grad(lambda p, _, b: language_model_loss(model)(p, b, None)[0]),
        "text in chunks": jax.grad(lambda p, _, b: language_model_loss(model, chunk_tokens=16)(p, b, None)[0]),
        "reinforcement": jax.grad(reinforced, argnums=(0, 1)),
        "scores": jax.grad(lambda p, _, b: scores(critic, p, b | {"tokens": b["tokens"][:, 1:]}).sum()),
        "values": lambda p, _, b: judge_values(critic, p, b),
        "decoding": decoded,
        "merged adapters": lambda p, trained, _: lora.merge(joined(p, trained)),
        "Muon": lambda p, *_: optimizer.update(p, optimizer.init(p), p),
    }


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
def test_products_of_float32_say_how_exact_they_are(switched_on, equations, kernel):
    """Everywhere: all bits, but in Muon, whose result is approximate by design."""
    config = dataclasses.replace(
        switched_on, compute_dtype="float32", attention_kernel=kernel, value_head=True, embedding_dropout=0.0
    )
    params = init_params(GPT(config), jax.random.key(0))
    trained = draw_trained(GPT(config), ADAPT, jax.random.key(0))
    for name, program in programs(config).items():
        made = equations(jax.make_jaxpr(program)(params, trained, of_tokens()).jaxpr)
        products = [one for one in made if one.primitive.name in ("dot_general", "ragged_dot", "conv_general_dilated")]
        assert products, name
        for one in products:
            exact = jax.lax.Precision.HIGH if name == "Muon" else jax.lax.Precision.HIGHEST
            assert one.params["precision"] == (exact, exact), f"{name}: {one.source_info.traceback}"
