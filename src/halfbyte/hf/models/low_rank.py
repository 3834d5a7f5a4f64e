"""A LoRA adapter's folder as what it adds to each weight, s B A, without its base; and back to a folder.

The singular values of s B A come from those of a matrix of rank × rank: with B = Q R and Aᵀ = P T (QR decompositions),
s B A = Q (s R Tᵀ) Pᵀ. So an adapter of any model takes milliseconds a layer.

A stack of experts (:mod:`halfbyte.hf.layers.expert_adapters`) is read as a pair A, B of each expert, and written as one
again; all experts of a stack have one rank.
"""

import copy
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.errors import InputError
from halfbyte.files import whole_folder
from halfbyte.hf.layers.expert_adapters import Stack, apart, names_in_file, stacks_of, together
from halfbyte.hf.layers.expert_targets import WEIGHT, with_weight
from halfbyte.hf.models.adapter_files import BESIDE, check_numbers
from halfbyte.hf.models.base_format import FILE as BASE_FORMAT
from halfbyte.hf.models.check import check_finite
from halfbyte.hf.models.configs import ADAPTER, sentence
from halfbyte.hf.models.fingerprint import FILE as FINGERPRINT
from halfbyte.hf.models.heads import LABELS_FILE
from halfbyte.hf.models.hub import locate

PREFIX = "base_model.model."
FORMS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
"""How files call A and B: of linear layers, and of embeddings."""


@dataclass(frozen=True)
class Part:
    """What is added to one weight: ``[out, in]``.

    Attributes:
        a: ``[rank, in]``, fp32.
        b: ``[out, rank]``, fp32.
        scaling: s.
        form: its place in ``FORMS``.
    """

    a: Tensor
    b: Tensor
    scaling: float
    form: int = 0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return len(self.b), self.a.shape[1]

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding's, whose weight is ``[in, out]``."""
        return self.form == 1

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U ``[out, k]``, the singular values of s B A, largest first, and V ``[in, k]``, in fp64."""
        q, r = torch.linalg.qr(self.b.double())
        p, t = torch.linalg.qr(self.a.double().T)
        u, values, v = torch.linalg.svd(self.scaling * r @ t.T)
        return q @ u, values, p @ v.T

    def dense(self) -> Tensor:
        """Return s B A."""
        return self.scaling * self.b @ self.a


@dataclass
class LowRankAdapter:
    """An adapter's folder, read.

    Attributes:
        folder: where it is.
        config: PEFT's.
        parts: what is added, by the name of the module; of a stack of experts by ``Stack.members``.
        stacks: of experts, by their names.
        others: tensors beside them, by their names in the file: lengths of DoRA, biases, modules that were saved whole.
    """

    folder: Path
    config: LoraConfig
    parts: dict[str, Part] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_dora(self) -> bool:
        """Whether lengths of rows are trained apart from their directions."""
        return bool(self.config.use_dora)

    @property
    def stack_of(self) -> dict[str, Stack]:
        """Of each part that is an expert's, its stack."""
        return {name: stack for stack in self.stacks.values() for name in stack.members}

    def in_file(self) -> dict[str, Part]:
        """Return the parts by their names in a file: an expert's together with the others of its stack."""
        stack_of = self.stack_of
        found = {name: part for name, part in self.parts.items() if name not in stack_of}
        for name, stack in names_in_file(self.stacks.values()).items():
            some = [self.parts[member] for member in stack.members]
            found[name] = Part(*together((part.a, part.b) for part in some), some[0].scaling)
        return found


def read_low_rank(path: str | Path) -> LowRankAdapter:
    """Read the folder or hub id of a LoRA adapter.

    Raises:
        InputError: it is none, or a tensor is missing or not finite.
    """
    folder = Path(locate(path).path)
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{path} holds no adapter ({ADAPTER}); give the folder of a run or of a PEFT adapter.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"The adapter {folder} cannot be read: {sentence(str(error))}") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise InputError(f"The adapter {folder} is of the kind {kind}; this is for LoRA.")
    check_numbers(config, folder)
    read = LowRankAdapter(folder, config)
    first, second = FORMS[0]
    rows = {key.removeprefix(PREFIX).removesuffix(first): len(x) for key, x in weights.items() if key.endswith(first)}
    stacks = stacks_of(folder, config, rows)
    for form, (first, second) in enumerate(FORMS):
        for key in [key for key in weights if key.endswith(first)]:
            name = key.removeprefix(PREFIX).removesuffix(first)
            other = key.removesuffix(first) + second
            if other not in weights:
                raise InputError(f"The adapter {folder} has {key} and lacks {other}; copy it again.")
            a, b = (weights.pop(one).float() for one in (key, other))
            for one, x in ((key, a), (other, b)):
                check_finite(one, x)
            if b.shape[1] != len(a):
                raise InputError(
                    f"The adapter {folder} has {key}, {list(a.shape)}, and {other}, {list(b.shape)}, which have no "
                    "product; copy it again."
                )
            if form == 0 and (stack := stacks.get(name)):
                scaling = scaling_of(config, stack.name, len(a) // stack.experts)
                read.stacks[stack.name] = stack
                pairs = zip(stack.members, *apart(a, b, stack.experts), strict=True)
                read.parts |= {member: Part(its_a, its_b, scaling) for member, its_a, its_b in pairs}
            else:
                read.parts[name] = Part(a, b, scaling_of(config, name, len(a)), form)
    alone = [(key, other) for key in weights for other, end in FORMS if key.endswith(end)]
    if alone:
        key, other = alone[0]
        raise InputError(f"The adapter {folder} has {key} and lacks its {other.split('.')[1]}; copy it again.")
    if not read.parts:
        raise InputError(f"The adapter {folder} has no LoRA matrices; copy it again.")
    if read.is_dora and read.stacks:
        name, stack = next(iter(read.stacks.items()))
        raise InputError(
            f"The adapter {folder} is DoRA on {name} ({stack.experts} experts of "
            f"{list(read.parts[stack.members[0]].shape)}), for which PEFT has no lengths; train it as plain LoRA."
        )
    read.others = weights
    return read


def scaling_of(config: LoraConfig, name: str, rank: int) -> float:
    """Return s of the module ``name``, as PEFT (0.21) has it."""
    patterns = config.alpha_pattern or {}
    keys = (get_pattern_key(list(patterns), one) for one in (name, name + WEIGHT))
    alpha = next((patterns[key] for key in keys if key in patterns), config.lora_alpha)
    return float(alpha) / (rank**0.5 if config.use_rslora else rank)


def save_low_rank(adapter: LowRankAdapter, output: Path) -> None:
    """Write an adapter as a PEFT folder, its scales within B and A: ``lora_alpha`` is the rank everywhere.

    Tokenizer and settings beside it are copied. The folder appears whole.
    """
    config = copy.deepcopy(adapter.config)
    stack_of, ranks = adapter.stack_of, {}
    for name, part in adapter.parts.items():
        ranks[stack_of[name].name if name in stack_of else name] = part.rank
    # PEFT (0.21) says of patterns for stacks that they match nothing, though they do: so few as can be
    config.r = config.lora_alpha = max([ranks[name] for name in adapter.stacks] or ranks.values())
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
    if any(name.endswith(WEIGHT) for name in config.target_parameters or ()):
        others = {with_weight(pattern): rank for pattern, rank in others.items()}
    config.rank_pattern, config.alpha_pattern = dict(others), dict(others)
    config.use_rslora, config.init_lora_weights, config.inference_mode = False, True, True
    weights = {key: x.contiguous() for key, x in adapter.others.items()}
    for name, part in adapter.in_file().items():
        root = abs(part.scaling) ** 0.5
        first, second = FORMS[part.form]
        weights[f"{PREFIX}{name}{first}"] = (part.a * root).contiguous()
        weights[f"{PREFIX}{name}{second}"] = (part.b * (part.scaling / root if root else 0.0)).contiguous()
    with whole_folder(output) as folder:
        for name in (*BESIDE, BASE_FORMAT, FINGERPRINT, LABELS_FILE):
            if (adapter.folder / name).is_file():
                shutil.copy(adapter.folder / name, folder)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
