"""A stand-in for W&B's server on 127.0.0.1, for the real `wandb sweep`, `wandb agent`, online runs, `wandb sync` and
`wandb.Api`. It answers the GraphQL operations that wandb 0.31 sends, keeps what it is told in memory, and schedules
sweeps by W&B's own engine (package `sweeps` 0.3.0). What it knows no answer to is written in `unknown`.

    with wandb_double.serving() as server:
        subprocess.run(["wandb", "sweep", ...], env=os.environ | server.environment(home))
        server.runs["abc123"].history
"""

import collections
import contextlib
import gzip
import importlib
import io
import json
import re
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

ENTITY = "double"
KEY = "0123456789abcdef" * 2 + "01234567"  # wandb wants 40 characters

USER: dict[str, Any] = dict.fromkeys(("id", "entity", "username", "name"), ENTITY) | {
    "flags": "{}", "email": "", "admin": False, "deletedAt": None, "apiKeys": {"edges": []},
    "teams": {"edges": [{"node": {"name": ENTITY}}]},
}  # fmt: skip
CONSTANT: dict[str, dict[str, Any]] = {
    "Viewer": {"viewer": USER},
    "GetViewer": {"viewer": USER},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": {"coreWeaveOrganizationId": None}}},
    "MarkRunFilesUploaded": {"markRunFilesUploaded": {"success": True}},
    "ArtifactType": {"project": {"artifact": None}},
    "ArtifactMembershipByName": {"project": {"artifactCollectionMembership": None}},
}


def engine() -> Any:
    """W&B's sweep engine; by name, as type checkers take our folder of definitions for it."""
    return importlib.import_module("sweeps")


@dataclass
class Row:
    """One run, as the server knows it."""

    id: str
    project: str
    entity: str = ENTITY
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    sweep: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """As on the wire: {key: {"value": value}}."""
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "running"
    exit_code: int | None = None
    stopping: bool = False
    """The sweep's early termination asked for its end."""
    created: float = field(default_factory=time.time)

    @property
    def params(self) -> dict[str, Any]:
        """The config as the program saw it, without wandb's own entry."""
        return {key: entry["value"] for key, entry in self.config.items() if key != "_wandb"}


@dataclass
class SweepRow:
    id: str
    project: str
    entity: str
    config: dict[str, Any]
    agents: dict[str, list[str]] = field(default_factory=dict)
    """Agent id to the runs it was given."""
    state: str = "RUNNING"


class Server(ThreadingHTTPServer):
    """The store and its answers; one GraphQL operation is one method of the operation's name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.runs: dict[str, Row] = {}
        self.sweeps: dict[str, SweepRow] = {}
        self.operations: collections.Counter[str] = collections.Counter()
        self.unknown: list[str] = []
        self.artifacts: list[str] = []
        self.views: list[dict[str, Any]] = []
        """Workspaces saved here."""

    def environment(self, home: Path) -> dict[str, str]:
        """What a child process needs to talk to this server, and to nothing of the caller's."""
        home.mkdir(parents=True, exist_ok=True)
        told = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY, "HOME": str(home)}
        told |= {"WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false", "WANDB_CONSOLE": "off"}
        # Hyperband reads what has been sent; the default of 15 s, which less than 1 means too, outlives a short run.
        told |= {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_X_DISABLE_STATS": "true"}
        folders = {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT")}
        return told | folders | {"WANDB_DIR": str(home)}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or that closed its end early, is what we are here for."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    # ---- GraphQL

    def answer(self, operation: str, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The `data` of one operation. Raises LookupError for one that is not known here."""
        self.operations[operation] += 1
        if operation in CONSTANT:
            return CONSTANT[operation]
        method: Callable[..., dict[str, Any]] | None = getattr(self, f"on_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            raise LookupError(operation)
        with self.lock:
            return method(query, given)

    def on_UpsertBucket(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        run_id = given.get("name") or (given.get("id") or secrets.token_hex(4)).rpartition("/")[2]
        inserted = run_id not in self.runs
        row = self.runs.setdefault(run_id, Row(run_id, given.get("project") or "uncategorized"))
        row.entity, row.project = given.get("entity") or row.entity, given.get("project") or row.project
        row.name = given.get("displayName") or row.name
        row.group, row.job_type = given.get("groupName") or row.group, given.get("jobType") or row.job_type
        row.tags, row.sweep = given.get("tags") or row.tags, given.get("sweep") or row.sweep
        row.config |= json.loads(given.get("config") or "{}")
        row.summary |= json.loads(given.get("summaryMetrics") or "{}")
        if row.state in ("pending", "preempted"):
            row.state = "running"
        return {"upsertBucket": {"bucket": self.node(row), "inserted": inserted}}

    def on_RunResumeStatus(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        model = self.project(given) | {"bucket": None}
        if row := self.runs.get(given["name"]):
            tail = [json.dumps(line) for line in row.history[-1:]]
            counts = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "wandbConfig": "{}"}
            model["bucket"] = self.node(row) | counts | {"historyTail": json.dumps(tail)}
        return {"model": model}

    def on_CreateRunFiles(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        where = f"{self.url}/store/{given['run']}/"
        files = [{"name": name, "uploadUrl": where + urllib.parse.quote(name)} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        """Taken note of; what is COMMITTED at once is not uploaded."""
        self.artifacts.append(given["input"]["artifactCollectionName"])
        artifact = {"id": f"a{len(self.artifacts)}", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    # ---- GraphQL: sweeps

    def on_UpsertSweep(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        sweep_id = given.get("id") or secrets.token_hex(4)
        if sweep_id not in self.sweeps:
            project = given.get("projectName") or "uncategorized"
            config = yaml.safe_load(given["config"])
            self.sweeps[sweep_id] = SweepRow(sweep_id, project, given.get("entityName") or ENTITY, config)
        sweep = self.sweeps[sweep_id]
        sweep.state = given.get("state") or sweep.state
        named = {"name": sweep_id, "project": self.project({"project": sweep.project, "entity": sweep.entity})}
        return {"upsertSweep": {"sweep": named, "configValidationWarnings": []}}

    def on_SweepWithRuns(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": self.project(given) | {"sweep": self.sweep_node(given["sweep"])}}

    def on_GetSweep(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": self.project(given) | {"sweep": self.sweep_node(given["name"])}}

    def on_CreateAgent(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        agent_id = f"{given['sweep']}/{secrets.token_hex(4)}"
        self.sweeps[given["sweep"]].agents[agent_id] = []
        return {"createAgent": {"agent": {"id": agent_id}}}

    def on_Heartbeat(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[given["id"].partition("/")[0]]
        mine, alive = sweep.agents[given["id"]], json.loads(given["runState"])
        for run_id in mine:
            if run_id not in alive and self.runs[run_id].state in ("running", "pending"):
                self.runs[run_id].state = "crashed"
        commands = self.stop_commands(sweep, alive)
        if not alive and not commands:
            commands = [self.next_command(sweep, mine)]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def engine_runs(self, sweep: SweepRow) -> list[Any]:
        """The sweep's runs as W&B's engine takes them."""
        rows = [row for row in self.runs.values() if row.sweep == sweep.id]
        known = [{"name": row.id, "config": row.config, "state": row.state, "history": row.history} for row in rows]
        told = [row.summary for row in rows]
        return [engine().SweepRun(**run, summary_metrics=end) for run, end in zip(known, told, strict=True)]

    def stop_commands(self, sweep: SweepRow, alive: dict[str, bool]) -> list[dict[str, Any]]:
        """Commands for the runs of an agent that the sweep's early termination ends."""
        if "early_terminate" in sweep.config:
            for run in engine().stop_runs(sweep.config, self.engine_runs(sweep)):
                self.runs[str(run.name)].stopping = True
        return [{"type": "stop", "run_id": run_id} for run_id in alive if self.runs[run_id].stopping]

    def next_command(self, sweep: SweepRow, mine: list[str]) -> dict[str, Any]:
        """The next run for an agent, or its end."""
        known = self.engine_runs(sweep)
        cap = sweep.config.get("run_cap")
        proposed = None if cap and len(known) >= cap else engine().next_run(sweep.config, known)
        if proposed is None or sweep.state != "RUNNING":
            sweep.state = "FINISHED"
            return {"type": "exit"}
        # numpy's numbers have no JSON
        args = json.loads(json.dumps(proposed.config, default=lambda value: value.item()))
        row = Row(secrets.token_hex(4), sweep.project, sweep.entity, sweep=sweep.id, config=args, state="pending")
        self.runs[row.id] = row
        mine.append(row.id)
        return {"type": "run", "run_id": row.id, "program": sweep.config.get("program"), "args": args}

    # ---- GraphQL: what wandb.Api reads

    def on_Runs(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        rows = [row for row in self.runs.values() if (row.entity, row.project) == (given["entity"], given["project"])]
        if wanted := re.search(r'"sweep": "(\w+)"', given.get("filters") or ""):
            rows = [row for row in rows if row.sweep == wanted[1]]
        first = int(given.get("cursor") or 0)
        page = rows[first : first + int(given.get("perPage") or 50)]
        heavy = "summaryMetrics" in query
        edges = [{"node": self.node(row, heavy), "cursor": str(first + i + 1)} for i, row in enumerate(page)]
        more = first + len(page) < len(rows)
        found = {"internalId": "1", "readOnly": False, "runCount": len(rows)}
        found["runs"] = {"edges": edges, "pageInfo": {"endCursor": str(first + len(page)), "hasNextPage": more}}
        return {"project": found if self.exists(given) else None}

    def on_Run(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        row = self.runs.get(given["name"])
        return {"project": {"run": self.node(row) if row else None}}

    def on_RunHistoryKeys(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"historyKeys": self.history_keys(self.runs[given["name"]])}}}

    def on_RunParquetHistory(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        """A finished run's rows come as a parquet file, a running one's by HistoryPage, as from W&B's own server."""
        row = self.runs[given["runName"]]
        urls = [f"{self.url}/store/{row.id}/history.parquet"] if row.state in ("finished", "failed") else []
        if urls:
            row.files["history.parquet"] = parquet(row.history)
        return {"project": {"run": {"parquetHistory": {"parquetUrls": urls, "liveData": []}}}}

    def on_HistoryPage(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        first, end, most = int(given["minStep"]), int(given["maxStep"]), int(given["pageSize"])
        lines = [json.dumps(line) for line in self.runs[given["run"]].history if first <= line["_step"] < end]
        return {"project": {"run": {"history": lines[:most]}}}

    def on_UpsertView2(self, _: str, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        return {"upsertView": {"view": {"id": str(len(self.views)), "name": given["name"]}, "inserted": True}}

    # ---- objects

    def exists(self, given: dict[str, Any]) -> bool:
        """Whether anything was ever recorded in the project."""
        rows: list[Row | SweepRow] = [*self.runs.values(), *self.sweeps.values()]
        return any((row.entity, row.project) == (given["entity"], given["project"]) for row in rows)

    def project(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("project") or "uncategorized"
        entity = given.get("entity") or ENTITY
        return {"id": f"p/{name}", "internalId": "1", "name": name, "entityName": entity,
                "entity": {"id": f"e/{entity}", "name": entity}}  # fmt: skip

    def history_keys(self, row: Row) -> dict[str, Any]:
        """Keys of the history and its last step, as W&B's index of a run has them."""
        keys = {key for line in row.history for key in line}
        last = max((line["_step"] for line in row.history), default=-1)
        return {"sets": [], "keys": {key: {} for key in keys}, "lastStep": last}

    def node(self, row: Row, heavy: bool = True) -> dict[str, Any]:
        """A run as GraphQL shows it; the light fragment has neither config nor summary."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.created))
        told = {"id": f"r/{row.id}", "name": row.id, "displayName": row.name or row.id, "projectId": "1",
                "project": self.project({"project": row.project, "entity": row.entity}), "group": row.group,
                "jobType": row.job_type, "tags": row.tags, "state": row.state, "createdAt": when, "heartbeatAt": when,
                "sweepName": row.sweep or None, "historyLineCount": len(row.history), "commit": None, "notes": None,
                "description": None, "readOnly": False, "user": {"name": ENTITY, "username": ENTITY}}  # fmt: skip
        if heavy:
            told |= {"config": json.dumps(row.config), "summaryMetrics": json.dumps(row.summary)}
            told |= {"systemMetrics": "{}", "historyKeys": self.history_keys(row)}
        return told

    def sweep_node(self, sweep_id: str) -> dict[str, Any] | None:
        if (sweep := self.sweeps.get(sweep_id)) is None:
            return None
        rows = [row for row in self.runs.values() if row.sweep == sweep_id]
        config = yaml.safe_dump(sweep.config, sort_keys=False)
        return {"__typename": "Sweep", "id": sweep_id, "name": sweep_id, "displayName": None, "config": config,
                "method": sweep.config.get("method"), "state": sweep.state, "description": None, "bestLoss": None,
                "createdAt": "2026-01-01T00:00:00Z", "updatedAt": None, "heartbeatAt": None, "controller": None,
                "scheduler": None, "runCount": len(rows), "runCountExpected": None,
                "runs": {"edges": [{"node": self.node(row)} for row in rows]}}  # fmt: skip

    # ---- what a run streams

    def stream(self, run_id: str, told: dict[str, Any]) -> dict[str, Any]:
        """One POST of a run's file stream: rows by their offset, the newest summary, perhaps the end."""
        with self.lock:
            row = self.runs[run_id]
            for name, chunk in (told.get("files") or {}).items():
                lines = [json.loads(line) for line in chunk["content"]] if name.endswith((".jsonl", ".json")) else []
                if name == "wandb-history.jsonl":
                    row.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
                elif name == "wandb-summary.json" and lines:
                    row.summary = lines[-1]
            if told.get("preempting"):
                row.state = "preempting"
            if told.get("complete"):
                row.exit_code = told.get("exitcode", 0)
                row.state = "finished" if row.exit_code == 0 else "failed"
            return {"limits": {}, "stopped": row.stopping}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """History rows as a parquet file: a column a key, what is nested as JSON text."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    for key, values in columns.items():
        if any(isinstance(value, dict) for value in values):
            columns[key] = [None if value is None else json.dumps(value) for value in values]
        elif key != "_step" and all(isinstance(value, int | float | None) for value in values):
            columns[key] = [None if value is None else float(value) for value in values]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """HTTP: /graphql, a run's file stream, uploads and downloads of its files; telemetry is thrown away."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_POST(self) -> None:
        data = self.body()
        if self.path == "/graphql":
            asked = json.loads(data)
            named = asked.get("operationName") or ""
            named = named or (re.search(r"(?:query|mutation)\s+(\w+)", asked["query"]) or ["", ""])[1]
            try:
                self.reply({"data": self.server.answer(named, asked["query"], asked.get("variables") or {})})
            except LookupError as error:
                self.reply({"errors": [{"message": f"the double has no answer to {named} ({error!r})"}]}, 400)
        elif streamed := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.reply(self.server.stream(streamed[1], json.loads(data)))
        else:
            self.reply({})

    def do_PUT(self) -> None:
        data = self.body()
        if stored := re.fullmatch(r"/store/([^/]+)/(.+)", self.path):
            self.server.runs[stored[1]].files[urllib.parse.unquote(stored[2])] = data
        self.reply({})

    def do_GET(self) -> None:
        stored = re.fullmatch(r"/store/([^/]+)/(.+)", self.path)
        row = self.server.runs.get(stored[1]) if stored else None
        file = row.files.get(urllib.parse.unquote(stored[2])) if row and stored else None
        self.reply(file if file is not None else b"", 200 if file is not None else 404)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """The server, running until the block ends."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, name="wandb-double", daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
