"""Trees of messages with ranked replies, as Open Assistant published them (arXiv 2304.07327), to their best path.

Two forms: a tree a row (``prompt`` with nested ``replies``), or a message a row (``message_id``, ``parent_id``), the
rows of a tree next to each other. The best path takes the reply with the lowest rank at each level, as QLoRA's paper
does for its OASST1 data (section 5).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from halfbyte.data.cells import Cells, is_blank, shown, words
from halfbyte.data.examples import BadRow, Message

ROLES = {"prompter": "user", "assistant": "assistant", "user": "user", "human": "user"}
BEST = "of a tree of messages the best ranked reply to each was taken, and the others left out"
KEYS = ("message_id", "parent_id", "text", "role")
LARGEST = 10_000
"""Messages of one tree in rows; the largest that was published has some hundreds."""


def is_tree(cells: Cells) -> bool:
    """Tell whether a row is a tree."""
    prompt = cells.peek("prompt")
    return isinstance(prompt, Mapping) and "replies" in prompt


def gathered(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield ``rows``, those that are messages of one tree as a tree in the place of its first."""
    where, messages = "", list[Mapping[str, Any]]()
    for place, row in rows:
        is_message = isinstance(row, Mapping) and "parent_id" in row and all(key in row for key in KEYS)
        if messages and not (is_message and _belongs(row, messages) and len(messages) < LARGEST):
            yield where, _tree(where, messages)
            messages = []
        if not is_message:
            yield place, row
            continue
        if not messages:
            where = place
        messages.append(row)
    if messages:
        yield where, _tree(where, messages)


def best_path(cells: Cells) -> list[Message]:
    """Return the turns from the root of a tree along its best replies, up to the last answer.

    Raises:
        BadRow: there is no answer, or the tree is none.
    """
    node = cells.get("prompt")
    turns: list[Message] = []
    while node is not None:
        role = ROLES.get(words(node.get("role")))
        if role is None:
            raise cells.bad(
                "role not known", f"has a message of the role {shown(node.get('role'))}; known are {', '.join(ROLES)}."
            )
        turns.append({"role": role, "content": cells.as_text("text", node.get("text"))})
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise cells.bad(
                "replies are no messages", f": replies must be a list of messages, but they are {shown(replies)}."
            )
        replies = [reply for reply in replies if reply.get("deleted") not in (True, "true", "True")]
        if len(replies) > 1:
            cells.note(BEST)
        node = min(replies, key=lambda reply: _rank(cells, reply), default=None)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        raise cells.bad("no answer", "is a tree without an answer; remove it.")
    return turns


def _rank(cells: Cells, reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    if is_blank(rank):
        return float("inf")
    try:
        return float(rank)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise cells.bad("rank is no number", f"has a reply of the rank {shown(rank)}; write a number.") from None


def _belongs(row: Mapping[str, Any], messages: list[Mapping[str, Any]]) -> bool:
    if "message_tree_id" in row:
        return bool(row["message_tree_id"] == messages[0].get("message_tree_id"))
    return not is_blank(row["parent_id"])


def _tree(where: str, messages: list[Mapping[str, Any]]) -> Any:
    nodes = {words(message["message_id"]): dict(message) | {"replies": []} for message in messages}
    if len(nodes) < len(messages):
        return BadRow(
            where, "tree is torn", "begins a tree in which two messages have the same message_id; give each its own."
        )
    roots = []
    for node in nodes.values():
        parent = node["parent_id"]
        if is_blank(parent):
            roots.append(node)
        elif words(parent) in nodes:
            nodes[words(parent)]["replies"].append(node)
        else:
            return BadRow(
                where, "tree is torn",
                f"begins a tree whose message {shown(node['message_id'])} answers {shown(parent)}, which is not beside "
                "it; put the rows of a tree next to each other.",
            )  # fmt: skip
    if len(roots) != 1:
        return BadRow(where, "tree is torn", f"begins a tree with {len(roots)} first messages; a tree has one.")
    return {"prompt": roots[0]}
