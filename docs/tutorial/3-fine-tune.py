# %% [markdown]
# # 3. A fine-tune, from look to export
#
# A shop gets mails, and somebody types a ticket for each: what is wanted, and for which order. Here a chat model of 135
# million parameters learns to write these tickets from 240 examples. On the way we do what one does with data of one's
# own: look at it, mend it, plan, train, watch, measure on mails that nobody trained on, talk to the result, and hand it
# on.
#
# The commands are those of a terminal, without the `%%bash` on top. The model is the quick start's, fetched the first
# time.

# %%
import warnings

warnings.simplefilter("ignore")  # what libraries tell each other

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

os.chdir(tempfile.mkdtemp(prefix="lesson-"))  # or a folder of yours, to keep what is made
Path("SmolLM2-135M-Instruct").symlink_to(model)
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # halfbyte beside this Python
os.environ.pop("FORCE_COLOR", None)  # a notebook asks programs for colours
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## The data
#
# For this lesson the mails are made up: five ways to ask for each of five things, with an order number. Mails to
# measure with ask in *other* words, ten ways that are in no training row: to have learnt a sentence by heart shall not
# count.

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
    """Rows of a mail and its ticket, as many of each kind."""
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
# Data of one's own is never clean, so let ours have what such data has: a ticket that nobody typed, a mail that was
# exported twice, one that has two different tickets, and one of the mails to measure with among those to train on.

# %%
dirty = [*mails, (mails[7][0], ""), mails[30], (mails[50][0], "cancel 1"), held_out[3]]
write("mails.csv", dirty)

# %% [markdown]
# ## Look
#
# Nothing is trained before somebody has looked at it. The first look does not get far:

# %% language="bash"
# halfbyte data mails.csv --model SmolLM2-135M-Instruct --eval-data held-out.csv --json look.json ||
#     echo "exit code $?"

# %%
assert not Path("look.json").exists()  # refused: nothing is shown, and nothing would be trained
dirty = [row for row in dirty if row[1]]
write("mails.csv", dirty)

# %% [markdown]
# An empty answer teaches nothing, so the row goes. (`--skip-bad-rows` would leave such rows out by itself, and list
# them.) The second look:

# %% language="bash"
# halfbyte data mails.csv --model SmolLM2-135M-Instruct --eval-data held-out.csv --samples 1 \
#     --json look.json --picture look.png

# %%
Image("look.png", width=700)

# %% [markdown]
# Most of it is good news: every answer ends with the token at which generation stops, no row is cut, and only the
# ticket is trained, what stands in `⟦ ⟧`. The rest is what we planted: a row that repeats another, a prompt with two
# answers, and a mail that we would measure on after training on it.

# %%
look = json.loads(Path("look.json").read_text())
for what in ("duplicates", "contradictions", "overlap"):
    print(f"{what}: {look[what]}")
assert look["duplicates"]["rows"] == look["contradictions"]["prompts"] == look["overlap"]["equal"] == 1
assert look["answers"]["stopped"] == look["rows"] and look["truncated"] == 0

# %% [markdown]
# Numbers of rows and lines say where to look in the file. Mended:

# %%
clean = [row for row in dict.fromkeys(dirty) if row not in held_out and row[1] != "cancel 1"]
write("mails.csv", clean)
assert clean == list(dict.fromkeys(mails))

# %% [markdown]
# ## Plan
#
# What will it take? `halfbyte plan` says it from the model's configuration, before anything is loaded. (`--stated`
# takes rates that are stated for this kind of processor. Without it the first plan measures the machine for half a
# minute, and its times are good to some percent where nothing else runs.)

# %% language="bash"
# halfbyte plan SmolLM2-135M-Instruct --data mails.csv --preset quick --batch-size 6 --max-steps 30 \
#     --stated --picture plan.png --json plan.json

# %%
Image("plan.png", width=700)

# %% [markdown]
# ## Train
#
# The preset `quick` suits a small model and few rows: rank 16 on every linear layer, a learning rate that falls to
# zero. 30 steps of 6 rows; before the first, in the middle and at the end the held-out mails are answered and scored.

# %% language="bash"
# halfbyte train --preset quick --model SmolLM2-135M-Instruct --data mails.csv --output runs/tickets \
#     --batch-size 6 --max-steps 30 --learning-rate 1e-3 \
#     --eval-data held-out.csv --eval-steps 15 --eval-samples 20 --max-new-tokens 10

# %% [markdown]
# ## Watch
#
# A run is its folder. `report.html` in it is the page to read and to send; what it draws stands in `metrics.jsonl`, a
# line of JSON for each thing that happened. ([Lesson 5](5-reading-a-run.ipynb) reads a run closely.)

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
assert summary["loss"] < 0.1  # the mean of the last ten steps
print(f"right: {before['exact_match']:.0%} before, {after['exact_match']:.0%} after")
print(f"loss:  {before['loss']:.2f} before, {after['loss']:.2f} after")
assert before["exact_match"] == 0 and after["exact_match"] >= 0.6
assert after["loss"] < before["loss"] / 5

# %% [markdown]
# A loss so near to zero, on rows that are each seen once, is suspicious in most runs: it says that the answer can be
# read off the question. (Below 0.01 halfbyte warns of it.) Here that is the task: the order number does stand in the
# mail. In a run that should learn to reason it would be a leak.
#
# ## Measure, row by row
#
# One number hides which mails go wrong. The same held-out file as prompts gives an answer a line, with its score.

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
# Not the mails are to be counted but the ways of asking: which of them go wrong?

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
# In the run that you see here it was the mails that begin with the order number, which got a made-up one: in no row
# that was trained on does the number stand first. (The last digits of a run differ from chip to chip, and with them
# what goes wrong at its edges.) Training longer is no cure for what the data lack; some rows that ask like those at the
# bottom are what to try.

# %% [markdown]
# ## Talk
#
# `halfbyte chat runs/tickets` opens a conversation; here it reads from a pipe. `/compare` has the base answer beside.

# %% language="bash"
# halfbyte chat runs/tickets --temperature 0 --max-new-tokens 30 2> /dev/null << END
# /compare Money back for order 77123, please!
# /quit
# END

# %% [markdown]
# ## Merge
#
# The adapter is 19 MB beside a base that stays as it is. To hand on *one* model that opens anywhere, merge the two: the
# sum of the 4-bit weights that it was trained over and what was learnt, in bf16.

# %% language="bash"
# halfbyte merge runs/tickets merged

# %% [markdown]
# It is a plain folder, so plain transformers opens it, with no halfbyte and no PEFT, and it answers the same.

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
assert same >= 4  # bf16 may turn a close decision

# %% [markdown]
# ## Export
#
# For llama.cpp and Ollama a model is one GGUF file. `q8_0` needs nothing installed; [exporting.md](../exporting.md) has
# the other forms.

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
# That is the whole way. Two questions are left open here. Does the model still know what it knew before? And does a
# merge into 4 bits keep what was learnt? [Lesson 5](5-reading-a-run.ipynb) measures both.
