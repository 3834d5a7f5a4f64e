"""The names that requests may ask for: the base, and adapters over it, which come and go while others answer.

The decoder and PEFT know an adapter by a name of ours (``served_1``), since PEFT's names become those of modules, which
hold no dots. Adapters are put on and taken off in the engine's thread, between two steps; one that is to go waits until
its last answer has ended.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.deploy.serve.errors import ApiError, without_paths
from halfbyte.deploy.serve.options import LONGEST_NAME, MOST_ADAPTERS
from halfbyte.errors import InputError, named, nearest
from halfbyte.generate.engine import Engine
from halfbyte.hf import prepare
from halfbyte.hf.layers.decoding import NotNative
from halfbyte.hf.layers.head import base_of
from halfbyte.hf.models.adapter_files import drop_adapter, put_adapter
from halfbyte.hf.models.base_files import check_base

SAFE = "adapter_model.safetensors"


@dataclass
class Served:
    """A model that can be asked for.

    Attributes:
        name: as requests say it.
        adapter: the decoder's name for its adapter, or None for the base.
        parent: the name of the base, of an adapter.
        created: seconds since 1970.
        may_go: whether it was loaded, or given as an adapter, and can be unloaded.
        in_use: requests that are being answered with it.
    """

    name: str
    adapter: str | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    may_go: bool = False
    in_use: int = 0


class Catalog:
    """What can be asked for, by name."""

    def __init__(self, served: Served, *more: Served) -> None:
        self._served = {one.name: one for one in (served, *more)}
        if len(self._served) <= len(more):
            raise InputError(f"Two models are called {served.name}; give one of them another name (--name).")
        self._numbers = 0
        self._changing = asyncio.Lock()

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    def __getitem__(self, name: str) -> Served:
        if (found := self._served.get(name)) is not None:
            return found
        short = name if len(name) <= 60 else f"{name[:60]}..."
        raise ApiError(
            404,
            f"There is no model {short!r}{nearest(name[:LONGEST_NAME], self._served)}; there is {named(self._served)}.",
            param="model",
            code="model_not_found",
        )

    @contextmanager
    def using(self, name: str) -> Iterator[Served]:
        """Keep a model from going meanwhile."""
        served = self[name]
        served.in_use += 1
        try:
            yield served
        finally:
            served.in_use -= 1

    def put(self, engine: Engine, name: str, folder: Path) -> Any:
        """Put the adapter in ``folder`` on the engine's model; returns a future of concurrent.futures.

        Raises:
            InputError: the name is taken.
        """
        if name in self._served:
            raise InputError(f"There is a model {name!r} already; unload it first, or take another name.")
        if len(self._served) > MOST_ADAPTERS:
            raise InputError(f"There are {MOST_ADAPTERS} adapters, and no more are taken; unload some.")
        self._numbers += 1
        adapter = f"served_{self._numbers}"
        parent = next(one.name for one in self if one.adapter is None)

        def work() -> None:
            put_on(engine.decoder, folder, adapter)
            self._served[name] = Served(name, adapter, parent, may_go=True)

        return engine.between(work)

    async def load(self, engine: Engine, name: str, folder: Path, base: str) -> None:
        """Load an adapter while others answer.

        Raises:
            ApiError: it does not fit, or the name is taken.
        """
        async with self._changing:
            try:
                decoder: Any = engine.decoder
                source = getattr(base_of(decoder.model), "opened_from", None)
                await asyncio.to_thread(check_base, folder, source)  # which may read all weights, once
                await asyncio.wrap_future(self.put(engine, name, folder))
            except InputError as error:
                names = {str(folder): name, base: next(iter(self)).name}
                raise ApiError(400, without_paths(str(error), names), code="adapter_not_loaded") from error

    async def unload(self, engine: Engine, name: str) -> None:
        """Take an adapter off, after its last answer has ended.

        Raises:
            ApiError: there is none of that name, or it is what the server was started with.
        """
        async with self._changing:
            served = self[name]
            if not served.may_go or (adapter := served.adapter) is None:
                raise ApiError(400, f"The model {name!r} is the one that is served; only adapters can be unloaded.")
            del self._served[name]  # nobody finds it any more
            while served.in_use:
                await asyncio.sleep(0.02)
            await asyncio.wrap_future(engine.between(lambda: take_off(engine.decoder, adapter)))


def put_on(decoder: Any, folder: Path, adapter: str) -> None:
    """Put an adapter on a decoder's model, in the engine's thread.

    Raises:
        InputError: it does not fit, or cannot be computed beside others; all is as before then.
    """
    if not (folder / SAFE).is_file():
        raise InputError(f"The adapter {folder} holds no {SAFE}; save it as such.")
    model = prepare(put_adapter(decoder.model, folder, name=adapter))
    try:
        decoder.take(model, adapter)
    except NotNative as reason:
        decoder.let_go(drop_adapter(model, adapter), adapter)
        raise InputError(
            f"The adapter {folder} cannot be decoded natively, as the model is: {reason}. Give it at the start "
            "(--adapter), so that all are decoded through transformers."
        ) from None
    except BaseException:
        decoder.let_go(drop_adapter(model, adapter), adapter)
        raise


def take_off(decoder: Any, adapter: str) -> None:
    """Take an adapter off a decoder's model, in the engine's thread."""
    decoder.let_go(drop_adapter(decoder.model, adapter), adapter)


def folder_within(path: str, folders: tuple[Path, ...]) -> Path:
    """Return the folder that a request names, if it lies in one of ``folders``.

    Raises:
        ApiError: it does not; what else there is on the server is not told.
    """
    if not folders:
        raise ApiError(
            403, "Adapters cannot be loaded at run time; start the server with --adapter-folder.", code="not_allowed"
        )
    refusal = ApiError(
        403, "lora_path names no adapter in a folder that adapters may be loaded from.", param="lora_path",
        code="not_allowed",
    )  # fmt: skip
    for folder in folders:
        try:
            found = (folder / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            continue
        if found.is_relative_to(folder) and (found / "adapter_config.json").is_file():
            return found
    raise refusal
