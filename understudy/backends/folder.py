"""A folder of this computer as a guest may use it: nothing outside of it can be reached.

A guest names a file by a number, which stands for a name in a folder that has a number itself.
For each wish the path of these names is opened anew, from the folder on, by openat2(2), with
which no link, no dots and no mount leads out; what was opened is used by its descriptor alone.
So nobody gains by changing a name meanwhile, in the guest or here.

Source: ours; openat2(2), proc(5), "/proc/pid/fd".
Invariants: nothing is opened but regular files and folders; at most `MOST_HANDLES` are open, and
there are no other descriptors than these between two wishes; nothing is written to a folder that is
not writable; a file that a guest makes or writes to gives nobody rights (setuid).
Each wish that cannot be fulfilled is an OSError.
"""

import errno
import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from understudy.backends import descriptors, system_calls
from understudy.backends.folder_files import PERMISSIONS, Handle, resize
from understudy.backends.folder_names import (
    FolderState,
    KeptHandle,
    Names,
    Node,
    checked,
    error,
)
from understudy.backends.system_calls import Entry
from understudy.state import plain, restore

MOST_HANDLES: Final = 256
LIST_BYTES: Final = 1 << 15  # of names that are read at once
NOREPLACE, EXCHANGE = 1, 2  # RENAME_*
GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
"""What is said of a path where there is not any more what was there."""
MADE: Final = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)
"""What mknod may make: no devices."""


class ShareError(Exception):
    """A folder that cannot be shared: one line that says what to do."""


class Folder:
    """A folder that one guest shares."""

    def __init__(self, path: Path, *, is_writable: bool = False) -> None:
        """ShareError says why not."""
        self.path, self.is_writable = path, is_writable
        self._root = _opened(path)
        self._self = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
        self.names = Names()
        self.handles: dict[int, Handle] = {}
        own = (self._root, self._self)
        self._release = weakref.finalize(self, _close, self.handles, own)

    def forget_all(self) -> None:
        """The guest knows nothing any more, and has nothing open."""
        _close(self.handles)
        self.names = Names(self.names.following)

    def close(self) -> None:
        """Let go of the folder."""
        self._release()

    # --- names ---

    def lookup(self, parent: int, name: bytes) -> tuple[int, os.stat_result]:
        """The number of a name in a folder, of which the guest is told, and what is there."""
        folder = self.names.node(parent)
        with self._at(folder) as fd:
            found = system_calls.open_within(fd, checked(name), os.O_PATH | os.O_NOFOLLOW)
            try:
                there = os.fstat(found)
            finally:
                os.close(found)
        return self.names.told(folder, name, there).number, there

    def forget(self, number: int, count: int) -> None:
        """The guest forgets so many times that it was told of a number."""
        self.names.forget(number, count)

    # --- descriptors ---

    @contextmanager
    def _at(self, node: Node) -> Iterator[int]:
        """A descriptor of what has this name, or of the file that had it and is still open."""
        fd = self._named(node)
        if fd is not None:
            try:
                yield fd
            finally:
                os.close(fd)
        elif node.handles and node.kind != stat.S_IFDIR:
            yield self.handles[next(iter(node.handles))].fd
        else:
            raise error(errno.ESTALE)

    def _named(self, node: Node) -> int | None:
        """A descriptor of the file of this name, if it is still there."""
        try:
            path = self.names.path(node)
            fd = system_calls.open_within(self._root, path, os.O_PATH | os.O_NOFOLLOW)
        except OSError as problem:
            if problem.errno in GONE:
                return None
            raise
        if node is self.names.top or node.is_of(os.fstat(fd)):
            return fd
        os.close(fd)
        return None

    def _reopened(self, fd: int, flags: int) -> int:
        """The same file for other uses.  It is no device and no pipe, whatever its name was."""
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise error(errno.EACCES)
        flags |= os.O_NONBLOCK | os.O_NOCTTY
        return os.open(b"%d" % fd, flags, dir_fd=self._self)

    def _may_write(self) -> None:
        if not self.is_writable:
            raise error(errno.EROFS)

    # --- files ---

    def stat(self, number: int) -> os.stat_result:
        """What is there."""
        with self._at(self.names.node(number)) as fd:
            return os.fstat(fd)

    def open(self, number: int, flags: int) -> int:
        """Open a file, or with O_DIRECTORY a folder; the number of what is open then."""
        flags &= os.O_ACCMODE | os.O_TRUNC | os.O_DIRECTORY
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            self._may_write()
        self._check_room()
        node = self.names.node(number)
        if (node.kind == stat.S_IFDIR) != bool(flags & os.O_DIRECTORY):
            raise error(errno.EISDIR if node.kind == stat.S_IFDIR else errno.ENOTDIR)
        with self._at(node) as fd:
            opened = self._reopened(fd, flags & ~os.O_TRUNC)
            try:
                if flags & os.O_TRUNC:
                    self._resize(node, fd, 0)
            except BaseException:
                os.close(opened)
                raise
        return self._handle(node, opened, flags)

    def _check_room(self) -> None:
        if len(self.handles) >= MOST_HANDLES or descriptors.are_scarce():
            raise error(errno.ENFILE)

    def _handle(self, node: Node, fd: int, flags: int) -> int:
        number = self.names.next()
        self.handles[number] = Handle(fd, node, flags & ~os.O_TRUNC)
        node.handles.add(number)
        return number

    def create(
        self, parent: int, name: bytes, flags: int, mode: int
    ) -> tuple[int, os.stat_result, int]:
        """Make and open a file, or open it if it is there: its number, what is there, the handle's.

        flags: of open(2); with O_EXCL it may not be there.
        """
        self._may_write()
        self._check_room()
        folder = self.names.node(parent)
        try:
            with self._at(folder) as fd:
                new = system_calls.open_within(
                    fd, checked(name), flags & os.O_ACCMODE | os.O_CREAT | os.O_EXCL, 0o600
                )
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            number, there = self.lookup(parent, name)
            return number, there, self.open(number, flags)
        try:
            os.fchmod(new, mode & PERMISSIONS)
            there = os.fstat(new)
        except BaseException:
            os.close(new)
            raise
        node = self.names.told(folder, name, there)
        return node.number, there, self._handle(node, new, flags & os.O_ACCMODE)

    def handle(self, number: int) -> Handle:
        """What the guest has open by this number."""
        try:
            return self.handles[number]
        except KeyError:
            raise error(errno.EBADF) from None

    def release(self, number: int) -> None:
        """Close it."""
        handle = self.handle(number)
        del self.handles[number]
        os.close(handle.fd)
        handle.node.handles.discard(number)
        self.names.tidy(handle.node)

    def listing(self, number: int, offset: int) -> Iterator[Entry]:
        """Names in an open folder, from an offset on; not all of them, and none at the end."""
        handle = self.handle(number)
        if handle.node.kind != stat.S_IFDIR:
            raise error(errno.ENOTDIR)
        for entry in system_calls.entries(handle.fd, offset, LIST_BYTES):
            # What is above the folder is nobody's business.
            is_above = handle.node is self.names.top and entry.name == b".."
            yield entry._replace(ino=os.fstat(handle.fd).st_ino) if is_above else entry

    def link_text(self, number: int) -> bytes:
        """What a symbolic link says; nobody here follows it."""
        node = self.names.node(number)
        if node.kind != stat.S_IFLNK:
            raise error(errno.EINVAL)
        with self._at(node) as fd:
            return os.readlink(b"", dir_fd=fd)

    def room(self) -> os.statvfs_result:
        """Of the file system; nothing is free on one that cannot be written."""
        return os.fstatvfs(self._root)

    # --- changes ---

    def change(
        self, number: int, *, mode: int | None = None, size: int | None = None,
        accessed_ns: int | None = None, modified_ns: int | None = None,
    ) -> None:  # fmt: skip
        """Change permissions, size or times."""
        self._may_write()
        node = self.names.node(number)
        with self._at(node) as fd:
            own = b"%d" % fd
            if size is not None:
                self._resize(node, fd, size)
            if mode is not None:
                if node.kind == stat.S_IFLNK:
                    raise error(errno.EOPNOTSUPP)
                os.chmod(own, mode & PERMISSIONS, dir_fd=self._self)
            if accessed_ns is not None or modified_ns is not None:
                old = os.fstat(fd)
                a = old.st_atime_ns if accessed_ns is None else accessed_ns
                m = old.st_mtime_ns if modified_ns is None else modified_ns
                os.utime(own, ns=(a, m), dir_fd=self._self)

    def _resize(self, node: Node, fd: int, size: int) -> None:
        for handle in (self.handles[number] for number in node.handles):
            if handle.flags & os.O_ACCMODE:  # its permissions may not let it be opened again
                resize(handle.fd, size)
                return
        writable = self._reopened(fd, os.O_WRONLY)
        try:
            resize(writable, size)
        finally:
            os.close(writable)

    def make_folder(self, parent: int, name: bytes, mode: int) -> None:
        """A new folder in a folder."""
        with self._changing(parent, name) as (fd, _):
            os.mkdir(name, 0o700, dir_fd=fd)
            self._permit(fd, name, stat.S_IFDIR, mode)

    def make_node(self, parent: int, name: bytes, mode: int) -> None:
        """A new file, pipe or socket; EPERM for a device."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        with self._changing(parent, name) as (fd, _):
            if kind not in MADE:
                raise error(errno.EPERM)
            os.mknod(name, kind | 0o600, dir_fd=fd)
            self._permit(fd, name, kind, mode)

    def make_link(self, parent: int, name: bytes, text: bytes) -> None:
        """A new symbolic link."""
        with self._changing(parent, name) as (fd, _):
            os.symlink(text, name, dir_fd=fd)

    def link(self, number: int, parent: int, name: bytes) -> None:
        """One more name of a file."""
        with self._changing(parent, name) as (to, _), self._at(self.names.node(number)) as fd:
            os.link(b"%d" % fd, name, src_dir_fd=self._self, dst_dir_fd=to)

    def remove(self, parent: int, name: bytes, *, is_folder: bool) -> None:
        """A name goes."""
        with self._changing(parent, name) as (fd, folder):
            (os.rmdir if is_folder else os.unlink)(name, dir_fd=fd)
            self.names.gone(folder, name)

    def rename(self, parent: int, name: bytes, other: int, to: bytes, flags: int) -> None:
        """A name becomes another one, maybe in another folder."""
        if flags not in (0, NOREPLACE, EXCHANGE):
            raise error(errno.EINVAL)
        with self._changing(parent, name) as (old, source), self._changing(other, to) as (new, aim):
            system_calls.rename(old, name, new, to, flags)
            self.names.moved(source, name, aim, to, is_exchange=flags == EXCHANGE)

    @contextmanager
    def _changing(self, parent: int, name: bytes) -> Iterator[tuple[int, Node]]:
        """A folder in which a name is to change."""
        self._may_write()
        checked(name)
        folder = self.names.node(parent)
        with self._at(folder) as fd:
            yield fd, folder

    def _permit(self, folder: int, name: bytes, kind: int, mode: int) -> None:
        """What was made just now gets its permissions, if it is still there."""
        with suppress(FileNotFoundError):
            fd = system_calls.open_within(folder, name, os.O_PATH | os.O_NOFOLLOW)
            try:
                if stat.S_IFMT(os.fstat(fd).st_mode) == kind:
                    os.chmod(b"%d" % fd, mode & PERMISSIONS, dir_fd=self._self)
            finally:
                os.close(fd)

    def counts(self) -> dict[str, int]:
        """What the guest knows, and has open."""
        return {"names": len(self.names.nodes), "open": len(self.handles)}

    # --- snapshots ---

    def save(self) -> dict[str, Any]:
        """Names and what is open, not the files."""
        handles = [KeptHandle(n, one.node.number, one.flags) for n, one in self.handles.items()]
        state = FolderState(self.names.rows(), handles, self.names.following)
        saved: dict[str, Any] = plain(state)
        return saved

    def load(self, saved: Any) -> None:
        """Become what was saved: what was open is opened by its name.  ValueError says why not."""
        state: FolderState = restore(FolderState, saved, "the shared folder")
        self.forget_all()
        if len(state.handles) > MOST_HANDLES:
            raise ValueError("snapshot: more open files than a share has")
        self.names = Names.of(state.nodes, state.following)
        for handle in state.handles:
            self._load_handle(handle)

    def _load_handle(self, kept: KeptHandle) -> None:
        node = self.names.nodes.get(kept.node)
        is_number = 0 < kept.number < self.names.following and kept.number not in self.handles
        if node is None or not is_number or kept.flags > 1 << 31:
            raise ValueError("snapshot: a shared folder's open files cannot be so")
        named = f"the guest has {os.fsdecode(node.name)!r} of the shared folder {self.path} open"
        try:
            if kept.flags & os.O_ACCMODE:
                self._may_write()
            with self._at(node) as fd:
                opened = self._reopened(fd, kept.flags & (os.O_ACCMODE | os.O_DIRECTORY))
        except OSError as problem:
            why = "removed" if problem.errno == errno.ESTALE else problem.strerror
            raise ValueError(f"snapshot: {named}, and it cannot be opened again: {why}") from None
        self.handles[kept.number] = Handle(opened, node, kept.flags)
        node.handles.add(kept.number)


def _close(handles: dict[int, Handle], more: Sequence[int] = ()) -> None:
    for fd in (*(handle.fd for handle in handles.values()), *more):
        os.close(fd)
    handles.clear()


def _opened(path: Path) -> int:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        raise ShareError(f"share {path}: there is no such folder: make it first") from None
    except NotADirectoryError:
        raise ShareError(
            f"share {path}: a file, and a folder was expected: share the folder it is in, or "
            "use --disk for an image"
        ) from None
    except OSError as problem:
        raise ShareError(f"share {path}: {problem.strerror}") from None
    try:
        os.close(system_calls.open_within(fd, b".", os.O_RDONLY | os.O_DIRECTORY))
    except OSError as problem:
        os.close(fd)
        why = problem.strerror
        if problem.errno == errno.ENOSYS:
            why = "sharing needs openat2(2), which this computer's kernel lacks: Linux 5.6 has it"
        raise ShareError(f"share {path}: {why}") from None
    return fd
