"""Claims: one holder at a time, kept by a heartbeat, lost by the dead."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mvar.errors import WriteError
from mvar.run.claims import Claims, remove_claims

HOLDER = """
import sys, time
from pathlib import Path
from mvar.run.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    print(claims.take("a.tar"), flush=True)
    sys.stdin.read()
"""


def test_one_of_many_gets_a_claim_and_the_next_one_when_it_is_given_back(tmp_path):
    for _ in range(3):
        barrier = threading.Barrier(4)
        taken = []

        def try_it(barrier=barrier, taken=taken):
            claims = Claims(tmp_path)
            barrier.wait()
            if claims.take("a.tar"):
                taken.append(claims)

        threads = [threading.Thread(target=try_it) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        assert Claims(tmp_path).take("b.tar")
        taken[0].release("a.tar")
        remove_claims(tmp_path)
        assert not list(tmp_path.iterdir())


def test_leaving_the_context_gives_all_claims_back(tmp_path):
    with Claims(tmp_path) as claims:
        assert claims.take("a.tar")
        assert not Claims(tmp_path).take("a.tar")
    assert Claims(tmp_path).take("a.tar")


def test_a_killed_holder_on_this_host_loses_its_claim_at_once(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert holder.stdout.readline() == "True\n"
    assert not Claims(tmp_path).take("a.tar")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert Claims(tmp_path).take("a.tar")


def test_a_silent_holder_on_another_host_loses_its_claim_after_a_while(tmp_path):
    claim = tmp_path / ".a.tar.claim"
    claim.write_text("another-host")
    assert not Claims(tmp_path).take("a.tar")
    old_s = time.time() - 3600
    os.utime(claim, (old_s, old_s))
    assert Claims(tmp_path).take("a.tar")


def test_a_heartbeat_keeps_a_claim_from_growing_old(tmp_path):
    with Claims(tmp_path, heartbeat_s=0.02, stale_after_s=1.0) as claims:
        claims.take("a.tar")
        claim = tmp_path / ".a.tar.claim"
        os.utime(claim, (0, 0))
        while claim.stat().st_mtime == 0:
            time.sleep(0.01)
        assert not Claims(tmp_path, stale_after_s=1.0).take("a.tar")


def test_giving_back_a_claim_that_was_taken_over_leaves_the_new_holder_alone(tmp_path):
    slow = Claims(tmp_path)
    slow.take("a.tar")
    os.utime(tmp_path / ".a.tar.claim", (0, 0))
    quick = Claims(tmp_path)
    assert quick.take("a.tar")
    slow.release("a.tar")
    assert not Claims(tmp_path).take("a.tar")
    quick.release("a.tar")
    assert not list(tmp_path.iterdir())


# ---- file systems that lack something

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


def without(monkeypatch, module, name, number):
    """A call that the file system does not have."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("number", [*NO_LOCKS, None])
def test_where_locks_say_nothing_the_age_of_the_heartbeat_decides(tmp_path, monkeypatch, number):
    """None: a file system that grants every lock to everybody."""
    if number is None:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    else:
        without(monkeypatch, fcntl, "flock", number)
    first = Claims(tmp_path)
    assert first.take("a.tar") and first.holds("a.tar")
    assert not Claims(tmp_path).take("a.tar") and first.holds("a.tar"), "it lives, as far as anybody knows"
    assert not Claims(tmp_path).holder("a.tar").alive, "and nothing proves that it does"
    os.utime(tmp_path / ".a.tar.claim", (0, 0))
    assert Claims(tmp_path).take("a.tar") and not first.holds("a.tar")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_claims_need_no_hard_links(tmp_path, monkeypatch, number):
    without(monkeypatch, os, "link", number)
    with Claims(tmp_path) as claims:
        assert claims.take("a.tar") and claims.holds("a.tar")
        assert not Claims(tmp_path).take("a.tar")
        os.utime(tmp_path / ".a.tar.claim", (0, 0))
        assert Claims(tmp_path).take("a.tar") and not claims.holds("a.tar")


def test_a_claim_that_cannot_be_written_names_its_path_and_no_other_command(tmp_path, monkeypatch):
    without(monkeypatch, os, "fsync", errno.ENOSPC)
    with pytest.raises(WriteError, match=r"\.run\.claim: cannot be written \(No space left on device\)") as raised:
        Claims(tmp_path).take("run")
    assert "token" not in str(raised.value) and not list(tmp_path.iterdir())


# ---- several who see one stale claim


def stale(folder):
    (folder / ".a.tar.claim").write_text("another-host\nprocess 1 on another-host")
    os.utime(folder / ".a.tar.claim", (0, 0))


def between_check_and_rename(monkeypatch, act):
    """Run `act` once, when somebody has found a claim stale and is about to take it away."""
    original, acts = os.rename, [act]

    def rename(source, target):
        if acts:
            acts.pop()()
        return original(source, target)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_who_find_a_claim_stale_the_slower_gives_back_what_is_not_what_it_checked(tmp_path, monkeypatch, links):
    stale(tmp_path)
    if not links:
        without(monkeypatch, os, "link", errno.EPERM)
    slow, quick = Claims(tmp_path), Claims(tmp_path)
    between_check_and_rename(monkeypatch, lambda: quick.take("a.tar"))
    assert not slow.take("a.tar")
    assert quick.holds("a.tar")
    assert os.listdir(tmp_path) == [".a.tar.claim"]


def test_a_holder_that_wakes_up_while_it_is_taken_over_keeps_its_claim(tmp_path, monkeypatch):
    holder, other = Claims(tmp_path), Claims(tmp_path)
    holder.take("a.tar")
    claim = tmp_path / ".a.tar.claim"
    os.utime(claim, (0, 0))
    between_check_and_rename(monkeypatch, lambda: os.utime(claim))
    assert not other.take("a.tar")
    assert holder.holds("a.tar")


@pytest.mark.parametrize("links", [True, False])
def test_a_third_who_comes_before_the_claim_is_given_back_is_the_only_holder(tmp_path, monkeypatch, links):
    stale(tmp_path)
    if not links:
        without(monkeypatch, os, "link", errno.EPERM)
    slow, quick, third = Claims(tmp_path), Claims(tmp_path), Claims(tmp_path)
    between_check_and_rename(monkeypatch, lambda: quick.take("a.tar"))
    renamed, count, came = os.rename, [], []

    def rename(source, target):
        renamed(source, target)
        count.append(target)
        if len(count) == 2:  # The first one is quick's, with the stale claim.
            came.append(third.take("a.tar"))

    monkeypatch.setattr(os, "rename", rename)
    assert not slow.take("a.tar")
    assert came == [True]
    assert third.holds("a.tar") and not quick.holds("a.tar")
    assert os.listdir(tmp_path) == [".a.tar.claim"]


def test_a_claim_that_is_away_for_a_moment_is_not_lost(tmp_path, monkeypatch):
    claims = Claims(tmp_path)
    claims.take("a.tar")
    claim, away = tmp_path / ".a.tar.claim", tmp_path / "away"
    os.rename(claim, away)
    monkeypatch.setattr(time, "sleep", lambda _: os.rename(away, claim) if away.exists() else None)
    assert claims.holds("a.tar")
    claim.unlink()
    assert not claims.holds("a.tar")
