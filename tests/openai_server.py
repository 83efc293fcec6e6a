"""An OpenAI-compatible server for the tests: models, chat completions under a JSON schema, misbehaviour on purpose.

It does what a constrained model does: it fills in the keys that the schema requires, one sub-goal for three actions.
The faults are chosen by a function of the trajectory (its task's text), so that a restarted client meets the same.
"""

import json
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "teacher-1"
BEFORE_THE_ANSWER = ["rate limit", "server error", "dropped", "stall"]  # nothing is paid, the client asks again itself
UNREADABLE = ["truncated", "ignored", "nothing", "no completion"]  # paid, and of no use
REFUSALS = {
    "too long": (400, "context_length_exceeded", "This model's maximum context length is 4096 tokens."),
    "rate limit": (429, "rate_limit_exceeded", "Slow down."),
    "server error": (500, "server_error", "The server had an error."),
    "no quota": (429, "insufficient_quota", "You exceeded your current quota."),
    "echo": (400, "bad_request", "Cannot work for {key}"),
}


class Server(ThreadingHTTPServer):
    """`faults` maps a trajectory's task to the fault of its first answer; `seconds` is how long an answer takes."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, faults=lambda task: None, seconds: float = 0.0, key: str = "",
                 tokens: tuple[int, int] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.seconds, self.key, self.tokens = faults, seconds, key, tokens
        self.always = None  # a fault of every answer
        self.lock = threading.Lock()
        self.paid = Counter()  # completions that were sent, by task
        self.times, self.last_answer = [], 0.0  # (task, when) of each question; when the last answer went
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.shutdown()
        self.server_close()


def completion(body: dict, fault: str | None, server: Server) -> dict:
    """The completion for a request, and with a fault one that no sub-goals can be read from."""
    names = body["response_format"]["json_schema"]["schema"]["required"]
    text = json.dumps({name: f"step_of_three({i // 3 + 1})" for i, name in enumerate(names)})
    if fault == "no completion":
        return {"detail": "I am a teapot"}
    if fault == "ignored":
        text = "Certainly! 1- navigate_to(kitchen): {'go to kitchen'}"
    if fault == "nothing":
        text = None
    if fault == "tell the key":
        text = f"Your key is {server.key}."
    if fault == "truncated":
        text = text[: int(len(text) * 0.6)]
    read, written = server.tokens or (len(json.dumps(body["messages"])) // 4, len(text or "") // 4)
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time()), "model": body["model"],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
            "choices": [{"index": 0, "finish_reason": "length" if fault == "truncated" else "stop",
                         "message": {"role": "assistant", "content": text}}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body: dict, status: int = 200, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
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
        if not self.allowed():
            return
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}
        answers = {"/v1/models": {"object": "list", "data": [model]}, f"/v1/models/{MODEL}": model}
        if self.path in answers:
            self.reply(answers[self.path])
        else:
            self.refuse(404, "not_found", f"{self.path} does not exist")

    def do_POST(self):
        server, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if not raw or not self.allowed():  # a client that was killed sends headers and no body
            return
        body = json.loads(raw)
        task = re.search("^Task: (.*)$", body["messages"][-1]["content"], re.M)[1]
        with server.lock:
            first = task not in [asked for asked, _ in server.times]
            server.times.append((task, time.monotonic()))
        fault = server.always or (server.faults(task) if first else None)
        if fault in REFUSALS:
            status, code, message = REFUSALS[fault]
            wait = {"Retry-After": "1"} if fault == "rate limit" else {}
            return self.refuse(status, code, message.format(key=server.key), **wait)
        if fault in ("dropped", "stall"):
            time.sleep(5 if fault == "stall" else 0)
            return self.drop()
        time.sleep(server.seconds)
        with server.lock:
            server.paid[task] += 1
        self.reply(completion(body, fault, server))
        server.last_answer = time.monotonic()

    def drop(self):
        """Promise a body, send a part of it, hang up."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        with suppress(OSError):  # after a stall nobody listens any more
            self.end_headers()
            self.wfile.write(b'{"id": "chatcmpl-')
        self.close_connection = True
