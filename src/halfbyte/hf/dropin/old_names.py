"""Arguments of 2023 to 2025 that have another name now, or none: of the configurations of transformers and TRL.

Read in transformers 4.31 to 5.23 and TRL 0.4 to 1.16. An argument that is in none of these tables and that the library
does not know stays the library's error.
"""

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "xpu_backend": "ddp_backend",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "use_liger": "use_liger_kernel",
    "max_seq_length": "max_length",
    "max_target_length": "max_completion_length",
}
"""Old name of a configuration's argument: its name now."""

WITHOUT_MEANING: Mapping[str, str] = {
    "overwrite_output_dir": "files are written over as it is",
    "save_safetensors": "weights are always saved so",
    "half_precision_backend": "there is one",
    "fp16_backend": "there is one",
    "fp16_opt_level": "it was Apex's",
    "use_mps_device": "a device is found as it is",
    "use_ipex": "halfbyte's kernels serve a CPU",
    "jit_mode_eval": "models are not traced",
    "mp_parameters": "it was SageMaker's",
    "ray_scope": "it was Ray's",
    "tpu_num_cores": "there is no TPU",
    "tpu_metrics_debug": "there is no TPU",
    "past_index": "no model of today returns its past so",
    "use_legacy_prediction_loop": "there is one loop",
    "include_tokens_per_second": "it is measured from outside",
    "num_of_sequences": "packing takes what fits",
    "chars_per_token": "packing counts tokens",
    "dataset_batch_size": "it only was the speed of the preparation",
    "infinite": "max_steps alone says how long training is",
    "max_prompt_length": "prompt and answer together are cut to max_length",
    "max_target_length": "prompt and answer together are cut to max_length",
    "label_pad_token_id": "it is -100",
    "is_encoder_decoder": "the model says it",
    "reference_free": "loss_type says it",
    "model_adapter_name": "the adapter that is active is trained",
    "ref_adapter_name": "the reference is the model without its adapter",
    "force_use_ref_model": "the reference is the model without its adapter",
    "padding_value": "the tokenizer says it",
}
"""Argument that is gone, and what it meant is as it was or means nothing here: why."""

TO_CONFIGURATION = (
    "dataset_text_field",
    "max_seq_length",
    "max_length",
    "max_prompt_length",
    "max_target_length",
    "packing",
    "eval_packing",
    "dataset_num_proc",
    "dataset_batch_size",
    "dataset_kwargs",
    "neftune_noise_alpha",
    "model_init_kwargs",
    "num_of_sequences",
    "chars_per_token",
    "infinite",
    "beta",
    "label_smoothing",
    "loss_type",
    "label_pad_token_id",
    "padding_value",
    "truncation_mode",
    "disable_dropout",
    "precompute_ref_log_probs",
    "generate_during_eval",
    "is_encoder_decoder",
    "reference_free",
    "model_adapter_name",
    "ref_adapter_name",
    "force_use_ref_model",
    "desirable_weight",
    "undesirable_weight",
)
"""Arguments that TRL's trainers took themselves, before their configurations did."""
