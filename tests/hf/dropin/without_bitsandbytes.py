"""A script of a machine without bitsandbytes, which imports it all the same; run by test_bitsandbytes.py."""

import importlib.util
import json
import sys


def hide():
    """Hide bitsandbytes as if it was not installed: no file that is found, no metadata."""
    import importlib.metadata as metadata
    from importlib.machinery import PathFinder

    find, version, about = PathFinder.find_spec, metadata.version, metadata.metadata
    PathFinder.find_spec = classmethod(
        lambda cls, name, path=None, target=None: (
            None if name.partition(".")[0] == "bitsandbytes" else find(name, path, target)
        )
    )

    def absent(old):
        def ask(name):
            if name == "bitsandbytes":
                raise metadata.PackageNotFoundError(name)
            return old(name)

        return ask

    metadata.version, metadata.metadata = absent(version), absent(about)


hide()
assert importlib.util.find_spec("bitsandbytes") is None

from halfbyte.hf.dropin import bitsandbytes as dropin  # noqa: E402

rows = dropin.rows()
undos = [row.put() for row in rows]

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.optim as optimizers  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import dequantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402
from bitsandbytes.nn.modules import Linear8bitLt  # noqa: E402
from bitsandbytes.optim import PagedAdamW8bit  # noqa: E402

assert bnb.nn.Linear4bit is Linear4bit and optimizers.PagedAdamW8bit is PagedAdamW8bit
assert bnb.__version__ == "0.50.2" and importlib.util.find_spec("bitsandbytes") is not None
assert bnb.nn.modules.Linear8bitLt is Linear8bitLt and Params4bit is bnb.nn.Params4bit

# every other name is the error that Python gives, with a sentence
for ask, word in (
    (lambda: bnb.optim.Lion8bit, "bitsandbytes.optim.Lion8bit"),
    (lambda: bnb.nn.Linear4bits, "(did you mean 'Linear4bit'?)"),
):
    try:
        ask()
    except AttributeError as error:
        assert "bitsandbytes is not installed" in str(error) and word in str(error), error
    else:
        raise AssertionError(word)
for line in ("from bitsandbytes.optim import Lion8bit", "import bitsandbytes.research"):
    try:
        exec(line)
    except ImportError:
        pass
    else:
        raise AssertionError(line)

# as bitsandbytes' documentation tells: embeddings keep 32 bits, and parameters that the manager is told of
net = torch.nn.Sequential(bnb.nn.StableEmbedding(100, 64), torch.nn.Linear(64, 100), torch.nn.Linear(100, 100))
manager = bnb.optim.GlobalOptimManager.get_instance()
manager.register_parameters(net.parameters())
adam = bnb.optim.Adam(net.parameters(), lr=0.001, optim_bits=8)
manager.override_config(net[1].weight, "optim_bits", 32)
net(torch.arange(100)).sum().backward()
adam.step()
bits = [adam.state[p]["exp_avg"].dtype for p in (net[0].weight, net[1].weight, net[2].weight)]
assert bits == [torch.float32, torch.float32, torch.uint8], bits

# the libraries see none
import accelerate.utils  # noqa: E402
import peft.import_utils  # noqa: E402
import transformers  # noqa: E402

assert not transformers.utils.is_bitsandbytes_available() and not accelerate.utils.is_bnb_available()
assert not peft.import_utils.is_bnb_available() and not peft.import_utils.is_bnb_4bit_available()

# a model whose layers a script makes 4-bit by hand, with an adapter of PEFT's, trained for a few steps
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for name, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, torch.float32, quant_type="nf4"
        )
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer)
model = model.to("cpu")
assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14
config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
model = peft.get_peft_model(model, config)
assert type(model.base_model.model.model.layers[0].mlp.down_proj).__module__ == "peft.tuners.lora.layer"
optimizer = bnb.optim.PagedAdamW8bit(model.parameters(), lr=1e-2)
ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.1, losses
assert not any(name.startswith("peft.tuners") and name.endswith(".bnb") for name in sys.modules)

x = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
packed, state = bnb.functional.quantize_4bit(x, quant_type="nf4")
sys.stdout.write(
    json.dumps(
        {
            "x": x.tolist(),
            "packed": packed.flatten().tolist(),
            "dequantized": dequantize_4bit(packed, state).tolist(),
        }
    )
)

for undo in reversed(undos):
    undo()
assert not any(name.partition(".")[0] == "bitsandbytes" for name in sys.modules)
assert importlib.util.find_spec("bitsandbytes") is None
