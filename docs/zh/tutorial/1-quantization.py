# %% [markdown]
# <!-- English: 7af9b4e635cfba71ae24c8f6764536419eabb20a -->
# # 1. 从零开始的量化
#
# 用 32 位表示的数，所说的比一个权重需要说的更多。本课从一次除法和一次舍入出发，一直走到 QLoRA 的数字格式：每个权重 4 位，按照权重所服从的钟形曲线选取，缩放常量还要再量化一次。每到一站，我们先自己写出来，再看 halfbyte 给出的是否相同。
#
# 你需要会一点 Python，并且见过张量。运行只需几秒钟。

# %%
import math
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch

import halfbyte
from halfbyte.quant import codebook, dequantize_affine, normal_float, quantize_affine, quantize_int8

plt.rcParams |= {"figure.figsize": (9, 2.6), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## 非对称量化：在最小值与最大值之间的 256 个刻度
#
# 五个权重，每个用 8 位。把一把有 255 格的尺子从最小值放到最大值，然后为每个权重记下离它最近的刻度：
#
#     scale = (max w - min w) / (2⁸ - 1)        q = round((w - min w) / scale)        ŵ = q · scale + min w

# %%
w = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5])

scale = (w.max() - w.min()) / 255
q = ((w - w.min()) / scale).round()
back = q * scale + w.min()

print(f"scale {scale:.6f}\ncodes {q.int().tolist()}\nback  {[round(x, 5) for x in back.tolist()]}")
assert q.tolist() == [142, 57, 198, 0, 255]

# %% [markdown]
# 没有哪个值偏离超过半格。这就是舍入的全部承诺，它还能查出错误：这个例子在流传时，第一个编码写的是 141。按这个编码，0.1 还原后偏离超过半格，因此它不可能是最近的。

# %%
assert (back - w).abs().max() <= scale / 2
assert abs(141 * scale + w.min() - 0.1) > scale / 2

theirs = quantize_affine(w)
assert theirs.codes.tolist() == q.int().tolist()
assert torch.equal(dequantize_affine(theirs), back)

# %% [markdown]
# 有一点对权重很要紧，却丢掉了：零处不一定有刻度。一个恰好为 0 的权重（例如填充）还原之后成了别的值。

# %%
zero = ((0 - w.min()) / scale).round() * scale + w.min()
print(f"0 comes back as {zero:.5f}")
assert zero != 0

# %% [markdown]
# ## 对称量化：零仍然是零
#
# 以零为中间的刻度，由最大的*绝对值*（称为 absmax）决定缩放。这是 [QLoRA 论文](https://arxiv.org/abs/2305.14314)的公式 1，c 就是其中的量化常量：
#
#     c = 127 / absmax(X)        X_int8 = round(c · X)        X̂ = X_int8 / c
#
# 八个值，切成两块，每块四个值，各有一个常量：

# %%
X = torch.tensor([1.5, -3.0, 2.0, 4.5, -2.5, 1.0, 3.5, -4.0])

for chunk in X.split(4):
    c = 127 / chunk.abs().max()
    codes = (c * chunk).round()
    back = [round(x, 3) for x in (codes / c).tolist()]
    print(f"c = {c:.3f}   codes {codes.int().tolist()}   back {back}")

theirs = quantize_int8(X.view(2, 4), blocksize="row")
assert theirs.codes.tolist() == [[42, -85, 56, 127], [-79, 32, 111, -127]]
assert theirs.dequantize()[0, 3] == 4.5 and theirs.dequantize()[1, 3] == -4.0  # 块中最大的值是精确的

# %% [markdown]
# ## 用哪一种？
#
# 取决于数据。这里用 3 位，这样刻度才看得清：分布在零附近的值适合对称的尺子；全为正的值则让这把尺子有一半闲置。


# %%
def marks_affine(x, bits):
    return torch.linspace(x.min(), x.max(), 2**bits)


def marks_symmetric(x, bits):
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1) / largest * x.abs().max()


def nearest(x, marks):
    return marks[(x[:, None] - marks).abs().argmin(dim=1)]


torch.manual_seed(0)
around_zero = torch.randn(500)
positive = torch.randn(500).abs() + 0.5

figure, axes = plt.subplots(1, 2)
for ax, x, title in zip(axes, (around_zero, positive), ("around zero", "all positive"), strict=True):
    for y, (marks, name) in enumerate([(marks_affine(x, 3), "affine"), (marks_symmetric(x, 3), "symmetric")]):
        error = (nearest(x, marks) - x).square().mean().sqrt()
        ax.plot(x, torch.full_like(x, y + 0.25), "|", color=GREY, alpha=0.5)
        ax.plot(marks, torch.full_like(marks, y), "o", color=(BLUE, RED)[y])
        ax.text(x.min() - 0.1, y + 0.45, f"{name}: error {error:.3f}", color=(BLUE, RED)[y])
    ax.set(title=title, yticks=[], ylim=(-0.4, 2))
    ax.spines.left.set_visible(False)
plt.show()

# %% [markdown]
# 这里以及下文所说的误差，都是均方误差的平方根。对于全为正的值，对称的尺子粗糙一倍以上。对于零附近的值，它有 7 个刻度，另一把有 8 个，因为零占去一个，而两侧必须相同；用 8 位时是 255 比 256，可以忽略。权重分布在零附近，所以采用对称量化：只需保存一个数而不是两个，而且零仍然是零。

# %%
affine, by_magnitude = (
    (nearest(positive, marks(positive, 3)) - positive).square().mean().sqrt()
    for marks in (marks_affine, marks_symmetric)
)
ratio = by_magnitude / affine
print(f"all positive: symmetric is {ratio:.1f} times as far off")
assert ratio > 2

# %% [markdown]
# ## 分块量化：一个离群值只损害自己所在的块
#
# 现在用 4 位，在 1,024 个小权重中有一个大的。如果全部共用一个常量，缩放就由这个离群值决定，其他权重都被舍入为零。如果每 64 个权重有一个常量，受损的就只有 64 个。

# %%
weights = torch.randn(1024) * 0.02
weights[300] = 1.0


def symmetric(x, blocksize, levels=7):
    blocks = x.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return ((blocks / absmax * levels).round() / levels * absmax).view(-1)


figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True, sharey=True)
for ax, blocksize in zip(axes, (1024, 64), strict=True):
    ax.bar(range(1024), (symmetric(weights, blocksize) - weights).abs(), width=1.0, color=RED)
    ax.set(title=f"error of each weight, blocks of {blocksize}", xlim=(0, 1024))
figure.tight_layout()
plt.show()

zeros = (symmetric(weights, 1024) == 0).sum().item()
print(f"One block: {zeros} of 1,024 weights became zero. Blocks of 64: {(symmetric(weights, 64) == 0).sum()}.")
assert zeros == 1023

# %% [markdown]
# 不过每个常量要占 32 位，由它的块分摊。块越小越精确，占用的内存也越多。论文取 64：每个权重多半位。

# %%
sizes = [16, 32, 64, 128, 256, 512, 1024, 2048]
normal = torch.randn(2**18)
errors = [(symmetric(normal, size) - normal).square().mean().sqrt() for size in sizes]
bits = [4 + 32 / size for size in sizes]

figure, ax = plt.subplots()
ax.plot(bits, errors, "o-", color=BLUE)
for size, x, y in zip(sizes, bits, errors, strict=True):
    ax.annotate(f"{size}", (x, y), textcoords="offset points", xytext=(4, 5))
ax.set(xlabel="bits a weight, constants and all", ylabel="error, in σ", title="blocks of 16 to 2,048 normal weights")
plt.show()

assert errors == sorted(errors) and bits[sizes.index(64)] == 4.5

# %% [markdown]
# ## NF4：刻度放在权重所在之处
#
# 16 个等间隔的编码：对于正态分布的权重，每个编码各用了多少次？

# %%
blocks = normal.view(-1, 64)
scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).view(-1)


def usage(table):
    """取表中各个值的权重所占的比例；表按升序排列。"""
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
    return torch.bincount(codes, minlength=16) / len(codes)


int4 = codebook("int4")
plt.bar(range(16), usage(int4), color=BLUE)
plt.xticks(range(16), [f"{value:.2f}" for value in int4])
plt.title("share of weights at each of int4's values")
plt.show()

assert usage(int4)[0] == 0  # -8/7 永远不是最近的
assert usage(int4).max() > 5 * usage(int4)[14]

# %% [markdown]
# 靠外的编码几乎用不到，第一个则从来不用：补码里有一个 −8，而按 absmax 缩放永远到不了那里。代表许多权重的编码，应当离相邻的编码更近。如果所有编码用得一样多，就没有浪费；为此，编码之间的边界必须是*分位数*：把钟形曲线切成面积相等的几份。

# %%
bell = NormalDist()
edges = [bell.inv_cdf(i / 16) for i in range(1, 16)]

x = torch.linspace(-3, 3, 400)
density = [bell.pdf(v) for v in x.tolist()]
plt.plot(x, density, color=GREY)
for left, right in zip([-3, *edges], [*edges, 3], strict=True):
    inside = torch.linspace(left, right, 30)
    plt.fill_between(inside, [bell.pdf(v) for v in inside.tolist()], alpha=0.35)
plt.title("sixteen pieces, each of one sixteenth of the weights")
plt.ylim(0)
plt.show()

assert abs(bell.cdf(edges[4]) - bell.cdf(edges[3]) - 1 / 16) < 1e-12

# %% [markdown]
# 论文把每个值放在钟形曲线的两个相邻分位数之间，Q 表示分位数：
#
#     qᵢ = ½ (Q(i / (2ᵏ + 1)) + Q((i + 1) / (2ᵏ + 1)))
#
# 严格照字面计算，只得到 15 个值，因为 i = 0 时分位数 Q(0) 是 −∞。它们关于零对称，零也在其中；第十六个值只能加在某一侧。

# %%
literal = [(bell.inv_cdf(i / 17) + bell.inv_cdf((i + 1) / 17)) / 2 for i in range(1, 16)]
print([round(v, 3) for v in literal])
assert len(literal) == 15 and abs(literal[7]) < 1e-12
assert bell.inv_cdf(1e-300) < -30  # 越接近 0 就越远

# %% [markdown]
# 因此论文把曲线的两半分开处理：零以上 8 个值，零以下 7 个，再加上零本身。在每一半中，概率从二分之一到最外侧的一个等间隔排列。最外侧是哪一个，论文没有说明；它公布的表则给出了答案：1 − 1/30 与 1 − 1/32 的中点，这两个数正是两半各自会取的值。最后除以最大的值。

# %%
outermost = 1 - (1 / 30 + 1 / 32) / 2


def half(count):
    """在 ``count`` 个等间隔概率处的分位数，从 ``outermost`` 向二分之一。"""
    step = (outermost - 0.5) / count
    return [bell.inv_cdf(outermost - i * step) for i in range(count)]


above, below = half(8), half(7)
values = [-v for v in below] + [0.0] + above[::-1]
nf4 = torch.tensor([v / max(values) for v in values], dtype=torch.float64)
print([round(v, 4) for v in nf4.tolist()])

assert len(nf4) == 16 and nf4[7] == 0 and nf4[0] == -1 and nf4[-1] == 1
assert torch.allclose(nf4, codebook("nf4").double(), atol=2e-7, rtol=0)
assert torch.allclose(nf4, normal_float(4).double(), atol=1e-7, rtol=0)

# %% [markdown]
# 这就是 QLoRA 的文件所保存的表，精确到第七位，全部来自分位数。与其他 4 位格式放在一起：

# %%
tables = {name: codebook(name).sort().values for name in ("nf4", "int4", "fp4", "e2m1", "e3m0")}

figure, ax = plt.subplots(figsize=(9, 3))
for y, (name, table) in enumerate(reversed(tables.items())):
    ax.plot(table, torch.full_like(table, y), "o", color=RED if name == "nf4" else BLUE)
ax.set(yticks=range(5), yticklabels=[*reversed(tables)], title="what sixteen codes stand for, of a block's absmax")
ax.spines.left.set_visible(False)
plt.show()

# %% [markdown]
# 它更好吗？对于 64 个一块的正态权重，在这五种格式中是的。好多少也值得知道：与等间隔相比，好出的是一位的几分之一，而不是一位（误差减半才算一位）。

# %%
errors = {}
for name in tables:
    back = halfbyte.quantize_4bit(normal, name, blocksize=64, double_quant=False).dequantize()
    errors[name] = (back - normal).square().mean().sqrt().item()

plt.barh([*reversed(errors)], [*reversed(errors.values())], color=[BLUE] * 4 + [RED])
plt.title("error on normal weights in blocks of 64, in σ")
plt.show()

gain = math.log2(errors["int4"] / errors["nf4"])
print({name: round(error, 4) for name, error in errors.items()}, f"int4 to nf4: {gain:.2f} bit")
assert min(errors, key=errors.get) == "nf4"
assert 0.1 < gain < 0.3

# %% [markdown]
# 它的编码真如分位数所承诺的那样，用得一样多吗？不完全是：被量化的是权重*除以它那 64 个中的最大值*，而 64 个正态值中的最大值约在 2.5 σ 处，这张表却把它的 1 放在相当于 1.85 σ 的位置。因此“对正态权重最优”略微说过了头；“比等间隔好”则成立。

# %%
shares = {name: usage(tables[name]) for name in ("int4", "nf4")}
for name, color in (("int4", BLUE), ("nf4", RED)):
    plt.step(range(16), shares[name], where="mid", color=color, label=name)
plt.axhline(1 / 16, color=GREY, linestyle=":", label="all alike")
plt.legend()
plt.title("share of weights at each code")
plt.show()

bits = {name: -(share[share > 0] * share[share > 0].log2()).sum().item() for name, share in shares.items()}
print("bits of information in a code:", {name: round(value, 2) for name, value in bits.items()})
assert bits["int4"] < bits["nf4"] < 4
assert 1.8 < bell.inv_cdf(outermost) < 1.9 and 2.4 < blocks.abs().amax(dim=1).median() < 2.6

# %% [markdown]
# ## 一个字节两个编码
#
# 机器没有 4 位的类型，所以两个编码共用一个字节，第一个在高半部分。于是权重就是这个字节数组，加上一张常量表。

# %%
small = torch.tensor([0.5, -1.0, 0.0, 0.25, *[0.0] * 60])
codes = torch.bucketize(small, (tables["nf4"][:-1] + tables["nf4"][1:]) / 2)
packed = (codes[::2] << 4) | codes[1::2]
print("codes", codes[:4].tolist(), "bytes", [f"{byte:08b}" for byte in packed[:2].tolist()])

theirs = halfbyte.quantize_4bit(small, double_quant=False)
assert theirs.packed.flatten().tolist() == packed.tolist()
assert theirs.statistics.absmax.tolist() == [1.0]

# %% [markdown]
# ## 双重量化：常量也是数
#
# 每 64 个权重一个 32 位的常量，就是每个权重半位。把这些常量本身也量化为 8 位，每 256 个为一块，每块有一个 32 位的常量：
#
#     8 / 64 + 32 / (64 · 256) = 0.127    而不是    32 / 64 = 0.5    位（每个权重）

# %%
before, after = 32 / 64, 8 / 64 + 32 / (64 * 256)
saved = before - after
print(f"{before} → {after:.3f} bit, {saved:.3f} saved: {saved * 65e9 / 8 / 1e9:.1f} GB of 65 billion weights")
assert round(after, 3) == 0.127 and round(saved, 3) == 0.373

figure, ax = plt.subplots(figsize=(9, 1.6))
for y, (first, second) in enumerate([(8 / 64, 32 / (64 * 256)), (32 / 64, 0)]):
    ax.barh(y, 4, color=GREY)
    ax.barh(y, first, left=4, color=BLUE)
    ax.barh(y, second, left=4 + first, color=RED)
    ax.text(4.52, y, f"{4 + first + second:.3f} bits", va="center")
ax.set(yticks=[0, 1], yticklabels=["double", "single"], xlim=(3.5, 4.8), title="codes, constants, constants' constants")
plt.show()

# %% [markdown]
# 常量是绝对值，全为正，而带符号的映射会有一半编码无人使用。所以先减去它们的平均值。剩下的取 256 个值中最近的一个，这些值越靠近零越密（*动态*映射：一部分位说明数有多小，其余的位说明是哪一个）。

# %%
constants = normal.view(-1, 64).abs().amax(dim=1)
mean = constants.mean()
rest = (constants - mean).view(-1, 256)
largest = rest.abs().amax(dim=1, keepdim=True)
dynamic = codebook("dynamic")
codes = torch.bucketize(rest / largest, (dynamic[:-1] + dynamic[1:]) / 2)
back = dynamic[codes] * largest + mean

figure, axes = plt.subplots(1, 2)
axes[0].hist(constants, bins=60, color=BLUE)
axes[0].axvline(mean, color=RED)
axes[0].set(title="constants of 4,096 blocks, and their mean")
axes[1].plot(dynamic, color=BLUE)
axes[1].set(title="the 256 values of the dynamic map")
plt.show()

theirs, nested = halfbyte.quant.quantize_statistics(constants)
agree = (theirs.view_as(codes) == codes).float().mean().item()
print(f"{agree:.2%} of the codes are halfbyte's")
assert agree > 0.999  # 恰在两者正中的值归于哪一边，取决于除法的最后一位
assert abs(nested.offset - mean) < 1e-6
assert ((back.flatten() - constants).abs() / constants).max() < 0.01

# %% [markdown]
# 代价是什么？常量偏离百分之零点几，权重的误差对此毫无察觉。

# %%
matrix = normal.view(512, 512)
single = halfbyte.quantize_4bit(matrix, double_quant=False)
double = halfbyte.quantize_4bit(matrix, double_quant=True)
worse = (double.dequantize() - matrix).norm() / (single.dequantize() - matrix).norm() - 1

print(f"{single.bits_per_parameter:.3f} → {double.bits_per_parameter:.3f} bits a weight, error {worse:+.2%}")
assert round(double.bits_per_parameter, 3) == 4.127 and single.bits_per_parameter == 4.5
assert abs(worse) < 0.005

# %% [markdown]
# 仅此而已：这就是 bitsandbytes 写出、halfbyte 读取的格式，逐位相同（[formats.md](../formats.md)）。[第 2 课](2-sixty-lines.ipynb)透过它进行训练。
