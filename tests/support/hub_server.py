"""A Hub on the loopback device: the endpoints that huggingface_hub's client really calls, over real HTTP.

Repositories have commits, branches, pull requests, private and gated ones; weights go through LFS, everything else
through the commit, as on the Hub. Faults can be set for any request.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
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


class Request(NamedTuple):
    """One request, as a fault sees it."""

    number: int
    method: str
    path: str


class Fault(NamedTuple):
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
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self, **methods}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **how: Any) -> str:
        """A repository of the owner's with one commit; the commit."""
        repository = self.repositories[name] = Repository(name.partition("/")[0], **how)
        return repository.commit("main", files)


class _RefusedError(Exception):
    """The answer is an error, with a code of the Hub's and more to say, where there is any."""

    def __init__(self, status: int, error: str, code: str | None = None, **more: str):
        super().__init__(error)
        self.status, self.code, self.content = status, code, {"error": error, **more}


class _Handler(BaseHTTPRequestHandler):
    """The routes, by what follows the method: each gives the content of its answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a cut, or the other side's
            self.close_connection = True

    def do_GET(self) -> None:
        """Any method: the routes know which they take."""
        with self.hub.lock:
            request = Request(len(self.hub.requests), self.command, self.path)
            self.hub.requests.append(request)
            self.fault = self.hub.fault(request) or Fault()
        time.sleep(self.fault.wait)
        self._cut("before")
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault.cut == "within":
            self.rfile.read(length // 2)
            self._cut("within")
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.hub.bodies.append(self.body)
        self.told: dict[str, str] = {}
        try:
            status, content = 200, self._content()
        except _RefusedError as refused:
            status, content = refused.status, refused.content
            self.told |= {"X-Error-Code": refused.code} if refused.code else {}
        self._answer(status, content if isinstance(content, bytes) else json.dumps(content).encode())

    def _content(self) -> Any:
        if self.fault.status is not None:
            raise _RefusedError(self.fault.status, "as set", self.fault.error_code)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match is not None and method in (self.command, "GET" if self.command == "HEAD" else ""):
                with self.hub.lock:
                    return action(self, *(unquote(group) for group in match.groups()))
        raise _RefusedError(404, f"no route {self.command} {url.path}")

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _cut(self, where: str) -> None:
        if self.fault.cut == where:
            if self.fault.then is not None:
                self.fault.then()
            raise ConnectionResetError

    def _answer(self, status: int, data: bytes) -> None:
        self._cut("after")
        self.send_response(status)
        for name, value in self.told.items():
            self.send_header(name, value)
        if self.fault.cut != "size":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault.cut == "answer":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self._cut("answer")
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        """The repository, if this user may do that."""
        found = self.hub.repositories.get(name)
        if self.headers.get("Authorization") and self.user is None:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        if found is None or (found.private and self.user != found.owner):
            raise _RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise _RefusedError(401, "Unauthorized")
        if write and self.user != found.owner and "create_pr" not in self.query:
            raise _RefusedError(403, "You may not write to this repository")
        return found

    def _at(self, found: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit of a revision, and its files."""
        sha = found.refs.get(revision, revision)
        if sha not in found.commits:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return sha, found.commits[sha]

    def whoami(self) -> Any:
        if self.user is None:
            raise _RefusedError(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "auth": {"accessToken": {"role": "write"}}}

    def create(self) -> Any:
        asked = json.loads(self.body)
        user = self.whoami()["name"]
        if (owner := asked.get("organization") or user) != user:
            raise _RefusedError(403, "You may not create a repository here")
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            raise _RefusedError(409, "You already created this model repo", **url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return url

    def info(self, name: str, revision: str = "main") -> Any:
        found = self._repository(name)
        sha, files = self._at(found, revision)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        return {"id": name, "modelId": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings}

    def tree(self, name: str, revision: str) -> Any:
        _, files = self._at(self._repository(name), revision)
        about = [{"path": path, "size": len(data), "oid": _oid(path, data)} for path, data in files.items()]
        return [{"type": "file", **each} for each in about]

    def branch(self, name: str, branch: str) -> Any:
        found = self._repository(name, write=True)
        if branch in found.refs:
            raise _RefusedError(409, "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return {}

    def preupload(self, name: str, revision: str) -> Any:
        _, there = self._at(self._repository(name, write=True), revision)
        answers = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode, oid = "lfs" if path.endswith(LFS_SUFFIXES) else "regular", _oid(path, there.get(path))
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, name: str) -> Any:
        self._repository(name)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "not the object that was announced")
        self.hub.objects[oid] = self.body
        return {}

    def commit(self, name: str, revision: str) -> Any:
        found = self._repository(name, write=True)
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        sha, before = self._at(found, revision)
        if header["value"].get("parentCommit", sha) != sha:
            raise _RefusedError(412, "A commit has happened since")
        files = dict(before)
        for kind, value in ((change["key"], change["value"]) for change in changes):
            if kind == "deletedFile":
                del files[value["path"]]
            else:  # an object that is missing is an error of the client's
                given = kind == "file"
                files[value["path"]] = base64.b64decode(value["content"]) if given else self.hub.objects[value["oid"]]
        number, proposed = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1, "create_pr" in self.query
        sha, url = found.commit(f"refs/pr/{number}" if proposed else revision, files), f"{self.hub.url}/{name}"
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if proposed else {}
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull_request}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        sha, files = self._at(self._repository(name), revision)
        self.told["X-Repo-Commit"] = sha
        if path not in files:
            raise _RefusedError(404, "no", "EntryNotFound")
        self.told["ETag"] = f'"{_oid(path, files[path])}"'
        return files[path]


def _oid(name: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"((?:[\w.-]+/)?[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", lambda handler: {"errors": [], "warnings": []}),
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
