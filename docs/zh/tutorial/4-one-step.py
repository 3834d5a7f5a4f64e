# %% [markdown]
# <!-- English: af678c35db73b769cb283a857e920b8242a2b25d -->
# # 4. 走过一个训练步
#
# 一个真实模型的一个训练步，慢慢地走，就像在调试器里：凡是 [QLoRA 论文](https://arxiv.org/abs/2305.14314)的想法起作用的地方，我们就停下来，看看那里有哪些张量，并手工算出接下来是什么。这里一切都用 fp32，以便把“手工计算”的结果核对到许多位数字；实际运行用 bf16 计算。
#
# 数字格式见[第 1 课](1-quantization.ipynb)。运行大约需要一分钟。

# %%
import warnings

warnings.simplefilter("ignore")  # 各个库彼此之间的提示

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
silence.enter_context(quiet())  # 其他库的进度条和日志

from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

folder = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(folder)

# %% [markdown]
# ## 第 1 站：一行中训练的是什么
#
# 一段对话，按模型的聊天模板书写。问题只供阅读；要学的是回答，连同结束它的词元。只供阅读的部分标签为 −100，不计入任何东西。

# %%
question = {"role": "user", "content": "What does QLoRA keep in four bits?"}
answer = {"role": "assistant", "content": "The frozen weights of the base model."}


def tokens(turns, **options):
    return tokenizer.apply_chat_template(turns, return_dict=True, **options)["input_ids"]


ids = tokens([question, answer])[:-1]  # 不要最后一个词元后面的换行
read = len(tokens([question], add_generation_prompt=True))
labels = [-100] * read + ids[read:]
print("".join(tokenizer.decode(i) for i in ids[:read]))
print("⟦" + "|".join(tokenizer.decode(i) for i in ids[read:]) + "⟧")
assert tokenizer.decode(ids[-1]) == "<|im_end|>"

batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}

# %% [markdown]
# ## 第 2 站：基础模型的一块
#
# 模型逐个张量地读取并量化。看其中一层：内存里放着的是字节，每个字节两个编码。

# %%
model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=halfbyte.HalfbyteConfig(compute_dtype="float32")
)
PLACE = "model.layers.12.mlp.up_proj"
weight = model.get_submodule(PLACE).quantized_weight

print(PLACE, tuple(weight.shape), f"{weight.bits_per_parameter:.3f} bits a weight")
print("the first bytes:", [f"{byte:02x}" for byte in weight.packed.flatten()[:8].tolist()])

# %% [markdown]
# 手工计算（公式 6）：由 8 位得到块的常量，由字节得到编码，再为每个编码取表中的值。

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
# ## 第 3 站：在一层之内
#
# 每个线性层上都有秩为 8 的 LoRA，其下是 halfbyte 的计算内核。我们那一层上的钩子就是断点：它留住进来的、出去的，以及之后回来的内容。

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
# 手工计算（公式 5）：Y = X Wᵀ + s (X Aᵀ) Bᵀ，每个词元要经过 8 个数的瓶颈。B 从零开始，所以 LoRA 还没有增加任何东西：训练就从载入的那个模型开始。

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
# ## 第 4 站：损失
#
# 回答中九个词元的平均，每个都由它前面的内容来预测。训练时，halfbyte 只在这些位置计算输出头：每个词元有 49,152 个 logits，问题的那些从来没有保存过。

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
# ## 第 5 站：为反向计算保留什么
#
# 在前向与反向之间，梯度所需的一切都要保留：行很长时，占满内存的就是它，而不是权重。torch 会说出它保存了什么。三种方式：4 位层之上原样的 PEFT 和 transformers；halfbyte 的融合层；梯度检查点，它只保留每层的输入，其余都重新计算。


# %%
def kept():
    """前向计算为反向计算保存的内容，每个张量一次；以及损失。"""
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = model(**batch).loss
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}  # 本来就有
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
# 其中*没有*的是：基础模型的任何权重。反向计算会再读一次 4 位的权重。

# %%
shapes = {tuple(module.quantized_weight.shape) for module in model.modules() if isinstance(module, halfbyte.Linear4bit)}
assert len(shapes) == 4
assert not any(tuple(tensor.shape) in shapes for tensor in (*fused, *again))

# %% [markdown]
# ## 第 6 站：反向计算
#
# 又到断点，这次从后面穿过它。到达这一层的是 dY；手工计算：
#
#     dB = dYᵀ (s X Aᵀ)        dA = (s dY B)ᵀ X        dX = dY W + (s dY B) A
#
# 梯度*穿过*冻结的权重，传到下面的各层，但从来不计算权重*自己的*梯度。

# %%
with torch.no_grad():  # 使 A 也得到梯度：在第一步，B = 0 使它没有梯度
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
assert len(graded) == 2 * 7 * 30  # 三十层，每层七个投影的 A 和 B

# %% [markdown]
# ## 第 7 站：重新计算得到同样的结果
#
# 使用梯度检查点时，我们的那一层运行两次：前向一次，反向时再一次，以重新得到没有保留的内容。矩阵计算增加一半，内存只要十分之一，结果逐位相同。

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
    B.zero_()  # 回到训练的起点
model.zero_grad()

# %% [markdown]
# ## 第 8 站：优化器的内存
#
# Adam 为每个训练的数保存两个数：梯度的平均，以及梯度平方的平均。以 fp32 保存是 8 字节；以 8 位保存，像第 1 课那样分块，是 2 字节多一点。*分页*的意思是，别处需要内存时，它可以离开内存：在 GPU 上进入 CPU 的内存，在这里进入一个映射的文件，由操作系统写出和读回。

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
assert A.grad.abs().max() == 0  # 因为 B 为零
optimizer.step()

# %%
state = optimizer.state[B]
print({name: (value.dtype, tuple(value.shape)) for name, value in state.items() if name != "step"})
stored = sum(value.nbytes for name, value in state.items() if name != "step")
print(f"{stored / B.numel():.2f} bytes a number instead of 8")
assert state["exp_avg"].dtype == torch.uint8 and round(stored / B.numel(), 2) == 2.03

# %% [markdown]
# 这 8 位保存了什么？一步之后，平均值是梯度的 (1 − β₁) 倍。

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
# 它们又放在哪里？在一个已经没有名称的文件的共享映射里，因此进程结束时什么也不会留下（`rw-s`：读、写、共享）。

# %%
maps = Path("/proc/self/maps")
if maps.exists():  # Linux 上
    address = state["exp_avg"].data_ptr()
    for line in maps.read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            print(line.split()[1], "…", line.split()[-1])
            assert "rw-s" in line and "(deleted)" in line

# %% [markdown]
# ## 第 9 站：更新
#
# Adam 的第一步只看梯度的符号：无论梯度多大，m / √v 都是 ±1，所以 B 的每个数都移动一个学习率。A 还没有梯度，保持不动。基础模型一位也没有改变，而损失降低了。

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
# 这就是一步。一次运行就是做几百个这样的步，再没有别的。
#
# ## 题外：8 位的激活值
#
# QLoRA 量化的是权重。各层之间流动的内容也可以量化，使乘积的两边都是整数；这就是 LLM.int8()（[arXiv 2208.07339](https://arxiv.org/abs/2208.07339)），它遇到了权重所没有的困难。让一段文本流过模型，看看进入靠近顶部的某一层的是什么。

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
# 在 576 列中，有两列在每个词元上都很突出。（那篇论文发现，大约 60 亿参数以上的模型在所有层中都有这样的列；这个小模型只在某些地方有。论文把有值达到 6 的列称为离群列。）权重则没有这种情况。

# %%
largest = x.abs().amax(dim=0)
outlier = largest >= 6
print(f"outlier columns: {outlier.nonzero().flatten().tolist()}")
assert 0 < outlier.sum() <= 5
assert largest.max() / largest.median() > 20 > 3 * W.abs().amax(dim=0).max() / W.abs().amax(dim=0).median()

# %% [markdown]
# 一个词元的行用一个常量来量化。常量由离群值决定，该行的其他值就只剩下很少的几个编码，与第 1 课中权重里的那个离群值一样。LLM.int8() 的办法是，把这几列单独用 16 位计算，其余 574 列用整数计算。


# %%
def int8(values):
    """逐行化为 −127 到 127 的整数，再还原。"""
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
# 所以，三分之二的误差是这两列造成的。QLoRA 不会遇到它们：那里的激活值保持 16 位，只有权重是 4 位，而权重没有这样的列。halfbyte 自己的 `int8`（[training.md](../training.md#其他形式的基础模型)）也只用于权重。
