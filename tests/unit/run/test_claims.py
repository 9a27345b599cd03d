"""Claims: one holder at a time, kept by a heartbeat, lost by the dead."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
