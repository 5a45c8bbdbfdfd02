"""The journal: what a crash leaves, and what a start makes of it."""

import contextlib
from pathlib import Path

import pytest
from tornado.options import Error as OptionError

from backends.http.journal import StateDirectory

ONE, TWO = "1" * 32, "2" * 32


@contextlib.contextmanager
def crashed(path: Path):
    """A run that adds to its journal, and is gone without a word."""
    state = StateDirectory(path, "host/aaaa")
    yield state.journal
    journal = next(path.glob("*.journal")).read_bytes()
    state.close()
    (path / "aaaa.journal").write_bytes(journal)


def test_crash_leaves_what_was_open(tmp_path):
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


@pytest.mark.parametrize(
    ("damage", "ids"),
    [
        (lambda data: data[:-5], [ONE]),  # torn in its last line
        (lambda data: data.replace(b"+1", b"?1"), [TWO]),
        (lambda data: b"\x00" * 100, None),
        (lambda data: b"", None),
    ],
)
def test_damage_is_set_aside_and_never_fatal(tmp_path, caplog, damage, ids):
    """Reported, kept for whoever wants to look, and read as far as it goes."""
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
    """A second one is refused with a sentence."""
    state = StateDirectory(tmp_path, "host/aaaa")
    with pytest.raises(OptionError, match="used by another process"):
        StateDirectory(tmp_path, "host/bbbb")
    state.close()
    StateDirectory(tmp_path, "host/bbbb").close()


def test_journal_does_not_grow_with_visits(tmp_path, monkeypatch):
    """It is rewritten when it has grown, and holds what is open."""
    monkeypatch.setattr("backends.http.journal.COMPACT_ABOVE", 10_000)
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
