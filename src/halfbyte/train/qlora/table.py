"""Every flag of ``qlora.py``, once: its name, type, default, and what becomes of it. Imports no torch.

The flags of ``ModelArguments``, ``DataArguments``, ``TrainingArguments`` (what it inherits is in :mod:`.inherited`) and
``GenerationArguments``, in their order; last those that the paper's shell scripts or this command add.
"""

from halfbyte.train.qlora.flags import Flag, Only, Own, To
from halfbyte.train.qlora.inherited import INHERITED

MODEL: tuple[Flag, ...] = (
    Flag("model_name_or_path", str, "EleutherAI/pythia-12b", Own("the base model: a folder or a hub id")),
    Flag("trust_remote_code", bool, False, Own("run Python code that comes with the model")),
    Flag("use_auth_token", bool, False, Own("the hub's token is used wherever there is one (hf auth login)")),
)

DATA: tuple[Flag, ...] = (
    Flag("eval_dataset_size", int, 1024, Own("rows that are held out with do_eval or do_predict")),
    Flag("max_train_samples", int, None, Own("the first rows of the training data")),
    Flag("max_eval_samples", int, None, Own("the first of the rows that are held out")),
    Flag("source_max_len", int, 1024, Own("tokens of a source, cut at its end; padding goes to the longest row")),
    Flag("target_max_len", int, 256, Own("tokens of a target, cut at its end")),
    Flag(
        "dataset", str, "alpaca", Own("alpaca, alpaca-clean, chip2, self-instruct, hh-rlhf, longform, oasst1, a file")
    ),
    Flag("dataset_format", str, None, Own("alpaca, chip2, self-instruct, hh-rlhf, oasst1 or input-output")),
)

TRAINING: tuple[Flag, ...] = (
    Flag("cache_dir", str, None, Only((), "set HF_HUB_CACHE in the environment to the folder")),
    Flag("train_on_source", bool, False, Own("label the source too")),
    Flag("mmlu_split", str, "eval", Own("eval or test")),
    Flag("mmlu_dataset", str, "mmlu-fs", Own("mmlu-zs or mmlu-fs (mmlu); from ./data/mmlu, or the hub")),
    Flag("do_mmlu_eval", bool, False, Own("measure MMLU at each evaluation")),
    Flag("max_mmlu_samples", int, None, Own("the first of its questions")),
    Flag("mmlu_source_max_len", int, 2048, Own("tokens of a question, cut at its end")),
    Flag(
        "full_finetune", bool, False,
        Only((False,), "4-bit weights cannot be trained, only adapters over them; leave it out"),
    ),
    Flag("adam8bit", bool, False, Own("the same as optim adamw_bnb_8bit; the script did nothing with it")),
    Flag("double_quant", bool, True, Own("quantize the absmax values too")),
    Flag("quant_type", str, "nf4", Own("nf4, fp4, or another of ours")),
    Flag("bits", int, 4, Own("4; 8 and 16 take an int8 or an unquantized base")),
    Flag("lora_r", int, 64, Own("rank of the LoRA matrices")),
    Flag("lora_alpha", float, 16.0, Own("LoRA's scale is lora_alpha / lora_r")),
    Flag("lora_dropout", float, 0.0, Own("dropout on LoRA's input")),
    Flag("max_memory_MB", int, 80000, Own("if given, and less than is free: what the process may take")),
)  # fmt: skip

GENERATION: tuple[Flag, ...] = (
    Flag("max_new_tokens", int, 256, To("max_new_tokens")),
    Flag("min_new_tokens", int, None, To("min_new_tokens")),
    Flag("do_sample", bool, False, To("do_sample")),
    Flag("num_beams", int, 1, To("num_beams")),
    Flag("num_beam_groups", int, 1, Only((1,), "transformers has no diverse beams any more; leave it out")),
    Flag("penalty_alpha", float, None, Only((), "transformers has no contrastive search any more; leave it out")),
    Flag("use_cache", bool, True, To("use_cache")),
    Flag("temperature", float, 1.0, To("temperature")),
    Flag("top_k", int, 50, To("top_k")),
    Flag("top_p", float, 1.0, To("top_p")),
    Flag("typical_p", float, 1.0, To("typical_p")),
    Flag("diversity_penalty", float, 0.0, Only((0.0,), "transformers has no diverse beams any more; leave it out")),
    Flag("repetition_penalty", float, 1.0, To("repetition_penalty")),
    Flag("length_penalty", float, 1.0, To("length_penalty")),
    Flag("no_repeat_ngram_size", int, 0, To("no_repeat_ngram_size")),
)
SAMPLING = ("temperature", "top_k", "top_p", "typical_p")
"""What says nothing without ``do_sample``."""

ADDED: tuple[Flag, ...] = (
    Flag(
        "lora_modules", str, "all",
        Own("all, or names with commas; the paper's scripts give it, and the script knows no such flag"),
    ),
    Flag("processes", int, 1, Own("processes of this machine that train together, on rows of their own")),
    Flag("max_restarts", int, 0, Own("how often processes that died begin again from the last checkpoint")),
)  # fmt: skip

FLAGS: tuple[Flag, ...] = (*MODEL, *DATA, *TRAINING, *INHERITED, *GENERATION, *ADDED)
