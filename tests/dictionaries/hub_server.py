"""The few routes of the Hub's protocol that one upload and one download take, over a folder in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """`commits[repo]` are its states, oldest first: path -> content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, list[dict[str, bytes]]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self, repo: str, index: int = -1) -> str:
        files = self.commits[repo][index]
        return hashlib.sha1(repr((index % len(self.commits[repo]), sorted(files.items()))).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """At "main" or at a commit."""
        states = self.commits.get(repo, [])
        named = {"main": states[-1]} if states else {}
        named |= {self.sha(repo, index): files for index, files in enumerate(states)}
        return named.get(revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound", X_Error_Message=what)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)
            repo = "/".join(filter(None, [name.get("organization"), name["name"]]))
            if repo.startswith("others/"):
                return self.answer(403, {"error": "You don't have the rights to create a model here"})
            status = 409 if repo in self.server.commits else 200
            self.server.commits.setdefault(repo, [{}])
            return self.answer(status, {"url": f"{self.server.url}/{repo}", "id": repo})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(\?.*)?", self.path)
        if match is None or match[1] not in self.server.commits:
            return self.missing("Repo")
        if match[2] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        state = dict(self.server.commits[match[1]][-1])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                state[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.server.commits[match[1]].append(state)
        sha = self.server.sha(match[1])
        self.answer(200, {"commitUrl": f"{self.server.url}/{match[1]}/commit/{sha}", "commitOid": sha})

    def do_GET(self) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)(\?.*)?", self.path)
        if match is not None:
            files = self.server.files(match[1], match[3])
            if files is None:
                return self.missing("Revision" if match[1] in self.server.commits else "Repo")
            if match[2] == "tree":
                listed = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
                return self.answer(200, listed)
            index = -1 if match[3] == "main" else self.server.commits[match[1]].index(files)
            found = [{"rfilename": path} for path in files]
            return self.answer(200, {"id": match[1], "sha": self.server.sha(match[1], index), "siblings": found})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        files = None if match is None else self.server.files(match[1], match[2])
        if match is None or files is None:
            return self.missing("Repo")
        if match[3] not in files:
            return self.missing("Entry")
        content = files[match[3]]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=match[2])

    do_HEAD = do_GET
