"""Fields of a Hugging Face `config.json` that no family computes with: why they may be ignored, or what to do instead.

What is in neither table and in no family's is refused, unless it is off: null, false or 0.
"""

from collections.abc import Mapping
from typing import Any

_IGNORED = {
    "says what the files are, not what is computed": "architectures model_type torch_dtype dtype transformers_version "
    "name_or_path tokenizer_class finetuning_task",
    "is code or a setting of another program, which is never run here": "auto_map custom_pipelines "
    "transformers.js_config unsloth_version unsloth_fixed",
    "names a token, of which the tokenizer's files know more": "bos_token_id eos_token_id pad_token_id unk_token_id "
    "sep_token_id cls_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id eos_token_ids",
    "says how to sample, which SamplingConfig says here": "do_sample temperature top_k top_p min_p typical_p "
    "repetition_penalty length_penalty diversity_penalty encoder_repetition_penalty epsilon_cutoff eta_cutoff "
    "num_beams num_beam_groups num_return_sequences early_stopping max_length min_length max_new_tokens "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens "
    "exponential_decay_length_penalty remove_invalid_values output_scores return_dict_in_generate "
    "task_specific_params prefix",
    "says what a call returns, or how it is run": "use_cache cache_implementation output_attentions "
    "output_hidden_states return_dict output_past attn_implementation use_flash_attn use_flash_attention "
    "use_flash_attention_2 chunk_size_feed_forward torchscript use_bfloat16 xla_device tf_legacy_loss is_decoder "
    "tie_last_hidden_states",
    "is about a head that a language model has not": "num_labels id2label label2id problem_type summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout classifier_dropout",
    "is about training that is over": "pretraining_tp gradient_checkpointing neftune_noise_alpha n_special "
    "predict_special_tokens tokenizer_padding_side",
    "is a length of texts; how far positions reach is max_position_embeddings": "max_sequence_length max_seq_length "
    "max_seq_len seq_length model_max_length tokenizer_model_max_length n_ctx",
    "is a dropout by another family's name, which transformers does not read": "attention_probs_dropout_prob "
    "hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop",
    "is another family's name: gpt2 reads activation_function, Gemma hidden_activation": "hidden_act",
    "says that the family is Llama, as model_type does": "is_llama_config",
}
IGNORED = {name: reason for reason, names in _IGNORED.items() for name in names.split()}
"""By name, the reason why a field changes nothing of what a model computes; where a family has the field, it counts."""

IGNORED_WHEN: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "rope_interleaved": ((False,), "pairs of rotated dimensions are half a head apart, as they are here"),
    "pruned_heads": (({},), "no head was taken out"),
    "per_layer_config": (({},), "no layer differs from the others"),
    "partial_rotary_factor": ((1,), "all of each head is rotated, as these families do"),
    "rotary_pct": ((1,), "all of each head is rotated, as these families do"),
}
"""By name, the values with which a field changes nothing, and why."""

_QUANTIZED = (
    "its weights are quantized, which gptjax does not read; take the model as it was before that, or write it with "
    "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).dequantize().save_pretrained(OTHER_FOLDER)"
)
REFUSED = {
    "quantization_config": _QUANTIZED,
    "compression_config": _QUANTIZED,
    "quantization": "its weights are quantized by MLX, which gptjax does not read; take the model as it was before",
}
"""By name, why a model with this field is refused, and the way out."""
