"""A mixture of experts made of a dense model (arXiv 2212.05055), on the quick start's task.

    python benchmarks/upcycled.py OUT [--experts 4] [--chosen 2]

Each expert of each layer begins as a copy of SmolLM2-135M-Instruct's MLP, and the router with small random values, so
that the mixture computes what the model does, whichever experts are chosen: Mixtral's weights of the chosen sum to 1.
What it writes is opened as any model is, quantized, measured on the quick start's 500 held-out snippets, trained by
its preset on its 900 others, and measured again.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import halfbyte
from halfbyte.cli.console import TerminalDisplay
from halfbyte.data import read_examples, tokenize
from halfbyte.evaluate import score_choices
from halfbyte.example import HELD_OUT, MAX_LENGTH, SEED, TRAIN
from halfbyte.example.reviews import read_snippets, split, write_chats
from halfbyte.example.sources import MODEL, REVIEWS, convert, fetch
from halfbyte.files import cache_folder
from halfbyte.train import TrainConfig, fine_tune


def upcycled(dense: Path, experts: int, chosen: int, folder: Path) -> None:
    """Write the mixture of a Llama in ``dense`` to ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    shared = {name: value for name, value in model.config.to_dict().items() if name in MixtralConfig().to_dict()}
    shared |= {"model_type": "mixtral", "architectures": None, "sliding_window": None}
    config = MixtralConfig(**shared | {"num_local_experts": experts, "num_experts_per_tok": chosen})
    mixture = MixtralForCausalLM(config).to(torch.bfloat16)
    torch.manual_seed(SEED)
    state = model.state_dict()
    for name, value in mixture.state_dict().items():
        if name in state:
            value.copy_(state[name])
        elif name.endswith("experts.gate_up_proj"):
            mlp = name.removesuffix("experts.gate_up_proj")
            value.copy_(torch.cat([state[f"{mlp}gate_proj.weight"], state[f"{mlp}up_proj.weight"]]))
        elif name.endswith("experts.down_proj"):
            value.copy_(state[f"{name.removesuffix('experts.down_proj')}down_proj.weight"])
        else:
            value.normal_(std=0.02)
    ids = torch.arange(100, 160).view(2, 30)
    with torch.no_grad():
        wanted, got = model(ids).logits.float(), mixture(ids).logits.float()
    print(
        f"apart from the dense model by {float((got - wanted).norm() / wanted.norm()):.4f} of its logits' norm, in bf16"
    )
    mixture.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


def measured(model: Path, rows: Path) -> dict[str, float]:
    """Return accuracy and loss on the held-out rows."""
    tokenizer = halfbyte.load_tokenizer(model)
    score = score_choices(halfbyte.load(model), tokenize(read_examples(rows), tokenizer, MAX_LENGTH).rows)
    return {"accuracy": score.accuracy, "loss": score.loss}


def main() -> None:
    """Make it, measure, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--chosen", type=int, default=2)
    args = parser.parse_args()
    cache = cache_folder()
    gguf, ratings = fetch(MODEL, cache), fetch(REVIEWS, cache)
    upcycled(convert(gguf, cache / "SmolLM2-135M-Instruct"), args.experts, args.chosen, args.out / "model")
    training, holding_out = split(read_snippets(ratings), TRAIN, HELD_OUT, SEED)
    train, held_out = (args.out / name for name in ("train.jsonl", "held_out.jsonl"))
    write_chats(training, train)
    write_chats(holding_out, held_out)
    figures = {"experts": args.experts, "chosen": args.chosen, "before": measured(args.out / "model", held_out)}
    config = TrainConfig(
        model=str(args.out / "model"), data=str(train), output=args.out / "run", preset="quick", max_length=MAX_LENGTH,
        seed=SEED, sample_prompts=[], overwrite=True,
    )  # fmt: skip
    run = fine_tune(config, TerminalDisplay(Console(highlight=False))).summary
    figures |= {"after": measured(args.out / "run", held_out), "seconds": run.seconds}
    figures |= {"expert_load": run.figures.get("expert_load"), "peak_memory_bytes": run.peak_memory_bytes}
    (args.out / "upcycled.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
