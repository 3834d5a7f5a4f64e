# %% [markdown]
# # 4. A walk through one step
#
# One training step of a real model, slowly, as under a debugger: we stop wherever an idea of the [QLoRA
# paper](https://arxiv.org/abs/2305.14314) is at work, look at the tensors that are there, and compute by hand what
# comes next. Everything is in fp32 here, so that "by hand" can be held to many digits; a run computes in bf16.
#
# [Lesson 1](1-quantization.ipynb) has the number formats. This takes about a minute.

# %%
import warnings

warnings.simplefilter("ignore")  # what libraries tell each other

from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.evaluate.texts import general_texts
from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder
from halfbyte.quant import codebook, dequantize_coded
from halfbyte.quiet import quiet

silence = ExitStack()
silence.enter_context(quiet())  # bars and log lines of other libraries

from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

folder = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(folder)

# %% [markdown]
# ## Stop 1: what is trained of a row
#
# A conversation as the model's chat template writes it. The question is read, and the answer is learned, with the token
# that ends it. What is only read has the label −100, which counts for nothing.

# %%
question = {"role": "user", "content": "What does QLoRA keep in four bits?"}
answer = {"role": "assistant", "content": "The frozen weights of the base model."}


def tokens(turns, **options):
    return tokenizer.apply_chat_template(turns, return_dict=True, **options)["input_ids"]


ids = tokens([question, answer])[:-1]  # without the newline behind the last token
read = len(tokens([question], add_generation_prompt=True))
labels = [-100] * read + ids[read:]
print("".join(tokenizer.decode(i) for i in ids[:read]))
print("⟦" + "|".join(tokenizer.decode(i) for i in ids[read:]) + "⟧")
assert tokenizer.decode(ids[-1]) == "<|im_end|>"

batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}

# %% [markdown]
# ## Stop 2: a block of the base
#
# The model is read and quantized tensor by tensor. Look at one layer: what lies in memory are bytes, two codes in each.

# %%
model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32")
)
PLACE = "model.layers.12.mlp.up_proj"
weight = model.get_submodule(PLACE).quantized_weight

print(PLACE, tuple(weight.shape), f"{weight.bits_per_parameter:.3f} bits a weight")
print("the first bytes:", [f"{byte:02x}" for byte in weight.packed.flatten()[:8].tolist()])

# %% [markdown]
# By hand (equation 6): the block's constant from its 8 bits, the codes from their bytes, and a value of the table for
# each code.

# %%
statistics, nested = weight.statistics, weight.statistics.nested
absmax = nested.code[statistics.absmax[0].int()] * nested.absmax[0] + nested.offset
packed = weight.packed.flatten()[:32]
codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
block = codebook("nf4")[codes.int()] * absmax

assert torch.equal(block, weight.dequantize(torch.float32).flatten()[:64])

plt.bar(range(64), block, color=BLUE)
for level in codebook("nf4") * absmax:
    plt.axhline(level, color=GREY, linewidth=0.5, zorder=0)
plt.title(f"64 weights, each on one of 16 lines; absmax is {absmax:.3f}")
plt.show()

# %% [markdown]
# ## Stop 3: inside a layer
#
# LoRA of rank 8 on every linear layer, and halfbyte's kernels under it. A hook on our layer is the breakpoint: it keeps
# what comes in, what goes out, and later what comes back.

# %%
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
model = halfbyte.prepare(get_peft_model(model, lora)).train()
layer = model.get_submodule(f"base_model.model.{PLACE}")
A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
s = layer.scaling["default"]

stop, passes = {}, []


def forward_stop(module, inputs, output):
    passes.append(module)
    stop["x"], stop["y"] = inputs[0].detach(), output.detach()


def backward_stop(module, into, out):
    stop["dx"], stop["dy"] = into[0], out[0]


hooks = [layer.register_forward_hook(forward_stop), layer.register_full_backward_hook(backward_stop)]
loss = model(**batch).loss
print(f"loss {loss:.3f};  x {tuple(stop['x'].shape)} → y {tuple(stop['y'].shape)},  s = {s}")

# %% [markdown]
# By hand (equation 5): Y = X Wᵀ + s (X Aᵀ) Bᵀ, through a bottleneck of 8 numbers a token. B begins with zeros, so LoRA
# adds nothing yet: training begins at the very model that was loaded.

# %%
x, y = stop["x"][0], stop["y"][0]
W = weight.dequantize(torch.float32)
by_hand = x @ W.T + s * (x @ A.T) @ B.T

print("off by", f"{(by_hand - y).abs().max() / y.abs().max():.1e}", "of the largest value")
assert torch.allclose(by_hand, y, atol=1e-4 * y.abs().max().item())
assert B.abs().max() == 0 and A.abs().max() > 0

trained, frozen = A.numel() + B.numel(), W.numel()
assert trained == 8 * (W.shape[0] + W.shape[1])
print(f"{trained:,} numbers are trained beside {frozen:,}: {trained / frozen:.1%}")

# %% [markdown]
# ## Stop 4: the loss
#
# The mean over the nine tokens of the answer, each predicted from what stands before it. While training, halfbyte
# evaluates the output head at these positions alone: of 49,152 logits a token, none is ever held for the question.

# %%
assert model(**batch).logits is None

with torch.no_grad():
    logits = model.eval()(input_ids=batch["input_ids"]).logits[0]
model.train()

targets = batch["labels"][0, 1:]
learned = targets != -100
by_hand = cross_entropy(logits[:-1][learned], targets[learned])
print(f"{learned.sum()} tokens: {by_hand:.5f} by hand, {loss:.5f} by the model")
assert learned.sum() == 9 and logits.shape[1] == 49_152
assert torch.allclose(by_hand, loss, rtol=1e-4)

# %% [markdown]
# ## Stop 5: what is kept for the backward pass
#
# Between forward and backward everything that the gradients need has to be held: that, and not the weights, is what
# fills memory in a long row. torch tells what it saves. Three ways: PEFT and transformers as they are over the 4-bit
# layers, halfbyte's fused layers, and gradient checkpointing, which keeps the input of each layer alone and makes all
# else again.


# %%
def kept():
    """What a forward pass saves for its backward, each tensor once; and the loss."""
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = model(**batch).loss
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}  # is there anyway
    return [tensor for at, tensor in saved.items() if at not in held], value


for hook in hooks:
    hook.remove()

fused, loss = kept()

halfbyte.unprepare(model)
plain, loss_plain = kept()
halfbyte.prepare(model)

model.gradient_checkpointing_enable({"use_reentrant": False})
again, loss_again = kept()
model.gradient_checkpointing_disable()

size = {
    "PEFT and transformers": sum(t.untyped_storage().nbytes() for t in plain),
    "halfbyte": sum(t.untyped_storage().nbytes() for t in fused),
    "checkpointed": sum(t.untyped_storage().nbytes() for t in again),
}
plt.barh([*reversed(size)], [value / 2**20 for value in reversed(size.values())], color=BLUE)
plt.title(f"MiB kept for the backward pass of {len(ids)} tokens")
plt.show()

print({name: f"{value / 2**20:.1f} MiB" for name, value in size.items()})
assert 5 * size["checkpointed"] < size["halfbyte"] < size["PEFT and transformers"]
assert torch.allclose(loss, loss_plain, rtol=1e-4) and torch.equal(loss, loss_again)

# %% [markdown]
# And what is *not* among it: no weight of the base. The backward pass reads the 4-bit weights once more.

# %%
shapes = {tuple(module.quantized_weight.shape) for module in model.modules() if isinstance(module, halfbyte.Linear4bit)}
assert len(shapes) == 4
assert not any(tuple(tensor.shape) in shapes for tensor in (*fused, *again))

# %% [markdown]
# ## Stop 6: backward
#
# The breakpoint again, and now through it from behind. What arrives at the layer is dY; by hand:
#
#     dB = dYᵀ (s X Aᵀ)        dA = (s dY B)ᵀ X        dX = dY W + (s dY B) A
#
# The gradient passes *through* the frozen weight, on to the layers below, but no gradient *of* it is ever made.

# %%
with torch.no_grad():  # so that A gets a gradient too: at the very first step B = 0 leaves it none
    B.normal_(std=0.01)

hooks = [layer.register_forward_hook(forward_stop), layer.register_full_backward_hook(backward_stop)]
model(**batch).loss.backward()
x, dy = stop["x"][0], stop["dy"][0]

by_hand = {
    "dB": (dy.T @ (s * x @ A.T), B.grad),
    "dA": ((s * dy @ B).T @ x, A.grad),
    "dX": (dy @ W + s * dy @ B @ A, stop["dx"][0]),
}
for name, (mine, theirs) in by_hand.items():
    off = (mine - theirs).abs().max() / theirs.abs().max()
    print(f"{name} {tuple(theirs.shape)}: off by {off:.1e} of its largest value")
    assert off < 1e-4

# %%
graded = [name for name, p in model.named_parameters() if p.grad is not None]
print(f"{len(graded)} tensors have a gradient, of {sum(1 for _ in model.parameters())}")
assert graded and all("lora_A" in name or "lora_B" in name for name in graded)
assert len(graded) == 2 * 7 * 30  # A and B of seven projections in thirty layers

# %% [markdown]
# ## Stop 7: the same by recomputing
#
# With gradient checkpointing our layer runs twice: once forward, and once more in the backward pass, to make again what
# was not kept. Half as much again of matrix work, for a tenth of the memory, and the same bits.

# %%
kept_gradient = B.grad.clone()
model.zero_grad()
model.gradient_checkpointing_enable({"use_reentrant": False})
passes.clear()
model(**batch).loss.backward()
model.gradient_checkpointing_disable()

print(f"the layer ran {len(passes)} times")
assert len(passes) == 2 and torch.equal(B.grad, kept_gradient)

for hook in hooks:
    hook.remove()
with torch.no_grad():
    B.zero_()  # back to the beginning of a training
model.zero_grad()

# %% [markdown]
# ## Stop 8: the optimizer's memory
#
# Adam keeps two numbers for each that it trains: the mean of its gradients and of their squares. In fp32 that is 8
# bytes; in 8 bits, block-wise as in lesson 1, it is 2 and a little. *Paged* means that it may leave memory when others
# need it: on a GPU to the CPU's memory, here to a file that is mapped, which the operating system writes out and reads
# back.

# %%
LR = 2e-4
optimizer = halfbyte.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, state_bits=8, paged=True
)
before = model(**batch).loss
before.backward()
norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.3)
print(f"loss {before:.3f}, gradient norm {norm:.2f}, clipped to 0.3 as in the paper")

base_bytes = weight.packed.clone()
start, gradient = B.detach().clone(), B.grad.clone()
assert A.grad.abs().max() == 0  # since B is zero
optimizer.step()

# %%
state = optimizer.state[B]
print({name: (value.dtype, tuple(value.shape)) for name, value in state.items() if name != "step"})
stored = sum(value.nbytes for name, value in state.items() if name != "step")
print(f"{stored / B.numel():.2f} bytes a number instead of 8")
assert state["exp_avg"].dtype == torch.uint8 and round(stored / B.numel(), 2) == 2.03

# %% [markdown]
# What do the 8 bits hold? After one step the mean is (1 − β₁) of the gradient.

# %%
coded = halfbyte.quant.Coded(state["exp_avg"], state["exp_avg_absmax"])
held = dequantize_coded(coded, "dynamic")
exact = 0.1 * gradient

plt.plot(exact.flatten(), held.flatten(), ".", color=BLUE, markersize=2)
plt.gca().set(xlabel="0.1 · gradient", ylabel="from 8 bits", title="the first moment of B")
plt.locator_params(axis="x", nbins=5)
plt.show()

worst = ((held - exact).abs().view(-1, 256).amax(dim=1) / exact.abs().view(-1, 256).amax(dim=1)).max()
print(f"furthest off: {worst:.2%} of the largest in its block")
assert worst < 0.01

# %% [markdown]
# And where do they lie? In a shared mapping of a file that has no name any more, so that nothing is left when the
# process ends (`rw-s`: read, write, shared).

# %%
maps = Path("/proc/self/maps")
if maps.exists():  # Linux
    address = state["exp_avg"].data_ptr()
    for line in maps.read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            print(line.split()[1], "…", line.split()[-1])
            assert "rw-s" in line and "(deleted)" in line

# %% [markdown]
# ## Stop 9: the step
#
# Adam's first step goes by the sign of the gradient: m / √v is ±1 whatever its size, so each number of B moves by the
# learning rate. A has no gradient yet and stays. The base has not changed by one bit, and the loss is lower.

# %%
moved = (B.detach() - start).flatten()
plt.hist(moved / LR, bins=80, color=BLUE)
plt.title("how far each number of B moved, in learning rates")
plt.show()

after = model(**batch).loss
print(f"loss {before:.3f} → {after:.3f}")
assert after < before
assert torch.equal(weight.packed, base_bytes)
assert (moved.abs() < 1.01 * LR).all() and (moved.abs() > 0.9 * LR).float().mean() > 0.5

# %% [markdown]
# That was the step. A run does a few hundred of these, and nothing else.
#
# ## Beside the way: activations in 8 bits
#
# QLoRA quantizes weights. One can quantize what flows between the layers too, so that a product has integers on both
# sides; that is LLM.int8() ([arXiv 2208.07339](https://arxiv.org/abs/2208.07339)), and it met a difficulty that weights
# do not have. Let a text flow through the model, and look at what enters one layer near the top.

# %%
WATCHED = "model.layers.29.mlp.up_proj"
entered = {}
watched = model.get_submodule(f"base_model.model.{WATCHED}")
hook = watched.register_forward_pre_hook(lambda module, inputs: entered.update(x=inputs[0][0].detach().float()))
text = tokenizer(general_texts()[0].text, return_tensors="pt").input_ids[:, :128]
with torch.no_grad(), model.disable_adapter():
    model.eval()(text)
hook.remove()

x = entered["x"]
W = watched.base_layer.quantized_weight.dequantize(torch.float32)

figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, height_ratios=(2, 1))
for column, (values, title) in enumerate(
    [(x, "activations: token by column"), (W[:128], "weights: 128 rows by column")]
):
    axes[0, column].imshow(values.abs() / values.abs().median(), aspect="auto", cmap="magma_r", vmin=4, vmax=20)
    axes[0, column].set(title=title)
    axes[1, column].plot(values.abs().amax(dim=0) / values.abs().median(), color=RED, linewidth=0.8)
    axes[1, column].set(ylim=(0, 200), ylabel="largest / median", xlabel="column")
figure.tight_layout()
plt.show()

# %% [markdown]
# Two columns of 576 stand out in every token. (The paper found such columns to appear in all layers of models beyond
# some 6 billion parameters; this small one has them here and there. It calls a column an outlier if a value reaches 6.)
# Weights have nothing of the kind.

# %%
largest = x.abs().amax(dim=0)
outlier = largest >= 6
print(f"outlier columns: {outlier.nonzero().flatten().tolist()}")
assert 0 < outlier.sum() <= 5
assert largest.max() / largest.median() > 20 > 3 * W.abs().amax(dim=0).max() / W.abs().amax(dim=0).median()

# %% [markdown]
# A token's row is quantized with one constant. The outlier sets it, and everybody else in that row is left with a few
# codes, just as the one outlier among weights in lesson 1. The remedy of LLM.int8() is to compute these few columns
# apart, in 16 bits, and the other 574 in integers.


# %%
def int8(values):
    """Row by row to the integers from −127 to 127 and back."""
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    return (values / scale).round() * scale


exact = x @ W.T


def error(product):
    return ((product - exact).norm(dim=1) / exact.norm(dim=1)).median().item()


errors = {
    "weights in int8": error(x @ int8(W).T),
    "both in int8": error(int8(x) @ int8(W).T),
    "both, outliers apart": error(int8(x * ~outlier) @ int8(W).T + (x * outlier) @ W.T),
}
plt.barh([*reversed(errors)], [value * 100 for value in reversed(errors.values())], color=[RED, BLUE, BLUE])
plt.title("error of the layer's output, in percent")
plt.show()

print({name: f"{value:.2%}" for name, value in errors.items()})
assert errors["weights in int8"] < errors["both, outliers apart"] < errors["both in int8"] / 2

# %% [markdown]
# So two columns are responsible for two thirds of the error. QLoRA does not meet them: there activations stay in 16
# bits, and only weights, which have no such columns, are in 4. halfbyte's own `int8`
# ([training.md](../training.md#other-bases)) is of weights alone, too.
