"""A stand-in for the Hugging Face hub on loopback: repositories of small files, made, committed to, listed and read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_a_test"


class Hub(BaseHTTPRequestHandler):
    """`server.repos` maps ids to {file: bytes}; `server.seen` holds (method, path, token) of every request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        repos = self.server.repos
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            found = repo in repos
            repos.setdefault(repo, {})
            return self._answer(409 if found else 200, {"url": f"{self.server.url}/{repo}", "error": "exists"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(?:\?.*)?", self.path)
        if match is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        repo, action = match.groups()
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                self.server.messages.append(line["value"]["summary"])
        sha = self._sha(repo)
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self._note()
        match = re.match(r"/(?:api/models/)?([^/]+/[^/?]+)(?:/(revision|tree|resolve)/([^/?]+))?/?([^?]*)", self.path)
        repo, kind, _, name = match.groups()
        if repo not in self.server.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files, sha = self.server.repos[repo], self._sha(repo)
        if kind == "resolve":
            data = files[name]
            marks = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
            return self._answer(200, data, marks)
        if kind == "tree":
            return self._answer(
                200, [{"type": "file", "path": n, "size": len(d), "oid": _blob(d)} for n, d in files.items()]
            )
        self._answer(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": n} for n in files]})

    def _note(self):
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))

    def _sha(self, repo):
        return hashlib.sha1(repr(sorted(self.server.repos[repo].items())).encode()).hexdigest()

    def _answer(self, code, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repos, server.seen, server.messages = {}, [], []
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
