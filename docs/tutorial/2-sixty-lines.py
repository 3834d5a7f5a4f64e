# %% [markdown]
# # 2. QLoRA in sixty lines
#
# The whole method is two equations of [the paper](https://arxiv.org/abs/2305.14314). Here they are in plain torch, in
# sixty lines that you can read at one go: NF4, double quantization, LoRA, AdamW, and a Llama that is trained with them.
# Then halfbyte does the same, and we hold the two against each other: bytes, logits, gradients, losses.
#
# [Lesson 1](1-quantization.ipynb) has the number format. What runs here is tiny and random, and takes seconds.

# %%
import warnings

warnings.simplefilter("ignore")  # what libraries tell each other

import copy
import tempfile
from contextlib import ExitStack
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
from IPython import get_ipython
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.quiet import quiet

silence = ExitStack()
silence.enter_context(quiet())  # bars and log lines of other libraries

from peft import LoraConfig, get_peft_model

cells = get_ipython().user_ns["In"]  # what was run so far, to count lines below
torch.manual_seed(0)
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## Two tables
#
# The 16 values of NF4 from quantiles of the bell curve, and the 256 of the dynamic map for the constants.

# %%
bell, last = NormalDist(), 1 - (1 / 30 + 1 / 32) / 2
above = [bell.inv_cdf(last - i * (last - 0.5) / 8) for i in range(8)]
below = [bell.inv_cdf(last - i * (last - 0.5) / 7) for i in range(7)]
NF4 = torch.tensor([-v for v in below] + [0.0] + above[::-1]) / max(above)

dynamic = [0.0, 1.0]
for decade in range(7):
    edges = torch.linspace(0.1, 1, 2**decade + 1)
    middles = (10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
    dynamic += [sign * middle for middle in middles for sign in (1, -1)]
DYNAMIC = torch.tensor(sorted(dynamic))


# %% [markdown]
# ## Quantize, and back
#
# Each block over its absmax, then the nearest value of a table.


# %%
def quantize(x, table, blocksize):
    blocks = x.reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    return torch.bucketize(blocks / absmax[:, None], (table[1:] + table[:-1]) / 2), absmax


def dequantize(codes, absmax, table):
    return table[codes] * absmax[:, None]


# %% [markdown]
# ## Equation 6: a weight in 4.127 bits
#
#     doubleDequant(c₁, c₂, W₄) = dequant(dequant(c₁, c₂), W₄) = W
#
# In the paper's names c₂ are the constants of the blocks of 64 weights, in 8 bits, and c₁ the constants of these, in
# fp32. There W comes out in bf16; here in fp32, so that we can compare to many digits.


# %%
class Weight:
    def __init__(self, dense):
        codes, absmax = quantize(dense, NF4, 64)
        self.packed = (codes[:, ::2] << 4 | codes[:, 1::2]).byte()
        self.mean, self.shape = absmax.mean(), dense.shape
        c2, self.c1 = quantize(absmax - self.mean, DYNAMIC, 256)
        self.c2 = c2.byte()

    def dense(self):
        absmax = dequantize(self.c2.long(), self.c1, DYNAMIC).flatten() + self.mean
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=-1).long()
        return dequantize(codes.view(-1, 64), absmax, NF4).view(self.shape)


# %% [markdown]
# ## Equation 5: the product, and LoRA beside it
#
#     Y = X doubleDequant(c₁, c₂, W₄) + s X L₁ L₂
#
# The product is a function of its own for one reason: autograd would keep the dense weight until the backward pass, and
# the 4 bits would save nothing. So the weight in 4 bits is what is kept, and the backward pass expands it again. The
# weight itself is frozen and gets no gradient.


# %%
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.dense().T

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.weight.dense(), None


class QLoRALinear(nn.Module):
    def __init__(self, linear, rank=8, alpha=16):
        super().__init__()
        self.weight, self.scale = Weight(linear.weight.data), alpha / rank
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return Product.apply(x, self.weight) + self.scale * (x @ self.a.T) @ self.b.T


# %% [markdown]
# ## Every linear layer of the decoder, and an optimizer


# %%
def qlora(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, QLoRALinear(linear))
    return model


def adamw(parameters, state, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.01):
    for p in parameters:
        m, v = state.setdefault(p, (torch.zeros_like(p), torch.zeros_like(p)))
        m.lerp_(p.grad, 1 - beta1)
        v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        p.data *= 1 - lr * decay
        p.data -= lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.grad = None


# %% [markdown]
# That was it. Count:

# %%
lines = [line for cell in cells[2:7] for line in cell.splitlines() if line.strip()]
print(f"{len(lines)} lines")
assert lines[0].startswith("bell") and "def adamw" in "".join(lines)
assert len(lines) <= 60

# %% [markdown]
# ## Does it learn?
#
# A Llama of two layers with random weights, one token a byte, and a sentence to learn by heart.

# %%
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, tie_word_embeddings=False, initializer_range=0.1,
)  # fmt: skip
llama = LlamaForCausalLM(config)

text = b"The frozen base is held in four bits, and what is trained lies beside it, in thirty-two. " * 2
ids = torch.tensor(list(text))[:160].view(4, 40)

ours = qlora(copy.deepcopy(llama))
with torch.no_grad():  # LoRA begins with B = 0, by which A has no gradient yet: to compare both, let B be something
    for module in ours.modules():
        if isinstance(module, QLoRALinear):
            module.b.normal_(std=0.02)
start = copy.deepcopy(ours.state_dict())

trained = [p for p in ours.parameters() if p.requires_grad]
frozen = sum(module.weight.packed.numel() * 2 for module in ours.modules() if isinstance(module, QLoRALinear))
print(f"{sum(p.numel() for p in trained):,} numbers are trained beside {frozen:,} weights in 4 bits")

# %%
STEPS, LR = 40, 1e-2
state, losses = {}, []
for step in range(1, STEPS + 1):
    loss = ours(input_ids=ids, labels=ids).loss
    loss.backward()
    adamw(trained, state, step, lr=LR)
    losses.append(loss.item())

print(f"loss {losses[0]:.2f} → {losses[-1]:.3f} in {STEPS} steps")
assert losses[-1] < losses[0] / 10

# %% [markdown]
# ## The same with halfbyte
#
# The same Llama from a folder, quantized while it is read; PEFT's LoRA on every linear layer; and `prepare`, which puts
# halfbyte's kernels under both. `compute_dtype` is fp32 for this comparison, where a run takes bf16.

# %%
with tempfile.TemporaryDirectory() as folder:
    llama.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32")
    )
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
theirs = halfbyte.prepare(get_peft_model(theirs, lora))

ours.load_state_dict(start)
pairs = {
    name: (module, theirs.get_submodule(f"base_model.model.{name}"))
    for name, module in ours.named_modules()
    if isinstance(module, QLoRALinear)
}
with torch.no_grad():
    for mine, other in pairs.values():
        other.lora_A["default"].weight.copy_(mine.a)
        other.lora_B["default"].weight.copy_(mine.b)
print(f"{len(pairs)} layers: {', '.join(name.split('.')[-1] for name in list(pairs)[:7])}, twice")

# %% [markdown]
# **The weights.** Every code of every weight is the same, and what they stand for agrees to the last places of fp32:
# our NF4 table comes from quantiles and halfbyte's from the published digits.

# %%
for mine, other in pairs.values():
    weight = other.base_layer.quantized_weight
    assert torch.equal(weight.packed.flatten(), mine.weight.packed.flatten())
    assert torch.allclose(weight.dequantize(torch.float32), mine.weight.dense(), rtol=0, atol=1e-6)

# %% [markdown]
# **Logits and gradients.** The bound that we state is 10⁻⁵ of the largest value. (fp32 has about seven digits; sums in
# another order take one or two.)

# %%
BOUND = 1e-5


def off(mine, other):
    """How far two tensors are apart, of the largest value."""
    return ((mine - other).abs().max() / mine.abs().max()).item()


with torch.no_grad():
    logits = off(ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)

for model in (ours.train(), theirs.train()):
    model(input_ids=ids, labels=ids).loss.backward()
gradients = {
    f"{name} {which}": off(mine, other)
    for name, (module, peer) in pairs.items()
    for which, mine, other in (
        ("A", module.a.grad, peer.lora_A["default"].weight.grad),
        ("B", module.b.grad, peer.lora_B["default"].weight.grad),
    )
}
worst = max(gradients, key=gradients.get)
print(f"logits are {logits:.1e} apart; of {len(gradients)} gradients {worst} is furthest, {gradients[worst]:.1e}")
assert logits < BOUND and gradients[worst] < BOUND

# %% [markdown]
# **Losses.** Both trained from the same beginning, ours with its eight lines of AdamW, halfbyte with its own. A step
# that is off in its last digit makes the next one off by more, so the bound of all forty is 10⁻⁴ of the loss.

# %%
ours.load_state_dict(start)
for model in (ours, theirs):
    model.zero_grad()
optimizer = halfbyte.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)

state, curves = {}, {"sixty lines": [], "halfbyte": []}
for step in range(1, STEPS + 1):
    loss = ours(input_ids=ids, labels=ids).loss
    loss.backward()
    adamw(trained, state, step, lr=LR)
    curves["sixty lines"].append(loss.item())

    loss = theirs(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    curves["halfbyte"].append(loss.item())

apart = [abs(a - b) / a for a, b in zip(*curves.values(), strict=True)]
figure, axes = plt.subplots(1, 2)
axes[0].plot(curves["sixty lines"], color=GREY, linewidth=5, alpha=0.5, label="sixty lines")
axes[0].plot(curves["halfbyte"], color=RED, label="halfbyte")
axes[0].set(title="loss by step")
axes[0].legend()
axes[1].semilogy(apart, "o", color=BLUE, markersize=3)
axes[1].axhline(1e-4, color=GREY, linestyle=":")
axes[1].set(title="how far apart, of the loss; dotted: the bound")
plt.show()

assert max(apart) < 1e-4

# %% [markdown]
# ## What the function of its own was for
#
# What does autograd keep for the backward pass, with `Product` and without it? Hooks that torch has for this purpose
# tell.


# %%
def kept(forward):
    """Bytes of the tensors that a forward pass saves for its backward, each counted once."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        forward()
    return sum(tensor.nbytes for tensor in saved.values())


layer = ours.model.layers[0].mlp.gate_proj
x = torch.randn(8, 128, requires_grad=True)
naive = kept(lambda: x @ layer.weight.dense().T)
own = kept(lambda: Product.apply(x, layer.weight))
in_4_bits = layer.weight.packed.nbytes + layer.weight.c2.nbytes + layer.weight.c1.nbytes

plt.barh(["in 4 bits, held anyway", "Product keeps", "plain product keeps"], [in_4_bits, own, naive], color=BLUE)
plt.title("bytes for one layer of 384 × 128")
plt.show()

print(f"plain {naive:,} bytes, Product {own:,}; the weight itself has {in_4_bits:,}")
assert own == 0 and naive >= 384 * 128 * 4

# %% [markdown]
# ## What halfbyte does beyond sixty lines
#
# The same arithmetic, and then what makes it usable: tiles of the weight are expanded inside the matrix product, so
# that no dense copy exists at all; LoRA and base product are one operation; norms, rotation and gated units take one
# pass; the head never holds its logits; optimizer state is 8 bits and can go to the disk; files are bitsandbytes',
# opened without a copy; a run can be killed and goes on with the same bits. [Lesson 4](4-one-step.ipynb) walks through
# such a step, and [lesson 3](3-fine-tune.ipynb) is a real fine-tune.
