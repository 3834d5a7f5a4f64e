"""The cache of many texts that are decoded together, in pages, and one call a token over them.

A page holds keys and values of all layers for ``PAGE`` positions; a text has a list of pages. Whole pages whose tokens
were read as part of a prompt may be shared between texts that begin alike, and are counted; the last page of a text is
its own. Pages come one by one and go back to a list of free ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.kernels import Decoder
from halfbyte.kernels.decode import PAGE

Angles = Callable[[int, int], tuple[Tensor, Tensor]]
Parts = Sequence[Tensor]
TABLE = 1024
"""Positions by which the tables of angles grow."""
_ALIGNED = 64


class Page:
    """A piece of the cache.

    Attributes:
        memory: uint8, at a multiple of 64 bytes.
        users: texts that have it, and the store of prefixes.
    """

    def __init__(self, size: int) -> None:
        whole = torch.empty(size + _ALIGNED, dtype=torch.uint8)
        skip = -whole.data_ptr() % _ALIGNED
        self.memory = whole[skip : skip + size]
        self.users = 1


class Text:
    """The cache of one text.

    Attributes:
        length: tokens whose keys and values are held.
        pages: that hold them; there may be more than the length needs.
    """

    def __init__(self) -> None:
        self.length = 0
        self.pages: list[Page] = []
        self.table = torch.zeros(4, dtype=torch.int64)
        self.table_held = 0

    def addresses(self) -> Tensor:
        """Return the addresses of the pages, int64."""
        while self.table_held < len(self.pages):
            if self.table_held == len(self.table):
                self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self.table[self.table_held] = self.pages[self.table_held].memory.data_ptr()
            self.table_held += 1
        return self.table


class PagedDecoder:
    """A decoder with the cache of its texts.

    Args:
        decoder: the kernels' side.
        angles: for each of its tables what computes it.
    """

    def __init__(self, decoder: Decoder, angles: Sequence[Angles]) -> None:
        self.decoder = decoder
        self._angles = angles
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._table_length = 0
        self._free: list[Page] = []
        self.pages_held = 0
        """Pages in use, by whomever."""

    def room(self, text: Text, length: int) -> None:
        """Give ``text`` the pages for ``length`` tokens."""
        while len(text.pages) * PAGE < length:
            text.pages.append(self._page())

    def _page(self) -> Page:
        """Return a page for one user."""
        page = self._free.pop() if self._free else Page(self.decoder.page_bytes)
        page.users = 1
        self.pages_held += 1
        return page

    def share(self, text: Text, pages: Sequence[Page]) -> None:
        """Begin ``text``, which is new, with whole pages that others have too."""
        for page in pages:
            page.users += 1
            text.pages.append(page)
        text.length = PAGE * len(pages)

    def release(self, page: Page) -> None:
        """Let go of a page on behalf of one user."""
        page.users -= 1
        if page.users == 0:
            self._free.append(page)
            self.pages_held -= 1

    def cut(self, text: Text, length: int) -> None:
        """Forget what lies behind the first ``length`` tokens; a page that is cut within becomes the text's own."""
        text.length = min(text.length, length)
        keep = -(-text.length // PAGE)
        while len(text.pages) > keep:
            self.release(text.pages.pop())
        text.table_held = min(text.table_held, keep)
        if text.length % PAGE and text.pages[-1].users > 1:
            shared = text.pages[-1]
            text.pages[-1] = self._copied(shared)
            text.table_held = min(text.table_held, keep - 1)
            self.release(shared)

    def begin_page(self, text: Text, page: Page, length: int) -> None:
        """Go on, behind whole pages, with the first ``length`` tokens of a page, which is copied."""
        text.pages.append(self._copied(page))
        text.length += length

    def _copied(self, page: Page) -> Page:
        own = self._page()
        own.memory.copy_(page.memory)
        return own

    def step(self, texts: Sequence[Text], tokens: Sequence[int], adapters: Sequence[int]) -> Tensor:
        """Go on by one token in each text; return the logits after it, fp32 ``[texts, vocabulary]``.

        Args:
            texts: different ones.
            tokens: of each.
            adapters: of each the decoder's number of its adapter, or -1.
        """
        positions = [text.length for text in texts]
        self._grow_tables(max(positions) + 1)
        for text, position in zip(texts, positions, strict=True):
            self.room(text, position + 1)
        order = sorted(range(len(texts)), key=lambda row: adapters[row])
        logits = self.decoder.step(
            [tokens[row] for row in order],
            [positions[row] for row in order],
            [texts[row].addresses() for row in order],
            [adapters[row] for row in order],
            self._tables,
        )
        for text in texts:
            text.length += 1
        if order == list(range(len(texts))):
            return logits
        back = sorted(range(len(texts)), key=lambda place: order[place])
        return logits[back]

    def extend(self, text: Text, tokens: Sequence[int], adapter: int) -> Tensor:
        """Go on by several tokens of one text, up to a step's rows; return the logits after the last, fp32.

        Args:
            text: to go on with.
            tokens: that are given.
            adapter: the decoder's number of its adapter, or -1.
        """
        begin, end = text.length, text.length + len(tokens)
        self._grow_tables(end)
        self.room(text, end)
        addresses = text.addresses()
        rows = len(tokens)
        logits = self.decoder.step(tokens, range(begin, end), [addresses] * rows, [adapter] * rows, self._tables)
        text.length = end
        return logits[-1]

    def copy_held(self, text: Text, keys: Tensor, values: Tensor) -> None:
        """Copy what is held of all layers to ``keys`` and ``values``, ``[layers, kv_heads, length, size]``."""
        for number in range(-(-text.length // PAGE)):
            first = number * PAGE
            count = min(PAGE, text.length - first)
            for out, held in zip((keys, values), self._views(text.pages[number], slice(None)), strict=True):
                out[:, :, first : first + count] = _dense([part[:, :, :count] for part in held])

    def append(self, text: Text, layer: int, keys: Tensor, values: Tensor, known: int = 0) -> tuple[Tensor, Tensor]:
        """Write keys and values of a layer behind the text's length, which stays; return them as they are held.

        Args:
            text: to go on with.
            layer: its number.
            keys: ``[kv_heads, tokens, size]``.
            values: likewise.
            known: how many of the first tokens are held already, and not written.
        """
        given = [_stored(x, self.decoder.cache) for x in (keys, values)]
        tokens = keys.shape[1] - known
        self.room(text, text.length + tokens)
        done = 0
        while done < tokens:
            number, place = divmod(text.length + done, PAGE)
            count = min(PAGE - place, tokens - done)
            for parts, held in zip(given, self._views(text.pages[number], layer), strict=True):
                for part, out in zip(parts, held, strict=True):
                    out[:, place : place + count] = part[:, known + done : known + done + count]
            done += count
        return _dense(given[0]), _dense(given[1])

    def _views(self, page: Page, layer: int | slice) -> tuple[Parts, Parts]:
        """Return keys and values of a layer of a page as views, as :func:`_stored` has them for ``PAGE`` tokens.

        Of several layers they have one more dimension, the first.
        """
        parts = self.decoder.parts
        if self.decoder.cache == "int8":
            of_values = parts.size * PAGE
            bytes_ = page.memory.view(len(parts.layers), parts.kv_heads, -1)[layer]
            codes = bytes_[..., : 2 * of_values].view(torch.int8)
            scales = _parted(bytes_[..., 2 * of_values :].view(torch.float32), 2, PAGE)
            keys = _parted(codes[..., :of_values], parts.size, PAGE).transpose(-1, -2)
            values = _parted(codes[..., of_values:], PAGE, parts.size)
            return (keys, scales[..., 0, :]), (values, scales[..., 1, :])
        typed = page.memory.view(getattr(torch, self.decoder.cache))
        both = typed.view(len(parts.layers), parts.kv_heads, 2, -1)[layer]
        keys = _parted(both[..., 0, :], parts.size, PAGE).transpose(-1, -2)
        return (keys,), (_parted(both[..., 1, :], PAGE, parts.size),)

    def _grow_tables(self, length: int) -> None:
        if length <= self._table_length:
            return
        self._table_length = -(-length // TABLE) * TABLE
        self._tables = [angles(0, self._table_length) for angles in self._angles]


def _parted(x: Tensor, *sizes: int) -> Tensor:
    """Return ``x`` with its last dimension as several."""
    return x.view(*x.shape[:-1], *sizes)


def _stored(x: Tensor, cache: str) -> Parts:
    """Return ``[kv_heads, tokens, size]`` as a cache stores it: as it is, or int8 and scales ``[kv_heads, tokens]``."""
    if cache != "int8":
        return (x,)
    absmax = x.float().abs().amax(-1)
    inverse = torch.where(absmax > 0, 127 / absmax, 0.0)
    return (x.float() * inverse[..., None]).round().to(torch.int8), absmax / 127


def _dense(parts: Parts) -> Tensor:
    """Return what :func:`_stored` was given, as far as it is still there."""
    return parts[0] if len(parts) == 1 else parts[0].float() * parts[1][..., None]
