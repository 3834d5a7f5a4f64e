"""The command line of the paper's own script (artidoro/qlora, ``qlora.py`` of 2023-07-24) over a run of ours.

flags       what a flag is, and a command line read as the script read it
table       every flag of the script's own classes: what it becomes, or why it is refused
inherited   the same for those it inherits from transformers' Seq2SeqTrainingArguments (4.31)
formats     the script's data sets and the texts that it makes of their rows
data        its split, truncation and labels, as rows of tokens
translate   the same run as a configuration of ours
arguments   the same run as arguments of our trainer
outputs     the files that it leaves
mmlu        its five-shot and zero-shot questions
run         the way of a run
"""
