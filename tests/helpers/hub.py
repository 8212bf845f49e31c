"""A stand-in of the hub's HTTP API on a port of this machine: repositories with branches, uploads and downloads.

It answers what ``huggingface_hub`` asks for in ``create_repo``, ``create_commit`` (inline files, and large ones through
LFS), ``snapshot_download`` and ``whoami``; anything else is 404.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Hub:
    """Attributes:
    commits: files by commit, in order.
    branches: by repository, the commit of each branch.
    requests: method and path of every request.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None  # answered to everything

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        branches = self.branches[repository]
        return self.commits[branches.get(revision, revision)]

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{repository} {branch} {len(self.commits)}".encode()).hexdigest()
        before = self.commits.get(self.branches[repository].get(branch), {})
        self.commits[oid] = before | files
        self.branches[repository][branch] = oid
        return oid


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, content: bytes | dict | list = b"", status: int = 200, **headers) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

        @property
        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def handle_any(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body
            hub.requests.append((self.command, path))
            if hub.status is not None:
                return self.refuse(hub.status, "Unavailable")
            writes = self.command != "HEAD" and (self.command != "GET" or path == "/api/whoami-v2")
            if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/large/"):
                return self.refuse(401, "Unauthorized")
            for pattern, method, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == self.command:
                    return answer(self, *found.groups(), body)
            return self.refuse(404, "RepoNotFound")

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        # --- reading ---

        def commit_of(self, repository: str, revision: str) -> str | None:
            if repository not in hub.branches:
                self.refuse(404, "RepoNotFound")
                return None
            oid = hub.branches[repository].get(revision, revision)
            if oid not in hub.commits:
                self.refuse(404, "RevisionNotFound")
                return None
            return oid

        def info(self, repository: str, revision: str | None, body: bytes) -> None:
            if oid := self.commit_of(repository, revision or "main"):
                siblings = [{"rfilename": name} for name in hub.commits[oid]]
                self.answer({"id": repository, "sha": oid, "siblings": siblings, "private": False, "tags": []})

        def tree(self, repository: str, revision: str, body: bytes) -> None:
            if oid := self.commit_of(repository, revision):
                files = hub.commits[oid].items()
                self.answer(
                    [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
                )

        def resolve(self, repository: str, revision: str, name: str, body: bytes) -> None:
            if oid := self.commit_of(repository, revision):
                content = hub.commits[oid].get(name)
                if content is None:
                    return self.refuse(404, "EntryNotFound")
                self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=oid)

        # --- writing ---

        def whoami(self, body: bytes) -> None:
            self.answer({"type": "user", "name": "user", "auth": {}, "orgs": []})

        def create(self, body: bytes) -> None:
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if repository in hub.branches:
                return self.answer({"error": "exists", "url": f"/{repository}"}, 409)
            hub.branches[repository], hub.private[repository] = {}, asked.get("visibility") == "private"
            hub.commit(repository, "main", {".gitattributes": b""})
            self.answer({"url": f"http://{self.headers['Host']}/{repository}", "name": repository})

        def branch(self, repository: str, name: str, body: bytes) -> None:
            hub.branches[repository].setdefault(name, hub.branches[repository]["main"])
            self.answer({})

        def preupload(self, repository: str, revision: str, body: bytes) -> None:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            self.answer(
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": modes[each["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for each in files
                    ]
                }
            )

        def batch(self, repository: str, body: bytes) -> None:
            here = f"http://{self.headers['Host']}/large/"
            objects = [
                {k: each[k] for k in ("oid", "size")} | {"actions": {"upload": {"href": here + each["oid"]}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})

        def upload(self, oid: str, body: bytes) -> None:
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            self.answer()

        def validate(self, body: bytes) -> None:
            self.answer({"errors": [], "warnings": []})

        def committed(self, repository: str, revision: str, body: bytes) -> None:
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            oid, host = hub.commit(repository, revision, files), self.headers["Host"]
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"http://{host}/{repository}/commit/{oid}"})

    repo = r"([\w.-]+/[\w.-]+)"
    ROUTES = [
        (rf"/api/models/{repo}(?:/revision/(.+))?", "GET", Handler.info),
        (rf"/api/models/{repo}/tree/([^/]+)", "GET", Handler.tree),
        (rf"/{repo}/resolve/([^/]+)/(.+)", "GET", Handler.resolve),
        (rf"/{repo}/resolve/([^/]+)/(.+)", "HEAD", Handler.resolve),
        (r"/api/whoami-v2", "GET", Handler.whoami),
        (r"/api/repos/create", "POST", Handler.create),
        (rf"/api/models/{repo}/branch/(.+)", "POST", Handler.branch),
        (rf"/api/models/{repo}/preupload/(.+)", "POST", Handler.preupload),
        (rf"/{repo}\.git/info/lfs/objects/batch", "POST", Handler.batch),
        (r"/large/(.+)", "PUT", Handler.upload),
        (r"/api/validate-yaml", "POST", Handler.validate),
        (rf"/api/models/{repo}/commit/(.+)", "POST", Handler.committed),
    ]
    return Handler


@contextmanager
def serving():
    """A :class:`Hub` and its address on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
