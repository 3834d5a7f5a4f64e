"""llama.cpp's library in a process of its own, asked by lines of JSON: a file that it refuses may end the process.

    python llama_process.py LIBRARY-FOLDER MODEL.gguf CONTEXT [LORA.gguf]

{"text", "special", "parse"}: the ids of a text. {"ids"}: logits behind each of them, as base64 of fp32. {"pieces"}: the
texts of ids. {"template"}: the chat template. Structures that llama.h passes by value are larger here than there: what
it has of them comes first.
"""

import base64
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

CONTEXT, BATCH, FLASH, KEYS, VALUES = 0, 1, 13, 26, 27
"""Where ``llama_context_params`` of v0.5.0 has these, as 32-bit numbers: sizes, fused attention, types of the cache."""
AUTO, OFF, FP16, FP32 = -1, 0, 1, 0


class Parameters(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_int32 * 256),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.c_int32)),
        ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


def main() -> None:
    folder, model_file, context, *lora = sys.argv[1:]
    ctypes.CDLL(str(next(Path(folder).glob("libggml-base.*so*"))), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(Path(folder).glob("libggml.*so*"))), mode=ctypes.RTLD_GLOBAL)
    llama: Any = ctypes.CDLL(str(next(Path(folder).glob("libllama.*so*"))))
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory",
                 "llama_adapter_lora_init", "llama_get_logits"):  # fmt: skip
        getattr(llama, name).restype = ctypes.c_void_p
    llama.llama_model_default_params.restype = llama.llama_context_default_params.restype = Parameters
    llama.llama_batch_init.restype = Batch
    llama.llama_model_chat_template.restype = ctypes.c_char_p
    ggml.ggml_backend_load_all_from_path(folder.encode())
    llama.llama_backend_init()
    model = ctypes.c_void_p(llama.llama_model_load_from_file(model_file.encode(), llama.llama_model_default_params()))
    if not model:
        return say({"failed": "the model was not loaded"})
    parameters = llama.llama_context_default_params()
    assert [parameters.numbers[i] for i in (FLASH, KEYS, VALUES)] == [AUTO, FP16, FP16]
    parameters.numbers[FLASH], parameters.numbers[KEYS], parameters.numbers[VALUES] = OFF, FP32, FP32
    parameters.numbers[CONTEXT] = parameters.numbers[BATCH] = int(context)
    state = ctypes.c_void_p(llama.llama_init_from_model(model, parameters))
    if not state:
        return say({"failed": "there is no context"})
    llama.llama_set_n_threads(state, 1, 1)
    if lora:
        adapter = ctypes.c_void_p(llama.llama_adapter_lora_init(model, lora[0].encode()))
        if not adapter:
            return say({"failed": "the adapter was not loaded"})
        one = (ctypes.c_void_p * 1)(adapter)
        llama.llama_set_adapters_lora(state, one, ctypes.c_size_t(1), (ctypes.c_float * 1)(1.0))
    vocabulary = ctypes.c_void_p(llama.llama_model_get_vocab(model))
    rows = llama.llama_vocab_n_tokens(vocabulary)
    say({"loaded": rows})
    for line in sys.stdin:
        asked = json.loads(line)
        if "text" in asked:
            text = asked["text"].encode()
            room = len(text) + 8
            ids = (ctypes.c_int32 * room)()
            count = llama.llama_tokenize(
                vocabulary, text, len(text), ids, room, ctypes.c_bool(asked["special"]), ctypes.c_bool(asked["parse"])
            )
            say({"ids": list(ids[:count])})
        elif "ids" in asked:
            say({"logits": logits(llama, state, asked["ids"], rows)})
        elif "pieces" in asked:
            say({"pieces": [piece(llama, vocabulary, token).decode(errors="replace") for token in asked["pieces"]]})
        elif "ends" in asked:
            say({"ends": [t for t in range(rows) if llama.llama_vocab_is_eog(vocabulary, t) & 1]})
        else:
            say({"template": (llama.llama_model_chat_template(model, None) or b"").decode()})


def logits(llama: Any, state: ctypes.c_void_p, ids: list[int], rows: int) -> str:
    llama.llama_memory_clear(ctypes.c_void_p(llama.llama_get_memory(state)), ctypes.c_bool(True))
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.count = len(ids)
    for i, token in enumerate(ids):
        batch.tokens[i], batch.positions[i], batch.sequences[i], batch.wanted[i] = token, i, 1, 1
        batch.sequence[i][0] = 0
    assert llama.llama_decode(state, batch) == 0
    size = 4 * len(ids) * rows
    return base64.b64encode(ctypes.string_at(llama.llama_get_logits(state), size)).decode()


def piece(llama: Any, vocabulary: ctypes.c_void_p, token: int) -> bytes:
    room = ctypes.create_string_buffer(256)
    count = llama.llama_token_to_piece(vocabulary, token, room, 256, 0, ctypes.c_bool(True))
    return room.raw[:count]


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
