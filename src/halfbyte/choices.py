"""The words and bounds that options may take, once; importing this imports no torch.

Everything that takes such an option reads its words, bounds and defaults here: configurations, the command line, the
quantizer, the file format.
"""

from typing import Literal, get_args

Type4bit = Literal["nf4", "fp4", "e2m1", "e3m0", "int4"]
"""A 4-bit number format of weights; see :mod:`halfbyte.quant.codebooks`."""
SaveableType = Literal[Type4bit, "int8"]
"""Those that a folder can hold; 8 bits are those of :mod:`halfbyte.quant.int8`."""
QuantType = Literal[SaveableType, "none"]
"""What the base weights of a model are held in; ``none`` leaves them in the compute dtype."""
FloatType = Literal["float32", "bfloat16", "float16"]
"""A dtype of torch in which can be computed."""
Device = Literal["auto", "cpu", "cuda"]
"""Where a model runs; see :mod:`halfbyte.devices`."""
Optimizer = Literal[
    "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_32bit", "adamw_torch", "paged_lion_8bit",
    "paged_lion_32bit", "lion_8bit", "lion_32bit", "adafactor", "sgd", "rmsprop", "adagrad",
]  # fmt: skip
"""AdamW or Lion by the bits of its state and whether that can be paged to disk, or one of transformers'."""
TRANSFORMERS_OPTIMIZERS: tuple[Optimizer, ...] = ("adafactor", "sgd", "rmsprop", "adagrad")
"""Those that transformers' trainer makes."""
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy",
]  # fmt: skip
"""The course of the learning rate after the warm-up, by transformers' names; linear and cosine fall to zero."""
WATCHING: tuple[Schedule, ...] = ("reduce_lr_on_plateau", "greedy")
"""Those that go by the loss of evaluations."""
Preset = Literal["paper", "paper-7b", "paper-13b", "paper-33b", "paper-65b", "quick"]
"""Which defaults of a run apply: the paper's, or quick ones for small models and data."""

Method = Literal["sft", "text", "dpo", "kto", "orpo"]
"""A method of training; see :mod:`halfbyte.train.methods`."""
REFERENCED: tuple[Method, ...] = ("dpo", "kto")
"""Those that compare with the model as it was before training."""
DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
"""What DPO makes of a pair's log-ratios, by TRL's (1.16) names."""
KtoLoss = Literal["kto", "apo_zero_unpaired"]
"""The same for KTO."""
SMOOTHED: tuple[DpoLoss, ...] = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses of DPO that smooth labels."""

KvType = Literal["int8"]
"""What keys and values may be kept in, other than as they are."""
HeadType = Literal["int8", "nf4"]
"""What the output head may be quantized to for decoding."""

Onto = Literal["quantized", "original"]
"""What an adapter is merged onto: the weights that it was trained over, or those before they were quantized."""
MergeType = Literal["bf16", "fp16", "fp32", "nf4"]
"""What a merged model's weights are in."""
Rounding = Literal["outputs", "random", "original"]
"""How sums become 4 bits; see :mod:`halfbyte.hf.models.four_bits`."""
Compared = Literal["nearest", "gptq"]
"""Two more, which lose what was learnt and are there to be compared with."""

ExportFormat = Literal["hf", "bnb-4bit", "gguf", "lora-gguf", "mlx", "gptq", "awq"]
"""What a model is exported to; see :mod:`halfbyte.deploy.export.formats`."""
GgufType = Literal[
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "bf16", "f16", "f32",
]  # fmt: skip
"""What the matrices of a GGUF file are in, by llama.cpp's names; those with a k need llama.cpp itself."""
GgufAdapterType = Literal["f32", "f16", "bf16"]
"""What an adapter in GGUF is in."""

CombineMethod = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
"""How several adapters become one; see :mod:`halfbyte.deploy.adapters`."""

Task = Literal["lm", "classify", "seq2seq"]
"""What a model is trained to do: go on with text, name the class of a text, turn one text into another."""

Bias = Literal["none", "all", "lora_only"]
"""Which biases of a model are trained beside its adapter."""
STARTS = ("default", "gaussian", "orthogonal", "loftq", "pissa", "pissa_niter_4", "olora", "eva")
"""How an adapter begins; see :mod:`halfbyte.hf.layers.starts`. Instead of 4 another number of iterations will do."""
STARTS_REFUSED = {
    "corda": "it wants the covariance of each layer's inputs collected over the dense model; use eva",
    "lora_ga": "it wants gradients of the dense weights; use eva or pissa",
    "mica": "it wants the smallest directions of the dense weights; use orthogonal",
}
"""Those of PEFT's that are none here, with a reason and another one to take."""

Logger = Literal["tensorboard", "trackio", "wandb", "mlflow"]
"""Whom a run may report to, by transformers' names."""
Sharding = Literal["full_shard", "shard_grad_op"]
"""How a base is divided over processes, by transformers' names; see :mod:`halfbyte.hf.trainers.sharded`."""
BUILTIN = "builtin"
"""Stands for the general text that comes with halfbyte."""

TYPES_4BIT: tuple[str, ...] = get_args(Type4bit)
SAVEABLE_TYPES: tuple[str, ...] = get_args(SaveableType)
QUANT_TYPES: tuple[str, ...] = get_args(QuantType)
BITSANDBYTES_TYPES = ("nf4", "fp4")
"""4-bit formats that bitsandbytes' files have a name for."""
FLOAT_TYPES: tuple[str, ...] = get_args(FloatType)
GGUF_TYPES: tuple[str, ...] = get_args(GgufType)
GGUF_ADAPTER_TYPES: tuple[str, ...] = get_args(GgufAdapterType)
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)

BLOCKSIZES = range(32, 4097)
"""Values that may share one absmax."""
ROW = "row"
"""In place of a block size, for int8 alone: each row is a block, as bitsandbytes' LLM.int8() has it."""

QUANT_TYPE: SaveableType = "nf4"
BLOCKSIZE = 64
DOUBLE_QUANT = True
COMPUTE_DTYPE: FloatType = "bfloat16"
"""Defaults: the paper's (QLoRA, arXiv 2305.14314, section 3)."""

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross entropy."""
