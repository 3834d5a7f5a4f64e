"""The card of an adapter as it goes to the hub; :mod:`halfbyte.deploy.card` has that of a model.

It says which base the adapter belongs to, how it was trained and what came of it, and how it is opened: with PEFT and
transformers, over the base in 4 bits if it was trained so, and with halfbyte.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from halfbyte import __version__
from halfbyte.choices import BLOCKSIZE
from halfbyte.deploy.card import PIPELINES, code, of_run, plain, run_of
from halfbyte.hf.models.base_format import base_format
from halfbyte.hf.models.config import HalfbyteConfig
from halfbyte.hf.models.configs import ADAPTER, CONFIG, json_of
from halfbyte.hf.models.heads import adapter_task

CLASSES = {
    "lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification", "seq2seq": "AutoModelForSeq2SeqLM"
}  # fmt: skip


def adapter_card(folder: Path, repo_id: str, base: str, base_is_id: bool, licence: str | None) -> str:
    """Return the card of an adapter.

    Args:
        folder: of the run, or of an adapter of which no run is known.
        repo_id: what it is on the hub.
        base: what its base is called.
        base_is_id: whether that is a hub id, or the name of a folder.
        licence: of the base, if it is known.
    """
    run = run_of(folder)
    about = json_of(folder / ADAPTER)
    task = adapter_task(about)
    held = base_format(folder) or (HalfbyteConfig() if run else None)
    head = ModelCardData(
        base_model=base if base_is_id else None,
        base_model_relation="adapter" if base_is_id else None,
        license=licence,
        library_name="peft",
        pipeline_tag=PIPELINES[task],
        tags=["qlora", "lora", "halfbyte"] if run else None,
    )
    rank = f" of rank {about['r']}" if isinstance(about.get("r"), int) else ""
    kind = f"{about.get('peft_type', 'PEFT')} adapter{rank}"
    form = f" in {held.quant_type}" if held and held.bits else ""
    how = f", trained over its weights{form} by halfbyte {__version__}" if run else ""
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {plain(repo_id.rpartition('/')[2])}",
        f"{kind[0].upper()}{kind[1:]} for {plain(base)}{how}.",
    ]
    if not base_is_id:
        parts.append(f"Where it was trained, the base model lay in a folder called `{base}`; put yours in its place.")
    if run:
        parts += of_run(run)
    lines = [*_opened(folder, repo_id, base, task, held)]
    parts += ["## Use", "With transformers and PEFT:", code("python", "\n".join(lines))]
    parts += ["Or with halfbyte, which holds the base as it was held in training:", code("", _tried(repo_id, task))]
    return "\n\n".join(parts) + "\n"


def _tried(repo_id: str, task: str) -> str:
    match task:
        case "classify":
            return f'halfbyte classify {repo_id} --text "Your text"'
        case "seq2seq":
            return f'halfbyte generate {repo_id} "Your text"'
    return f"halfbyte chat {repo_id}"


def _opened(folder: Path, repo_id: str, base: str, task: str, held: HalfbyteConfig | None) -> list[str]:
    """Return lines of Python that open base and adapter."""
    kind, where = CLASSES[task], json.dumps(base)
    names = [kind, "AutoTokenizer"]
    options, before = "", []
    if held and held.quant_type in ("nf4", "fp4") and held.blocksize == BLOCKSIZE:
        names.append("BitsAndBytesConfig")
        options = ", quantization_config=held"
        before = [
            "held = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{held.quant_type}", '
            f"bnb_4bit_use_double_quant={held.double_quant},",
            f'    bnb_4bit_compute_dtype="{str(held.compute_dtype).removeprefix("torch.")}",',
            ")",
        ]
    if (folder / CONFIG).is_file():
        names.append("AutoConfig")
        options += f", config=AutoConfig.from_pretrained({json.dumps(repo_id)})"
    tokenizer = json.dumps(repo_id) if (folder / "tokenizer_config.json").is_file() else where
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted(names))}",
        "",
        *before,
        f"base = {kind}.from_pretrained({where}{options})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo_id)})",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
    ]
