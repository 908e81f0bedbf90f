"""Stand-in for vLLM's server: real HTTP, the real one's paths, refusals and metrics.

Every answer is its prompt's length in words.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fake_road
import prometheus_client as prometheus

ARGS = KEY = None
GAUGES = {
    name: prometheus.Gauge(f"vllm:{name}", name, ["engine"])
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
}
COUNTED = (
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
)
COUNTERS = {name: prometheus.Counter(f"vllm:{name}", name, ["engine"]) for name in COUNTED}
TIMED = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
)
HISTOGRAMS = {name: prometheus.Histogram(f"vllm:{name}", name, ["engine"]) for name in TIMED}
METRICS = {name: metric.labels("0") for name, metric in (GAUGES | COUNTERS | HISTOGRAMS).items()}


def names() -> dict[str, str | None]:
    """Every model that may be asked for, and the base of an adapter."""
    served = ARGS.served_model_name or [ARGS.model]
    return dict.fromkeys(served) | {
        module.partition("=")[0]: served[0] for module in ARGS.lora_modules
    }


def fitting(schema: dict):
    """The least that a JSON schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "object":
        return {name: fitting(part) for name, part in schema["properties"].items()}
    return {"string": "a", "integer": 1, "number": 1.0, "boolean": True, "array": []}[
        schema["type"]
    ]


def pooled(body: dict) -> dict:
    """What a server with --runner pooling answers: vectors of inputs, or scores of documents."""
    if "documents" in body:
        scores = [
            {"index": place, "relevance_score": 1 / (place + 1)}
            for place in range(len(body["documents"]))
        ]
        return {"results": scores}
    read = sum(len(text.split()) for text in body["input"])
    vectors = [
        {"object": "embedding", "index": place, "embedding": [1.0, float(place)]}
        for place in range(len(body["input"]))
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "model": body["model"], "data": vectors, "usage": usage}


class Server(ThreadingHTTPServer):
    request_queue_size = 1024


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, content, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(
            content
            if isinstance(content, bytes)
            else json.dumps(content, separators=(",", ":")).encode()
        )

    def refuse(self, status: int, message: str) -> None:
        with (fake_road.MEET / "refused").open("a") as file:
            file.write(f"{status} {message}\n")
        self.send({"error": {"message": message, "type": "Error", "code": status}}, status)

    def allowed(self) -> bool:
        """As vLLM 0.26: the key guards /v1, /v2 and /inference, and nothing else."""
        if (
            not KEY
            or not self.path.startswith(("/v1", "/v2", "/inference"))
            or self.headers.get("Authorization") == f"Bearer {KEY}"
        ):
            return True
        self.send({"error": "Unauthorized"}, 401)
        return False

    def do_GET(self):
        if not self.allowed():
            return
        if self.path in ("/health", "/ping", "/version", "/load", "/docs"):
            self.send({"version": "0.26.0"} if self.path == "/version" else b"")
        elif self.path == "/metrics":
            self.send(prometheus.generate_latest(), kind=prometheus.CONTENT_TYPE_LATEST)
        elif self.path == "/v1/models":
            card = {
                "object": "model",
                "owned_by": "vllm",
                "created": 0,
                "root": ARGS.model,
                "max_model_len": ARGS.max_model_len,
            }
            self.send(
                {
                    "object": "list",
                    "data": [
                        card | {"id": name, "parent": parent} for name, parent in names().items()
                    ],
                }
            )
        else:
            self.refuse(404, f"there is no path {self.path}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        chat = "messages" in body
        if not self.allowed():
            return
        if ARGS.runner == "pooling" and self.path in ("/v1/embeddings", "/v1/rerank"):
            self.send(pooled(body))
            return
        if ARGS.runner == "pooling" or self.path not in (
            "/v1/chat/completions",
            "/v1/completions",
            "/invocations",
            "/tokenize",
            "/detokenize",
        ):
            self.refuse(404, f"there is no path {self.path}")
            return
        model = body.get("model") or next(iter(names()))
        if model not in names():
            self.refuse(404, f"The model `{model}` does not exist.")
            return
        prompt = body.get(
            "prompt", " ".join(str(m.get("content")) for m in body.get("messages", []))
        )
        read = len(prompt if isinstance(prompt, list) else prompt.split())
        wanted = body.get("max_tokens") or 16
        if read + wanted > ARGS.max_model_len:
            message = (
                f"This model's maximum context length is {ARGS.max_model_len} tokens. "
                f"However, you requested {wanted} output tokens and your prompt contains {read}."
            )
            self.send({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)
            return
        METRICS["num_requests_running"].inc()
        METRICS["kv_cache_usage_perc"].inc(0.001)
        try:
            self.answer(body, model, chat, read, wanted)
        except OSError:  # the client has hung up
            pass
        finally:
            METRICS["num_requests_running"].dec()
            METRICS["kv_cache_usage_perc"].set(0.001 * METRICS["num_requests_running"]._value.get())

    def answer(self, body: dict, model: str, chat: bool, read: int, wanted: int) -> None:
        usage = {"prompt_tokens": read, "completion_tokens": wanted, "total_tokens": read + wanted}
        whole = {
            "id": "cmpl-0",
            "created": 0,
            "model": model,
            "object": "chat.completion" if chat else "text_completion",
        }
        for name, count in (
            ("prompt_tokens", read),
            ("prefix_cache_queries", read),
            ("generation_tokens", wanted),
            ("request_success", 1),
        ):
            METRICS[name].inc(count)
        for name in TIMED:
            METRICS[name].observe(0.01)
        if body.get("stream"):
            self.send(b"", kind="text/event-stream")
            for i in range(wanted):
                piece = {"delta": {"content": f"{read} "}} if chat else {"text": f"{read} "}
                ending = {"index": 0, "finish_reason": "length" if i + 1 == wanted else None}
                self.event(
                    whole
                    | {"object": whole["object"] + ".chunk" * chat, "choices": [piece | ending]}
                )
            if body.get("stream_options", {}).get("include_usage"):
                self.event(whole | {"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        time.sleep(0.01 * wanted)
        text, calls = f"{read} " * wanted, []
        if form := body.get("response_format", {}).get("json_schema"):
            text = json.dumps(fitting(form["schema"]))
        if body.get("tools") and body.get("tool_choice") == "required":
            function = body["tools"][0]["function"]
            calls = [
                {
                    "id": "call-0",
                    "type": "function",
                    "function": {
                        "name": function["name"],
                        "arguments": json.dumps(fitting(function["parameters"])),
                    },
                }
            ]
        message = (
            {"message": {"role": "assistant", "content": text, "tool_calls": calls}}
            if chat
            else {"text": text}
        )
        self.send(
            whole | {"choices": [message | {"index": 0, "finish_reason": "length"}], "usage": usage}
        )

    def event(self, content: dict) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())


def serve(host: str, port: int, handler=Handler) -> None:
    threading.stack_size(1 << 18)  # a thread a connection
    Server((host, port), handler).serve_forever()


if __name__ == "__main__":
    ARGS = fake_road.engine_args("vllm serve", sys.argv[1:])
    KEY = ARGS.api_key or os.environ.get("VLLM_API_KEY")
    fake_road.take_cards(ARGS.tensor_parallel_size * ARGS.pipeline_parallel_size)
    serve(ARGS.host or "0.0.0.0", ARGS.port)
