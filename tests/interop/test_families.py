"""A family's fields mean what they mean in transformers: drawn configurations, fields there and left out, both ways.

What is derived of a configuration (windows, frequencies, scales, sizes) is compared for hundreds of them, with modules
of transformers that hold no numbers; logits for a few of each family.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import configurations, models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gptjax.errors import UserError  # noqa: E402
from gptjax.interop import huggingface  # noqa: E402
from gptjax.interop.configs import from_theirs, to_theirs  # noqa: E402
from gptjax.interop.families import FAMILIES  # noqa: E402
from gptjax.model.accounting import parameter_counts  # noqa: E402
from gptjax.model.gpt import GPT  # noqa: E402
from gptjax.model.layers import ACTIVATIONS  # noqa: E402
from gptjax.model.positions import rotary_factor, rotary_frequencies  # noqa: E402
from gptjax.training.state import abstract_params  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
FIXED = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
TOKENS_BT = np.random.default_rng(0).integers(0, 40, (2, 24)).astype(np.int32)


def their_model(values):
    """transformers' configuration of a `config.json`, and its model without numbers."""
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)


def derived_by_them(values):
    """What a `config.json` comes to there: what each layer sees and how it turns, scales, sizes."""
    config, model = their_model(values)
    family = config.model_type
    body = model.transformer if family == "gpt2" else model.gpt_neox if family == "gpt_neox" else model.model
    blocks = body.h if family == "gpt2" else body.layers
    attentions = [
        getattr(block, {"gpt2": "attn", "gpt_neox": "attention"}.get(family, "self_attn")) for block in blocks
    ]
    norm = getattr(blocks[0], {"gpt2": "ln_1", "apertus": "attention_layernorm"}.get(family, "input_layernorm"))
    windows = [None] * len(blocks)
    if family == "mistral":  # whose mask is made of the configuration alone
        windows = [config.sliding_window] * len(blocks)
    elif hasattr(attentions[0], "sliding_window"):
        windows = [attention.sliding_window for attention in attentions]
    context = getattr(config, "max_position_embeddings", None)
    activation = blocks[0].mlp.act if family in ("gpt2", "gpt_neox") else blocks[0].mlp.act_fn
    x = torch.linspace(-3, 3, 7)
    return {
        "windows": windows,
        "turns": [] if family == "gpt2" else their_turns(config, body.rotary_emb, windows, context),
        "scale": attentions[0].scaling,
        "softcap": (config.attn_logit_softcapping or 0.0) if family == "gemma2" else 0.0,
        "logit_softcap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "epsilon": getattr(norm, "eps", getattr(norm, "variance_epsilon", None)),
        "context": context,
        "tied": config.tie_word_embeddings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parallel": getattr(config, "use_parallel_residual", False),
        "activation": activation(x).numpy(),
    }


def their_turns(config, rotary, windows, context):
    """Frequencies and factor of each layer, in a text of the whole context."""
    made = type(rotary)(config)
    positions = torch.tensor([[0, context - 1]])
    if config.model_type != "gemma3_text":
        made(torch.zeros(1), positions)
        return [(made.inv_freq.numpy(), made.attention_scaling)] * len(windows)
    found = []
    for kind in config.layer_types:
        made(torch.zeros(1), positions, kind)
        found.append((getattr(made, f"{kind}_inv_freq").numpy(), getattr(made, f"{kind}_attention_scaling")))
    return found


def derived_by_us(config):
    c = config
    locals_ = [window is not None for window in c.layer_windows]
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    return {
        "windows": list(c.layer_windows),
        "turns": [(rotary_frequencies(c, local=local), rotary_factor(c, local=local)) for local in locals_]
        if c.positions == "rope"
        else [],
        "scale": c.resolved_query_scale_dim**-0.5,
        "softcap": c.attention_softcap,
        "logit_softcap": c.logit_softcap,
        "epsilon": c.norm_epsilon,
        "context": c.context_length,
        "tied": c.tie_embeddings,
        "parameters": parameter_counts(c)["total"],
        "parallel": c.parallel_residual,
        "activation": np.asarray(ACTIVATIONS[c.feed_forward](x)),
    }


def assert_same(ours, theirs):
    turns, their = ours.pop("turns"), theirs.pop("turns")
    activation = ours.pop("activation"), theirs.pop("activation")
    for name in theirs:
        assert ours[name] == (pytest.approx(theirs[name]) if isinstance(theirs[name], float) else theirs[name]), name
    assert len(turns) == len(their)
    for (frequencies, factor), (expected, their_factor) in zip(turns, their, strict=True):
        np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
        assert factor == pytest.approx(their_factor)
    np.testing.assert_allclose(*activation, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_mean_the_same(family):
    """Whatever fields are there, and in whichever spelling, what they come to is the same."""

    @settings(max_examples=60, **FIXED)
    @given(configurations(family, small=False))
    def run(values):
        assert_same(derived_by_us(from_theirs(values)), derived_by_them(values))

    run()


def assert_same_logits(config, theirs, folder):
    """Of the weights in a folder: both programs' logits."""
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS_BT, dtype=torch.long)).logits.numpy()
    params = huggingface.read_params(folder, config)
    found = GPT(config).apply({"params": params}, TOKENS_BT)[0][:, :, : config.vocab_size]
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same(family, tmp_path):
    """The few of which all is computed: weights so large that positions, windows and soft caps count."""

    @settings(max_examples=6, **FIXED)
    @given(configurations(family, small=True))
    def run(values):
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path)
        config = huggingface.read_config(tmp_path)
        assert config.filled() == from_theirs(values).filled()  # what transformers makes of it and writes again
        assert_same_logits(config, theirs, tmp_path)

    run()


def exported(config):
    """Their `config.json`; None where it is refused."""
    try:
        return to_theirs(config)[1]
    except UserError:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_computed_the_same(family):
    """Or it is refused."""
    families = set()

    @settings(max_examples=60, **FIXED)
    @given(models(family))
    def run(config):
        values = exported(config)
        if values is not None:
            families.add(values["model_type"])
            assert_same(derived_by_us(config), derived_by_them(values))
            assert_same(derived_by_us(from_theirs(values)), derived_by_us(config))

    run()
    assert family in families


def test_an_exported_model_has_the_same_logits(tmp_path):
    """A few of any family."""

    @settings(max_examples=12, **FIXED)
    @given(st.sampled_from([*FAMILIES]).flatmap(models).filter(exported))
    def run(config):
        draw = np.random.default_rng(0)
        shapes = abstract_params(GPT(config))
        params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.normal(size=leaf.shape), jnp.float32), shapes)
        huggingface.write_model(tmp_path, config, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert_same_logits(config, theirs, tmp_path)

    run()
