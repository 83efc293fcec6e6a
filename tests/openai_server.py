"""An OpenAI-compatible server for the tests: chat completions, models, files and batches, and misbehaviour on purpose.

It answers from the question it was sent alone, as a model would: it reads the actions in it and groups them by threes.
The faults are chosen by a function of the trajectory (its last `Actions:` line), so a restarted client meets the same.

    python tests/openai_server.py --port 8000 --seconds 1      # by hand, for a look
"""

import argparse
import email
import json
import re
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

MODEL = "teacher-1"
FAULTS = ["rate limit", "server error", "dropped", "stall", "truncated", "prose", "fence", "missing one", "missing two",
          "invented", "reordered", "duplicated", "empty", "capitals", "not json", "unlisted"]
BEFORE_THE_ANSWER = FAULTS[:4]  # the request fails, nothing is paid for, the client asks again by itself


class Server(ThreadingHTTPServer):
    """`faults` maps a trajectory's key to the fault of its first answer; `seconds` is how long an answer takes."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0, faults=lambda key: None, seconds: float = 0.0, key: str = "", stall: float = 5,
                 refuse: dict | None = None, tokens: tuple[int, int] | None = None, polls: int = 2):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.seconds, self.key, self.stall = faults, seconds, key, stall
        self.refuse, self.tokens, self.polls = refuse, tokens, polls
        self.lock = threading.Lock()
        self.paid = Counter()  # completions that were sent, by trajectory
        self.attempts = Counter()  # chat requests, by trajectory
        self.times, self.last_answer = [], 0.0  # (trajectory, when) of each request; when the last answer went
        self.files, self.batches, self.numbers = {}, {}, count(1)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def complete(self, body: dict) -> dict:
        """The completion for a request; the fault of a trajectory is used up by its first answer."""
        text = body["messages"][-1]["content"]
        key, actions = read_question(text)
        with self.lock:
            fault = self.faults(key)
            if fault == "always prose alone":
                answer = "I would rather not say."
            elif fault == "echo key":
                answer = f"Your key is {self.key}."
            else:
                answer = spoil(answer_for(actions), None if self.paid[key] else fault)
            self.paid[key] += 1
        read, written = self.tokens or (len(text) // 4, len(answer) // 4)
        return {"id": f"chatcmpl-{next(self.numbers)}", "object": "chat.completion", "created": int(time.time()),
                "model": body["model"],
                "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
                "choices": [{"index": 0, "finish_reason": "stop",
                             "message": {"role": "assistant", "content": answer}}]}

    def work_on(self, batch: dict):
        """Advance a batch by one poll; answer its requests, all at once, when it is due."""
        batch["polls"] += 1
        if batch["status"] != "in_progress" or batch["polls"] < self.polls:
            return
        lines, refused = [], []
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            out = {"id": f"batch_req_{next(self.numbers)}", "custom_id": line["custom_id"], "error": None}
            if self.faults(read_question(line["body"]["messages"][-1]["content"])[0]) == "batch error":
                error = {"message": "overloaded", "code": "server_error"}
                out["response"] = {"status_code": 500, "body": {"error": error}}
                refused.append(out)
                continue
            out["response"] = {"status_code": 200, "body": self.complete(line["body"])}
            lines.append(out)
        for name, content in (("output_file_id", lines), ("error_file_id", refused)):
            if content:
                batch[name] = f"file-{next(self.numbers)}"
                self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in reversed(content))
        batch["status"] = "completed"
        batch["request_counts"] = {"total": len(lines) + len(refused), "completed": len(lines), "failed": len(refused)}


def read_question(text: str) -> tuple[str, list[str]]:
    """A question's trajectory, as a short key, and the actions that are asked about."""
    task = re.findall(r"^Task: (.*)$", text, re.M)[-1]
    listed = [line for line in text.splitlines() if line.startswith("Actions: ")]
    if not listed:  # the short question
        listed = re.findall(r"^(?:between|after|before) .*?: ('.*)$", text, re.M)
    actions = re.findall(r"'([^']*)'", " ".join(listed if "Actions: " not in text else listed[-1:]))
    return f"{zlib.crc32(task.encode()):08x}", actions


def answer_for(actions: list[str]) -> list[tuple[str, list[str]]]:
    """Sub-goals of three actions each, named after the first one and its place."""
    return [(f"step_{i // 3 + 1}({actions[i].partition(' ')[2] or actions[i]}, of three)", actions[i : i + 3])
            for i in range(0, len(actions), 3)]


def spoil(subgoals: list[tuple[str, list[str]]], fault: str | None) -> str:
    """The answer as text, with one of the ways in which language models miss the form."""
    subgoals = [(name, list(group)) for name, group in subgoals]
    flat = [group for _, group in subgoals]
    if fault == "missing one":
        flat[0].pop()
    elif fault == "missing two":
        del flat[0][1:]
    elif fault == "invented":
        flat[0].insert(1, "sing a song about the kitchen")
        flat[-1].append("bow to the audience")
    elif fault == "reordered" and len(subgoals) > 1:
        subgoals[0], subgoals[1] = subgoals[1], subgoals[0]
    elif fault == "duplicated":
        subgoals.insert(1, subgoals[0])
        flat[-1].append(flat[-1][-1])
    elif fault == "capitals":
        subgoals = [(name, [action.capitalize().replace(" ", "  ") for action in group]) for name, group in subgoals]
    elif fault == "unlisted":
        return "Sub-goals:\n" + "\n".join(f'{i}. **{name}**:\n' + "\n".join(f"   - {action}" for action in group)
                                         for i, (name, group) in enumerate(subgoals, 1))
    elif fault == "not json":
        return json.dumps({name: group for name, group in subgoals}, indent=1)
    elif fault == "empty":
        return ""
    text = "\n".join("{}- {}: {{{}}}".format(i, name, ", ".join(f"'{action}'" for action in group))
                     for i, (name, group) in enumerate(subgoals, 1))
    if fault == "prose":
        text = f"Certainly! Here are the expert's sub-goals (numbered):\n\n{text}\n\nI hope this 'helps' (let me know)!"
    elif fault == "fence":
        text = f"```python\n{text.replace(chr(39), chr(34))}\n```"
    elif fault == "truncated":
        text = text[: int(len(text) * 0.6)]
    return text


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body: dict | str, status: int = 200, **headers):
        data = (json.dumps(body) if isinstance(body, dict) else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if isinstance(body, dict) else "text/plain")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        with suppress(OSError):  # a client that was killed does not listen any more
            self.end_headers()
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str, **headers):
        self.reply({"error": {"message": message, "type": code, "param": None, "code": code}}, status, **headers)

    def allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.server.key and given != f"Bearer {self.server.key}":
            self.refuse(401, "invalid_api_key", f"Incorrect API key provided: {given}.")
            return False
        return True

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        if not self.allowed():
            return
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}
        if path == "/v1/models":
            self.reply({"object": "list", "data": [model]})
        elif path == f"/v1/models/{MODEL}":
            self.reply(model)
        elif path == "/v1/batches":
            batches = sorted(server.batches.values(), key=lambda batch: -batch["created_at"])
            self.reply({"object": "list", "data": batches, "has_more": False})
        elif path.startswith("/v1/batches/") and (batch := server.batches.get(path.rpartition("/")[2])):
            server.work_on(batch)
            self.reply(batch)
        elif path.startswith("/v1/files/") and path.endswith("/content") and path.split("/")[3] in server.files:
            self.reply(server.files[path.split("/")[3]])
        else:
            self.refuse(404, "not_found", f"{path} does not exist")

    def do_POST(self):
        server, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if not raw or not self.allowed():  # a client that was killed sends headers and no body
            return
        if self.path == "/v1/files" and not server.refuse:
            kind = self.headers["Content-Type"].encode()
            form = email.message_from_bytes(b"Content-Type: " + kind + b"\r\n\r\n" + raw)
            parts = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                     for part in form.get_payload()}
            assert parts["purpose"].strip() == b"batch"
            name = f"file-{next(server.numbers)}"
            server.files[name] = parts["file"].decode()
            return self.reply({"id": name, "object": "file", "bytes": len(raw), "created_at": int(time.time()),
                               "filename": "questions.jsonl", "purpose": "batch", "status": "processed"})
        if server.refuse:
            return self.refuse(**server.refuse)
        body = json.loads(raw)
        if self.path == "/v1/batches":
            name = f"batch_{next(server.numbers)}"
            server.batches[name] = {
                "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
                "completion_window": body["completion_window"], "status": "in_progress", "polls": 0,
                "created_at": int(time.time())}
            if server.faults("batch reply") == "dropped" and len(server.batches) == 1:
                return self.drop()  # the batch exists, and the client does not know
            return self.reply(server.batches[name])
        if self.path != "/v1/chat/completions":
            return self.refuse(404, "not_found", f"{self.path} does not exist")
        if body["model"] != MODEL:
            return self.refuse(404, "model_not_found", f"The model {body['model']} does not exist")
        key, _ = read_question(body["messages"][-1]["content"])
        with server.lock:
            server.attempts[key] += 1
            server.times.append((key, time.monotonic()))
            fault = server.faults(key) if server.attempts[key] == 1 else None
        if fault == "too long":
            return self.refuse(400, "context_length_exceeded", "This model's maximum context length is 4096 tokens.")
        if fault == "rate limit":
            return self.refuse(429, "rate_limit_exceeded", "Slow down.", Retry_After="1")
        if fault == "server error":
            return self.refuse(500, "server_error", "The server had an error.")
        if fault == "dropped":
            return self.drop()
        if fault == "stall":
            time.sleep(server.stall)
            return self.drop()
        time.sleep(server.seconds)
        self.reply(server.complete(body))
        server.last_answer = time.monotonic()

    def drop(self):
        """Promise a body, send a part of it, hang up."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        with suppress(OSError):  # after a stall nobody listens any more
            self.end_headers()
            self.wfile.write(b'{"id": "chatcmpl-')
            self.wfile.flush()
        self.close_connection = True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=0, help="how long an answer takes")
    server = Server(**vars(parser.parse_args()))
    print(f"model {MODEL} at {server.url}")
    threading.Event().wait()
