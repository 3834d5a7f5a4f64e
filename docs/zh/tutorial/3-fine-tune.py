# %% [markdown]
# <!-- English: 07b841bec6a105bf18dcc870467ce4129401058c -->
# # 3. 一次微调，从查看数据到导出
#
# 一家商店收到邮件，有人为每封邮件录入一张工单：客户要什么，是哪个订单。这里，一个 1.35 亿参数的聊天模型从 240 个例子中学习写这样的工单。一路上，我们做的是对待自己的数据所要做的事：查看、修正、规划、训练、观察，在没有人用来训练过的邮件上测量，与结果对话，再把它交出去。
#
# 各条命令与在终端中的一样，只是上面多了一行 `%%bash`。模型是快速开始所用的那个，第一次运行时获取。

# %%
import warnings

warnings.simplefilter("ignore")  # 各个库彼此之间的提示

import csv
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image

from halfbyte.example.sources import MODEL, convert, fetch
from halfbyte.files import cache_folder

model = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")

os.chdir(tempfile.mkdtemp(prefix="lesson-"))  # 也可以换成你自己的文件夹，以保留结果
Path("SmolLM2-135M-Instruct").symlink_to(model)
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # 与这个 Python 在一起的 halfbyte
os.environ.pop("FORCE_COLOR", None)  # 笔记本会要求程序输出颜色
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## 数据
#
# 本课的邮件是编造的：五种要求，每种有五个说法，带一个订单号。用来测量的邮件使用*另外*的说法，一共十个，训练行里都没有：把句子背下来不应算数。

# %%
MAILS = {
    "refund": [
        "I want my money back for order {n}.", "Order {n} came broken. Please refund it.",
        "Please pay back what I paid for {n}, it never worked.", "Could you return the money of order {n}?",
        "The lamp of order {n} does not light up, I would like a refund.",
    ],
    "exchange": [
        "The shoes of order {n} are too small, can I have them in 43?", "Please swap order {n} for the blue one.",
        "Order {n}: wrong colour, I would like another.", "I would rather have the larger size. Order {n}.",
        "Can I exchange what came with {n}?",
    ],
    "delivery": [
        "Where is my parcel? Order {n}.", "Order {n} should have been here on Monday.", "When will {n} arrive?",
        "The tracking of order {n} has not moved for a week.", "I am still waiting for order {n}.",
    ],
    "invoice": [
        "I need an invoice for order {n}.", "Please send the bill of {n} to our office.",
        "The receipt for order {n} is missing.", "Our accountant wants the invoice of order {n}.",
        "Order {n}: could I have a bill with VAT?",
    ],
    "cancel": [
        "Please cancel order {n}.", "I ordered {n} by mistake, do not send it.", "Order {n} can be called off.",
        "Stop order {n}, I do not need it any more.", "I changed my mind about {n}, please cancel.",
    ],
}  # fmt: skip
OTHER_WORDS = {
    "refund": ["{n}: not as described. Money back, please.", "Please refund order {n}, it fell apart."],
    "exchange": ["You sent the wrong size with {n}, please swap it.", "Order {n}: can I have it in green?"],
    "delivery": ["Has {n} been sent yet? It should be here.", "My parcel {n} has not arrived."],
    "invoice": ["The address on the invoice of {n} is wrong.", "Could you mail me the bill for {n}?"],
    "cancel": ["Please do not ship {n}, cancel it.", "Call off order {n}, please."],
}


def made(phrases, count, seed):
    """由邮件及其工单组成的行，每种一样多。"""
    draw = random.Random(seed)
    kinds = sorted(phrases) * (count // len(phrases))
    draw.shuffle(kinds)
    numbers = [draw.randrange(10_000, 100_000) for _ in kinds]
    return [(draw.choice(phrases[kind]).format(n=n), f"{kind} {n}") for kind, n in zip(kinds, numbers, strict=True)]


def write(name, rows):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *rows])


mails, held_out = made(MAILS, 240, seed=0), made(OTHER_WORDS, 20, seed=1)
write("held-out.csv", held_out)
mails[:3]

# %% [markdown]
# 自己的数据从来都不干净，所以让我们的数据也有这类数据常有的毛病：一张没有人录入的工单，一封导出了两次的邮件，一封有两张不同工单的邮件，还有一封用于测量的邮件混进了训练数据。

# %%
dirty = [*mails, (mails[7][0], ""), mails[30], (mails[50][0], "cancel 1"), held_out[3]]
write("mails.csv", dirty)

# %% [markdown]
# ## 查看
#
# 在有人看过之前，什么也不训练。第一次查看没能走多远：

# %% language="bash"
# halfbyte data mails.csv --model SmolLM2-135M-Instruct --eval-data held-out.csv --json look.json ||
#     echo "exit code $?"

# %%
assert not Path("look.json").exists()  # 被拒绝：什么也不显示，也什么都不会训练
dirty = [row for row in dirty if row[1]]
write("mails.csv", dirty)

# %% [markdown]
# 空的回答教不了任何东西，所以去掉这一行。（`--skip-bad-rows` 会自动略去这样的行，并把它们列出来。）第二次查看：

# %% language="bash"
# halfbyte data mails.csv --model SmolLM2-135M-Instruct --eval-data held-out.csv --samples 1 \
#     --json look.json --picture look.png

# %%
Image("look.png", width=700)

# %% [markdown]
# 大部分是好消息：每个回答都以停止生成的词元结尾，没有哪一行被截断，训练的只有工单，即 `⟦ ⟧` 中的内容。其余的就是我们埋下的毛病：一行与另一行重复，一个提示词有两个回答，还有一封邮件会在训练之后又用来测量。

# %%
look = json.loads(Path("look.json").read_text())
for what in ("duplicates", "contradictions", "overlap"):
    print(f"{what}: {look[what]}")
assert look["duplicates"]["rows"] == look["contradictions"]["prompts"] == look["overlap"]["equal"] == 1
assert look["answers"]["stopped"] == look["rows"] and look["truncated"] == 0

# %% [markdown]
# 行的序号和文件的行号说明该看文件的哪里。修正之后：

# %%
clean = [row for row in dict.fromkeys(dirty) if row not in held_out and row[1] != "cancel 1"]
write("mails.csv", clean)
assert clean == list(dict.fromkeys(mails))

# %% [markdown]
# ## 规划
#
# 需要多少资源？`halfbyte plan` 在载入任何东西之前，根据模型的配置回答。（`--stated` 采用对这类处理器给定的速率。不带它时，第一次规划会用半分钟测量这台机器；没有其他任务时，它给出的时间相差百分之几。）

# %% language="bash"
# halfbyte plan SmolLM2-135M-Instruct --data mails.csv --preset quick --batch-size 6 --max-steps 30 \
#     --stated --picture plan.png --json plan.json

# %%
Image("plan.png", width=700)

# %% [markdown]
# ## 训练
#
# 配方 `quick` 适合小模型和少量的行：每个线性层上秩为 16，学习率逐渐降到零。30 步，每步 6 行；在第一步之前、中途和结束时，回答留出的邮件并评分。

# %% language="bash"
# halfbyte train --preset quick --model SmolLM2-135M-Instruct --data mails.csv --output runs/tickets \
#     --batch-size 6 --max-steps 30 --learning-rate 1e-3 \
#     --eval-data held-out.csv --eval-steps 15 --eval-samples 20 --max-new-tokens 10

# %% [markdown]
# ## 观察
#
# 运行就是它的文件夹。其中的 `report.html` 是可以阅读、可以发给别人的页面；页面所画的内容都在 `metrics.jsonl` 中，发生的每件事一行 JSON。（[第 5 课](5-reading-a-run.ipynb)仔细阅读一次运行。）

# %%
run = Path("runs/tickets")
events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
steps = [event for event in events if event["kind"] == "step"]
evaluations = [event for event in events if event["kind"] == "evaluation"]

figure, axes = plt.subplots(1, 2)
axes[0].plot([e["step"] for e in steps], [e["loss"] for e in steps], color=GREY, label="training")
axes[0].plot(
    [e["step"] for e in evaluations], [e["figures"]["loss"] for e in evaluations], "o-", color=RED, label="held out"
)
axes[0].set(title="loss", xlabel="step")
axes[0].legend()
axes[1].plot([e["step"] for e in evaluations], [e["figures"]["exact_match"] for e in evaluations], "o-", color=RED)
axes[1].set(title="tickets that are right, letter by letter", xlabel="step", ylim=(0, 1))
plt.show()

# %%
summary = json.loads((run / "summary.json").read_text())
before, after = summary["evaluation_before"], summary["evaluation"]
assert summary["loss"] < 0.1  # 最后十步的平均
print(f"right: {before['exact_match']:.0%} before, {after['exact_match']:.0%} after")
print(f"loss:  {before['loss']:.2f} before, {after['loss']:.2f} after")
assert before["exact_match"] == 0 and after["exact_match"] >= 0.6
assert after["loss"] < before["loss"] / 5

# %% [markdown]
# 每行只见过一次，损失却如此接近零，这在多数运行中是可疑的：它说明答案可以直接从问题里读出来。（低于 0.01 时 halfbyte 会发出警告。）在这里，任务正是如此：订单号就写在邮件里。如果一次运行要学的是推理，这就是泄漏。
#
# ## 逐行测量
#
# 单独一个数字看不出是哪些邮件出了错。把同一个留出的文件当作提示词，得到的是每行一个回答，并附有评分。

# %% language="bash"
# halfbyte generate runs/tickets --prompts held-out.csv --out answers.jsonl --max-new-tokens 10

# %%
answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
for row in answers:
    mark = " " if row["generated"] == row["answer"] else "✗"
    print(f"{mark} {row['question']:52}{row['generated']:18}{'' if mark == ' ' else row['answer']}")

right = sum(row["generated"] == row["answer"] for row in answers) / len(answers)
assert len(answers) == 20 and right >= 0.6
assert right == sum(row["generation"]["exact_match"] for row in answers) / len(answers)

# %% [markdown]
# 该数的不是邮件，而是说法：其中哪些出了错？

# %%
ways = {}
for row in answers:
    number = row["answer"].split()[1]
    ways.setdefault(row["question"].replace(number, "…"), []).append(row["generated"] == row["answer"])
shares = dict(sorted(((way, sum(hits) / len(hits)) for way, hits in ways.items()), key=lambda pair: pair[1]))

plt.barh([*shares], [*shares.values()], color=BLUE)
plt.title("share of mails that became the right ticket")
plt.show()

assert len(ways) <= 10
assert not any(question[0].isdigit() for question, _ in clean)

# %% [markdown]
# 在这里显示的这次运行中，出错的是以订单号开头的邮件，它们得到的是编造的号码：在训练过的行里，号码从不在最前面。（一次运行的最后几位数字因芯片而异，处在边缘的邮件哪些出错也随之不同。）数据里没有的东西，训练更久也补不上；该尝试的是加几行像最下面那些说法的邮件。

# %% [markdown]
# ## 对话
#
# `halfbyte chat runs/tickets` 开始一次对话；这里它从管道读取。`/compare` 让基础模型在旁边也回答一遍。

# %% language="bash"
# halfbyte chat runs/tickets --temperature 0 --max-new-tokens 30 2> /dev/null << END
# /compare Money back for order 77123, please!
# /quit
# END

# %% [markdown]
# ## 合并
#
# 适配器有 19 MB，旁边的基础模型保持原样。如果要交出*一个*在哪里都能打开的模型，就把两者合并：训练时所用的 4 位权重与所学内容之和，以 bf16 表示。

# %% language="bash"
# halfbyte merge runs/tickets merged

# %% [markdown]
# 它是一个普通的文件夹，因此普通的 transformers 就能打开，不需要 halfbyte，也不需要 PEFT，而且回答相同。

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained("merged")
merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.bfloat16)

same = 0
for row in answers[:5]:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["question"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = merged.generate(**chat, max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(output[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
    same += answer == row["generated"]
print(f"{same} of 5 answers are the same")
assert same >= 4  # 难分高下时，bf16 可能改变结果

# %% [markdown]
# ## 导出
#
# 对 llama.cpp 和 Ollama 来说，模型就是一个 GGUF 文件。`q8_0` 不需要安装任何东西；其他形式见 [exporting.md](../exporting.md)。

# %% language="bash"
# halfbyte export runs/tickets tickets-gguf --format gguf --to q8_0

# %%
from gguf import GGUFReader

[file] = Path("tickets-gguf").glob("*.gguf")
reader = GGUFReader(file)
print(f"{len(reader.tensors)} tensors, {file.stat().st_size / 2**20:.0f} MiB")
assert file.read_bytes()[:4] == b"GGUF" and len(reader.tensors) == 272


def size(folder, pattern="*.safetensors"):
    return sum(f.stat().st_size for f in Path(folder).glob(pattern)) / 2**20


sizes = {
    "adapter": size("runs/tickets"),
    "merged, bf16": size("merged"),
    "GGUF, q8_0": size("tickets-gguf", "*.gguf"),
}
plt.barh([*reversed(sizes)], [*reversed(sizes.values())], color=BLUE)
plt.title("MiB on the disk")
plt.show()

assert sizes["adapter"] < 20 < sizes["GGUF, q8_0"] < sizes["merged, bf16"]

# %% [markdown]
# 这就是全部的路程。还有两个问题没有回答：模型还知道它以前知道的东西吗？合并为 4 位能保留所学的内容吗？[第 5 课](5-reading-a-run.ipynb)对两者都作了测量。
