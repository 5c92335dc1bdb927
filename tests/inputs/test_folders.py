"""Files of folders and globs: links, loops, pipes, hidden and unreadable things, and names of every kind."""

import glob
import os
import socket
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs.folders import FileList
from gpt_jax.inputs.tally import Tally

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


def shown(tallies: dict[str, Tally]) -> dict[str, str]:
    return {kind: str(tally) for kind, tally in tallies.items()}


HIDDEN = "hidden files and folders"
FOLDERS = "folders that match the glob"
BROKEN = "links that cannot be followed"


# -- folders ----------------------------------------------------------------------------------------------------------------


def test_all_files_below_a_folder_are_listed_in_order_except_hidden_ones_which_are_counted(tmp_path):
    make(tmp_path, "z.txt", "sub/b.txt", "sub/deep/a.txt", ".git/HEAD", ".git/objects/x", ".no", "sub/.DS_Store", "sub/empty/")
    listed = FileList(tmp_path)
    assert names(tmp_path) == ["sub/b.txt", "sub/deep/a.txt", "z.txt"]
    assert shown(listed.left_out) == {HIDDEN: "3 (.git, .no, sub/.DS_Store)"}
    assert [status.st_size for status in listed.files.values()] == [9, 14, 5]
    assert not listed.unreadable


def test_links_to_folders_and_files_are_followed(tmp_path):
    make(tmp_path, "disk/a.txt", "disk/sub/b.txt", "disk/.hidden", "file.txt")
    make(tmp_path, "texts/own.txt", "texts/disk -> ../disk", "texts/f.txt -> ../file.txt", "texts/again.txt -> own.txt")
    listed = FileList(tmp_path / "texts")
    assert names(tmp_path / "texts") == ["again.txt", "disk/a.txt", "disk/sub/b.txt", "f.txt", "own.txt"]
    assert shown(listed.left_out) == {HIDDEN: "1 (disk/.hidden)"}
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
    assert FileList(tmp_path / "texts").unreadable.keys() <= {BROKEN}


def test_a_link_to_a_folder_above_would_read_everything_else_and_is_counted(tmp_path):
    make(tmp_path, "secret.txt", "texts/a.txt", "texts/up -> ..", "texts/root -> /")
    listed = FileList(tmp_path / "texts")
    assert names(tmp_path / "texts") == ["a.txt"]
    assert shown(listed.unreadable) == {"links to a folder that contains the source": "2 (root, up)"}


def test_what_is_not_a_file_is_counted_and_never_opened(tmp_path):
    make(tmp_path, "a.txt", "gone -> nowhere", "self -> self", "sub/gone -> /nowhere/at/all")
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    make(tmp_path, "null -> /dev/null")
    listed = FileList(tmp_path)
    assert names(tmp_path) == ["a.txt"]
    assert shown(listed.unreadable) == {BROKEN: "3 (gone, self, sub/gone)", "pipes and devices": "3 (null, pipe, socket)"}


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
    assert shown(FileList(tmp_path).left_out) == {HIDDEN: r"1 (.hid\nden)"}


@pytest.mark.parametrize("pattern", [ALL, ("*", "*.txt"), ("**", "a.txt")])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, pattern):
    """As root, everything can be read, so the operating system's refusal is imitated."""
    make(tmp_path, "a.txt", "closed/a.txt")
    listdir = os.listdir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=rf"^--data.source: cannot read {tmp_path}/closed: Permission denied$"):
        FileList(tmp_path, pattern)


@pytest.mark.parametrize(("pattern", "error"), [(ALL, True), (("*",), True), (("*", "sub", "*"), True), (("*.md",), False)])
def test_what_cannot_be_looked_at_is_an_error_or_counted_and_not_missing(tmp_path, monkeypatch, pattern, error):
    make(tmp_path, "a.txt", "link -> closed/a.txt", "b/sub/a.txt")
    stat = Path.stat
    closed = [tmp_path / "link"]

    def refuse(path, *, follow_symlinks=True):
        if path in closed and follow_symlinks:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", refuse)
    assert shown(FileList(tmp_path, pattern).unreadable) == ({BROKEN: "1 (link)"} if error else {})
    closed += [tmp_path / "a.txt", tmp_path / "b" / "sub"]
    if error:
        with pytest.raises(UserError, match=rf"^--data.source: cannot read {tmp_path}/(a.txt|b/sub): Permission denied$"):
            FileList(tmp_path, pattern)


def test_a_file_that_disappears_while_it_is_listed_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "b.txt")
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*listdir(path), "c.txt"])
    with pytest.raises(UserError, match=r"cannot read \S*/c.txt: No such file or directory"):
        FileList(tmp_path)


def test_a_broken_link_that_could_lead_to_a_folder_is_counted(tmp_path):
    make(tmp_path, "a.txt", "part2 -> /mnt/disk/not_mounted", "sub/b.txt")
    for pattern in (("**", "*.txt"), ("*", "*.txt")):
        assert shown(FileList(tmp_path, pattern).unreadable) == {BROKEN: "1 (part2)"}
    assert not FileList(tmp_path, ("*.txt",)).unreadable


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
        "none/*",
        "sub/none*",
        "**/sub/**",
        "**/deep/*",
        "**/**/*.txt",
        ".h*",
        ".hidden/*",
        "*.TXT",
        "**/.h*",
        "**/.hidden/*.txt",
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
    assert shown(FileList(tmp_path, ("*",)).left_out) == {HIDDEN: "2 (.git, .hidden)", FOLDERS: "3 (empty, sub, sub2)"}
    assert not FileList(tmp_path, ("*.txt",)).left_out
    assert shown(FileList(tmp_path, ("**", "*.txt")).left_out) == {HIDDEN: "1 (.git)"}


def test_a_folder_that_a_glob_reaches_in_several_ways_is_searched_in_each(tmp_path):
    make(tmp_path, "a/b/1.txt", "a/b/d/2.txt", "c -> a/b", "sub/loop -> ..", "0.txt")
    assert names(tmp_path, ("*", "*", "*.txt")) == ["a/b/1.txt", "c/d/2.txt", "sub/loop/0.txt"]
    assert names(tmp_path, ("*", "**", "*.txt")) == ["a/b/1.txt", "a/b/d/2.txt", "sub/loop/0.txt"]


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
        ("*/data.txt", ["."], ["runs", "sub"]),
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
