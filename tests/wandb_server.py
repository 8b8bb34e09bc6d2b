"""A server that W&B's client takes for its own, in this process: it keeps what runs send, and no more."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Listens on a port of its own until `shutdown`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, list[str]] = {}  # by run, its lines
        self.summaries: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []  # names of GraphQL's operations, and variables
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes W&B's client talk to it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the one run that there is."""
        (lines,) = self.history.values()
        return list(map(json.loads, lines))

    def summary(self) -> dict[str, Any]:
        """The summary of the one run that there is."""
        (text,) = self.summaries.values()
        return dict(json.loads(text))

    def sent(self, operation: str) -> list[dict[str, Any]]:
        """The variables of each request of a kind."""
        return [variables for name, variables in self.requests if name == operation]

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Takes up lines of a run, each from its place on."""
        if lines := files.get("wandb-history.jsonl"):
            self.history.setdefault(run, [])[lines["offset"] :] = lines["content"]
        if lines := files.get("wandb-summary.json"):
            self.summaries[run] = lines["content"][-1]

    def answer(self, operation: str, given: dict[str, Any]) -> Any:
        """What W&B answers to an operation, in short."""
        self.requests.append((operation, given))
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        name = given.get("name", "")
        match operation:
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self._bucket(name)}}
            case "UpsertBucket":
                self.history.setdefault(name, [])
                bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in given["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "NotifyScriptableRunAlert":
                return {"notifyScriptableRunAlert": {"success": True}}
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}"}, "serverInfo": None}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if not (lines := self.history.get(name)):
            return None
        return {
            "name": name,
            "summaryMetrics": self.summaries.get(name, "{}"),
            "historyTail": json.dumps(lines[-1:]),
            "historyLineCount": len(lines),
            **{"eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'},
            **{"logLineCount": 0, "eventsLineCount": 0},
        }


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        """GraphQL, or lines of a run."""
        data = self._read()
        content = json.loads(data) if self.path.startswith(("/graphql", "/files/")) else {}
        if self.path.startswith("/files/"):
            self.server.stream(self.path.split("/")[4], content.get("files") or {})
            return self._say({})
        named = re.search(r"(?:query|mutation)\s+(\w+)", content.get("query", ""))
        operation = named[1] if named else ""
        return self._say({"data": self.server.answer(operation, content.get("variables") or {})})

    def do_PUT(self) -> None:
        """A file, which is forgotten."""
        self._read()
        self._say({})

    def do_GET(self) -> None:
        """Nothing is here to be had."""
        self._say({})

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _read(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

    def _say(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
