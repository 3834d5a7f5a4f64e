"""Answers of several models judged in pairs by another one, as QLoRA's paper does it (arXiv 2305.14314, section 5):

``prompts`` (what a judge is asked, how its verdict is read) → ``endpoint`` (a model behind OpenAI's HTTP API) →
``contest`` (who meets whom, and the file of judgements) → ``elo``, ``summary`` (what came of it).
"""
