# %% [markdown]
# <!-- English: e58ba92f2b06f82b0c1203644812adacfb2a8259 -->
# # 5. 读懂一次运行
#
# 损失下降，说明学到了东西。它没有说的是代价。这里有两次在同样的行上的运行，一次正常，一次学习率过高；对两者要问的问题是：过程如何，忘记了什么，适配器需要多少，合并之后还剩下什么。

# %%
import warnings

warnings.simplefilter("ignore")  # 各个库彼此之间的提示

import csv
import datetime
import json
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image
from transformers import AutoTokenizer

import halfbyte
from halfbyte.evaluate.texts import general_texts
from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder
from halfbyte.quiet import quiet

silence = ExitStack()
silence.enter_context(quiet())  # 其他库的进度条和日志

from halfbyte.deploy.adapters import info

model_folder = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")

os.chdir(tempfile.mkdtemp(prefix="lesson-"))  # 也可以换成你自己的文件夹，以保留结果
Path("SmolLM2-135M-Instruct").symlink_to(model_folder)
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # 与这个 Python 在一起的 halfbyte
os.environ.pop("FORCE_COLOR", None)  # 笔记本会要求程序输出颜色
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## 两次运行
#
# 任务很小，一分钟就能学会：把人们书写的日期写成 `2024-03-05`。除了留出的行，还有一段与日期毫无关系的文本，即几页小说，每次评估都会报告它的损失：由此可以看出模型另外失去了什么。

# %%
FORMS = ["{d} {month} {y}", "{month} {d}, {y}", "the {d}. of {month} {y}", "{d}. {m}. {y}", "{month} the {d}., {y}"]


def dates(count, seed):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        day = datetime.date(draw.randrange(1950, 2030), draw.randrange(1, 13), draw.randrange(1, 29))
        words = draw.choice(FORMS).format(d=day.day, m=day.month, month=day.strftime("%B"), y=day.year)
        rows.append((words, day.isoformat()))
    return rows


train, held_out = dates(240, seed=0), dates(12, seed=1)
for name, rows in (("dates.csv", train), ("held-out.csv", held_out)):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *rows])

general = [text.text[:700] for text in general_texts()[:3]]
Path("general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in general))
train[:3]

# %% language="bash"
# cat > train.yaml << END
# preset: quick
# model: SmolLM2-135M-Instruct
# data: dates.csv
# eval_data: held-out.csv
# forgetting_data: general.jsonl
# batch_size: 4
# max_steps: 20
# eval_steps: 10
# eval_samples: 0
# sample_prompts: none
# END
# halfbyte train --config train.yaml --output runs/sound --learning-rate 1e-3 2>&1 | grep -v "^step"

# %% language="bash"
# halfbyte train --config train.yaml --output runs/hot --learning-rate 8e-3 2>&1 | grep -v "^step"

# %% [markdown]
# ## 曲线
#
# 发生的一切都在 `metrics.jsonl` 中。（文件夹里的 `report.html` 画出同样的内容，而且更多，一行代码也不用写。）

# %%
RUNS = {"sound": BLUE, "hot": RED}


def events(run, kind):
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for run, color in RUNS.items():
    steps = events(run, "step")
    for ax, what in zip(axes, ("loss", "grad_norm", "learning_rate"), strict=True):
        ax.plot([e["step"] for e in steps], [e[what] for e in steps], color=color, label=run)
        ax.set(title=what, xlabel="step", yscale="log")
axes[0].legend()
axes[1].axhline(0.3, color=GREY, linestyle=":")
figure.tight_layout()
plt.show()

# %% [markdown]
# 要看的是：
#
# - **损失**。正常的损失先快后慢地下降，其中的波动来自各行，而不是来自模型：每步四行，数量很少。过热的那次先*上升*。如果损失从一开始就上升，说明学习率太高。
# - **梯度范数**。它被裁剪到 0.3（虚线）。高于它很常见；不断增长则不正常。
# - **学习率**。是否如你所愿。配方 `quick` 使它降到零。

# %%
sound, hot = ([event["loss"] for event in events(run, "step")] for run in RUNS)
assert sound[-1] < sound[0] / 5
assert max(hot[1:6]) > hot[0] and max(sound[1:6]) < sound[0]

# %% [markdown]
# `halfbyte runs compare` 把同样的问题列成表：结果如何，两者有哪些选项不同。

# %% language="bash"
# halfbyte runs compare runs/sound runs/hot

# %% [markdown]
# ## 遗忘
#
# 只看任务的损失，会以为过热的那次也过得去：它确实学会了写日期。其余的要看通用文本：上升 0.05，是模型略微弯曲了；上升 2 或 3（单位为 nat），是模型坏了。

# %%
figure, ax = plt.subplots()
for run, color in RUNS.items():
    figures = [event["figures"] for event in events(run, "evaluation")]
    ax.plot([f["loss"] for f in figures], [f["general_loss"] for f in figures], "o-", color=color, label=run)
    ax.annotate("before", (figures[0]["loss"], figures[0]["general_loss"]), textcoords="offset points", xytext=(0, 8))
ax.set(xlabel="loss of the task", ylabel="general loss", title="learned is left, forgotten is up")
ax.legend()
plt.show()

before, after = {}, {}
for run in RUNS:
    first, *_, last = events(run, "evaluation")
    before[run], after[run] = first["figures"], last["figures"]
    rise = after[run]["general_loss"] - before[run]["general_loss"]
    print(f"{run}: task {before[run]['loss']:.2f} → {after[run]['loss']:.2f}, general +{rise:.2f}")
assert after["sound"]["loss"] < before["sound"]["loss"] / 5 and after["hot"]["loss"] < before["hot"]["loss"] / 2
assert after["sound"]["general_loss"] - before["sound"]["general_loss"] < 0.2
assert after["hot"]["general_loss"] - before["hot"]["general_loss"] > 1

# %% [markdown]
# 有三种办法：更低的学习率，更少的步数，以及混入通用的行（`--replay`）。还有第四种，可以事后采用。适配器是乘以系数 s 加上去的，这个系数可以调低。载入过热的那个，在几种强度下测量两个损失。

# %%
tokenizer = AutoTokenizer.from_pretrained("SmolLM2-135M-Instruct")


def encoded(question, answer):
    """训练时的一行：回答的词元是标签，问题的不是。"""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][:-1]  # 不要最后的换行
    read = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
    return whole, [-100] * read + whole[read:]


task_rows = [encoded(*row) for row in held_out]
general_rows = [(ids, ids) for ids in (tokenizer(text)["input_ids"] for text in general)]


@torch.no_grad()
def loss_of(model, rows):
    """各行所有带标签的词元的平均损失。"""
    total, count = 0.0, 0
    for ids, labels in rows:
        labelled = sum(label != -100 for label in labels[1:])
        total += model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * labelled
        count += labelled
    return total / count


model = halfbyte.load("runs/hot").eval()
layers = [module for module in model.modules() if hasattr(module, "lora_A")]
scaling = layers[0].scaling["default"]

strengths = [0.0, 0.25, 0.5, 1.0]
curve = []
for strength in strengths:
    for layer in layers:
        layer.scaling["default"] = strength * scaling
    curve.append((loss_of(model, task_rows), loss_of(model, general_rows)))

figure, ax = plt.subplots()
ax.plot([task for task, _ in curve], [other for _, other in curve], "o-", color=RED)
for strength, point in zip(strengths, curve, strict=True):
    ax.annotate(f"{strength:.0%}", point, textcoords="offset points", xytext=(6, 4))
ax.set(xlabel="loss of the task", ylabel="general loss", title="the hot adapter, turned down")
plt.show()

# %%
assert abs(curve[-1][0] - after["hot"]["loss"]) < 0.05  # 我们自己算的损失就是运行的损失
others = [other for _, other in curve]
assert others == sorted(others)  # 强度越大，忘记得越多
half = strengths.index(0.5)
assert curve[half][0] < 1.25 * curve[-1][0] and curve[half][1] < curve[-1][1] - 0.5

# %% [markdown]
# 强度减半时，它写日期与原来一样好，英文也恢复了不少：走得太远的适配器可以事后调低。不过正常的运行比所有这些点都好。调低只适用于没有别的运行的时候。
#
# ## 损失说不出的事
#
# 问正常的那个一件与日期无关的事。

# %%
model = halfbyte.load("runs/sound").eval()
question = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)


def said():
    written = model.generate(**question, max_new_tokens=12, do_sample=False)[0, question["input_ids"].shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


with model.disable_adapter():
    by_base = said()
by_sound = said()
print(f"base:  {by_base}\nsound: {by_sound}")
assert "Paris" in by_base and "Paris" not in by_sound

# %% [markdown]
# 它仍然读得懂小说，正如通用文本的损失所说；但无论问它什么，得到的都是日期：在它训练过的全部内容里，从来没有过别的回答。对于只做一件事的工具，这正是应有的样子。对于聊天模型，这是一种遗忘，而且是文本显示不出来的那一种；对策是在训练的行中混入其他问题（`--replay`）。一个指标只测量它所测量的东西，所以也要看回答：这正是每次运行都显示示例回答的用意。
#
# ## 秩
#
# 正常的那次运行用了秩 16 的多少？适配器加到权重上的是 s·B·A，它的奇异值说明其中有多少在多少个方向上。`adapter info` 数的是占 99 % 能量（即奇异值的平方和）的方向数。

# %% language="bash"
# halfbyte adapter info runs/sound 2> /dev/null

# %% [markdown]
# 手工做同样的事：

# %%
layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def parts(layer):
    """s·B·A 的奇异值和方向，由两个窄的因子得到。"""
    qb, rb = torch.linalg.qr(layer.lora_B["default"].weight.detach() * layer.scaling["default"])
    qa, ra = torch.linalg.qr(layer.lora_A["default"].weight.detach().T)
    u, values, v = torch.linalg.svd(rb @ ra.T)
    return qb @ u, values, v @ qa.T


decomposed = {name: parts(layer) for name, layer in layers.items()}
energies = {name: values.square().cumsum(0) / values.square().sum() for name, (_, values, _) in decomposed.items()}

for energy in energies.values():
    plt.plot(range(1, 17), 1 - energy, color=GREY, alpha=0.1)
plt.plot(range(1, 17), torch.stack([1 - energy for energy in energies.values()]).median(dim=0).values, color=RED)
plt.yscale("log")
plt.ylim(1e-4, 1)
plt.axhline(0.01, color=BLUE, linestyle=":")
plt.title("energy beyond the first so many directions, of 210 layers; red: the middle one")
plt.show()

theirs = {module.name: module.effective for module in info("runs/sound").modules}
ours = {name.removeprefix("base_model.model."): int((energy < 0.99).sum()) + 1 for name, energy in energies.items()}
assert ours == theirs

# %% [markdown]
# 能量分布在许多方向上：A 一开始在全部十六个方向上都是随机数，所以每个方向都有一点。要紧的是*任务*是否需要它们。把每层裁剪到最前面的几个方向，再测量：


# %%
def cut(rank):
    for name, layer in layers.items():
        u, values, v = decomposed[name]
        kept = values * (torch.arange(16) < rank)
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(u * kept)
            layer.lora_A["default"].weight.copy_(v / layer.scaling["default"])


ranks = [16, 4, 1, 0]
losses = []
for rank in ranks:
    cut(rank)
    losses.append(loss_of(model, task_rows))

plt.plot([str(rank) for rank in ranks], losses, "o-", color=BLUE)
plt.gca().set(xlabel="directions kept", ylabel="loss of the task", ylim=0, title="the sound adapter, cut")
plt.show()

print({rank: round(loss, 3) for rank, loss in zip(ranks, losses, strict=True)})
assert abs(losses[0] - after["sound"]["loss"]) < 0.02
learned = [(losses[-1] - loss) / (losses[-1] - losses[0]) for loss in losses]
assert learned[ranks.index(4)] > 0.95 and learned[ranks.index(1)] > 0.9

# %% [markdown]
# 每层一个方向就几乎保留了所学的全部：学写日期并不是什么难事。所以，占有能量的方向数是任务所需的秩的上界，而不是它的度量；上面那句“更高的秩可以学到更多”（a higher one may learn more）依据的正是这个数，因此也不能当作度量。（`halfbyte adapter truncate` 写出裁剪后的适配器。）
#
# ## 合并保留了什么
#
# 基础模型和适配器要合成一个模型。以 bf16 合并，什么也不会丢失。以 4 位合并则有一个陷阱：适配器对一个权重的改动大约只有两个编码之间距离的百分之一，因此把合并后的权重再量化一次，就会把训练的成果舍入掉。`halfbyte audit` 按所要求的每种方式合并，并测量还剩下多少。

# %%
place = "base_model.model.model.layers.12.mlp.up_proj"
u, values, v = decomposed[place]
change = ((u * values) @ v).abs().mean()
dense = layers[place].base_layer.quantized_weight.dequantize(torch.float32)
distance = dense.view(-1, 64).abs().amax(dim=1).mean() * 2 / 15  # 从 −absmax 到 absmax 的 16 个编码
print(f"a weight moves by {change / distance:.3f} of the distance between two codes")
assert change < 0.05 * distance

# %% language="bash"
# halfbyte audit runs/sound --way bf16 --way nf4-random --way nf4-again --tokens 150

# %%
audit = json.loads(Path("runs/sound/audit/audit.json").read_text())
kept = {way["name"]: way["kept"] for way in audit["ways"]}
assert kept["bf16"] > 0.99
assert kept["nf4-random"] > 0.9
assert kept["nf4-again"] < 0.3

# %%
Image("runs/sound/audit/audit.png", width=760)

# %% [markdown]
# *kept* 是改进中仍然保留的比例。`nf4-again` 就是像对待其他任何模型那样量化合并后的模型，得到的几乎就是基础模型。`nf4-random` 在两个相邻的编码中随机选取，使权重平均而言正确，因此保留了所学的内容。（训练数据可用时，`halfbyte merge --to nf4` 做得更好：[merging.md](../merging.md)。）
#
# ## 小结
#
# | 问题 | 在哪里看 | 何时该担心 |
# |---|---|---|
# | 学到了吗？ | 留出的行上的损失 | 它上升，而训练损失下降 |
# | 稳定吗？ | 每步的损失和梯度范数 | 它们上升 |
# | 代价是什么？ | `general_loss` | 上升超过零点一、零点二 |
# | 需要多少适配器？ | 裁剪后的适配器的损失 | 全部的秩也不够 |
# | 合并保留了它吗？ | `halfbyte audit` | *kept* 低于你能接受的程度 |
