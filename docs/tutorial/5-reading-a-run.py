# %% [markdown]
# # 5. Reading a run
#
# A loss that falls says that something was learned. It does not say what it cost. Here are two runs over the same rows,
# one sound and one with a learning rate that is too high, and the questions to ask of both: how did it go, what was
# forgotten, how much of the adapter is needed, and what is left of it after merging.

# %%
import warnings

warnings.simplefilter("ignore")  # what libraries tell each other

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
silence.enter_context(quiet())  # bars and log lines of other libraries

from halfbyte.deploy.adapters import info

model_folder = convert(fetch(MODEL, cache_folder()), cache_folder() / "SmolLM2-135M-Instruct")

os.chdir(tempfile.mkdtemp(prefix="lesson-"))  # or a folder of yours, to keep what is made
Path("SmolLM2-135M-Instruct").symlink_to(model_folder)
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # halfbyte beside this Python
os.environ.pop("FORCE_COLOR", None)  # a notebook asks programs for colours
plt.rcParams |= {"figure.figsize": (9, 2.8), "axes.spines.top": False, "axes.spines.right": False}
BLUE, RED, GREY = "#3465a4", "#cc3333", "#999999"

# %% [markdown]
# ## Two runs
#
# The task is small enough to be learned in a minute: dates, as people write them, to be written as `2024-03-05`. Beside
# the rows that are held out there is a text that has nothing to do with dates, a page of novels, whose loss is told
# with each evaluation: by it one sees what else the model loses.

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
# ## The curves
#
# All that happened stands in `metrics.jsonl`. (`report.html` in the folder draws the same, and more, without a line of
# code.)

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
# What to look for:
#
# - **Loss.** A sound one falls fast, then slowly, with noise that is the rows' and not the model's: four rows a step
#   are few. The hot one *rises* first. Where a loss rises from the beginning, the learning rate is too high.
# - **Gradient norm.** It is clipped to 0.3 (dotted). Lying above it is common; growing is not.
# - **Learning rate.** Whether it was what you meant. The preset `quick` lets it fall to zero.

# %%
sound, hot = ([event["loss"] for event in events(run, "step")] for run in RUNS)
assert sound[-1] < sound[0] / 5
assert max(hot[1:6]) > hot[0] and max(sound[1:6]) < sound[0]

# %% [markdown]
# `halfbyte runs compare` has the same question in a table: what came of them, and by which options they differ.

# %% language="bash"
# halfbyte runs compare runs/sound runs/hot

# %% [markdown]
# ## Forgetting
#
# By the loss of the task alone one could take the hot run for a tolerable one: it did learn to write dates. The general
# text tells the rest: a rise of 0.05 is a model that has bent a little, a rise of 2 or 3 nats is one that is broken.

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
# Three things help: a lower learning rate, fewer steps, and general rows mixed in (`--replay`). There is a fourth,
# after the fact. An adapter is added with a factor, s, and one may turn it down. Load the hot one, and measure both
# losses at several strengths.

# %%
tokenizer = AutoTokenizer.from_pretrained("SmolLM2-135M-Instruct")


def encoded(question, answer):
    """A row as it is trained: the answer's tokens are labels, the question's are not."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][:-1]  # without the last newline
    read = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
    return whole, [-100] * read + whole[read:]


task_rows = [encoded(*row) for row in held_out]
general_rows = [(ids, ids) for ids in (tokenizer(text)["input_ids"] for text in general)]


@torch.no_grad()
def loss_of(model, rows):
    """The mean loss over all labelled tokens of the rows."""
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
assert abs(curve[-1][0] - after["hot"]["loss"]) < 0.05  # our own loss is the run's
others = [other for _, other in curve]
assert others == sorted(others)  # the stronger, the more is forgotten
half = strengths.index(0.5)
assert curve[half][0] < 1.25 * curve[-1][0] and curve[half][1] < curve[-1][1] - 0.5

# %% [markdown]
# At half its strength it writes dates as well as before, and a good part of the English is back: an adapter that has
# gone too far can be turned down afterwards. The sound run beats all of these points, though. Turning down is for when
# there is no other run.
#
# ## What no loss says
#
# Ask the sound one something that is no date.

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
# It can still read a novel, as the general loss said, but whoever asks it anything gets a date: in all that it was
# trained on, nothing else was ever answered. For a tool that does one thing that is as it should be. For a chat model
# it is forgetting, of a kind that a text does not show; rows with other questions among those that are trained
# (`--replay`) are against it. A figure measures what it measures, so look at answers too: that is what samples are for,
# which every run shows.
#
# ## Ranks
#
# How much of rank 16 did the sound run use? What an adapter adds to a weight is s·B·A, and its singular values say how
# much of it lies in how many directions. `adapter info` counts those that hold 99 % of the energy, their squares' sum.

# %% language="bash"
# halfbyte adapter info runs/sound 2> /dev/null

# %% [markdown]
# The same by hand:

# %%
layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def parts(layer):
    """The singular values of s·B·A, and the directions, from the two thin factors."""
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
# Energy spreads over many directions: A began as random numbers in all sixteen, so that a bit of everything is in it.
# What counts is whether the *task* needs them. Cut each layer to its first few directions, and measure:


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
# A single direction in each layer keeps nearly all that was learned: writing dates is little to learn. So the count of
# directions that hold energy is an upper bound of the rank that a task needs, and no measure of it; nor is "a higher
# rank may learn more" above, which goes by that count. (`halfbyte adapter truncate` writes a cut adapter.)
#
# ## What a merge keeps
#
# Base and adapter are to become one model. In bf16 nothing is lost. In 4 bits there is a trap: the adapter moves a
# weight by about a hundredth of the distance between two codes, so that quantizing the merged weights again rounds the
# training away. `halfbyte audit` merges in each way that is asked for, and measures what is left.

# %%
place = "base_model.model.model.layers.12.mlp.up_proj"
u, values, v = decomposed[place]
change = ((u * values) @ v).abs().mean()
dense = layers[place].base_layer.quantized_weight.dequantize(torch.float32)
distance = dense.view(-1, 64).abs().amax(dim=1).mean() * 2 / 15  # 16 codes from −absmax to absmax
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
# *kept* is the share of the improvement that is still there. `nf4-again`, what one gets by quantizing a merged model as
# any other, is nearly the base. `nf4-random` draws each code from the two neighbours so that the weight is right on
# average, and keeps it. (`halfbyte merge --to nf4` does better still where the training data are at hand:
# [merging.md](../merging.md).)
#
# ## In short
#
# | question | where it stands | worry if |
# |---|---|---|
# | did it learn? | loss on rows that are held out | it rises while training falls |
# | was it stable? | loss and gradient norm by step | they rise |
# | what did it cost? | `general_loss` | it rises by more than a tenth or two |
# | how much adapter is needed? | loss of a cut adapter | the full rank is not enough |
# | does the merge keep it? | `halfbyte audit` | *kept* is below what you can spare |
