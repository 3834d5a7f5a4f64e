"""A script written for one GPU, on a machine without; run by test_cuda.py. Arguments: a model, the output folder."""

import sys

import torch

assert not torch.cuda.is_available()  # before
places = {"to": torch.Tensor.__mro__[1].to, "tensor": torch.tensor, "lazy": torch.cuda._lazy_init}

from halfbyte.hf.dropin import bitsandbytes, cuda  # noqa: E402

rows = [*bitsandbytes.rows(), *cuda.rows()]
assert all(row.cuda for row in cuda.rows())


def held(row):
    """What the row's place holds, and whether it is its own."""
    holder, key, is_item = row._place()
    return (holder.get(key), True) if is_item else (getattr(holder, key), key in vars(holder))


before = [held(row) for row in rows]
undos = [row.put() for row in rows]
during = [held(row) for row in rows]  # to hold a new value keeps nothing in place

# --- the user's script -----------------------------------------------------------------------------------------------
import library  # noqa: E402  (lies in a folder site-packages)
from beside import seen_by_a_file_beside_the_script  # noqa: E402

assert torch.cuda.is_available() and torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
assert seen_by_a_file_beside_the_script()
assert torch.cuda.get_device_name(0) == "CPU (halfbyte)" and torch.cuda.get_device_capability() == (8, 0)
properties = torch.cuda.get_device_properties(0)
assert properties.major >= 8 and properties.total_memory > 2**28 and properties.name == "CPU (halfbyte)"
assert torch.cuda.is_bf16_supported()
free, total = torch.cuda.mem_get_info()
assert 0 < free <= total
assert 2**20 < torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated() * 1.01
torch.cuda.reset_peak_memory_stats()
keep = torch.ones(2**25)
peak = torch.cuda.max_memory_allocated()
del keep
assert torch.cuda.max_memory_allocated() >= peak - 2**24 and "MiB" in torch.cuda.memory_summary()
torch.cuda.empty_cache()
torch.cuda.synchronize()
torch.cuda.set_device(0)
torch.cuda.manual_seed_all(1)
first = torch.randn(3)
torch.cuda.manual_seed(1)
assert torch.equal(first, torch.randn(3))
assert torch.accelerator.is_available() and torch.accelerator.device_count() == 1
assert torch.ones(2).to(torch.accelerator.current_accelerator().type).device.type == "cpu"
torch.accelerator.synchronize()
torch.accelerator.empty_cache()
assert torch.accelerator.max_memory_allocated() > 2**20 and torch.accelerator.current_device_index() == 0
state = torch.cuda.get_rng_state()
second = torch.randn(3)
torch.cuda.set_rng_state(state)
assert torch.equal(second, torch.randn(3)) and len(torch.cuda.get_rng_state_all()) == 1
generator = torch.Generator(device="cuda").manual_seed(7)
assert isinstance(generator, torch.Generator) and generator.device.type == "cpu"
assert torch.equal(
    torch.randn(2, generator=generator, device="cuda"), torch.randn(2, generator=torch.Generator().manual_seed(7))
)
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
start.record()
torch.ones(300, 300) @ torch.ones(300, 300)
end.record()
assert start.elapsed_time(end) > 0
with torch.cuda.device(0):
    assert torch.cuda.current_device() == 0


@torch.jit.script
def scripted(x):
    return x + torch.tensor([1.0])


assert scripted(torch.ones(1)) == 2

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
x = torch.ones(2, 3)
for place in (device, "cuda", "cuda:0", 0, torch.device("cuda:0"), torch.device("cuda", 0)):
    for y in (x.to(place), x.to(device=place), x.to(place, torch.bfloat16), x.to(place, non_blocking=True)):
        assert y.device.type == "cpu" and torch.equal(y.float(), x)
    linear = torch.nn.Linear(3, 2).to(place)
    assert linear.weight.device.type == "cpu" and isinstance(linear.weight, torch.nn.Parameter)
for place in ("cuda", "cuda:0", device):
    made = [
        torch.tensor([1, 2], device=place),
        torch.as_tensor([1, 2], device=place),
        torch.zeros(2, device=place),
        torch.ones((2, 2), device=place, dtype=torch.bfloat16),
        torch.empty(2, device=place),
        torch.full((2,), 3.0, device=place),
        torch.arange(5, device=place),
        torch.linspace(0, 1, 5, device=place),
        torch.rand(2, device=place, requires_grad=True),
        torch.randn(2, 3, device=place),
        torch.randint(0, 5, (3,), device=place),
        torch.randperm(4, device=place),
        torch.eye(3, device=place),
        torch.zeros_like(x, device=place),
        x.new_zeros(3, device=place),
        torch.nn.Linear(2, 3, device=place).weight,
    ]
    assert all(y.device.type == "cpu" for y in made), [y.device for y in made]
    assert torch.equal(made[6], torch.arange(5)) and made[3].dtype == torch.bfloat16 and made[8].requires_grad
assert x.cuda() is not None and x.cuda(0).device.type == "cpu" and x.pin_memory().device.type == "cpu"
assert torch.nn.Linear(3, 2).cuda().weight.device.type == "cpu"
with torch.autocast("cuda", dtype=torch.float16):
    assert torch.nn.Linear(3, 2)(x.to("cuda")).dtype == torch.bfloat16
with torch.autocast(device_type="cuda"):
    assert (x @ x.T).dtype == torch.bfloat16
with torch.cuda.amp.autocast():
    assert (x @ x.T).dtype == torch.bfloat16
with torch.autocast("cuda", enabled=False):
    assert (x @ x.T).dtype == torch.float32
with torch.device("meta"):  # torch's own functions are known to it as before
    assert torch.zeros(2).is_meta and torch.tensor([1.0]).is_meta and torch.nn.Linear(2, 2).weight.is_meta
torch.set_default_device("cuda")
assert torch.zeros(2).device.type == "cpu"
torch.set_default_device(None)
torch.save({"x": x}, f"{sys.argv[2]}/x.pt")
assert torch.equal(torch.load(f"{sys.argv[2]}/x.pt", map_location="cuda")["x"], x)
assert torch.equal(torch.load(f"{sys.argv[2]}/x.pt", map_location=torch.device("cuda:0"))["x"], x)
try:
    x.to("cuda") @ torch.ones(5, 5)  # an error of the script's own is its own
except RuntimeError as error:
    assert "cannot be multiplied" in str(error)
else:
    raise AssertionError
try:
    x.view(7, 7).to("cuda")
except RuntimeError as error:
    assert "invalid for input of size" in str(error)

# a library sees no GPU, and is told so as ever
assert library.sees() == {"available": False, "count": 0, "bf16": False}, library.sees()
assert library.fails() == ["AssertionError"] * 3, library.fails()
assert library.hands_on(x).to("cuda").device.type == "cpu"

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline  # noqa: E402

assert not transformers.utils.is_torch_cuda_available()
for device_map in (None, "auto", {"": 0}, "cuda:0", "cuda", 0, {"": "cuda:0"}, {"": torch.cuda.current_device()}):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=device_map, dtype=torch.float32)
    assert model.device.type == "cpu" and all(p.device.type == "cpu" for p in model.parameters())
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(["one two", "ten two"], return_tensors="pt").to("cuda")
assert inputs["input_ids"].device.type == "cpu"
model.to("cuda")
model.cuda()
out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
assert out.shape[0] == 2
for place in (0, "cuda", "cuda:0", device):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device=place)
    assert generate.device.type == "cpu"
generate = pipeline("text-generation", model=sys.argv[1], device_map="auto")
assert generate("one", max_new_tokens=2, do_sample=False)[0]["generated_text"]

data = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"].repeat(4, 1)]
arguments = TrainingArguments(f"{sys.argv[2]}/out", max_steps=2, report_to=[], logging_steps=1, learning_rate=1e-3)
assert arguments.device.type == "cpu" and arguments.n_gpu == 0
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
assert trainer.state.global_step == 2 and next(model.parameters()).device.type == "cpu"

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(sys.argv[2])
for options in ({"torch_device": "cuda"}, {"device_map": "auto"}, {"device_map": {"": 0}}):
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="auto")
    adapted = PeftModel.from_pretrained(base, sys.argv[2], **options)
    assert adapted.device.type == "cpu" and not any(hasattr(module, "_hf_hook") for module in adapted.modules())

import bitsandbytes as bnb  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

layer = bnb.nn.LinearNF4(64, 32).to("cuda")
assert layer.weight.quant_state is not None and layer(torch.ones(1, 64, device="cuda")).shape == (1, 32)
layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).cuda()
assert layer.weight.SCB is not None
save_file({"x": x}, f"{sys.argv[2]}/x.safetensors")
assert torch.equal(
    __import__("safetensors.torch").torch.load_file(f"{sys.argv[2]}/x.safetensors", device="cuda")["x"], x
)

# --- undone ----------------------------------------------------------------------------------------------------------
for undo in reversed(undos):
    undo()
after = [held(row) for row in rows]
assert all(a is b and own == owned for (a, own), (b, owned) in zip(before, after, strict=True))
assert "to" not in vars(torch.Tensor) and torch.tensor is places["tensor"]
assert torch.cuda._lazy_init is places["lazy"] and not torch.cuda.is_available()
for ask in (lambda: x.to("cuda"), lambda: torch.zeros(2, device="cuda"), lambda: torch.tensor([1], device="cuda:0")):
    try:
        ask()
    except (AssertionError, RuntimeError):
        continue
    raise AssertionError("a GPU is seen after undo")
sys.stdout.write("done\n")
