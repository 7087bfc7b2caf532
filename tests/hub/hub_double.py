"""A double of the Hub on 127.0.0.1, for the requests that huggingface_hub makes to push and to load models.

Repositories are lists of commits, each a dictionary of files; branches and tags name commits. Small files come with
the commit, large ones by git-LFS before it, as the Hub wants them. Faults can be ordered.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "doubleSecret" * 2
USER = "somebody"
CUT = "cut"  # a fault: the connection ends before there is an answer


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the files of each commit
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]

    def resolve(self, revision: str) -> str:
        return self.branches.get(revision) or self.tags.get(revision) or revision


class HubDouble:
    """The server. `faults` maps patterns of "METHOD /path" to a status or `CUT`; each strikes until it is removed."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: dict[str, int | str] = {}
        self.requests: list[str] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def fault(self, pattern: str, what: int | str):
        self.faults[pattern] = what
        try:
            yield
        finally:
            del self.faults[pattern]

    def answer(self, method: str, url: str, headers, body: bytes) -> tuple[int, dict, bytes]:
        """Gives status, headers and body."""
        path, query = urlparse(url).path, urlparse(url).query
        with self._lock:
            self._is_pull_request = "create_pr=1" in query
            self.requests.append(f"{method} {path}")
            for pattern, what in self.faults.items():
                if re.search(pattern, f"{method} {path}"):
                    if what == CUT:
                        raise ConnectionAbortedError
                    return _json({"error": f"the double was told to answer {what}"}, what)
            return self._route(method, path, headers, body)

    def _route(self, method: str, path: str, headers, body: bytes) -> tuple[int, dict, bytes]:
        authorized = headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/lfs/"):
            return self._store(method, path, body)
        if method == "POST" and path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return _json({"name": USER, "type": "user", "orgs": []}) if authorized else _error(401)
        if method not in ("GET", "HEAD") and not authorized:
            return _error(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)", path)
        repository = self.repositories.get(repo and repo[1])
        if repository is None or (repository.private and not authorized):
            return _error(404, "RepoNotFound")
        for pattern, action in self._ACTIONS.items():
            if match := re.fullmatch(pattern, f"{method} {path.replace(repo[1], 'R', 1)}"):
                return action(self, repo[1], repository, body, *map(unquote, match.groups()))
        return _error(404, "EntryNotFound")

    def _create(self, asked: dict) -> tuple[int, dict, bytes]:
        owner = asked.get("organization") or USER
        if owner != USER:
            return _error(403)
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return _json(answer, 409)
        repository = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.repositories[name] = repository
        return _json(answer)

    def _store(self, method: str, path: str, body: bytes) -> tuple[int, dict, bytes]:
        oid = path.split("/")[-1]
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return _error(400)
            self.lfs[oid] = body
        return _json({})

    def _info(self, name, repository, body, revision="main"):
        oid = repository.resolve(revision)
        if oid not in repository.commits:
            return _error(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        return _json(
            {"_id": "1", "id": name, "modelId": name, "sha": oid, "private": repository.private, "tags": [],
             "siblings": siblings}
        )  # fmt: skip

    def _refs(self, name, repository, body):
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        refs = {
            kind: [{"name": ref, "ref": f"refs/{at}/{ref}", "targetCommit": oid} for ref, oid in found.items()]
            for kind, (at, found) in kinds.items()
        }
        return _json({**refs, "converts": []})

    def _branch(self, name, repository, body, branch):
        if branch in repository.branches:
            return _error(409)
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = repository.resolve(start)
        return _json({})

    def _tag(self, name, repository, body, revision):
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            return _error(409)
        repository.tags[tag] = repository.resolve(revision)
        return _json({})

    def _preupload(self, name, repository, body, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return _json({"files": files})

    def _batch(self, name, repository, body):
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.lfs:
                url = f"{self.url}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": url}, "verify": {"href": url}}
            objects.append(entry)
        return _json({"transfer": "basic", "objects": objects})

    def _commit(self, name, repository, body, revision):
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            return _error(412)
        files = dict(repository.files(revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    return _error(400)
                files[value["path"]] = self.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        branch = "refs/pr/1" if self._is_pull_request else revision
        oid = repository.commit(branch, files, header["summary"])
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
        if self._is_pull_request:
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/1"
        return _json(answer)

    def _tree(self, name, repository, body, revision):
        if repository.resolve(revision) not in repository.commits:
            return _error(404, "RevisionNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.files(revision).items()
        ]
        return _json(entries)

    def _resolve(self, name, repository, body, revision, path):
        oid = repository.resolve(revision)
        if oid not in repository.commits:
            return _error(404, "RevisionNotFound")
        content = repository.commits[oid].get(path)
        if content is None:
            return _error(404, "EntryNotFound", {"X-Repo-Commit": oid})
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": oid}, content

    _ACTIONS = {
        r"GET /api/models/R": _info,
        r"GET /api/models/R/revision/([^/]+)": _info,
        r"GET /api/models/R/refs": _refs,
        r"POST /api/models/R/branch/([^/]+)": _branch,
        r"POST /api/models/R/tag/([^/]+)": _tag,
        r"POST /api/models/R/preupload/([^/]+)": _preupload,
        r"POST /api/models/R/commit/([^/]+)": _commit,
        r"GET /api/models/R/tree/([^/]+)": _tree,
        r"POST /R\.git/info/lfs/objects/batch": _batch,
        r"(?:GET|HEAD) /R/resolve/([^/]+)/(.+)": _resolve,
    }


def _json(content, status: int = 200) -> tuple[int, dict, bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str | None = None, headers: dict | None = None) -> tuple[int, dict, bytes]:
    answer = _json({"error": code or f"status {status}"}, status)
    return status, {**answer[1], **({"X-Error-Code": code} if code else {}), **(headers or {})}, answer[2]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            status, headers, content = self.hub.answer(self.command, self.path, self.headers, body)
        except ConnectionAbortedError:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_):
        pass
