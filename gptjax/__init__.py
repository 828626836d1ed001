"""gptjax: the GPT-3.5 recipe, whole, in JAX.

The library's face. Names are loaded when they are first used (PEP 562), so that `import gptjax` costs
nothing and a command line is parsed before JAX is imported.
"""

import importlib

_MODULE_OF = {
    "CheckpointConfig": "gptjax.config",
    "Config": "gptjax.config",
    "DataConfig": "gptjax.config",
    "GuardConfig": "gptjax.config",
    "MeshConfig": "gptjax.config",
    "ModelConfig": "gptjax.config",
    "OptimizerConfig": "gptjax.config",
    "TokenizerConfig": "gptjax.config",
    "TrainingConfig": "gptjax.config",
    "load_config": "gptjax.config_files",
    "UserError": "gptjax.errors",
    "Tokenizer": "gptjax.text.tokenizer",
    "train_tokenizer": "gptjax.text.tokenizer",
    "load_tokenizer": "gptjax.text.files",
    "prepare": "gptjax.data.prepare",
    "DistributedConfig": "gptjax.parallel.launch",
    "connect": "gptjax.parallel.distributed",
    "GPT": "gptjax.model.gpt",
    "train": "gptjax.stages.pretrain",
    "Run": "gptjax.training.load",
    "load_run": "gptjax.training.load",
    "plot_loss": "gptjax.training.metrics",
    "read_metrics": "gptjax.training.metrics",
    "SamplingConfig": "gptjax.sampling.config",
    "generate": "gptjax.sampling.generate",
    "stream": "gptjax.sampling.generate",
    "evaluate": "gptjax.evaluation.perplexity",
    "evaluate_documents": "gptjax.evaluation.documents",
    "attention_weights": "gptjax.evaluation.inside",
    "logit_lens": "gptjax.evaluation.inside",
    "plot_attention": "gptjax.evaluation.pictures",
    "plot_logit_lens": "gptjax.evaluation.pictures",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
