"""Files of folders and globs: links, loops, pipes, hidden and unreadable things, and names of every kind."""

import glob
import os
import socket
import sys
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs.folders import FileList

ALL = ("**", "*")


def make(folder: Path, *names: str) -> Path:
    """Creates files whose content is their name; a name that ends with a slash is a folder, and "a -> b" is a link."""
    for name in names:
        link, _, target = name.partition(" -> ")
        path = folder / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text(name)
    return folder


def names(folder: Path, pattern: tuple[str, ...] = ALL) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in FileList(folder, pattern).files]


def skipped(listed: FileList) -> dict[str, str]:
    return {kind: str(tally) for kind, tally in listed.skipped.items()}


# -- folders ----------------------------------------------------------------------------------------------------------------


def test_all_files_below_a_folder_are_listed_in_order_except_hidden_ones_which_are_counted(tmp_path):
    make(tmp_path, "z.txt", "sub/b.txt", "sub/deep/a.txt", ".git/HEAD", ".git/objects/x", ".no", "sub/.DS_Store", "sub/empty/")
    listed = FileList(tmp_path)
    assert names(tmp_path) == ["sub/b.txt", "sub/deep/a.txt", "z.txt"]
    assert str(listed.hidden) == "3 (.git, .no, sub/.DS_Store)"
    assert [status.st_size for status in listed.files.values()] == [9, 14, 5]
    assert not listed.skipped
    assert listed.unread_folders.count == 0


def test_links_to_folders_and_files_are_followed(tmp_path):
    make(tmp_path, "disk/a.txt", "disk/sub/b.txt", "disk/.hidden", "file.txt")
    make(tmp_path, "texts/own.txt", "texts/disk -> ../disk", "texts/f.txt -> ../file.txt", "texts/again.txt -> own.txt")
    listed = FileList(tmp_path / "texts")
    assert names(tmp_path / "texts") == ["again.txt", "disk/a.txt", "disk/sub/b.txt", "f.txt", "own.txt"]
    assert str(listed.hidden) == "1 (disk/.hidden)"
    make(tmp_path, "latest -> texts")
    assert names(tmp_path / "latest") == names(tmp_path / "texts")


def test_a_folder_is_read_once_under_its_own_name(tmp_path):
    make(tmp_path, "texts/real/a.txt", "texts/real/sub/b.txt", "texts/a_link -> real", "texts/b/link -> ../real/sub")
    make(tmp_path, "disk/c.txt", "texts/l1 -> ../disk", "texts/l2 -> ../disk", "texts/b/l3 -> ../l1")
    assert names(tmp_path / "texts") == ["b/l3/c.txt", "real/a.txt", "real/sub/b.txt"]


@pytest.mark.parametrize(
    "loop", ["loop -> .", "sub/loop -> ..", "sub/loop -> ../sub", "a -> b", "one/x -> ../two", "sub/d/e -> ../../sub/d"]
)
def test_loops_end(tmp_path, loop):
    make(tmp_path / "texts", "a.txt", "sub/b.txt", "sub/d/c.txt", "b -> a", "two/y -> ../one", "one/", loop)
    expected = ["a.txt", "sub/b.txt", "sub/d/c.txt"]
    assert names(tmp_path / "texts") == expected
    assert names(tmp_path / "texts", ("**", "*.txt")) == expected
    assert FileList(tmp_path / "texts").skipped.keys() <= {"broken links"}


def test_a_link_to_a_folder_above_would_read_everything_else_and_is_counted(tmp_path):
    make(tmp_path, "secret.txt", "texts/a.txt", "texts/up -> ..", "texts/root -> /")
    listed = FileList(tmp_path / "texts")
    assert names(tmp_path / "texts") == ["a.txt"]
    assert skipped(listed) == {"links to a folder that contains the source": "2 (root, up)"}


def test_what_is_not_a_file_is_counted_and_never_opened(tmp_path):
    make(tmp_path, "a.txt", "gone -> nowhere", "self -> self", "sub/gone -> /nowhere/at/all")
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    make(tmp_path, "null -> /dev/null")
    listed = FileList(tmp_path)
    assert names(tmp_path) == ["a.txt"]
    assert skipped(listed) == {"broken links": "3 (gone, self, sub/gone)", "pipes and devices": "3 (null, pipe, socket)"}


def test_any_name_is_a_name(tmp_path):
    strange = [b"caf\xe9.txt", b"line\nend.txt", b" ", b"-rf", b"a*[b].txt", "日本".encode(), b"\xff\xfe", b"sub\xe9/a"]
    for name in strange:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name)
    assert [path.read_bytes() for path in FileList(tmp_path).files] == [os.fsencode(name) for name in names(tmp_path)]
    assert sorted(map(os.fsencode, names(tmp_path))) == sorted(strange)
    make(tmp_path, ".hid\nden")
    assert str(FileList(tmp_path).hidden) == r"1 (.hid\nden)"


@pytest.mark.parametrize("pattern", [ALL, ("*", "*.txt"), ("**", "a.txt")])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, pattern):
    """As root, everything can be read, so the operating system's refusal is imitated."""
    make(tmp_path, "a.txt", "closed/a.txt")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"^--data.source: cannot read {tmp_path}/closed: Permission denied$"):
        FileList(tmp_path, pattern)


@pytest.mark.parametrize("pattern", [ALL, ("*",), ("*", "sub", "*"), ("*", "sub", "a.txt")])
def test_a_link_or_path_through_a_closed_folder_is_an_error_and_not_missing(tmp_path, monkeypatch, pattern):
    make(tmp_path, "a.txt", "link -> closed/a.txt", "b/sub/a.txt")
    for name in ("stat", "lstat"):
        call = getattr(Path, name)

        def refuse(path, *arguments, call=call, **options):
            if path in (tmp_path / "link", tmp_path / "b" / "sub") and "_is_folder" not in sys._getframe(1).f_code.co_name:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *arguments, **options)

        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(UserError, match=rf"^--data.source: cannot read {tmp_path}/(link|b/sub): Permission denied$"):
        FileList(tmp_path, pattern)


def test_patterns_with_many_recursive_parts_take_no_longer(tmp_path):
    make(tmp_path, *(f"{a}/{b}/{c}.txt" for a in "abc" for b in "abc" for c in "abc"))
    assert names(tmp_path, ("**",) * 2000 + ("*.txt",)) == names(tmp_path)


def test_a_file_that_disappears_while_it_is_listed_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "b.txt")
    match = FileList._match

    def lose(self, folder, pattern):
        yield from match(self, folder, pattern)
        (tmp_path / "b.txt").unlink(missing_ok=True)

    monkeypatch.setattr(FileList, "_match", lose)
    with pytest.raises(UserError, match=r"cannot read \S*/b.txt: No such file or directory"):
        FileList(tmp_path)


# -- globs ------------------------------------------------------------------------------------------------------------------

PATTERNS = [
    *(
        "*",
        "*.txt",
        "?.txt",
        "[ab].txt",
        "[!a].txt",
        "**",
        "**/*",
        "**/*.txt",
        "*/*",
        "*/*.txt",
        "*/**/*.txt",
        "s*/**",
        "s*/?.txt",
    ),
    *(
        "sub/*",
        "sub/a.txt",
        "sub/../*.txt",
        "none/*",
        "sub/none*",
        "**/sub/**",
        "**/deep/*",
        "**/**/*.txt",
        ".h*",
        ".hidden/*",
        "*.TXT",
    ),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_matches_what_python_matches(tmp_path, pattern):
    make(tmp_path, "a.txt", "b.txt", "c.md", "sub/a.txt", "sub/x/d.txt", "sub/deep/e.txt", "other/sub/f", ".h", ".hidden/a.txt")
    make(tmp_path, "sub/.h.txt", "link.txt -> a.txt")
    found = glob.glob(pattern, root_dir=tmp_path, recursive=True)
    assert sorted(names(tmp_path, Path(pattern).parts)) == sorted({name for name in found if (tmp_path / name).is_file()})


def test_folders_that_a_glob_matches_and_hidden_files_are_counted(tmp_path):
    make(tmp_path, "a.txt", "sub/b.txt", "sub2/c.txt", "empty/", ".hidden", ".git/x.txt")
    assert str(FileList(tmp_path, ("*",)).unread_folders) == "2 (sub, sub2)"
    assert str(FileList(tmp_path, ("*",)).hidden) == "2 (.git, .hidden)"
    assert str(FileList(tmp_path, ("*.txt",)).hidden) == "0 ()"
    assert FileList(tmp_path, ("**", "*.txt")).unread_folders.count == 0
    assert str(FileList(tmp_path, ("**", "*.txt")).hidden) == "1 (.git)"


# -- folders inside ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("**/*", [".", "sub", "sub/new/run", "new", ".runs/x", "link/new"], ["..", "../other", "../texts2"]),
        ("**/*.txt", [".", "sub/new", "new"], ["../other"]),
        ("*.txt", ["."], ["sub", "runs/mine", "../other", "new"]),
        ("*", ["."], ["sub", "runs/mine"]),
        ("*/*.txt", ["sub", "runs", "new"], ["runs/mine", "sub/deep"]),
        ("sub/**", ["sub", "sub/new/run"], [".", "runs"]),
        ("a.txt", [], [".", "runs", "a.txt.d"]),
        ("s*/new/*", ["sub/new", "s2/new"], ["sub/newer", "sub/new/run", "new"]),
    ],
)
def test_a_folder_whose_files_would_be_listed_is_recognized(tmp_path, pattern, inside, outside):
    make(tmp_path / "texts", "a.txt", "sub/b.txt", "link -> ../elsewhere")
    make(tmp_path, "elsewhere/c.txt", "way -> texts")
    listed = FileList(tmp_path / "texts", Path(pattern).parts)
    for name in inside:
        assert listed.reaches(tmp_path / "texts" / name), name
        assert listed.reaches(tmp_path / "way" / name), name
    for name in outside:
        assert not listed.reaches(tmp_path / "texts" / name), name
    assert listed.reaches(tmp_path / "elsewhere" / "run") == pattern.startswith("**")


def test_relative_and_linked_spellings_of_a_folder_inside_are_recognized(tmp_path, monkeypatch):
    make(tmp_path, "texts/a.txt", "way -> texts")
    monkeypatch.chdir(tmp_path)
    for root in (Path("texts"), Path("way"), tmp_path / "texts", Path("texts/../way")):
        for run in (Path("texts/run"), Path("way/run"), Path("./texts/../texts/run"), tmp_path / "way" / "run"):
            assert FileList(root).reaches(run)
        assert not FileList(root).reaches(Path("run"))
    make(tmp_path, "texts/loop -> loop")
    assert FileList(Path("texts")).reaches(Path("texts/loop/run"))
