"""gptjax: the GPT-3.5 recipe, whole, in JAX.

The library's face. Names are loaded when they are first used (PEP 562), so that `import gptjax` costs
nothing and a command line is parsed before JAX is imported.
"""

import importlib

_MODULE_OF = {
    "CheckpointConfig": "gptjax.config",
    "GrpoConfig": "gptjax.config",
    "LoraConfig": "gptjax.config",
    "PpoConfig": "gptjax.config",
    "PreferenceConfig": "gptjax.config",
    "RlConfig": "gptjax.config",
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
    "train_tokenizer": "gptjax.text.tokenizer_training",
    "Message": "gptjax.text.chat",
    "chat_format": "gptjax.text.chat",
    "load_tokenizer": "gptjax.text.files",
    "token_labels": "gptjax.text.labels",
    "prepare": "gptjax.data.prepare",
    "DistributedConfig": "gptjax.parallel.launch",
    "connect": "gptjax.parallel.distributed",
    "make_mesh": "gptjax.parallel.mesh",
    "bytes_by_kind": "gptjax.parallel.collectives",
    "collectives": "gptjax.parallel.collectives",
    "parameter_counts": "gptjax.model.accounting",
    "traffic": "gptjax.model.accounting",
    "training_flops_per_token": "gptjax.model.accounting",
    "GPT": "gptjax.model.gpt",
    "init_state": "gptjax.training.state",
    "language_model_loss": "gptjax.training.losses",
    "make_optimizer": "gptjax.training.optimizer",
    "make_train_step": "gptjax.training.step",
    "train": "gptjax.stages.train",
    "Run": "gptjax.training.load",
    "load_run": "gptjax.training.load",
    "Console": "gptjax.training.metrics",
    "plot_loss": "gptjax.training.metrics",
    "read_metrics": "gptjax.training.metrics",
    "SamplingConfig": "gptjax.sampling.config",
    "generate": "gptjax.sampling.generate",
    "stream": "gptjax.sampling.generate",
    "chat": "gptjax.sampling.chat",
    "rollout": "gptjax.sampling.rollout",
    "evaluate": "gptjax.evaluation.perplexity",
    "evaluate_documents": "gptjax.evaluation.documents",
    "attention_weights": "gptjax.evaluation.inside",
    "logit_lens": "gptjax.evaluation.inside",
    "Study": "gptjax.scaling.study",
    "fit_loss": "gptjax.scaling.fit",
    "make_plan": "gptjax.scaling.plan",
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
