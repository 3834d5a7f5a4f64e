"""An engine over a model, with the decoder that it gets and a share of the memory that is free."""

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.choices import HeadType, KvType
from halfbyte.generate.conversation import stop_tokens
from halfbyte.generate.decoders import decoder_for
from halfbyte.generate.engine import Engine
from halfbyte.memory import free_memory


@contextlib.contextmanager
def engine_over(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kv: KvType | None = None,
    head: HeadType | None = None,
    keep_decoded: bool = False,
    most_waiting: int = 64,
) -> Iterator[Engine]:
    """Yield an engine over a model, with half of the memory that is free for keys and values; closed at the end."""
    decoder = decoder_for(model, cache=kv, head=head, keep_decoded=keep_decoded)
    with Engine(
        decoder,
        tokenizer,
        stops=stop_tokens(model, tokenizer),
        memory=max(free_memory() // 2, decoder.bytes_of(2)),
        most_waiting=most_waiting,
    ) as engine:
        yield engine
