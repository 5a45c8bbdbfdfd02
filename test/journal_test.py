"""The journal: what a crash leaves, and what the next start reads."""

import contextlib
import os
import resource
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import websockets
from programs import leave_out
from service import AS_NOBODY, RecordingBackend, Service, ended, eventually, refusal

from backends import Unavailable
from backends.journal import StateDirectory

ONE, TWO = "1" * 32, "2" * 32
HTTP = ("--backend=http", "--messageuri=http://127.0.0.1:9/",
        "--disconnecturi=http://127.0.0.1:9/")


@contextlib.contextmanager
def crashed(path: Path):
    """A run that adds to its journal, and ends like a crash."""
    state = StateDirectory(path, "host/aaaa")
    yield state.journal
    journal = next(path.glob("*.journal")).read_bytes()
    state.close()
    (path / "aaaa.journal").write_bytes(journal)


def test_crash_leaves_open_connections(tmp_path):
    """Ids that were added and not removed, with the run's instance."""
    with crashed(tmp_path) as journal:
        journal.add(ONE)
        journal.add(TWO)
        journal.remove(ONE)
    state = StateDirectory(tmp_path, "host/bbbb")
    (dead,) = state.dead
    assert (dead.ids, dead.instance) == ([TWO], "host/aaaa")
    dead.remove(TWO)
    state.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock"]


def test_run_that_was_taken_for_dead_leaves_its_new_name(tmp_path):
    """With the connections that were open then, and those that came after."""
    with crashed(tmp_path) as journal:
        journal.add(ONE)
        journal.rename("host/cccc")
        journal.add(TWO)
    state = StateDirectory(tmp_path, "host/bbbb")
    (dead,) = state.dead
    assert (dead.ids, dead.instance) == ([ONE, TWO], "host/cccc")
    state.close()


@pytest.mark.parametrize(
    ("damage", "ids"),
    [
        (lambda data: data[:-5], [ONE]),  # torn in its last line
        (lambda data: data.replace(b"+1", b"?1"), [TWO]),
        (lambda data: b"\x00" * 100, None),
        (lambda data: b"", None),
    ],
)
def test_corrupt_journal_is_set_aside(tmp_path, caplog, damage, ids):
    """It is logged, renamed, and read as far as possible."""
    with crashed(tmp_path) as journal:
        journal.add(ONE)
        journal.add(TWO)
    path = tmp_path / "aaaa.journal"
    path.write_bytes(damage(path.read_bytes()))
    state = StateDirectory(tmp_path, "host/bbbb")
    assert [journal.ids for journal in state.dead] == ([] if ids is None else [ids])
    assert "torn or corrupt" in caplog.text
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1
    state.close()


def test_one_process_per_directory(tmp_path):
    """A second process gets a one-line error."""
    state = StateDirectory(tmp_path, "host/aaaa")
    with pytest.raises(Unavailable, match="used by another process"):
        StateDirectory(tmp_path, "host/bbbb")
    state.close()
    StateDirectory(tmp_path, "host/bbbb").close()


def test_journal_does_not_grow_with_closed_connections(tmp_path, monkeypatch):
    """It is rewritten at a size, and then contains the open connections."""
    monkeypatch.setattr("backends.journal.COMPACT_ABOVE", 10_000)
    with crashed(tmp_path) as journal:
        journal.add(ONE)
        for number in range(1000):
            journal.add(f"{number:032x}")
            journal.remove(f"{number:032x}")
        (path,) = tmp_path.glob("*.journal")
        assert path.stat().st_size < 12_000
    state = StateDirectory(tmp_path, "host/bbbb")
    assert state.dead[0].ids == [ONE]
    state.close()


@contextlib.contextmanager
def limited(kind: int, most: int):
    """Set this process's soft limit of `kind` to `most` during the block."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@contextlib.contextmanager
def full(path: Path):
    """A disk with room for 10 more bytes of `path`, and for no new file."""
    with limited(resource.RLIMIT_FSIZE, path.stat().st_size + 10):
        yield


def journal_of(number: int) -> bytes:
    return f"socketdock journal 1 host/{number}\n+{number:032x}\n".encode()


def test_journals_of_dead_runs_take_no_descriptors(tmp_path):
    """There may be more than the descriptor limit; empty ones are deleted."""
    for number in range(300):
        content = journal_of(number)
        if number % 2:
            content = content[: content.index(b"+")]
        (tmp_path / f"{number:03}.journal").write_bytes(content)
    with limited(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + 10):
        state = StateDirectory(tmp_path, "host/now")
        assert len(list(tmp_path.glob("*.journal"))) == 151
        assert [run.instance for run in state.dead[:2]] == ["host/0", "host/2"]
        for run in state.dead:
            run.remove(run.ids[0])
        state.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.gen_test
async def test_journal_is_completed_after_a_full_disk(
    io_loop, tmp_path, caplog
):
    """By a timer, with one log line; no line is written in part."""
    with crashed(tmp_path) as journal:
        (path,) = tmp_path.glob("*.journal")
        journal.add(ONE)
        before = path.read_bytes()
        with full(path):
            for number in range(3, 9):
                journal.add(f"{number:032x}")
            journal.remove(ONE)
            assert path.read_bytes() == before
        await eventually(lambda: path.read_bytes() != before)
    assert caplog.text.count("File too large") + caplog.text.count("No space") == 1
    assert "all is written again" in caplog.text
    state = StateDirectory(tmp_path, "host/bbbb")
    assert state.dead[0].ids == [f"{number:032x}" for number in range(3, 9)]
    assert not list(tmp_path.glob("*.corrupt-*"))
    state.close()


@pytest.mark.gen_test
async def test_disk_that_stays_full_takes_no_memory(io_loop, tmp_path):
    """The kept lines are bounded; later the journal is rewritten."""
    with crashed(tmp_path) as journal:
        (path,) = tmp_path.glob("*.journal")
        before = path.read_bytes()
        with full(path):
            tracemalloc.start()
            try:
                for number in range(10_000):  # 680 kB
                    journal.add(f"{number:032x}")
                    journal.remove(f"{number:032x}")
                kept, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert kept < 256 * 1024
            journal.add(ONE)
        await eventually(lambda: path.read_bytes() != before)
        assert path.read_bytes() == before + b"+" + ONE.encode() + b"\n"


@pytest.mark.gen_test
async def test_journal_that_cannot_be_replaced_is_appended_to(
    io_loop, tmp_path, monkeypatch
):
    """A directory has the name of the new file; no line is lost."""
    monkeypatch.setattr("backends.journal.COMPACT_ABOVE", 1000)
    with crashed(tmp_path) as journal:
        (tmp_path / "aaaa.fresh").mkdir()
        for number in range(100):
            journal.add(f"{number:032x}")
            journal.remove(f"{number:032x}")
        journal.add(ONE)
        (path,) = tmp_path.glob("*.journal")
        assert path.read_bytes().endswith(b"+" + ONE.encode() + b"\n")
        (tmp_path / "aaaa.fresh").rmdir()


def test_dead_run_on_a_full_disk_is_reported_again(tmp_path, caplog):
    """No line is torn."""
    with crashed(tmp_path) as journal:
        journal.add(ONE)
        journal.add(TWO)
    state = StateDirectory(tmp_path, "host/bbbb")
    with full(tmp_path / "aaaa.journal"):
        state.dead[0].remove(ONE)
    assert "aaaa.journal: " in caplog.text
    state.close()
    state = StateDirectory(tmp_path, "host/cccc")
    assert state.dead[0].ids == [ONE, TWO]
    state.close()


@pytest.mark.parametrize("kind", ["folder", "pipe", "symlink"])
def test_unusable_journal_does_not_stop_the_start(tmp_path, caplog, kind):
    """It is logged and left unchanged; no file is opened that blocks."""
    path = tmp_path / "a.journal"
    target = tmp_path / "elsewhere"
    target.write_bytes(journal_of(1))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    state = StateDirectory(tmp_path, "host/bbbb")
    assert state.dead == []
    assert f"{path} can't be used" in caplog.text
    state.close()
    assert os.path.lexists(path) and target.exists()


def test_leftovers_of_a_journal_rewrite_are_removed(tmp_path):
    """A crash during a rewrite would leave a file for ever."""
    (tmp_path / "dead.fresh").write_bytes(b"socket")
    StateDirectory(tmp_path, "host/bbbb").close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("file", "Not a directory"),
        ("lock is a folder", "lock: Is a directory"),
        ("lock is a symlink", "lock: Too many levels of symbolic links"),
    ],
)
def test_unusable_directory_is_explained(tmp_path, what, why):
    """It does not count as one in use; status 1, since that may change."""
    state = tmp_path / "state"
    if what == "file":
        state.write_bytes(b"")
    else:
        state.mkdir()
        if what.endswith("folder"):
            (state / "lock").mkdir()
        else:
            (state / "lock").symlink_to(tmp_path / "lock")
    line = refusal(*HTTP, f"--state_dir={state}", status=1)
    assert line.startswith(f"socketdock: --state_dir={state}: ")
    assert line.endswith(why)


def test_directory_without_permission_is_explained(tmp_path, monkeypatch):
    """EACCES is not a lock; here the lock itself raises it."""

    def denied(*arguments):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("fcntl.flock", denied)
    with pytest.raises(Unavailable, match=r"Permission denied$"):
        StateDirectory(tmp_path, "host/aaaa")


@pytest.mark.parametrize("what", ["folder", "lock"])
def test_directory_of_another_user_is_explained(what):
    """This user may not write there, or to another user's lock."""
    if os.getuid():
        leave_out("another user to be takes root")
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which pytest closes
        folder = Path(name)
        if what == "lock":
            folder.chmod(0o777)
            (folder / "lock").touch(0o600)
        else:
            folder.chmod(0o755)
        line = refusal(
            "--config=/dev/null", *HTTP, f"--state_dir={folder}",
            command=AS_NOBODY, status=1,
        )
    said = f"--state_dir={folder}: {folder}/lock: Permission denied"
    assert line == f"socketdock: {said}"


@pytest.mark.gen_test
async def test_full_disk_with_room_again_loses_nothing(io_loop, tmp_path):
    """On a real disk: complete lines in journal and log; all events are sent."""
    command = [*on_small_disk(tmp_path), sys.executable, "socketdock.py"]
    async with RecordingBackend() as backend:
        flags = [f"--state_dir={tmp_path}/state", f"--log_file_prefix={tmp_path}/log",
                 "--log_to_stderr"]
        async with Service(*backend.flags(), *flags, command=command) as service:
            disk = Path(f"/proc/{service.process.pid}/root{tmp_path}")
            fill(disk / "filler")
            clients = [await websockets.connect(service.ws_url) for _ in range(150)]
            for client in clients[:50]:
                await client.close()
            await backend.wait_for("disconnect", 50)
            (disk / "filler").unlink()
            await eventually(
                lambda: any("all is written again" in line for line in service.log)
            )
            (journal,) = (disk / "state").glob("*.journal")
            left = tmp_path / "left"
            left.mkdir()
            (left / journal.name).write_bytes(journal.read_bytes())
            for line in (disk / "log").read_text().splitlines():
                assert line.startswith("[") and line.count("[I ") <= 1
            complaints = [line for line in service.log if "No space left" in line]
            assert len(complaints) == 2
            service.process.kill()
            await service.process.wait()
        async with Service(*backend.flags(), f"--state_dir={left}"):
            events = await backend.wait_for("disconnect", 150)
        assert len({event["connection_id"] for event in events}) == 150
        assert [path.name for path in left.iterdir()] == ["lock"]


def test_full_disk_at_the_start_is_status_1(tmp_path):
    """So that a supervisor starts the relay again."""
    filled = f'dd if=/dev/zero of="{tmp_path}/filler" bs=4k 2>/dev/null; exec "$@"'
    started = ended(
        sys.executable, "socketdock.py", "--bindport=0", *HTTP,
        f"--state_dir={tmp_path}",
        command=(*on_small_disk(tmp_path), "sh", "-c", filled, "sh"),
    )
    said = f"socketdock: --state_dir={tmp_path}: No space left on device\n"
    assert (started.returncode, started.stderr) == (1, said)


def on_small_disk(path: Path) -> tuple[str, ...]:
    """The command prefix of a process that alone sees a disk of 100 kB at `path`."""
    mount = 'mount -t tmpfs -o size=100k none "$0" && exec "$@"'
    command = ("unshare", "-rm", "sh", "-c", mount, str(path))
    if ended("true", command=command).returncode:
        leave_out("mount namespaces, which unshare -rm makes, are not allowed here")
    return command


def fill(path: Path) -> None:
    """Leave no byte of the disk free."""
    with open(path, "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))


def test_set_aside_journals_are_bounded(tmp_path, caplog):
    """Each crash of the machine may leave one more; the latest stay."""
    for number in range(30):
        (tmp_path / f"{number:02}.corrupt-{number}").write_bytes(b"?")
    for number in range(5):
        (tmp_path / f"{number:02}.journal").write_bytes(b"?")
    StateDirectory(tmp_path, "host/bbbb").close()
    left = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    latest = [*range(5), *range(25, 30)]
    assert left == [*(f"{number:02}.corrupt" for number in latest), "lock"]
    assert "25 older corrupt journals are removed" in caplog.text
