"""Pages of keys and values that stay behind their texts, for other texts that begin alike with the same adapter.

A page is kept by a digest of the adapter's name and one of all tokens up to the page's end. What lies behind a text's
last whole page, its tail, is kept by the digest of the page before it, one tail a place. Where memory is bounded, the
pages that were not wanted for longest go first.
"""

import hashlib
import itertools
from collections import OrderedDict, abc
from collections.abc import Iterator

from halfbyte.generate.decoder import PAGE
from halfbyte.nn.decode import Page, PagedDecoder, Text

_TAIL = b"tail"


class KeptPages:
    """The pages of a decoder that are kept.

    Args:
        paged: that they are of.

    Attributes:
        budget: bytes that its cache may take, kept pages included, or None.
    """

    def __init__(self, paged: PagedDecoder) -> None:
        self._paged = paged
        self.budget: int | None = None
        self._pages: OrderedDict[bytes, Page] = OrderedDict()
        self._tails: dict[bytes, list[int]] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes that keys and values take now, kept ones and others."""
        return self._paged.pages_held * self._paged.decoder.page_bytes

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes that so many tokens of one text take, at most."""
        return -(-tokens // PAGE) * self._paged.decoder.page_bytes

    def begin(self, text: Text, ids: abc.Sequence[int], adapter: str | None) -> None:
        """Give ``text``, which is new, what is kept of the beginning of ``ids``; never of the last one."""
        shared, last = [], _adapter_key(adapter)
        for key in _keys(adapter, ids[: (len(ids) - 1) // PAGE * PAGE]):
            if key not in self._pages:
                break
            self._pages.move_to_end(key)
            shared.append(self._pages[key])
            last = key
        self._paged.share(text, shared)
        if page := self._pages.get(last + _TAIL):
            self._pages.move_to_end(last + _TAIL)
            following = zip(self._tails[last + _TAIL], ids[text.length : -1], strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], following))
            if same:
                self.make_room(PAGE)
                self._paged.begin_page(text, page, same)

    def keep(self, text: Text, ids: abc.Sequence[int], adapter: str | None) -> None:
        """Keep the whole pages of ``ids``, with which ``text`` begins."""
        pages = text.pages[: len(ids) // PAGE]
        for key, page in zip(_keys(adapter, ids), pages, strict=True):
            if key not in self._pages:
                self._pages[key] = page
                page.users += 1
            self._pages.move_to_end(key)

    def keep_tail(self, text: Text, ids: abc.Sequence[int], adapter: str | None) -> None:
        """Keep what lies behind the last whole page of ``text``, whose tokens are ``ids``."""
        whole, rest = divmod(len(ids), PAGE)
        if not rest:
            return
        *_, last = _adapter_key(adapter), *_keys(adapter, ids)
        self._forget(last + _TAIL)
        page = text.pages[whole]
        page.users += 1
        self._pages[last + _TAIL], self._tails[last + _TAIL] = page, list(ids[whole * PAGE :])

    def forget(self, adapter: str | None) -> None:
        """Let go of all that was kept with an adapter."""
        for key in [key for key in self._pages if key.startswith(_adapter_key(adapter))]:
            self._forget(key)

    def make_room(self, tokens: int) -> None:
        """Let go of kept pages, the oldest first, until so many further tokens fit into the budget."""
        if self.budget is None:
            return
        most = self.budget - self.bytes_of(max(tokens, 0))
        if self.bytes_held <= most:
            return
        for key in [key for key, page in self._pages.items() if page.users == 1]:
            self._forget(key)
            if self.bytes_held <= most:
                return

    def _forget(self, key: bytes) -> None:
        if key in self._pages:
            self._paged.release(self._pages.pop(key))
            self._tails.pop(key, None)


def _adapter_key(adapter: str | None) -> bytes:
    return hashlib.sha256(b"base" if adapter is None else b"adapter " + adapter.encode()).digest()


def _keys(adapter: str | None, ids: abc.Sequence[int]) -> Iterator[bytes]:
    """Yield what each whole page of ``ids`` is kept by."""
    digest = hashlib.sha256()
    for first in range(0, len(ids) - PAGE + 1, PAGE):
        digest.update(b"".join(token.to_bytes(4, "little") for token in ids[first : first + PAGE]))
        yield _adapter_key(adapter) + digest.digest()
