"""What the processes of tests/hf/trainers/test_sharded.py run: one pass of a tiny model whose base is divided.

python sharded_run.py MODEL OUTPUT QUANT_TYPE HOW; the first process saves what it saw in OUTPUT.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

import halfbyte
from halfbyte.hf.trainers import distributed, sharded
from halfbyte.nn import FrozenLinear


def main(folder: str, output: str, quant_type: Any, how: Any) -> None:
    distributed.join(use_cpu=True)
    kept = {"double_quant": False, "blocksize": None} if quant_type == "none" else {}
    config = halfbyte.HalfbyteConfig(quant_type=quant_type, compute_dtype=torch.float32, **kept)
    model: Any = halfbyte.load(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = halfbyte.prepare(model)
    linears = {name: x for name, x in model.named_modules() if isinstance(x, FrozenLinear)}
    dense = {name: x.dequantize().clone() for name, x in linears.items()}
    held = sum(x.weight.nbytes for x in linears.values())
    ids = torch.arange(4 * 20).reshape(4, 20) % 250
    processes, rank = distributed.world_size(), distributed.rank()
    seen: dict[str, Any] = {"passes": [], "held": held}
    run = model
    if processes > 1:
        sharded.shard(model, how, torch.device("cpu"))
        assert sharded.is_sharded(model)
        seen["held"] = sum(x.weight.to_local().nbytes for x in linears.values())
        distributed.ignore_frozen(model)
        run = DistributedDataParallel(model)
    own = ids[rank * len(ids) // processes : (rank + 1) * len(ids) // processes]
    for training in (True, False, True):  # twice, an evaluation between
        run.train(training)
        with torch.set_grad_enabled(training):
            loss = run(input_ids=own, labels=own, use_cache=False).loss
        if training:
            loss.backward()
        mean = loss.detach().double()
        if processes > 1:
            dist.all_reduce(mean)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if training and p.requires_grad}
        model.zero_grad()
        seen["passes"].append((mean / processes, gradients))
    if processes > 1:
        base = model.get_base_model()
        for layer in base.model.layers:
            layer.unshard()
        seen["same"] = all(torch.equal(x.dequantize(), dense[name]) for name, x in linears.items())
        for layer in base.model.layers:
            layer.reshard()
    if rank == 0:
        torch.save(seen, output)
    distributed.leave()


main(*sys.argv[1:])
