"""Which arguments of TRL's configurations our trainers refuse, and why; all others they obey.

TRL 1.16 over transformers 5.23 has some 150. tests/hf/trainers/test_arguments.py goes through all of them: each is
refused here, or is shown to be obeyed, or says nothing to a trainer (as ``do_train``, which scripts read).
"""

from collections.abc import Mapping

import torch
from transformers import TrainingArguments

from halfbyte.errors import InputError

REFUSED: Mapping[str, str] = {
    "fp16": "checkpoints do not keep its loss scale; use bf16=True, or HalfbyteConfig(compute_dtype=torch.float16)",
    "bf16_full_eval": "it would round the adapter's fp32 weights, for training too; leave it out",
    "fp16_full_eval": "it would round the adapter's fp32 weights, for training too; leave it out",
    "torch_compile": "every kernel of ours breaks the compiled graph, which is slower; leave it out",
    "use_liger_kernel": "it replaces the layers that ours serve; leave it out",
    "auto_find_batch_size": "it begins the run anew with weights that are trained already; set "
    "per_device_train_batch_size",
    "enable_jit_checkpoint": "it leaves half a checkpoint of its own; set control.should_save and "
    "control.should_training_stop in a callback",
    "push_to_hub": "nothing is sent to anybody; upload the folder with huggingface_hub.upload_folder",
    "parallelism_config": "4-bit weights are not split over processes; leave it out for data parallelism",
    "fsdp": "accelerate divides 4-bit weights of its own class alone; leave it out for data parallelism, or use "
    "halfbyte train --fsdp",
    "deepspeed": "4-bit weights are not split over processes; leave it out for data parallelism",
    "sync_ref_model": "4-bit weights cannot be mixed with others; leave it out",
}
"""Name of an argument: why it is refused, and what to do instead."""

CHECKPOINTING = {
    "selective": "TRL's selective checkpointing does not reach transformers' layers",
    "offload": "sending inputs to the CPU's memory needs a GPU",
}
"""The same for the keys of ``activation_checkpointing_kwargs``."""

SAMPLING = ("random", "sequential", "group_by_length")


def check(args: TrainingArguments) -> None:
    """Refuse what our trainers would not obey.

    Raises:
        InputError: it names the argument.
    """
    kind = type(args).__name__
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value:
            shown = repr(value) if isinstance(value, (bool, str)) else "..."
            raise InputError(f"{kind}({name}={shown}) is not for halfbyte's trainers: {reason}.")
    for key, reason in CHECKPOINTING.items():
        if (args.activation_checkpointing_kwargs or {}).get(key):
            raise InputError(
                f"{kind}(activation_checkpointing_kwargs={{{key!r}: ...}}) is not for halfbyte's trainers: {reason}; "
                "leave it out."
            )
    if getattr(args, "activation_offloading", False) and not torch.accelerator.is_available():
        raise InputError(
            f"{kind}(activation_offloading=True) needs a GPU, whose activations go to the CPU's memory; use "
            "activation_checkpointing=True."
        )
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy not in SAMPLING:
        raise InputError(
            f"{kind}(train_sampling_strategy={strategy!r}) is not for halfbyte's trainers: the order of the rows "
            f"would not be that of a resumed run; use one of {', '.join(SAMPLING)}."
        )
    if args.length_column_name != "length":
        raise InputError(
            f"{kind}(length_column_name={args.length_column_name!r}) is not for halfbyte's trainers: lengths are those "
            "of input_ids; leave it out."
        )
