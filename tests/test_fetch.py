"""Finding the published files, downloading them from a server on this machine, and proving what they are."""

import gzip
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convlens.data import builtin
from convlens.data.builtin import IdxSource, locate, read_cifar10_archive
from convlens.data.download import find_file, find_or_download, read_verified, search_path, unpack_members
from convlens.data.formats import CIFAR_RECORD
from convlens.data.loading import load_dataset
from convlens.errors import ConvlensError
from convlens.system.files import cache_dir

quick = settings(max_examples=50, deadline=None, database=None, derandomize=True)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def idx(*shape: int, step: int = 1, top: int = 256) -> bytes:
    """An IDX file of counting bytes."""
    size = 1
    for n in shape:
        size *= n
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(i * step % top for i in range(size))


NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FILES = dict(zip(NAMES, (idx(6, 28, 28), idx(6, top=3), idx(4, 28, 28, step=3), idx(4, top=3)), strict=True))
CONTENT = FILES[NAMES[0]]
FOLDERS = ("mnist", "mnist/raw", "MNIST/raw")
SOURCE = IdxSource(FOLDERS, (), *(sha256(content) for content in FILES.values()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache; the working folder and the search path are empty."""
    path, here = tmp_path / "the-cache", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("CONVLENS_CACHE", str(path))
    monkeypatch.delenv("CONVLENS_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return path


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def everything_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@dataclass
class Site:
    """A web server on this machine: what it serves, and what was asked of it."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # path -> content
    cut: set[str] = field(default_factory=set)  # paths whose connection breaks half way
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            if self.path not in state.files:
                self.send_error(404)
                return
            content = state.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path in state.cut else content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


# where things are looked for


def test_the_search_path(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = [Path("data"), cache, Path("/usr/share/datasets")]
    assert search_path() == rest
    monkeypatch.setenv("CONVLENS_DATA", "/one")
    assert search_path() == [Path("/one"), *rest]
    monkeypatch.setenv("CONVLENS_DATA", f"/one{os.pathsep}{os.pathsep}/two")
    assert search_path() == [Path("/one"), Path("/two"), *rest]


def test_the_cache_is_the_users_unless_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("CONVLENS_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("/users/cache") / name)
    assert cache_dir() == Path("/users/cache/convlens")


def test_the_first_place_of_the_search_path_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setenv("CONVLENS_DATA", f"{one}{os.pathsep}{two}")
    places = [one / "mnist/f", two / "MNIST/raw/f.gz", Path("data/mnist/f"), cache / "mnist/f.gz"]
    for place in places:
        put(place, b"x")
    for place in places:
        assert find_file("f", FOLDERS) == place
        place.unlink()
    assert find_file("f", FOLDERS) is None


def test_in_one_place_plain_comes_before_gz_and_folders_in_order(cache: Path) -> None:
    data = Path("data")
    places = [data / f"{folder}/f{end}" for folder in FOLDERS for end in ("", ".gz")]
    for place in places:
        put(place, b"x")
    for place in places:
        assert find_file("f", FOLDERS) == place
        place.unlink()


def test_a_folder_of_that_name_is_no_file(cache: Path) -> None:
    Path("data/mnist/f").mkdir(parents=True)
    assert find_file("f", FOLDERS) is None


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_every_layout_loads(folder: str, end: str, cache: Path) -> None:
    for name, content in FILES.items():
        put(Path("data") / folder / f"{name}{end}", gzip.compress(content) if end else content)
    train, test = SOURCE.load("train"), SOURCE.load("test")
    assert train.images.shape == (6, 1, 28, 28)
    assert test.images.shape == (4, 1, 28, 28)
    assert train.images.numpy().tobytes() == FILES[NAMES[0]][16:]
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert list(test.ids) == ["0", "1", "2", "3"]
    assert not cache.exists()


def test_mnist_by_name_takes_the_files_that_are_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MNIST", SOURCE)
    for name, content in FILES.items():
        put(Path("data/MNIST/raw") / name, content)
    dataset = load_dataset("mnist")
    assert (dataset.name, dataset.source, dataset.validation) == ("mnist", "mnist", None)
    assert dataset.classes == tuple("0123456789")
    assert (len(dataset.train), len(dataset.test), dataset.shape) == (6, 4, (1, 28, 28))
    assert (dataset.style.content_size, dataset.style.center_of_mass) == (20, True)
    assert dataset.note == "the published train and test splits"
    assert locate("mnist") == "data/MNIST/raw"


def test_whereabouts_of_what_is_not_here(cache: Path) -> None:
    assert locate("digits") == "embedded"
    assert locate("mnist") == locate("fashion-mnist") == locate("cifar10") == "to be downloaded"
    put(Path("data/cifar10/cifar-10-binary.tar.gz"), b"x")
    assert locate("cifar10") == "data/cifar10"


# what was found is proven


def test_the_hash_is_of_the_uncompressed_content(tmp_path: Path) -> None:
    for content in (CONTENT, gzip.compress(CONTENT, 1), gzip.compress(CONTENT, 9)):
        assert read_verified(put(tmp_path / "f.gz", content), sha256(CONTENT)) == CONTENT


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_with_the_wrong_content_is_named(packed: bool, tmp_path: Path) -> None:
    wrong = b"not the published file"
    path = put(tmp_path / "f", gzip.compress(wrong) if packed else wrong)
    with pytest.raises(ConvlensError) as caught:
        read_verified(path, sha256(CONTENT))
    assert str(caught.value) == (
        f"{path} is not the published file (22 bytes, SHA-256 {sha256(wrong)[:12]}..., expected "
        f"{sha256(CONTENT)[:12]}...); delete or replace it"
    )


def test_a_wrong_file_that_was_found_is_an_error_and_nothing_is_downloaded(cache: Path, site: Site) -> None:
    put(Path("data/mnist/f"), b"wrong")
    site.files["/f.gz"] = gzip.compress(CONTENT)
    with pytest.raises(ConvlensError, match="^data/mnist/f is not the published file"):
        find_or_download("f", sha256(CONTENT), FOLDERS, [f"{site.address}/"])
    assert site.asked == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:2],
        lambda packed: packed[:9],
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-1],
        lambda packed: packed[:40] + bytes([packed[40] ^ 255]) + packed[41:],
        lambda packed: packed[:-5] + b"\0" + packed[-4:],
        lambda packed: packed[:2] + b"\x07" + packed[3:],
        lambda packed: packed + b"more",
    ],
    ids=["magic-only", "header", "half", "last-byte", "flipped", "crc", "method", "trailing"],
)
def test_a_corrupt_gzip_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = put(tmp_path / "f.gz", damage(gzip.compress(CONTENT)))
    with pytest.raises(ConvlensError) as caught:
        read_verified(path, sha256(CONTENT))
    assert str(caught.value).startswith(f"{path} cannot be read: ")
    assert str(caught.value).endswith("; delete it, and it is downloaded again")


@quick
@given(st.binary(max_size=60), st.booleans())
def test_arbitrary_content_is_refused_for_people(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, gzipped: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary"
    path.write_bytes(b"\x1f\x8b\x08" * gzipped + content)
    with pytest.raises(ConvlensError, match=r"arbitrary (is not the published file|cannot be read)"):
        read_verified(path, sha256(CONTENT))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConvlensError, match="cannot be read: .*Is a directory"):
        read_verified(tmp_path, sha256(CONTENT))


# downloads


def test_mirrors_are_asked_in_turn_until_one_has_it(cache: Path, site: Site) -> None:
    site.files["/second/f.gz"] = gzip.compress(CONTENT)
    mirrors = [f"{site.address}/{name}/" for name in ("first", "second", "third")]
    assert find_or_download("f", sha256(CONTENT), FOLDERS, mirrors) == CONTENT
    assert site.asked == ["/first/f.gz", "/second/f.gz"]
    assert everything_below(cache) == ["mnist/f.gz"]
    assert (cache / "mnist/f.gz").read_bytes() == site.files["/second/f.gz"]


def test_what_was_downloaded_is_not_asked_for_again(cache: Path, site: Site) -> None:
    site.files["/f.gz"] = gzip.compress(CONTENT)
    for _ in range(2):
        assert find_or_download("f", sha256(CONTENT), FOLDERS, [f"{site.address}/"]) == CONTENT
    assert site.asked == ["/f.gz"]


def test_a_whole_data_set_is_downloaded(cache: Path, site: Site) -> None:
    for name, content in FILES.items():
        site.files[f"/m/{name}.gz"] = gzip.compress(content)
    source = replace(SOURCE, mirrors=(f"{site.address}/gone/", f"{site.address}/m/"))
    assert (len(source.load("train")), len(source.load("test"))) == (6, 4)
    assert everything_below(cache) == sorted(f"mnist/{name}.gz" for name in NAMES)


@pytest.mark.parametrize("bad", ["half", "wrong", "half-gzip", "page"])
def test_a_bad_download_is_never_left_in_the_cache(bad: str, cache: Path, site: Site) -> None:
    packed = gzip.compress(CONTENT)
    site.files["/bad/f.gz"] = {
        "half": packed,
        "wrong": gzip.compress(b"something else"),
        "half-gzip": packed[: len(packed) // 2],
        "page": b"<html>Please log in</html>",
    }[bad]
    if bad == "half":
        site.cut.add("/bad/f.gz")
    mirror = f"{site.address}/bad/"
    with pytest.raises(ConvlensError) as caught:
        find_or_download("f", sha256(CONTENT), FOLDERS, [mirror])
    message = str(caught.value)
    assert message.startswith(f"f is not on this machine and could not be downloaded ({mirror}: ")
    assert message.endswith("; put it into data/mnist/, or point CONVLENS_DATA at the folder that holds it")
    assert everything_below(cache) == []
    site.files["/good/f.gz"] = packed  # and the next mirror helps
    assert find_or_download("f", sha256(CONTENT), FOLDERS, [mirror, f"{site.address}/good/"]) == CONTENT
    assert everything_below(cache) == ["mnist/f.gz"]


def test_every_mirror_that_failed_is_named(cache: Path, site: Site) -> None:
    mirrors = [f"{site.address}/a/", f"{site.address}/b/", "http://127.0.0.1:1/"]
    with pytest.raises(ConvlensError) as caught:
        find_or_download("f", sha256(CONTENT), FOLDERS, mirrors)
    tried = f"{mirrors[0]}: HTTP 404; {mirrors[1]}: HTTP 404; {mirrors[2]}: ConnectionError"
    assert f"could not be downloaded ({tried});" in str(caught.value)


def test_a_mirror_that_sends_the_gz_as_an_encoding_is_understood(cache: Path, site: Site) -> None:
    site.files["/f.gz"] = CONTENT  # what arrives when a server unpacks on the way
    assert find_or_download("f", sha256(CONTENT), FOLDERS, [f"{site.address}/"]) == CONTENT
    assert find_or_download("f", sha256(CONTENT), FOLDERS, []) == CONTENT


def test_a_cache_that_cannot_be_written_is_said(cache: Path, site: Site) -> None:
    put(cache, b"a file where the cache should be")
    site.files["/f.gz"] = gzip.compress(CONTENT)
    with pytest.raises(ConvlensError, match=r"could not be downloaded \(.*cannot write .*f\.gz: "):
        find_or_download("f", sha256(CONTENT), FOLDERS, [f"{site.address}/"])


# archives


def archive(members: dict[str, bytes | tarfile.TarInfo], kind: str = "w:gz") -> bytes:
    """A .tar.gz of files (content) and of other things (TarInfo)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=kind) as tar:
        for name, what in members.items():
            if isinstance(what, bytes):
                entry = tarfile.TarInfo(name)
                entry.size = len(what)
                tar.addfile(entry, io.BytesIO(what))
            else:
                tar.addfile(what)
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def test_members_are_read_by_base_name_and_only_they(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tar.gz", archive({"d/a.bin": b"A", "b.bin": b"", "d/readme": b"no", "d/c.bin": b"C"}))
    assert unpack_members(path, ["a.bin", "b.bin"], 10) == {"a.bin": b"A", "b.bin": b""}


def test_missing_members_are_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tar.gz", archive({"d/a.bin": b"A"}))
    with pytest.raises(ConvlensError) as caught:
        unpack_members(path, ["c.bin", "a.bin", "b.bin"], 10)
    assert str(caught.value) == f"{path} does not hold b.bin, c.bin"


def test_hostile_paths_are_only_names_and_nothing_lands_on_disk(cache: Path) -> None:
    hostile = {"../../evil/a.bin": b"A", "/etc/b.bin": b"B", "d/../../c.bin": b"C"}
    path = put(Path("a.tar.gz"), archive(hostile))
    before = everything_below(Path("..")), everything_below(Path("."))
    assert unpack_members(path, ["a.bin", "b.bin", "c.bin"], 10) == {"a.bin": b"A", "b.bin": b"B", "c.bin": b"C"}
    assert (everything_below(Path("..")), everything_below(Path("."))) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_read(kind: bytes, tmp_path: Path) -> None:
    secret = put(tmp_path / "secret", b"mine")
    path = put(tmp_path / "a.tar.gz", archive({"a.bin": link("a.bin", str(secret), kind)}))
    with pytest.raises(ConvlensError, match=r"does not hold a\.bin$"):
        unpack_members(path, ["a.bin"], 10)


def test_a_member_over_the_size_is_not_read(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tar.gz", archive({"a.bin": bytes(11), "b.bin": bytes(10)}))
    with pytest.raises(ConvlensError, match=r"does not hold a\.bin$"):
        unpack_members(path, ["a.bin", "b.bin"], 10)


def bad_sparse_map() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a.bin")
        entry.pax_headers = {"GNU.sparse.map": "zero,one"}
        tar.addfile(entry)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        gzip.compress(b""),
        gzip.compress(b"not a tar" * 100),
        archive({"a.bin": b"A" * 5000})[:60],
        gzip.compress(archive({"a.bin": b"A" * 5000}, "w")[:3000]),
        bad_sparse_map(),
    ],
    ids=["empty", "text", "empty-gzip", "no-tar", "cut", "cut-inside", "sparse-map"],
)
def test_a_bad_archive_is_named(content: bytes, tmp_path: Path) -> None:
    path = put(tmp_path / "a.tar.gz", content)
    with pytest.raises(ConvlensError) as caught:
        unpack_members(path, ["a.bin"], 10_000)
    assert str(caught.value).startswith((f"{path} cannot be unpacked: ", f"{path} does not hold a.bin"))


TAR = archive({"d/a.bin": b"A" * 600, "d/b.bin": b"B" * 10}, "w")


@quick
@given(st.integers(0, 1600), st.binary(min_size=1, max_size=12))
def test_a_damaged_archive_is_read_or_refused_for_people(
    tmp_path_factory: pytest.TempPathFactory, where: int, damage: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar.gz"
    path.write_bytes(gzip.compress(TAR[:where] + damage + TAR[where + len(damage) :], 1))
    try:
        contents = unpack_members(path, ["a.bin"], 1000)
    except ConvlensError as error:
        assert str(error).startswith(f"{path} ")
    else:
        assert set(contents) == {"a.bin"}
        assert len(contents["a.bin"]) <= 1000


# CIFAR-10

BATCHES = {
    name: bytes([i]) + bytes([i * 10]) * (CIFAR_RECORD - 1) + bytes([9]) + bytes([i]) * (CIFAR_RECORD - 1)
    for i, name in enumerate(builtin.CIFAR10_FILES)
}
ARCHIVE = archive({f"cifar-10-batches-bin/{name}": content for name, content in BATCHES.items()})


@pytest.fixture
def small_cifar(cache: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Six files of two images each stand for the published ones, the server for their mirror."""
    monkeypatch.setattr(builtin, "CIFAR10_FILES", {name: sha256(content) for name, content in BATCHES.items()})
    monkeypatch.setattr(builtin, "CIFAR10_MIRRORS", (f"{site.address}/first/", f"{site.address}/"))
    return site


def check_cifar() -> None:
    dataset = load_dataset("cifar10")
    assert (len(dataset.train), len(dataset.test), dataset.shape) == (10, 2, (3, 32, 32))
    assert dataset.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert dataset.test.labels.tolist() == [5, 9]
    assert dataset.train.images[2].unique().tolist() == [10]
    assert dataset.classes[:2] == ("airplane", "automobile")
    assert list(dataset.train.ids) == [str(i) for i in range(10)]


@pytest.mark.parametrize("folder", ["cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
def test_cifar_from_files(folder: str, small_cifar: Site) -> None:
    for name, content in BATCHES.items():
        put(Path("data") / folder / name, content)
    check_cifar()
    assert small_cifar.asked == []


@pytest.mark.parametrize("place", ["data/cifar10", "data"])
def test_cifar_from_an_archive_that_is_here(place: str, small_cifar: Site) -> None:
    put(Path(place) / "cifar-10-binary.tar.gz", ARCHIVE)
    put(Path("data/cifar10/test_batch.bin"), BATCHES["test_batch.bin"])  # one file of six is not enough
    check_cifar()
    assert small_cifar.asked == []


def test_cifar_is_downloaded_once_and_kept_as_the_archive(cache: Path, small_cifar: Site) -> None:
    small_cifar.files["/cifar-10-binary.tar.gz"] = ARCHIVE
    check_cifar()
    check_cifar()
    assert small_cifar.asked == ["/first/cifar-10-binary.tar.gz", "/cifar-10-binary.tar.gz"]
    assert everything_below(cache) == ["cifar10/cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("bad", ["cut", "member", "content", "page"])
def test_a_bad_cifar_download_is_never_left_in_the_cache(bad: str, cache: Path, small_cifar: Site) -> None:
    some = dict(list(BATCHES.items())[:5])
    small_cifar.files["/cifar-10-binary.tar.gz"] = {
        "cut": ARCHIVE,
        "member": archive(some),
        "content": archive({**some, "test_batch.bin": bytes(2 * CIFAR_RECORD)}),
        "page": b"<html>",
    }[bad]
    if bad == "cut":
        small_cifar.cut.add("/cifar-10-binary.tar.gz")
    with pytest.raises(ConvlensError) as caught:
        load_dataset("cifar10")
    message = str(caught.value)
    assert message.startswith("cifar-10-binary.tar.gz is not on this machine and could not be downloaded (")
    assert "put it into data/cifar10/, or point CONVLENS_DATA at the folder that holds it" in message
    assert everything_below(cache) == []
    part = {"member": "does not hold test_batch.bin", "content": "test_batch.bin in "}.get(bad, "")
    assert part in message


def test_a_wrong_cifar_archive_that_was_found_is_an_error(small_cifar: Site) -> None:
    path = put(Path("data/cifar10/cifar-10-binary.tar.gz"), archive(dict(list(BATCHES.items())[1:])))
    with pytest.raises(ConvlensError, match=f"^{path} does not hold data_batch_1.bin$"):
        read_cifar10_archive()
    assert small_cifar.asked == []


def test_a_wrong_cifar_file_is_named(small_cifar: Site) -> None:
    put(Path("data/cifar10/data_batch_3.bin"), b"x")
    with pytest.raises(ConvlensError, match=r"^data/cifar10/data_batch_3\.bin is not the published file \(1 bytes"):
        load_dataset("cifar10")
