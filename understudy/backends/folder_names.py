"""The names of files that a guest knows, each with its number.

A number stands for a name in a folder, which has a number itself; what is there by that name is
found anew each time.  Two names of one file are two numbers.

Source: ours; the numbers are FUSE's "nodeid".
Invariants: no number is given twice; there are at most `MOST_NODES`: beyond that, the name that was
used longest ago goes, and who uses its number is told that it is stale; no name is above itself.
"""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from understudy.state import U64

MOST_NODES: Final = 1 << 16
LONGEST_NAME: Final = 255
LONGEST_PATH: Final = 4095
ROOT: Final = 1


@dataclass(slots=True, eq=False)
class Node:
    """A name that the guest knows."""

    number: int
    parent: "Node | None"  # None: it is the folder itself, or there is no such name any more
    name: bytes
    kind: int  # as in st_mode
    file: tuple[int, int] | None = None  # device and inode of what was there; None: not seen yet
    known: int = 0  # how often the guest has been told of it
    children: "dict[bytes, Node]" = field(default_factory=dict)
    handles: set[int] = field(default_factory=set)

    def is_of(self, there: os.stat_result) -> bool:
        """Whether this is what was there before.  What was not seen yet is seen now."""
        file = there.st_dev, there.st_ino
        if self.file is None and self.kind == stat.S_IFMT(there.st_mode):
            self.file = file
        return (self.kind, self.file) == (stat.S_IFMT(there.st_mode), file)


class KeptNode(NamedTuple):
    """A name in a snapshot."""

    number: U64
    parent: U64  # 0: it has none
    name: bytes
    kind: U64
    known: U64


class KeptHandle(NamedTuple):
    """An open file in a snapshot."""

    number: U64
    node: U64
    flags: U64


@dataclass
class FolderState:
    """What a snapshot keeps: names, parents before their children, and what is open."""

    nodes: list[KeptNode]
    handles: list[KeptHandle]
    following: U64


class Names:
    """The names in one folder that is shared."""

    def __init__(self, following: int = ROOT + 1) -> None:
        """`following`: the number that is given next."""
        self.top = Node(ROOT, None, b"", stat.S_IFDIR)
        self.nodes: OrderedDict[int, Node] = OrderedDict({ROOT: self.top})  # used last, last
        self.following = following
        self.steps = 0  # from name to name, since somebody began to count

    def node(self, number: int) -> Node:
        """The name with this number; OSError if it is stale."""
        try:
            node = self.nodes[number]
        except KeyError:
            raise error(errno.ESTALE) from None
        self.nodes.move_to_end(number)
        return node

    def path(self, node: Node) -> bytes:
        """From the folder that is shared on; OSError if there is none any more."""
        names: list[bytes] = []
        at, size = node, -1  # no slash before the first
        while at is not self.top:
            if at.parent is None:
                raise error(errno.ESTALE)
            names.append(at.name)
            size += 1 + len(at.name)
            if size > LONGEST_PATH:
                raise error(errno.ENAMETOOLONG)
            self.steps += 1
            at = at.parent
        return b"/".join(reversed(names)) or b"."

    def told(self, folder: Node, name: bytes, there: os.stat_result) -> Node:
        """The guest is told of a name, and of what is there: another file is another number."""
        node = folder.children.get(name)
        if node is not None and not node.is_of(there):
            self.gone(folder, name)
            node = None
        if node is None:
            if len(self.nodes) >= MOST_NODES:
                self._evict(folder)
            file = there.st_dev, there.st_ino
            node = Node(self.next(), folder, name, stat.S_IFMT(there.st_mode), file)
            self.nodes[node.number] = folder.children[name] = node
        node.known += 1
        return node

    def next(self) -> int:
        """A number that nobody has had."""
        self.following += 1
        return self.following - 1

    def forget(self, number: int, count: int) -> None:
        """The guest forgets so many times that it was told of a number."""
        node = self.nodes.get(number)
        if node is not None and node is not self.top:
            node.known = max(node.known - count, 0)
            self.tidy(node)

    def tidy(self, node: Node) -> None:
        """Drop a name that nobody knows, and what was kept for its sake."""
        while not (node is self.top or node.known or node.children or node.handles):
            parent = node.parent
            self.nodes.pop(node.number, None)
            if parent is None:
                return
            del parent.children[node.name]
            node.parent = None
            node = parent

    def _evict(self, folder: Node) -> None:
        """Drop the name that was used longest ago: the guest finds it again from its folder on."""
        for _ in range(len(self.nodes)):
            number = next(iter(self.nodes))
            node = self.nodes[number]
            if node not in (self.top, folder) and not node.children and not node.handles:
                node.known = 0
                self.tidy(node)
                return
            self.nodes.move_to_end(number)
            self.steps += 1

    def gone(self, folder: Node, name: bytes) -> None:
        """There is no such name any more."""
        node = folder.children.pop(name, None)
        if node is not None:
            node.parent = None
            self.tidy(node)

    def moved(self, source: Node, name: bytes, aim: Node, to: bytes, *, is_exchange: bool) -> None:
        """A name has become another one, or two have been exchanged."""
        if (source, name) == (aim, to):
            return
        if self._is_above(source.children.get(name), aim) or (
            is_exchange and self._is_above(aim.children.get(to), source)
        ):
            # Somebody else has moved one of the folders meanwhile: nothing is known of either name.
            self.gone(source, name)
            self.gone(aim, to)
            return
        node, there = source.children.pop(name, None), aim.children.pop(to, None)
        if there is not None and not is_exchange:
            there.parent = None
            self.tidy(there)
            there = None
        for one, folder, its in ((node, aim, to), (there, source, name)):
            if one is not None:
                one.parent, one.name = folder, its
                folder.children[its] = one

    def _is_above(self, node: Node | None, folder: Node) -> bool:
        """Whether a name is the folder's itself, or one that the folder is under."""
        at: Node | None = folder
        while at is not None and at is not node:
            self.steps += 1
            at = at.parent
        return at is not None

    # --- snapshots ---

    def rows(self) -> list[KeptNode]:
        """All of them, parents before their children."""
        waiting = [node for node in self.nodes.values() if node.parent is None]
        rows: list[KeptNode] = []
        while waiting:
            node = waiting.pop()
            above = node.parent.number if node.parent else 0
            rows.append(KeptNode(node.number, above, node.name, node.kind, node.known))
            waiting += node.children.values()
        return rows

    @classmethod
    def of(cls, rows: Sequence[KeptNode], following: int) -> "Names":
        """Those of a snapshot.  ValueError if they cannot be."""
        names = cls(following)
        if len(rows) > MOST_NODES:
            raise ValueError("snapshot: more names than a share has")
        for row in rows:
            if row.number != ROOT:
                names._load(row)
        return names

    def _load(self, row: KeptNode) -> None:
        parent = self.nodes.get(row.parent)
        if (
            row.number in self.nodes or not 0 < row.number < self.following
            or (parent is None) != (row.parent == 0)
        ):  # fmt: skip
            raise ValueError("snapshot: a shared folder's names cannot be so")
        node = Node(row.number, parent, row.name, row.kind, None, row.known)
        self.nodes[node.number] = node
        if parent is None:
            return
        try:
            checked(row.name)
        except OSError:
            raise ValueError(f"snapshot: a shared file is called {row.name!r}") from None
        if row.name in parent.children:
            raise ValueError(f"snapshot: two shared files are called {row.name!r}")
        parent.children[row.name] = node


def checked(name: bytes) -> bytes:
    """A name of something in a folder, and nothing else; OSError if it is none."""
    if len(name) > LONGEST_NAME:
        raise error(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL)
    return name


def error(number: int) -> OSError:
    """With the computer's words for it."""
    return OSError(number, os.strerror(number))
