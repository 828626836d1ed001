"""What TRL's trainers minimize, is minimized here: DPO, IPO and GRPO of one model on one batch, with their gradients.

PPO is not among them: TRL's is an experiment that makes its own rollouts, and has no loss of a given batch to call.
Shape suffixes: B rows, T tokens.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from gptjax.config import ModelConfig, TokenizerConfig  # noqa: E402  after what may be missing
from gptjax.interop import huggingface  # noqa: E402
from gptjax.model.gpt import GPT  # noqa: E402
from gptjax.text.tokenizer_training import train_tokenizer  # noqa: E402
from gptjax.training.policy_losses import group_advantages, policy_loss  # noqa: E402
from gptjax.training.preference_losses import log_probabilities, pair_loss  # noqa: E402
from gptjax.training.state import init_params  # noqa: E402
from gptjax.tuning_config import PreferenceConfig, RlConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

B, PROMPT, ANSWER = 4, 5, 6
LENGTHS = np.array([6, 3, 4, 5])
RANDOM = np.random.default_rng(0)
TOKENS_BT = RANDOM.integers(16, 272, (B, PROMPT + ANSWER)).astype(np.int32)
MASK_BT = (np.arange(PROMPT + ANSWER) >= PROMPT) & (np.arange(PROMPT + ANSWER) < PROMPT + LENGTHS[:, None])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reference as directories, and our parameters of both."""
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    config = ModelConfig(
        num_layers=2,
        model_dim=32,
        num_heads=2,
        context_length=32,
        vocab_size=tokenizer.vocab_size,
        norm="rmsnorm",
        positions="rope",
        feed_forward="swiglu",
        qk_norm=True,
        bias=False,
        compute_dtype="float32",
    )
    both = []
    for seed, name in enumerate(("policy", "reference")):
        params = jax.tree.map(lambda x: 3 * x, init_params(GPT(config), jax.random.key(seed)))
        (folder / name).mkdir()
        huggingface.write_model(folder / name, config, params)
        tokenizer.save(folder / name / "tokenizer.json")
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
            )
        )
        both.append(params)
    return folder, config, both


def trainer_of(kind, folder, dataset, reference=False, **settings):
    import trl

    load = transformers.AutoModelForCausalLM.from_pretrained
    arguments = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 2,
        "output_dir": str(folder / "out"),
    }
    config = getattr(trl, f"{kind}Config")(**arguments, **settings)
    more = {"ref_model": load(folder / "reference", dtype=torch.float32)} if reference else {}
    if kind == "GRPO":
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    return getattr(trl, f"{kind}Trainer")(
        model=load(folder / "policy", dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(dataset),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
        **more,
    )


def compare_gradients(trainer, folder, config, ours):
    """Theirs are written as if they were weights, and read as ours."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.grad)
    trainer.model.save_pretrained(folder / "gradients")
    theirs = huggingface.read_params(folder / "gradients", config)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max() + 1e-8)


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "dpo"), ("ipo", "ipo")])
def test_preferences(theirs, ours, models, tmp_path):
    folder, config, (policy, reference) = models
    settings = PreferenceConfig(loss=ours, beta=0.3)
    model = GPT(config)
    rows = {"tokens": jnp.asarray(TOKENS_BT), "loss_mask": jnp.asarray(MASK_BT, jnp.float32)}
    reference_B = log_probabilities(model, reference, rows)
    pairs = {name: value.reshape(B // 2, 2, -1) for name, value in rows.items()}
    batch = pairs | {"reference": reference_B.reshape(B // 2, 2)}

    def mean(params):
        total, sums = pair_loss(model, settings)(params, batch, None)
        return total / sums["weight"]

    loss, gradient = jax.jit(jax.value_and_grad(mean))(policy)
    words = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    trainer = trainer_of("DPO", folder, words, reference=True, beta=0.3, loss_type=[theirs])
    order = [0, 2, 1, 3]  # all chosen ones first
    inputs = {
        "input_ids": torch.tensor(TOKENS_BT[order], dtype=torch.long),
        "attention_mask": torch.tensor(
            (np.arange(PROMPT + ANSWER) < PROMPT + LENGTHS[:, None])[order].astype(np.int64)
        ),
        "completion_mask": torch.tensor(MASK_BT[order].astype(np.int64)),
    }
    trainer.model.eval()  # nothing else depends on it than what is logged
    expected = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-5)
    expected.backward()
    compare_gradients(trainer, tmp_path, config, gradient)


@pytest.mark.parametrize(("theirs", "aggregate"), [("grpo", "answer"), ("bnpo", "token"), ("dr_grpo", "constant")])
def test_groups(theirs, aggregate, models, tmp_path):
    """With a penalty, clipped on both sides, and old log-probabilities that are not the policy's own."""
    folder, config, (policy, _) = models
    rl = RlConfig(clip=0.2, temperature=1.0, answer_tokens=ANSWER)
    shape = (B, PROMPT + ANSWER)
    old_BT, reference_BT = (RANDOM.normal(-5.6, 0.3, shape).astype(np.float32) for _ in range(2))
    advantages_B = group_advantages(np.array([[0.0, 1.0, 0.5, 2.0]]), True).ravel()
    lengths_B1 = LENGTHS[:, None]
    weight = {"token": 1.0, "answer": 1.0 / lengths_B1, "constant": 1.0 / ANSWER}[aggregate]
    batch = {
        "tokens": TOKENS_BT,
        "loss_mask": MASK_BT.astype(np.float32),
        "old_logprobs": old_BT,
        "advantages": (MASK_BT * advantages_B[:, None]).astype(np.float32),
        "token_weight": (MASK_BT * weight).astype(np.float32),
        "row_weight": (LENGTHS if aggregate == "token" else np.ones(B)).astype(np.float32),
        "reference_logprobs": reference_BT,
    }
    loss_of = policy_loss(GPT(config), rl, clip_high=0.28, kl_coefficient=0.04)

    def mean(params):
        total, sums = loss_of(params, jax.tree.map(jnp.asarray, batch), None)
        return total / sums["weight"]

    loss, gradient = jax.jit(jax.value_and_grad(mean))(policy)
    settings = {"loss_type": theirs, "beta": 0.04, "epsilon": 0.2, "epsilon_high": 0.28, "temperature": 1.0}
    trainer = trainer_of(
        *("GRPO", folder, [{"prompt": "a"}] * 4),
        **settings,
        max_completion_length=ANSWER,
        num_generations=2,
        use_bias_correction_kl=False,  # a later estimator than GRPO's own
    )
    inputs = {
        "prompt_ids": torch.tensor(TOKENS_BT[:, :PROMPT], dtype=torch.long),
        "prompt_mask": torch.ones((B, PROMPT), dtype=torch.long),
        "completion_ids": torch.tensor(TOKENS_BT[:, PROMPT:], dtype=torch.long),
        "completion_mask": torch.tensor(MASK_BT[:, PROMPT:].astype(np.int64)),
        "advantages": torch.tensor(advantages_B, dtype=torch.float32),
        "old_per_token_logps": torch.tensor(old_BT[:, PROMPT:]),
        "ref_per_token_logps": torch.tensor(reference_BT[:, PROMPT:]),
        "num_items_in_batch": torch.tensor(float(LENGTHS.sum())),
    }
    trainer.model.eval()
    expected = trainer._compute_loss(trainer.model, inputs)
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-5, atol=1e-6)
    expected.backward()
    compare_gradients(trainer, tmp_path, config, gradient)
