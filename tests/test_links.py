"""Links to source images: what is there afterwards, and what happens where links cannot be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spctrl.export.links import Linker, UnreadableLinkError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "raw/1.jpg"
    path.parent.mkdir()
    path.write_bytes(b"image")
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "export/1.jpg"
    path.parent.mkdir()
    return path


def put(source: Path, target: Path, way: str) -> None:
    Linker(way, pytest.fail).link(source, target, temporary=target.with_name("temporary"))


def kind_of(source: Path, target: Path) -> str:
    if target.is_symlink():
        return "symbolic"
    return "hard" if target.samefile(source) else "copy"


LINK_WAYS = ("auto", "hard", "symbolic", "copy")


@pytest.mark.parametrize("way", LINK_WAYS)
def test_an_image_gets_there_each_way(source: Path, target: Path, way: str) -> None:
    put(source, target, way)
    assert target.read_bytes() == b"image"
    assert kind_of(source, target) == ("hard" if way == "auto" else way)
    assert sorted(path.name for path in target.parent.iterdir()) == ["1.jpg"]


@pytest.mark.parametrize("way", LINK_WAYS)
@pytest.mark.parametrize("before", LINK_WAYS)
def test_what_is_there_is_replaced_without_touching_the_source(
    source: Path, target: Path, before: str, way: str
) -> None:
    put(source, target, before)
    other = source.with_name("2.jpg")
    other.write_bytes(b"another image")
    for wanted in (other, source, source):
        put(wanted, target, way)
        assert target.read_bytes() == wanted.read_bytes()
    assert kind_of(source, target) == ("hard" if way == "auto" else way)
    assert (source.read_bytes(), other.read_bytes()) == (b"image", b"another image")
    assert sorted(path.name for path in target.parent.iterdir()) == ["1.jpg"]


def test_a_dangling_link_is_replaced(source: Path, target: Path) -> None:
    target.symlink_to(target.with_name("nowhere"))
    put(source, target, "copy")
    assert target.read_bytes() == b"image"
    assert not target.with_name("nowhere").exists()


@pytest.mark.parametrize("way", ["hard", "symbolic"])
def test_a_link_leads_to_the_file_itself_and_not_to_a_link(source: Path, target: Path, way: str) -> None:
    alias = source.with_name("alias.jpg")
    alias.symlink_to("1.jpg")
    put(alias, target, way)
    alias.unlink()
    assert target.read_bytes() == b"image"
    assert kind_of(source, target) == way


def test_a_relative_source_works(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    for way in LINK_WAYS:
        put(Path("1.jpg"), target, way)
        assert target.read_bytes() == b"image"


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_auto_takes_the_first_way_that_works(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    put(source, target, "auto")
    assert kind_of(source, target) == "symbolic"
    monkeypatch.setattr(Path, "symlink_to", refuse)
    put(source, target, "auto")
    assert kind_of(source, target) == "copy"


def test_a_way_that_does_not_work_is_an_error_and_keeps_what_is_there(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="cross-device"):
        put(source, target, "hard")
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in target.parent.iterdir()) == ["1.jpg"]


@pytest.mark.parametrize("way", ["hard", "copy"])
def test_a_missing_source_is_an_error(source: Path, target: Path, way: str) -> None:
    with pytest.raises(FileNotFoundError):
        put(source.with_name("gone.jpg"), target, way)
    assert list(target.parent.iterdir()) == []


# Links that cannot be read, as on sshfs


make_symlink = Path.symlink_to


def link_to_nowhere(target: Path, source: Path) -> None:
    make_symlink(target, Path(f"/no/such/mount{source}"))


def link_to_another(target: Path, source: Path) -> None:
    other = source.with_name("other.jpg")
    other.write_bytes(b"other")
    make_symlink(target, other)


def link_to_itself(target: Path, source: Path) -> None:
    make_symlink(target, target)


def empty_file(source: Path, target: Path) -> None:
    target.touch()


def longer_file(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes() + b"\0")


def put_all(linker: Linker, sources: list[Path], folder: Path) -> list[Path]:
    targets = [folder / source.name for source in sources]
    for source, target in zip(sources, targets, strict=True):
        linker.link(source, target, temporary=folder / "temporary")
        assert target.read_bytes() == source.read_bytes()
    assert sorted(folder.iterdir()) == sorted(targets)
    return targets


@pytest.fixture
def sources(source: Path) -> list[Path]:
    others = [source.with_name(f"{i}.jpg") for i in (2, 3)]
    for path in others:
        path.write_bytes(path.name.encode())
    return [source, *others]


@pytest.mark.parametrize("hard", [empty_file, longer_file])
@pytest.mark.parametrize(
    ("symbolic", "kind"),
    [(None, "symbolic"), (link_to_nowhere, "copy"), (link_to_another, "copy"), (link_to_itself, "copy")],
)
def test_auto_gives_up_links_that_cannot_be_read_and_says_so_once(
    sources: list[Path],
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    hard: object,
    symbolic: object,
    kind: str,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(os, "link", hard)
    if symbolic is not None:
        monkeypatch.setattr(Path, "symlink_to", symbolic)
    for made in put_all(Linker("auto", said.append), sources, target.parent):
        assert kind_of(sources[0].with_name(made.name), made) == kind
    assert [line.split(" link in ")[0] for line in said] == [
        f"[export] link = auto: expected a {way}"
        for way in (["hard"] if symbolic is None else ["hard", "symbolic"])
    ]
    assert all(f" in {target.parent} that reads as {sources[0]}, found one that " in line for line in said)


@pytest.mark.parametrize(
    ("way", "broken", "found"),
    [
        ("hard", empty_file, "reads as something else"),
        ("symbolic", link_to_another, "reads as something else"),
        ("symbolic", link_to_nowhere, "cannot be read (No such file or directory)"),
        ("symbolic", link_to_itself, "cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_a_kind_of_link_that_was_asked_for_and_cannot_be_read_is_an_error(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, way: str, broken: object, found: str
) -> None:
    target.write_bytes(b"old")
    monkeypatch.setattr(*((os, "link") if way == "hard" else (Path, "symlink_to")), broken)
    with pytest.raises(UnreadableLinkError) as error:
        put(source, target, way)
    assert str(error.value) == (
        f"expected a {way} link in {target.parent} that reads as {source}, found one that {found}; "
        "set [export] link = copy"
    )
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in target.parent.iterdir()) == ["1.jpg"]


@pytest.mark.parametrize("way", ["auto", "hard", "symbolic"])
def test_one_link_is_read_for_all_from_the_same_file_system(
    sources: list[Path], target: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    linker, read = Linker(way, pytest.fail), []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    for source in sources:
        linker.link(source, target.with_name(source.name), temporary=target.with_name("temporary"))
    assert read == [sources[0]]


def test_each_file_system_is_looked_at_on_its_own(
    sources: list[Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard, said, stat = os.link, [], Path.stat
    first, second, third = sources
    # The second image is on another file system, whose hard links are empty.
    monkeypatch.setattr(os, "link", lambda *paths: (empty_file if paths[0] == second else hard)(*paths))

    def other_device(path: Path, **options: bool) -> os.stat_result:
        found = stat(path, **options)
        return os.stat_result((*found[:2], -1, *found[3:10])) if path == second else found

    monkeypatch.setattr(Path, "stat", other_device)
    made = put_all(Linker("auto", said.append), [first, second, third], target.parent)
    assert [each.is_symlink() for each in made] == [False, True, False]
    assert len(said) == 1


def test_an_empty_image_is_no_proof_of_a_kind_of_link(
    sources: list[Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources[0].write_bytes(b"")
    monkeypatch.setattr(os, "link", empty_file)
    made = put_all(Linker("auto", lambda line: None), sources, target.parent)
    assert [each.is_symlink() for each in made] == [False, True, True]


@pytest.mark.parametrize(
    "error", [errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.ENOSYS]
)
def test_a_link_that_is_refused_is_tried_for_the_next_image(
    sources: list[Path], target: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    hard = os.link

    def refuse_the_second(source: Path, target: Path) -> None:
        if source == sources[1]:
            raise OSError(error, os.strerror(error))
        hard(source, target)

    monkeypatch.setattr(os, "link", refuse_the_second)
    made = put_all(Linker("auto", pytest.fail), sources, target.parent)
    assert [each.is_symlink() for each in made] == [False, True, False]


@pytest.mark.parametrize("way", ["auto", "copy"])
def test_a_copy_is_never_written_through_a_link_to_the_source(
    sources: list[Path], target: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def made_all_the_same(target: Path, source: Path) -> None:
        make_symlink(target, source)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = [path.read_bytes() for path in sources]
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "symlink_to", made_all_the_same)
    for made in put_all(Linker(way, pytest.fail), sources, target.parent):
        assert not made.is_symlink()
    assert [path.read_bytes() for path in sources] == before


def test_a_link_that_somebody_else_leaves_is_not_written_through(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = target.with_name("temporary")
    temporary.symlink_to(source)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    with pytest.raises(FileExistsError):
        Linker("copy", pytest.fail).link(source, target, temporary=temporary)
    assert source.read_bytes() == b"image"
