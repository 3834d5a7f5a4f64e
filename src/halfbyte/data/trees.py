"""Trees of messages with ranked replies, as Open Assistant published them (arXiv 2304.07327), to their best path.

Two forms: a tree a row (``prompt`` with nested ``replies``), or a message a row (``message_id``, ``parent_id``), the
rows of a tree next to each other. The best path takes the reply with the lowest rank at each level, as QLoRA's paper
does for its OASST1 data (section 5).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from halfbyte.data.cells import Cells
from halfbyte.data.examples import BadRow, Message

ROLES = {"prompter": "user", "assistant": "assistant"}


def is_tree(cells: Cells) -> bool:
    """Tell whether a row is a tree."""
    prompt = cells.row.get("prompt")
    return isinstance(prompt, Mapping) and "replies" in prompt


def gathered(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield ``rows``, those that are messages of one tree as a tree in the place of its first."""
    where, messages = "", list[Mapping[str, Any]]()
    for place, row in rows:
        is_message = isinstance(row, Mapping) and {"message_id", "parent_id", "text", "role"} <= row.keys()
        if messages and not (is_message and _belongs(row, messages)):
            yield _tree(where, messages)
            messages = []
        if not is_message:
            yield place, row
            continue
        if not messages:
            where = place
        messages.append(row)
    if messages:
        yield _tree(where, messages)


def best_path(cells: Cells) -> list[Message]:
    """Return the turns from the root of a tree along its best replies, up to the last answer."""
    node = cells.get("prompt")
    turns: list[Message] = []
    while node:
        role = ROLES.get(node.get("role"))
        if role is None:
            raise cells.bad(
                "role not known", f"has a message of the role {node.get('role')!r}; known are {', '.join(ROLES)}."
            )
        turns.append({"role": role, "content": cells.as_text("text", node.get("text"))})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=_rank, default=None)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        raise cells.bad("no answer", "is a tree without an answer; remove it.")
    return turns


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else float(rank)


def _belongs(row: Mapping[str, Any], messages: list[Mapping[str, Any]]) -> bool:
    if "message_tree_id" in row:
        return bool(row["message_tree_id"] == messages[0].get("message_tree_id"))
    return row["parent_id"] is not None


def _tree(where: str, messages: list[Mapping[str, Any]]) -> tuple[str, Any]:
    nodes = {message["message_id"]: dict(message) | {"replies": []} for message in messages}
    roots = []
    for node in nodes.values():
        if node["parent_id"] is None:
            roots.append(node)
        elif node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
        else:
            return where, BadRow(
                where, "tree is torn",
                f"begins a tree whose message {node['message_id']} answers {node['parent_id']}, which is not beside "
                "it; put the rows of a tree next to each other.",
            )  # fmt: skip
    if len(roots) != 1:
        return where, BadRow(where, "tree is torn", f"begins a tree with {len(roots)} first messages; a tree has one.")
    return where, {"prompt": roots[0]}
