# %% [markdown]
# <!-- English: 048c36e083b81e3ad66e27aa470a96d12fc4842e -->
# # 2. 六十行代码的 QLoRA
#
# 整个方法就是[论文](https://arxiv.org/abs/2305.14314)的两个公式。这里用普通的 torch 写出来，六十行，可以一口气读完：NF4、双重量化、LoRA、AdamW，以及用它们训练的一个 Llama。然后 halfbyte 做同样的事，我们把两者对照：字节、logits、梯度、损失。
#
# 数字格式见[第 1 课](1-quantization.ipynb)。这里运行的模型极小，权重随机，只需几秒钟。

# %%
import warnings

warnings.simplefilter("ignore")  # 各个库彼此之间的提示

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
silence.enter_context(quiet())  # 其他库的进度条和日志

from peft import LoraConfig, get_peft_model

cells = get_ipython().user_ns["In"]  # 到目前为止运行过的代码，供下面数行数
torch.manual_seed(0)
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## 两张表
#
# NF4 的 16 个值，来自钟形曲线的分位数；以及常量所用的动态映射的 256 个值。

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
# ## 量化，以及还原
#
# 每块除以它的 absmax，然后取表中最近的值。


# %%
def quantize(x, table, blocksize):
    blocks = x.reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    return torch.bucketize(blocks / absmax[:, None], (table[1:] + table[:-1]) / 2), absmax


def dequantize(codes, absmax, table):
    return table[codes] * absmax[:, None]


# %% [markdown]
# ## 公式 6：4.127 位的权重
#
#     doubleDequant(c₁, c₂, W₄) = dequant(dequant(c₁, c₂), W₄) = W
#
# 按论文的记法，c₂ 是每 64 个权重一块的常量，为 8 位；c₁ 是这些常量的常量，为 fp32。论文中 W 还原为 bf16；这里还原为 fp32，以便比较许多位数字。


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
# ## 公式 5：乘积，以及旁边的 LoRA
#
#     Y = X doubleDequant(c₁, c₂, W₄) + s X L₁ L₂
#
# 乘积单独写成一个函数，只有一个原因：否则 autograd 会把未量化的权重一直保留到反向计算，4 位就什么也没有省下。因此保留的是 4 位的权重，反向计算再把它展开一次。权重本身是冻结的，没有梯度。


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
# ## 解码器的每个线性层，以及优化器


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
# 就是这些。数一数：

# %%
lines = [line for cell in cells[2:7] for line in cell.splitlines() if line.strip()]
print(f"{len(lines)} lines")
assert lines[0].startswith("bell") and "def adamw" in "".join(lines)
assert len(lines) <= 60

# %% [markdown]
# ## 它能学会吗？
#
# 一个两层的 Llama，权重随机，每个字节一个词元，要背下一句话。

# %%
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, tie_word_embeddings=False, initializer_range=0.1,
)  # fmt: skip
llama = LlamaForCausalLM(config)

text = b"The frozen base is held in four bits, and what is trained lies beside it, in thirty-two. " * 2
ids = torch.tensor(list(text))[:160].view(4, 40)

ours = qlora(copy.deepcopy(llama))
with torch.no_grad():  # LoRA 从 B = 0 开始，因此 A 还没有梯度；为了比较两者，让 B 取一些值
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
# ## 用 halfbyte 做同样的事
#
# 同一个 Llama 从文件夹载入，边读取边量化；每个线性层上都有 PEFT 的 LoRA；`prepare` 把 halfbyte 的计算内核放到两者之下。为了这次比较，`compute_dtype` 取 fp32，而实际运行用 bf16。

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
# **权重**。每个权重的每个编码都相同，它们所代表的值直到 fp32 的最后几位都一致：我们的 NF4 表来自分位数，halfbyte 的来自公布的数字。

# %%
for mine, other in pairs.values():
    weight = other.base_layer.quantized_weight
    assert torch.equal(weight.packed.flatten(), mine.weight.packed.flatten())
    assert torch.allclose(weight.dequantize(torch.float32), mine.weight.dense(), rtol=0, atol=1e-6)

# %% [markdown]
# **logits 和梯度**。我们声明的界限是最大值的 10⁻⁵。（fp32 大约有七位数字；求和次序不同会损失一两位。）

# %%
BOUND = 1e-5


def off(mine, other):
    """两个张量相差多少，以最大值为单位。"""
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
# **损失**。两者从同一个起点训练，我们的用八行的 AdamW，halfbyte 用它自己的。某一步最后一位的偏差会使下一步偏差更大，所以全部四十步的界限是损失的 10⁻⁴。

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
# ## 单独的函数有什么用
#
# 有 `Product` 和没有它，autograd 分别为反向计算保留什么？torch 为此提供的钩子可以告诉我们。


# %%
def kept(forward):
    """前向计算为反向计算保存的张量的字节数，每个只算一次。"""
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
# ## 六十行之外 halfbyte 还做什么
#
# 同样的算术，再加上使它实用的部分：权重在矩阵乘法之内一小块一小块地展开，因此根本没有未量化的副本；LoRA 与基础模型的乘积是一个操作；归一化、旋转和门控单元各只遍历一次内存；输出头从不保存完整的 logits；优化器状态是 8 位，可以放到磁盘上；文件是 bitsandbytes 的，打开时不复制；运行可以被强行终止，然后继续得到逐位相同的结果。[第 4 课](4-one-step.ipynb)走过这样的一步，[第 3 课](3-fine-tune.ipynb)是一次真正的微调。
