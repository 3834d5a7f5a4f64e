"""A real server over small models, for the tests of this folder: uvicorn on a free port, in a thread."""

import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.deploy.address import bound, listen, url_of
from halfbyte.deploy.serve.log import Log
from halfbyte.deploy.serve.options import ServeOptions
from halfbyte.deploy.serve.running import Server, make_server, opened
from halfbyte.deploy.serve.service import Service

POSITIONS = 1024
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall as <tool_call>\n"
    '{"name": "NAME", "arguments": {}}\n</tool_call>. Tools:\n{% for tool in tools %}{{ tool | tojson }}\n'
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In Hermes' form."""


def save_model(folder: Path, tokenizer: Any, seed: int = 0, **shape: Any) -> Path:
    """Save a random Llama that takes longer texts and tools, with a tokenizer."""
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
            "initializer_range": 0.3, "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        LlamaForCausalLM(LlamaConfig(**options | shape)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """Save an adapter that sways the answers of a model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
        model = LlamaForCausalLM.from_pretrained(base)
        adapted = get_peft_model(model, LoraConfig(**given | options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter *= 10
        adapted.save_pretrained(folder)
    return folder


@dataclass
class Running:
    """A server that runs."""

    url: str
    service: Any
    server: Server
    written: io.StringIO
    key: str

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.written.getvalue().splitlines()]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key or "none", **{"max_retries": 0} | options)

    def http(self, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url.removesuffix("/v1"), headers=headers, timeout=60, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.http() as http:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            return http.post(path, content=raw, headers={"content-type": "application/json"} | headers)

    def wait_idle(self, seconds: float = 30) -> None:
        """Wait until no answer is under way or waits."""
        assert isinstance(self.service, Service)
        until = time.monotonic() + seconds
        while (now := self.service.engine.figures()).rows or now.waiting:
            assert time.monotonic() < until, now
            time.sleep(0.005)


@contextlib.contextmanager
def running(model: Path, **given: Any) -> Iterator[Running]:
    """Serve a model meanwhile."""
    options = ServeOptions.from_yaml(None, {"port": 0, "memory": "200MB"} | given)
    written = io.StringIO()
    with (
        contextlib.closing(bound(options.host, options.port)) as listening,
        opened(str(model), options, Log(written)) as service,
    ):
        keys = options.keys()
        server = make_server(service, keys)
        listen(listening, options.host, options.port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Running(f"{url_of(listening)}/v1", service, server, written, keys[0] if keys else "")
        finally:
            server.should_exit = True
            thread.join()
