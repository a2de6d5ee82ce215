"""Downloads by huggingface_hub's own code, from a stand-in for the Hub that serves tiny random checkpoints."""

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from checkpoints import save, tiny

from jaxft.weights.hub import BUILTIN

OLD, NEW = "a" * 40, "b" * 40  # commits; main is at NEW, the tag v1 at OLD
TOKEN = "hf_OfNobodyAtAll"
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # refuses connections
OFFLINE = {"HF_HUB_OFFLINE": "1"}
LEFT_ALONE = (
    "pytorch_model.bin model.pt modeling_tiny.py tf_model.h5 flax_model.msgpack model-q4_0.gguf README.md .gitattributes "
    "onnx/model.onnx original/consolidated.00.pth consolidated.safetensors fp16/model.safetensors"
).split()
SAID = {"owner/401": "Invalid credentials in Authorization header", "owner/403": "Not for you", "owner/500": "Oops"}
Asked = namedtuple("Asked", "repo what revision file token start of_cdn")


class Hub:
    """The Hub, and the other host to which it sends for large files."""

    def __init__(self, commits, names):
        self.commits, self.asked = commits, []  # commit -> name -> content, the same in every repository
        self.breaks = ["reset", "half"]  # of the first downloads of owner/flaky's first shard
        self.refs = {f"owner/{name}": {"main": NEW, "v1": OLD} for name in names}
        self.refs["owner/moving"]["main"] = OLD  # until it has been asked for once
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Answer) for _ in range(2)]
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)


class Answer(BaseHTTPRequestHandler):
    """What `snapshot_download` asks for: a revision's commit, the commit's tree, a file's head, a file or the rest of it."""

    log_message = lambda *_: None  # noqa: E731

    def do_GET(self):
        hub, of_cdn = self.server.hub, self.server is self.server.hub.servers[1]
        path = re.fullmatch(r"/(?:api/models/)?(\w+/\w+)/(\w+)/([^/]+)/?(.+)?", self.path.partition("?")[0])
        repo, what, revision, file = path.groups() if path else [None] * 4
        token, start = self.headers.get("Authorization"), int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        hub.asked.append(Asked(repo, what, revision, file, token, start, of_cdn))
        commit = hub.refs.get(repo, {}).get(revision, revision)
        if repo not in hub.refs:
            self.say(404 if token else 401, **{"X-Error-Code": "RepoNotFound"})
        elif commit not in hub.commits:
            self.say(404, **{"X-Error-Code": "RevisionNotFound"})
        elif of_cdn:
            breaks = repo == "owner/flaky" and "-00001-of-" in file and hub.breaks
            self.send_rest(hub.commits[commit][file], start, breaks and breaks.pop(0))
        elif what == "resolve":
            self.send_file(hub, repo, commit, file)
        else:
            self.send_list(hub, repo, commit, what, revision)

    do_HEAD = do_GET

    def send_list(self, hub, repo, commit, what, revision):
        if repo in SAID:
            self.say(int(repo[-3:]), **{"X-Error-Message": SAID[repo]})
        elif repo == "owner/page":
            self.say(200, b"<html>Welcome to this airport</html>")
        elif repo != "owner/silence":
            files = hub.commits[commit].items()
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files]
            self.say(200, json.dumps(tree if what == "tree" else {"id": repo, "sha": commit}).encode())
        if (repo, revision) == ("owner/moving", "main"):
            hub.refs[repo]["main"] = NEW

    def send_file(self, hub, repo, commit, file):
        """The lists of a gated repository are public: only its files are not."""
        data = hub.commits[commit][file]
        tag, commit = f'"{hashlib.sha256(data).hexdigest()}"', {"X-Repo-Commit": commit}
        if repo == "owner/gated":
            self.say(403 if self.headers.get("Authorization") else 401, **{"X-Error-Code": "GatedRepo"})
        elif file.endswith(".safetensors"):
            linked = {"X-Linked-Size": len(data), "X-Linked-ETag": tag, "Location": hub.cdn + self.path}
            self.say(302, **commit, **linked)
        else:
            self.say(200, data, **commit, ETag=tag)

    def send_rest(self, data, start, broken):
        rest = data[start:]
        self.say(206 if start else 200, rest[: len(rest) // 2] if broken else rest, **{"Content-Length": len(rest)})
        if broken == "reset":  # instead of the end that a connection usually has
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def say(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Repositories of sharded checkpoints with the embedded tokenizer; the commits differ in their weights."""
    folders, commits = {}, {}
    for seed, commit in enumerate((OLD, NEW)):
        model, folders[commit] = tiny("llama", seed, vocab_size=640), tmp_path_factory.mktemp("local")
        save(model, folders[commit], max_shard_size="60KB")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folders[commit] / name).write_bytes((BUILTIN["builtin:tiny"] / name).read_bytes())
        commits[commit] = {p.name: p.read_bytes() for p in folders[commit].iterdir()} | dict.fromkeys(LEFT_ALONE, b"?")
    hub = Hub(commits, "model words fresh moving flaky gated 401 403 500 page silence".split())
    hub.folders, hub.home = folders, tmp_path_factory.mktemp("home")
    yield hub
    for server in hub.servers:
        server.shutdown()
        server.server_close()


def run(hub, home, *words, **more):
    """`python WORDS` as in a shell, with a token and a cache of its own; it says nothing of the token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip
    environment = kept | settings | more
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert TOKEN not in ended.stdout + ended.stderr
    return ended


READ = """
import hashlib, huggingface_hub.constants, jax, jax.numpy as jnp, jaxft, json, numpy as np, sys
from jaxft import config
from jaxft.parallel.mesh import make_mesh
from jaxft.weights.model import find, materialise
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000  # so that a shard comes in several pieces
forward, ids = jax.jit(lambda model, ids: model(ids)), jnp.arange(3, 67).reshape(2, 32)
for settings in map(json.loads, sys.argv[1:]):
    if isinstance(settings, str):
        commit, model = None, jaxft.load(settings)[0]
    else:
        source = find(config.Model(dtype="float32", **settings))
        commit, model = source.commit, materialise(source, make_mesh()).decoder()
    print(json.dumps([commit, hashlib.sha256(np.asarray(forward(model, ids)).tobytes()).hexdigest()]))
"""


def read(hub, home, *models, **more):
    """The commit and a digest of the logits of each model, by `jaxft.load` where it is a name alone."""
    ended = run(hub, home, "-c", READ, *map(json.dumps, models), **more)
    assert ended.returncode == 0, ended.stderr
    return [tuple(json.loads(line)) for line in ended.stdout.splitlines()]


ASK = """
import json, sys, traceback
from jaxft.weights.hub import UserError, local_folder
for name, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps([str(local_folder(name, revision))]))
    except UserError as error:
        print(json.dumps([str(error), traceback.format_exc()]))
"""


def ask(hub, home, *models, **more):
    """The folder of each (name, revision), or the line that says what went wrong; `run` sees the traceback too."""
    ended = run(hub, home, "-c", ASK, json.dumps(models), **more)
    assert (ended.returncode, ended.stderr) == (0, "")
    return [json.loads(line)[0] for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def online(hub):
    """What was read over the network, and what was asked for meanwhile."""
    models = {
        "old": {"name": str(hub.folders[OLD]), "tokenizer": "owner/words"}, "new": {"name": str(hub.folders[NEW])},
        "main": {"name": "owner/model"}, "commit": {"name": "owner/model", "revision": OLD}, "api": "owner/model",
        "tag": {"name": "owner/model", "revision": "v1"}, "random": {"name": "owner/fresh", "init": "random"},
    }  # fmt: skip
    found = dict(zip(models, read(hub, hub.home, *models.values()), strict=True))
    return found, [asked for asked in hub.asked if asked.repo in ("owner/model", "owner/words", "owner/fresh")]


def test_a_hub_id_a_commit_and_a_tag_give_the_logits_of_the_same_folder_and_name_their_commit(online):
    found, (_, old), (_, new) = online[0], online[0]["old"], online[0]["new"]
    assert found["api"][1] == new != old and found["main"] == (NEW, new)
    assert found["commit"] == found["tag"] == (OLD, old)


def test_pickles_code_and_other_formats_are_never_requested(online, hub):
    files = {path.name for path in hub.folders[NEW].iterdir()}
    assert {asked.file for asked in online[1] if asked.repo == "owner/model" and asked.what == "resolve"} == files
    assert len([file for file in files if file.endswith(".safetensors")]) > 2


@pytest.mark.parametrize("repo", ["owner/words", "owner/fresh"])
def test_neither_a_tokenizer_nor_a_random_start_brings_weights(repo, online):
    found = {str(asked.file) for asked in online[1] if asked.repo == repo}
    assert "tokenizer.json" in found and not [file for file in found if file.endswith(".safetensors")]


def test_the_token_goes_to_the_hub_and_to_no_other_host(online):
    assert {(asked.of_cdn, asked.token) for asked in online[1]} == {(False, f"Bearer {TOKEN}"), (True, None)}


def test_the_cache_serves_without_the_hub(online, hub):
    models = {"name": "owner/model"}, {"name": "owner/model", "revision": "v1"}
    assert read(hub, hub.home, *models, **NOWHERE, **OFFLINE) == [online[0]["main"], online[0]["tag"]]
    folders = ask(hub, hub.home, ("owner/model", None), ("owner/model", "v1"), **NOWHERE)
    assert [folder.rpartition("/")[2] for folder in folders] == [NEW, OLD]


ANSWERS = {
    ("owner/none", None): ["check the spelling", "`hf auth login`"],
    ("owner/gated", None): ["https://huggingface.co/owner/gated", "`hf auth login`", "HF_TOKEN"],
    ("owner/model", "v2"): ["at revision v2 does not exist", "list its branches"],
    ("owner/model", "c" * 40): ["at revision ccc", "list its branches"],
    ("owner/401", None): ["answered 401", "Invalid credentials", "check the token"],
    ("owner/403", None): ["answered 403", "Not for you", "check the token"],
    ("owner/500", None): ["answered 500", "try again"],
    ("owner/page", None): ["check the network"],
    ("owner/silence", None): ["Server disconnected", "try again"],
}


def assert_generate_refuses(hub, home, repo, *said, **more):
    ended = run(hub, home, "-m", "jaxft.generate", "--model", repo, "--prompt", "x", **more)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: model.name: {repo} ") and ended.stderr.count("\n") == 1
    assert not [part for part in said if part not in ended.stderr], ended.stderr


def test_a_model_that_cannot_be_had_is_one_line_with_the_remedy(hub, tmp_path):
    assert_generate_refuses(hub, tmp_path, "owner/model", "HF_HUB_OFFLINE", **OFFLINE)
    assert_generate_refuses(hub, tmp_path, "owner/model", "check the path or the network", **NOWHERE)
    assert_generate_refuses(hub, tmp_path, "owner/none", *ANSWERS["owner/none", None])
    assert_generate_refuses(hub, tmp_path, "owner/gated", *ANSWERS["owner/gated", None])


@pytest.mark.parametrize("token", [TOKEN, ""])
def test_every_answer_of_the_hub_has_its_line_and_no_traceback_shows_the_token(token, hub, tmp_path):
    lines = ask(hub, tmp_path, *ANSWERS, HF_TOKEN=token)
    for line, ((name, _), said) in zip(lines, ANSWERS.items(), strict=True):
        assert line.startswith(f"model.name: {name} ") and not [part for part in said if part not in line], line


def test_a_download_broken_off_leaves_nothing_damaged_and_the_next_completes_it(hub, online, tmp_path):
    """First a reset in the middle of a shard, then an early end, after which the rest is asked for."""
    assert_generate_refuses(hub, tmp_path, "owner/flaky", "try again")
    cached = tmp_path / "hub/models--owner--flaky/snapshots" / NEW
    kept = {path.name: path.read_bytes() for path in cached.iterdir()}
    assert kept.items() < hub.commits[NEW].items() and not [name for name in kept if "00001" in name]
    assert "not whole" in ask(hub, tmp_path, ("owner/flaky", None), **OFFLINE)[0]
    assert read(hub, tmp_path, {"name": "owner/flaky"}) == [online[0]["main"]]
    assert len([asked for asked in hub.asked if asked.start]) == 1


VERBS = """
import json, sys
from jaxft import errors, export, train
from jaxft.learn import result
def interrupted(job, started, folder, *_):
    folder.update({"best_loss": 0.0, "best_step": 0})
    result.export(job, started.loaded, folder, started.state.trainable)  # as a run does at its end
    raise KeyboardInterrupt
train._train = interrupted
for command in json.loads(sys.argv[1]):
    sys.argv = command.split()
    try:
        errors.run_verb({"train": train.main, "export": export.main}[sys.argv[0]])
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
"""


def test_a_run_and_its_adapter_stay_on_the_commit_it_began_on(hub, tmp_path):
    """Interrupted; refused, as main has moved; gone on with as the refusal advises; and its adapter exported anew."""
    folder, again = tmp_path / "run", tmp_path / "again"
    begin = f"train --config tiny_cpu.py --model.name owner/moving --data.limit 40 --eval.tasks --run.dir {folder}"
    verbs = begin, begin, f"{begin} --model.revision {OLD}", f"export --adapter {folder} --out {again}"
    said = run(hub, tmp_path / "home", "-c", VERBS, json.dumps(verbs)).stderr.splitlines()
    assert said[1::2] == ["130", "2", "130"] and said[-1] == "0", said
    assert f"now at commit {NEW}, and this run began on {OLD}" in said[2] and f"--model.revision {OLD}" in said[2]
    assert json.loads((folder / "results.json").read_text())["model"]["commit"] == OLD
    for adapter in (folder / "adapter", again):
        assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == OLD
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
