"""What runs auto-round (0.16), in a process of its own: it changes transformers when it is imported, sets variables for
the whole process, prints, and ends it where something is wrong.

    python -m halfbyte.deploy.export.autoround ORDER.json

reads an :class:`Order` and writes the quantized model's files to its ``output``. Memory is auto-round's own matter: the
whole model, in 16 bits or, where the CPU has no products in 16 bits, in 32; the inputs of a decoder layer for all
blocks; and that layer's gradients.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Order:
    """What is to be made.

    Attributes:
        model: folder of a model in 16 bits.
        blocks: file with the token ids to calibrate with, int32 ``[blocks, length]``, of numpy.
        output: the folder to write.
        form: ``gptq`` or ``awq``.
        group_size: weights that share a scale.
        rounds: of tuning the rounding of each decoder layer (SignRound, arXiv 2309.05516); 0: there is none.
        trust_remote_code: run code that comes with the model.
        launcher: the process that waits; if it ends, so does this one.
    """

    model: str
    blocks: str
    output: str
    form: str
    group_size: int
    rounds: int
    trust_remote_code: bool
    launcher: int

    def write(self, file: Path) -> None:
        """Write it as ``main`` reads it."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which auto-round leaves nothing anywhere but in ``folder``, and asks nobody."""
    return os.environ | {
        "AR_WORK_SPACE": str(folder / "auto-round"),
        "AR_LOG_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        "TOKENIZERS_PARALLELISM": "false",
    }


def main() -> None:
    """Do what the order says whose file is the first argument."""
    order = Order(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    _end_with(order.launcher)
    import numpy as np
    import torch
    from auto_round import AutoRound, AWQConfig, RTNConfig, SignRoundConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halfbyte.kernels import product_dtype

    options = {"trust_remote_code": order.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(order.model, dtype=product_dtype(torch.bfloat16, "cpu"), **options)
    tokenizer = AutoTokenizer.from_pretrained(order.model, **options)
    ids = torch.from_numpy(np.load(order.blocks)).long()
    scheme = {
        "bits": 4,
        "group_size": order.group_size,
        "sym": order.form == "gptq",
        "data_type": "int",
        "act_bits": 16,
    }
    rounds = SignRoundConfig(iters=order.rounds) if order.rounds else RTNConfig()
    rounding = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        alg_configs=[AWQConfig(), rounds] if order.form == "awq" else rounds,
        dataset=[{"input_ids": block[None], "attention_mask": torch.ones_like(block[None])} for block in ids],
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=min(4, len(ids)),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(order.output, format=f"auto_{order.form}")


def _end_with(launcher: int) -> None:
    """Have the system end this process when ``launcher`` ends, on Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:
            sys.exit(1)


if __name__ == "__main__":
    main()
