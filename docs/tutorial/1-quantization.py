# %% [markdown]
# # 1. Quantization from nothing
#
# A number in 32 bits says more than a weight has to say. This lesson goes from one division and one rounding to the
# number format of QLoRA: 4 bits a weight, chosen for the bell curve that weights follow, with scales that are quantized
# once more. At each stop we write it ourselves first, and then see that halfbyte gives the same.
#
# You need some Python, and to have seen a tensor. It takes seconds to run.

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
# ## Affine: 256 marks between the smallest and the largest
#
# Five weights, and 8 bits for each. Lay a ruler from the smallest to the largest with 255 steps, and write down for
# each weight the mark that it is nearest to:
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
# Nothing is further off than half a step. That is the whole promise of rounding, and it catches mistakes: this example
# goes around with 141 as its first code. By that code 0.1 comes back more than half a step away, so that it cannot be
# the nearest.

# %%
assert (back - w).abs().max() <= scale / 2
assert abs(141 * scale + w.min() - 0.1) > scale / 2

theirs = quantize_affine(w)
assert theirs.codes.tolist() == q.int().tolist()
assert torch.equal(dequantize_affine(theirs), back)

# %% [markdown]
# One thing is lost that matters to weights: no mark need lie at zero. A weight of exactly 0, such as padding, comes
# back as something else.

# %%
zero = ((0 - w.min()) / scale).round() * scale + w.min()
print(f"0 comes back as {zero:.5f}")
assert zero != 0

# %% [markdown]
# ## Symmetric: zero stays zero
#
# Take zero as the middle mark, and let the largest *magnitude*, called absmax, decide the scale. This is equation 1 of
# the [QLoRA paper](https://arxiv.org/abs/2305.14314), and c is its quantization constant:
#
#     c = 127 / absmax(X)        X_int8 = round(c · X)        X̂ = X_int8 / c
#
# Eight values, cut into two chunks of four with a constant each:

# %%
X = torch.tensor([1.5, -3.0, 2.0, 4.5, -2.5, 1.0, 3.5, -4.0])

for chunk in X.split(4):
    c = 127 / chunk.abs().max()
    codes = (c * chunk).round()
    back = [round(x, 3) for x in (codes / c).tolist()]
    print(f"c = {c:.3f}   codes {codes.int().tolist()}   back {back}")

theirs = quantize_int8(X.view(2, 4), blocksize="row")
assert theirs.codes.tolist() == [[42, -85, 56, 127], [-79, 32, 111, -127]]
assert theirs.dequantize()[0, 3] == 4.5 and theirs.dequantize()[1, 3] == -4.0  # the largest of a chunk is exact

# %% [markdown]
# ## Which one?
#
# It depends on the data. With 3 bits, so that one can see the marks: values that lie around zero fit the symmetric
# ruler, values that are all positive leave half of it unused.


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
# By error we mean the root of the mean square, here and below. On the positive values the symmetric ruler is more than
# twice as coarse. Around zero it has 7 marks to 8, since zero takes one and both sides are alike; with 8 bits it is 255
# to 256, and nothing. Weights lie around zero, so they are quantized symmetrically: one number to keep instead of two,
# and zero stays zero.

# %%
affine, by_magnitude = (
    (nearest(positive, marks(positive, 3)) - positive).square().mean().sqrt()
    for marks in (marks_affine, marks_symmetric)
)
ratio = by_magnitude / affine
print(f"all positive: symmetric is {ratio:.1f} times as far off")
assert ratio > 2

# %% [markdown]
# ## Chunks: one outlier spoils its own block only
#
# Now 4 bits, and a single large weight among 1,024 small ones. With one constant for all of them the outlier sets the
# scale, and everybody else is rounded to zero. With a constant for each 64, it spoils 64.

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
# Each constant costs 32 bits, though, shared by its block. Smaller blocks are more exact and larger in memory. The
# paper takes 64: half a bit more for each weight.

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
# ## NF4: marks where the weights are
#
# 16 codes, evenly spaced: how often is each of them used by normal weights?

# %%
blocks = normal.view(-1, 64)
scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).view(-1)


def usage(table):
    """The share of weights that takes each value of a table, which ascends."""
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
    return torch.bincount(codes, minlength=16) / len(codes)


int4 = codebook("int4")
plt.bar(range(16), usage(int4), color=BLUE)
plt.xticks(range(16), [f"{value:.2f}" for value in int4])
plt.title("share of weights at each of int4's values")
plt.show()

assert usage(int4)[0] == 0  # -8/7 is never the nearest
assert usage(int4).max() > 5 * usage(int4)[14]

# %% [markdown]
# The outer codes are hardly used, and the first never: two's complement has a −8 that absmax scaling cannot reach. A
# code that stands for many weights wants to stand closer to its neighbours. If all were used alike, none would be
# wasted, and for that the borders between codes have to be *quantiles*: cut the bell curve into pieces of equal area.

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
# The paper puts each value between two neighbouring quantiles of the bell curve, Q:
#
#     qᵢ = ½ (Q(i / (2ᵏ + 1)) + Q((i + 1) / (2ᵏ + 1)))
#
# Taken by the letter that is 15 values, since at i = 0 the quantile Q(0) is −∞. They lie symmetrically around zero,
# with zero among them; a sixteenth would have to go to one side.

# %%
literal = [(bell.inv_cdf(i / 17) + bell.inv_cdf((i + 1) / 17)) / 2 for i in range(1, 16)]
print([round(v, 3) for v in literal])
assert len(literal) == 15 and abs(literal[7]) < 1e-12
assert bell.inv_cdf(1e-300) < -30  # and further, the nearer to 0

# %% [markdown]
# So the paper takes the two halves of the curve apart: 8 values above zero, 7 below, and zero itself. In each half the
# probabilities are evenly spaced, from one half out to a last one. Which one, the paper leaves open; its published
# table says it: midway between 1 − 1/30 and 1 − 1/32, what the two halves would have for themselves. Then divide by the
# largest.

# %%
outermost = 1 - (1 / 30 + 1 / 32) / 2


def half(count):
    """Quantiles at ``count`` evenly spaced probabilities, from ``outermost`` down towards one half."""
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
# That is the table which QLoRA's files hold, to the seventh digit, from quantiles alone. Beside others of 4 bits:

# %%
tables = {name: codebook(name).sort().values for name in ("nf4", "int4", "fp4", "e2m1", "e3m0")}

figure, ax = plt.subplots(figsize=(9, 3))
for y, (name, table) in enumerate(reversed(tables.items())):
    ax.plot(table, torch.full_like(table, y), "o", color=RED if name == "nf4" else BLUE)
ax.set(yticks=range(5), yticklabels=[*reversed(tables)], title="what sixteen codes stand for, of a block's absmax")
ax.spines.left.set_visible(False)
plt.show()

# %% [markdown]
# Is it better? On normal weights in blocks of 64 it is, of these five. By how much is worth knowing too: against even
# steps it is a part of a bit, not a bit (halving the error would be one).

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
# Are its codes used alike, as the quantiles promised? Not quite: what is quantized is a weight *over the largest of its
# 64*, and the largest of 64 normal values lies at about 2.5 σ, while the table puts its 1 where 1.85 σ would be. So
# "optimal for normal weights" is a little more than holds; "better than even steps" holds.

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
# ## Two codes in a byte
#
# 4 bits are no type that a machine has, so two codes share a byte, the first in the upper half. Then the weight is that
# array of bytes, and a table of constants.

# %%
small = torch.tensor([0.5, -1.0, 0.0, 0.25, *[0.0] * 60])
codes = torch.bucketize(small, (tables["nf4"][:-1] + tables["nf4"][1:]) / 2)
packed = (codes[::2] << 4) | codes[1::2]
print("codes", codes[:4].tolist(), "bytes", [f"{byte:08b}" for byte in packed[:2].tolist()])

theirs = halfbyte.quantize_4bit(small, double_quant=False)
assert theirs.packed.flatten().tolist() == packed.tolist()
assert theirs.statistics.absmax.tolist() == [1.0]

# %% [markdown]
# ## Double quantization: the constants are numbers too
#
# A constant of 32 bits for 64 weights is half a bit a weight. Quantize the constants themselves to 8 bits, in blocks of
# 256 with one constant of 32 bits each:
#
#     8 / 64 + 32 / (64 · 256) = 0.127    in place of    32 / 64 = 0.5    bit a weight

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
# Constants are magnitudes, all of them positive, and a signed map would leave half of its codes to nobody. So their
# mean is taken off first. What is left goes to the nearest of 256 values that lie the denser, the nearer to zero (a
# *dynamic* map: some of the bits say how small a number is, the rest says which one).

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
assert agree > 0.999  # a value midway between two may fall to either, by the last bit of a division
assert abs(nested.offset - mean) < 1e-6
assert ((back.flatten() - constants).abs() / constants).max() < 0.01

# %% [markdown]
# What does it cost? The constants are off by a fraction of a percent, and the weights' error does not notice.

# %%
matrix = normal.view(512, 512)
single = halfbyte.quantize_4bit(matrix, double_quant=False)
double = halfbyte.quantize_4bit(matrix, double_quant=True)
worse = (double.dequantize() - matrix).norm() / (single.dequantize() - matrix).norm() - 1

print(f"{single.bits_per_parameter:.3f} → {double.bits_per_parameter:.3f} bits a weight, error {worse:+.2%}")
assert round(double.bits_per_parameter, 3) == 4.127 and single.bits_per_parameter == 4.5
assert abs(worse) < 0.005

# %% [markdown]
# And there is nothing more to it: this is the format that bitsandbytes writes and halfbyte reads, bit for bit
# ([formats.md](../formats.md)). [Lesson 2](2-sixty-lines.ipynb) trains through it.
