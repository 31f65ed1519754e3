"""A Hub on the loopback device: the endpoints that huggingface_hub's client really calls, over real HTTP.

Repositories have commits, branches, pull requests, private and gated ones; weights go through LFS, everything else
through the commit, as on the Hub. Faults can be set for any request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {f"hf_{name}0123456789": name for name in ("owner", "guest", "user")}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")


@dataclass
class Repository:
    """A repository: files by commit, and the commit that each branch, tag or pull request is at."""

    owner: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        """Make `files` what `ref` is at; the commit."""
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
        sha = hashlib.sha1(json.dumps([content, len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """What is there at a ref or commit."""
        return self.commits[self.refs.get(ref, ref)]


@dataclass(frozen=True)
class Request:
    """One request, as a fault sees it."""

    number: int
    method: str
    path: str


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request.

    Args:
        status: answer so, and do nothing.
        error_code: the `X-Error-Code` of that answer.
        cut: break the connection: `before` the request's body is read, in the midst of it, `after` it was carried
            out but before the answer, or in the midst of the answer; `size` leaves out the length of the answer.
        wait: seconds to wait first.
        then: called at that point too.
    """

    status: int | None = None
    error_code: str | None = None
    cut: str | None = None
    wait: float = 0.0
    then: Callable[[], None] | None = None


def failing(status: int, *, code: str | None = None, where: str = "") -> Callable[[Request], Fault | None]:
    """Every request whose path contains `where` is answered so."""
    return lambda request: Fault(status=status, error_code=code) if where in request.path else None


class HubServer:
    """The server; use it as a context.

    Attributes:
        repositories: by name.
        requests: every one so far.
        fault: what is to go wrong with a request, if anything.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.bodies: list[bytes] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.lock = threading.RLock()
        methods = {f"do_{method}": _Handler.do_GET for method in ("HEAD", "POST", "PUT")}
        handler = type("Handler", (_Handler,), {"hub": self, **methods})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **how: Any) -> str:
        """A repository of the owner's with one commit; the commit."""
        repository = self.repositories[name] = Repository(name.partition("/")[0], **how)
        return repository.commit("main", files)


class _StopError(Exception):
    """The connection is cut."""


class _Handler(BaseHTTPRequestHandler):
    """The routes, by what follows the method."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    body = b""
    fault: Fault | None = None

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_StopError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_GET(self) -> None:
        """Any method: the routes know which they take."""
        with self.hub.lock:
            request = Request(len(self.hub.requests), self.command, self.path)
            self.hub.requests.append(request)
            self.fault = fault = self.hub.fault(request)
        if fault is not None:
            time.sleep(fault.wait)
        self._cut("before")
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut == "within":
            self.rfile.read(length // 2)
            self._cut("within")
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.hub.bodies.append(self.body)
        if fault is not None and fault.status is not None:
            return self._answer(fault.status, {"error": "as set"}, {"X-Error-Code": fault.error_code})
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match is not None and method in (self.command, "GET" if self.command == "HEAD" else ""):
                with self.hub.lock:
                    return action(self, *(unquote(group) for group in match.groups()))
        return self._answer(404, {"error": f"no route {self.command} {url.path}"})

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _cut(self, where: str) -> None:
        if self.fault is not None and self.fault.cut == where:
            if self.fault.then is not None:
                self.fault.then()
            raise _StopError

    def _answer(self, status: int, content: Any = None, headers: dict[str, str | None] | None = None) -> None:
        self._cut("after")
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value is not None:
                self.send_header(name, value)
        if self.fault is None or self.fault.cut != "size":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault is not None and self.fault.cut == "answer":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self._cut("answer")
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repository(self, name: str, *, write: bool = False) -> Repository | None:
        """The repository, if this user may do that; None where the answer has been given."""
        found = self.hub.repositories.get(name)
        if self.headers.get("Authorization") and self.user is None:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif found is None or (found.private and self.user != found.owner):
            self._answer(404 if self.user else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif write and self.user is None:
            self._answer(401, {"error": "Unauthorized"})
        elif write and self.user != found.owner and "create_pr" not in self.query:
            self._answer(403, {"error": "You may not write to this repository"})
        else:
            return found
        return None

    def _commit_of(self, found: Repository, revision: str) -> str | None:
        sha = found.refs.get(revision, revision)
        if sha in found.commits:
            return sha
        self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def whoami(self) -> None:
        if self.user is None:
            return self._answer(401, {"error": "Invalid username or password."})
        return self._answer(200, {"type": "user", "name": self.user, "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if self.user is None:
            return self._answer(401, {"error": "Invalid username or password."})
        if owner != self.user:
            return self._answer(403, {"error": "You may not create a repository here"})
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._answer(409, {**url, "error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self._answer(200, url)

    def info(self, name: str, revision: str = "main") -> None:
        found = self._repository(name)
        sha = found and self._commit_of(found, revision)
        if found and sha:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in found.files(sha).items()]
            about = {"id": name, "modelId": name, "sha": sha, "private": found.private, "tags": []}
            self._answer(200, {**about, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        found = self._repository(name)
        sha = found and self._commit_of(found, revision)
        if found and sha:
            files = found.files(sha).items()
            about = [{"path": path, "size": len(data), "oid": _oid(path, data)} for path, data in files]
            self._answer(200, [{"type": "file", **each} for each in about])

    def branch(self, name: str, branch: str) -> None:
        found = self._repository(name, write=True)
        if found and branch in found.refs:
            return self._answer(409, {"error": "Reference already exists"})
        if found:
            found.refs[branch] = found.refs["main"]
            self._answer(200, {})
        return None

    def preupload(self, name: str, revision: str) -> None:
        found = self._repository(name, write=True)
        if found and self._commit_of(found, revision):
            there, answers = found.files(revision), []
            for path in (file["path"] for file in json.loads(self.body)["files"]):
                mode, oid = "lfs" if path.endswith(LFS_SUFFIXES) else "regular", _oid(path, there.get(path))
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer(200, {"files": answers})

    def lfs_batch(self, name: str) -> None:
        if self._repository(name):
            objects = json.loads(self.body)["objects"]
            for each in objects:
                if each["oid"] not in self.hub.objects:
                    each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "not the object that was announced"})
        self.hub.objects[oid] = self.body
        return self._answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        found = self._repository(name, write=True)
        if not found or not self._commit_of(found, revision):
            return None
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", found.refs[revision]) != found.refs[revision]:
            return self._answer(412, {"error": "A commit has happened since"})
        files = dict(found.files(revision))
        for kind, value in ((change["key"], change["value"]) for change in changes):
            if kind == "deletedFile":
                del files[value["path"]]
            else:  # an object that is missing is an error of the client's
                given = kind == "file"
                files[value["path"]] = base64.b64decode(value["content"]) if given else self.hub.objects[value["oid"]]
        number, proposed = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1, "create_pr" in self.query
        sha, url = found.commit(f"refs/pr/{number}" if proposed else revision, files), f"{self.hub.url}/{name}"
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if proposed else {}
        return self._answer(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull_request}
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name)
        sha = found and self._commit_of(found, revision)
        if not found or not sha:
            return None
        content = found.files(sha).get(path)
        if content is None:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return self._answer(200, content, {"X-Repo-Commit": sha, "ETag": f'"{_oid(path, content)}"'})


def _oid(name: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"((?:[\w.-]+/)?[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/(?:models|spaces)/{NAME}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/(?:models|spaces)/{NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/(?:models|spaces)/{NAME}/commit/(.+)", _Handler.commit),
    ("GET", f"/api/(?:models|spaces)/{NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/(?:models|spaces)/{NAME}/revision/(.+)", _Handler.info),
    ("GET", f"/api/(?:models|spaces)/{NAME}", _Handler.info),
    ("POST", rf"/(?:spaces/)?{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", _Handler.lfs_upload),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
