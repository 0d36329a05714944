"""A stand-in for the hub: a server that answers Hugging Face's client, and keeps repositories in memory.

The client is the real one, in processes of its own, as it reads its settings when it is imported.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "hf_owner"  # the token of who may write to org/...


@dataclass
class Repository:
    """Its commits, newest last, each with the content of the files by their names."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, contents: Mapping[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(contents)}".encode()).hexdigest()
        self.commits[sha] = dict(contents)
        return sha

    def find(self, revision: str) -> str | None:
        newest = next(reversed(self.commits), None)
        return newest if revision in ("main", "v1") else revision if revision in self.commits else None


class Reply(Exception):
    """What a request is answered with, in place of the usual."""

    def __init__(self, status: int, body: object = b"", **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class Hub:
    """The server's state.

    Attributes:
        url: its address.
        repositories: by OWNER/NAME.
        asked: the requests so far, METHOD PATH.
        fault: called with each request's method and path; may raise a `Reply`.
        cut: files of which only half is sent, by their name.
        large: sizes that are told in place of the true ones, by the name of the file.
    """

    def __init__(self):
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # what was uploaded to git LFS
        self.asked: list[str] = []
        self.fault: Callable[[str, str], None] = lambda method, path: None
        self.cut: set[str] = set()
        self.large: dict[str, int] = {}

    def files(self, name: str) -> dict[str, bytes]:
        """The newest content of a repository."""
        return next(reversed(self.repositories[name].commits.values()))


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        try:
            hub.fault(self.command, path)
            for method, pattern, answer in _ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    answer(self, body, **found.groupdict())
            raise Reply(404)
        except Reply as reply:
            told = {"Content-Length": str(len(reply.body)), **reply.headers}
            self.send_response(reply.status)
            for name, value in told.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
                self.close_connection = told["Content-Length"] != str(len(reply.body))

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    @property
    def writes(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {OWNER}"

    def _repository(self, repository: str) -> Repository:
        found = self.state.repositories.get(repository)
        if found is None or (found.private and not self.writes):
            raise Reply(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def _commit_of(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self._repository(repository)
        sha = found.find(revision)
        if sha is None:
            raise Reply(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return sha, found.commits[sha]

    def _require_owner(self, repository: str) -> None:
        if not self.headers.get("Authorization"):
            raise Reply(401, {"error": "Invalid username or password."})
        if not self.writes or not repository.startswith("org/"):
            raise Reply(403, {"error": f"You don't have the rights to write to {repository}"})

    # What a client reads.

    def info(self, body: bytes, repository: str, revision: str = "main") -> None:
        found = self._repository(repository)
        if not found.commits:
            raise Reply(200, {"id": repository, "private": found.private, "sha": None, "siblings": []})
        sha, contents = self._commit_of(repository, revision)
        siblings = [{"rfilename": name, "size": self._size(name, content)} for name, content in contents.items()]
        raise Reply(200, {"id": repository, "private": found.private, "sha": sha, "siblings": siblings})

    def _size(self, name: str, content: bytes) -> int:
        return self.state.large.get(name, len(content))

    def tree(self, body: bytes, repository: str, revision: str) -> None:
        contents = self._commit_of(repository, revision)[1] if self._repository(repository).commits else {}
        raise Reply(
            200,
            [
                {"type": "file", "path": name, "size": self._size(name, content), "oid": _etag(content)}
                for name, content in contents.items()
            ],
        )

    def resolve(self, body: bytes, repository: str, revision: str, name: str) -> None:
        if self._repository(repository).gated and not self.writes:
            raise Reply(403, {"error": "Access to this model is restricted"}, X_Error_Code="GatedRepo")
        sha, contents = self._commit_of(repository, revision)
        if name not in contents:
            raise Reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content, status = contents[name], 200
        headers = {"ETag": f'"{_etag(content)}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            headers["Content_Range"] = f"bytes {asked[1]}-{len(content) - 1}/{len(content)}"
            content, status = content[int(asked[1]) :], 206
        if self.command == "HEAD" or name in self.state.cut:
            headers["Content_Length"] = str(len(content))
        if name in self.state.cut:
            content = content[: len(content) // 2]
        raise Reply(status, content, **headers)

    # What a client writes.

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        self._require_owner(name)
        if name in self.state.repositories:
            raise Reply(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.state.repositories[name] = Repository(private=bool(private))
        raise Reply(200, {"url": f"{self.state.url}/{name}"})

    def validate(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        try:
            yaml.safe_load(content.split("---")[1])
        except (IndexError, yaml.YAMLError):
            raise Reply(400, {"errors": [{"message": "no metadata"}], "warnings": []}) from None
        raise Reply(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repository: str, revision: str) -> None:
        self._require_owner(repository)
        large = [file["path"].endswith(".safetensors") for file in json.loads(body)["files"]]
        modes = ["lfs" if each else "regular" for each in large]
        asked = json.loads(body)["files"]
        found = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            for file, mode in zip(asked, modes, strict=True)
        ]
        raise Reply(200, {"files": found})

    def batch(self, body: bytes, repository: str) -> None:
        self._require_owner(repository)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.state.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        raise Reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.stored[oid] = body
        raise Reply(200)

    def commit(self, body: bytes, repository: str, revision: str) -> None:
        self._require_owner(repository)
        found = self._repository(repository)
        contents = dict(self.state.files(repository)) if found.commits else {}
        for line in map(json.loads, body.splitlines()):
            value: Any = line["value"]
            match line["key"]:
                case "file":
                    contents[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    contents[value["path"]] = self.state.stored[value["oid"]]
                case "deletedFile":
                    del contents[value["path"]]
        sha = found.commit(contents)
        raise Reply(200, {"commitUrl": f"{self.state.url}/{repository}/commit/{sha}", "commitOid": sha})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_NAME, _REVISION = "(?P<repository>[^/]+/[^/]+)", "(?P<revision>.+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("HEAD", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    ("GET", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
]


class Client:
    """A machine that has flaxmpc: its cache, its token and its current folder.

    Attributes:
        home: the folder of all these.
        settings: more variables of its environment.
    """

    def __init__(self, home: Path, url: str, **settings: str):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        taken = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "FLAXMPC_ZOO")
        self.environment = {name: value for name, value in os.environ.items() if name not in taken}
        self.environment |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **settings,
        }

    @property
    def cache(self) -> Path:
        return self.home / "hf" / "hub"

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A command of flaxmpc."""
        return self._python("-m", "flaxmpc", *map(str, words))

    def python(self, code: str) -> str:
        """What a program prints."""
        done = self._python("-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def found(self, *models: str, weights: bool = True) -> list[str]:
        """What `zoo.find` says of each of these models; "found" where it finds one."""
        return self._said(f"zoo.find(it, weights={weights}) and 'found'", models)

    def uploaded(self, *asked: tuple[object, str, bool]) -> list[str]:
        """What `hub.upload` says of each folder, repository, and whether it is to be private."""
        return self._said("hub.upload(Path(it[0]), it[1], private=it[2])", [(str(it[0]), *it[1:]) for it in asked])

    def _said(self, call: str, given: Sequence[object]) -> list[str]:
        code = (
            "import json, sys\nfrom pathlib import Path\nfrom flaxmpc.models import hub, zoo\nsaid = []\n"
            "for it in json.loads(sys.stdin.read()):\n"
            "    try:\n"
            f"        said.append({call})\n"
            "    except (OSError, ValueError) as error:\n"
            "        said.append(f'{type(error).__name__}: {error}')\n"
            "print(json.dumps(said))"
        )
        done = self._python("-c", code, given=json.dumps(given))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _python(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            input=given,
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.home,
            timeout=300,
        )
