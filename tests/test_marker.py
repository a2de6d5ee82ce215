"""One writer of a folder on gs://, through google-cloud-storage and a stand-in of the storage's API: not a real bucket."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from buckets import serving

from jaxft.errors import UserError
from jaxft.learn import marker
from jaxft.learn.marker import Times

pytestmark = [
    pytest.mark.skipif(not marker.can_mark(), reason="google-cloud-storage is not here: pip install 'jaxft[gcs]'"),
    pytest.mark.filterwarnings("ignore"),  # the client's own
]
PLACE, WHAT, NAME = "gs://bucket/runs/mine", "run.dir: gs://bucket/runs/mine", "bucket/runs/mine/.lock"
QUICK = Times(beat=0.1, silent=0.5, dead=2.0)


@pytest.fixture
def bucket(monkeypatch):
    with serving() as found:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.address)
        yield found


@pytest.fixture
def lost():
    """What was said when a marker was lost."""
    said = []
    said.append(lambda *words: said.append(words))
    yield said
    assert callable(said[0])


def held(lost, times=QUICK, say=print):
    return marker.only_writer(PLACE, WHAT, lost[0], say, times)


def left_by(bucket, *, pid="1", host="elsewhere", age=0.0):
    bucket.age = age
    about = {"pid": pid, "host": host, "since": "2026-01-02T03:04:05+00:00", "key": "theirs"}
    resource = bucket.put(NAME, {"metadata": about}, b"")
    bucket.age = 0.0
    return resource["generation"]


def test_the_marker_names_its_writer_is_written_anew_while_it_lives_and_goes_with_it(bucket, lost):
    with held(lost):
        generations = set()
        deadline = time.monotonic() + 20
        while len(generations) < 3 and time.monotonic() < deadline:
            resource, content = bucket.objects[NAME]
            generations.add(resource["generation"])
        assert len(generations) == 3
        about = json.loads(content)
        assert about["pid"] == str(os.getpid()) and about["host"] and re.match(r"20\d\d-.*\+00:00", about["since"])
        assert resource["metadata"] == about
    assert bucket.objects == {} and len(lost) == 1
    writes = [query.get("ifGenerationMatch") for method, _, query in bucket.requests if method == "POST"]
    assert writes[0] == "0" and len(set(writes)) == len(writes) >= 3 and None not in writes


def test_a_second_writer_is_refused_by_the_name_of_the_first(bucket, lost):
    left_by(bucket, pid="77")
    began = time.monotonic()
    with pytest.raises(UserError) as said, held(lost, Times()):
        pass
    assert time.monotonic() - began < 2
    assert str(said.value).startswith(
        f"{WHAT} is in use by process 77 on elsewhere since 2026-01-02T03:04:05+00:00, last heard 0 s ago; wait until it ends"
    )
    assert bucket.objects[NAME][0]["metadata"]["key"] == "theirs"


@pytest.mark.parametrize(
    "who", [{"age": 301.0}, {"pid": str(os.getpid()), "host": None}, {"pid": "gone", "host": None}]
)
def test_the_marker_of_a_dead_writer_is_taken_over_at_once(bucket, lost, who):
    """One that is old, and on this machine one whose process has ended."""
    import socket

    if "host" in who:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        who = {"pid": who["pid"].replace("gone", str(ended.pid)), "host": socket.gethostname()}
    left_by(bucket, **who)
    with held(lost, Times()):
        assert bucket.objects[NAME][0]["metadata"]["pid"] == str(os.getpid())
    assert bucket.objects == {}


def test_one_that_has_been_silent_is_waited_for_and_refused_if_it_is_heard_again(bucket, lost):
    said = []
    left_by(bucket, age=1.0)
    with held(lost, QUICK, said.append):
        pass
    (line,) = said
    assert (
        line
        == f"{WHAT}: process 1 on elsewhere since 2026-01-02T03:04:05+00:00 has not been heard for 1 s; waiting 1 s for it"
    )
    left_by(bucket, age=1.0)
    threading.Timer(0.3, lambda: left_by(bucket, age=0.6)).start()
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), held(lost, QUICK, said.append):
        pass


def until(lost):
    deadline = time.monotonic() + 20
    while len(lost) == 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    return lost[1]


def test_a_writer_whose_marker_another_has_taken_over_ends_and_leaves_the_others(bucket, lost):
    with held(lost):
        generation = left_by(bucket, pid="9")
        code, why = until(lost)
    assert code == 2 and f"{WHAT}: process 9 on elsewhere since" in why and "has taken over; this run ends" in why
    assert bucket.objects[NAME][0]["generation"] == generation


def test_a_writer_that_cannot_reach_the_storage_ends_before_another_may_take_over(bucket, lost):
    with held(lost):
        bucket.down = True
        began = time.monotonic()
        code, why = until(lost)
        assert time.monotonic() - began > 1.0
        bucket.down = False
    assert code == 75 and re.search(
        r"could not be marked as in use for \d+ s \((InvalidResponse|ServiceUnavailable)\)", why
    )


def test_a_storage_that_refuses_is_the_users_mistake(bucket, lost, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"^run.dir: .* cannot be marked as in use: \w+: "), held(lost):
        pass


HOLDS = """
import sys, time
from jaxft.learn import marker
with marker.only_writer("gs://bucket/runs/mine", "x", print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_of_two_processes_one_writes_and_after_a_kill_the_other_does(bucket, lost):
    command = [sys.executable, "-W", "ignore", "-c", HOLDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n", first.stderr.read()
        with pytest.raises(UserError, match=rf"in use by process {first.pid} on .* since 20"), held(lost, Times()):
            pass
        first.send_signal(signal.SIGKILL)
    with held(lost, Times()):
        assert bucket.objects[NAME][0]["metadata"]["pid"] == str(os.getpid())
    assert bucket.objects == {}
