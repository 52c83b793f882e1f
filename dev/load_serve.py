"""A server under load, as its clients see it: many at once for minutes, some of which leave, read slowly or mean harm.

    python -m scripts.chat_web --port=8123 &
    python -m dev.load_serve --url=http://127.0.0.1:8123 --pid=$! --minutes=3

Clients of four kinds ask as fast as they are answered. Their prompts are short, but for a tenth that fill two thirds of the context:

* most read their answers (half of them streaming), and count what they get
* one in eight leaves in the middle of its answer
* one in eight reads a streamed answer slowly
* one means harm: wrong JSON of a megabyte, extreme settings, endless bodies, unfinished requests, many long answers at once

An answer is lost if it ends without a reason, or with an error. The waits for a first token are those of the short prompts of the first kind.
"""
import asyncio
import json
import random
import statistics
import sys
import time

import httpx
import psutil

from nanochat.cli import ArgumentParser, command, positive_float, positive_int


class Counts:
    def __init__(self):
        self.answers, self.left, self.harm, self.tokens = 0, 0, 0, 0
        self.lost: list[str] = []
        self.first: list[float] = []  # seconds
        self.health: list[float] = []


class Client:
    def __init__(self, http: httpx.AsyncClient, info: dict, counts: Counts, seed: int):
        self.http, self.info, self.counts, self.rng = http, info, counts, random.Random(seed)

    def body(self, **settings) -> tuple[dict, bool]:
        """A request, and whether its prompt is short."""
        short = self.rng.random() > 0.1
        length = self.rng.randint(5, 60) if short else self.info["context"] * 2 // 3
        prompt = [self.rng.randrange(256) for _ in range(length)]
        return {"model": self.info["model"], "prompt": prompt, "max_tokens": self.rng.randint(1, 120), **settings}, short

    async def read(self) -> None:
        if self.rng.random() < 0.5:
            body, _ = self.body(stop=["\0"])
            response = await self.http.post("/v1/completions", json=body)
            self.note(response.json()["choices"][0]["finish_reason"] if response.status_code == 200 else response.text)
            return
        await self.stream(*self.body(stream=True))

    async def stream(self, body: dict, short: bool, pause: float = 0, leave_after: int = 10**9) -> None:
        start, reason, pieces = time.perf_counter(), None, 0
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]" or not line:
                    continue
                if not line.startswith("data: "):
                    reason = line
                    break
                data = json.loads(line[6:])
                pieces += 1
                if pieces == 1 and short and not pause and leave_after == 10**9:
                    self.counts.first.append(time.perf_counter() - start)
                if pieces > leave_after:
                    self.counts.left += 1
                    return
                reason = data["choices"][0]["finish_reason"] if "choices" in data else line
                await asyncio.sleep(pause)
        self.note(reason)

    def note(self, reason: str | None) -> None:
        self.counts.answers += 1
        if reason not in ("stop", "length"):
            self.counts.lost.append(str(reason)[:200])

    async def leave(self) -> None:
        await self.stream(*self.body(stream=True, max_tokens=200), leave_after=self.rng.randint(1, 20))

    async def read_slowly(self) -> None:
        await self.stream(*self.body(stream=True, max_tokens=100), pause=0.1)

    async def harm(self) -> None:
        url, name, self.counts.harm = self.http.base_url, self.info["model"], self.counts.harm + 1

        async def endless():
            for _ in range(2000):
                yield b"a" * 2**15

        async def unfinished():
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n")
            await asyncio.sleep(1)
            writer.close()

        async def unread():
            _, writer = await asyncio.open_connection(url.host, url.port)
            body = json.dumps({"model": name, "prompt": "a", "max_tokens": 500, "n": 8, "stream": True}).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await asyncio.sleep(2)
            writer.transport.abort()
        post = lambda content: self.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        ask = lambda **settings: self.http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 50, **settings})
        acts = [lambda: post(b'{"model": "%s", "prompt": [' % name.encode() + b"{}," * 340_000 + b"{}]}"), lambda: post(b"[" * 2**20), lambda: post(endless()),
                lambda: ask(temperature=1e-40), lambda: ask(temperature=5e-324, top_p=0), lambda: ask(repetition_penalty=10, frequency_penalty=2),
                lambda: ask(n=16, prompt=[1] * (self.info["context"] - 100), max_tokens=-1), lambda: ask(stop=["x" * 200 + str(i) for i in range(1000)]),
                lambda: ask(logit_bias={str(i): 100 for i in range(200)}), unfinished, unread]
        try:
            await asyncio.wait_for(self.rng.choice(acts)(), self.rng.uniform(1, 20))
        except (httpx.HTTPError, OSError, asyncio.TimeoutError):
            pass


async def load(args) -> None:
    counts, until = Counts(), time.perf_counter() + 60 * args.minutes
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=args.url, timeout=300, limits=limits) as http:
        info = (await http.get("/info")).json()
        print(info)

        async def keep(act) -> None:
            while time.perf_counter() < until:
                await act()

        async def watch() -> None:
            process = psutil.Process(args.pid) if args.pid else None
            for seconds in range(10**9):
                if time.perf_counter() > until:
                    return
                start = time.perf_counter()
                await http.get("/health")
                counts.health.append(time.perf_counter() - start)
                if seconds % 15 == 0:
                    worker = (await http.get("/stats")).json()["workers"][0]
                    memory = f"{process.memory_info().rss / 2**20:.0f} MiB, {process.num_fds()} files" if process else ""
                    print(f"{seconds:4} s: {counts.answers} answers, {counts.left} left, {len(counts.lost)} lost, running {worker['running']}, "
                          f"waiting {worker['waiting']}; {memory}", flush=True)
                await asyncio.sleep(1)
        clients = [Client(http, info, counts, seed) for seed in range(args.clients)]
        kinds = lambda i, client: client.harm if i == 0 else client.leave if i % 8 == 1 else client.read_slowly if i % 8 == 2 else client.read
        await asyncio.gather(watch(), *(keep(kinds(i, client)) for i, client in enumerate(clients)))
        stats = {}
        for _ in range(60):
            stats = (await http.get("/stats")).json()["workers"][0]
            if not stats["running"] and not stats["waiting"]:
                break
            await asyncio.sleep(1)
    first, health = sorted(counts.first), sorted(counts.health)
    at = lambda values, share: values[min(len(values) - 1, int(share * len(values)))]
    print(f"{counts.answers} answers, {len(counts.lost)} lost; {counts.left} left, {counts.harm} times harm; at the end {stats}")
    print(f"first token of a short prompt: median {statistics.median(first):.3f} s, 95 % {at(first, 0.95):.3f} s, 99 % {at(first, 0.99):.3f} s, longest {first[-1]:.3f} s ({len(first)})")
    print(f"/health: median {statistics.median(health):.3f} s, longest {health[-1]:.3f} s")
    for reason in counts.lost[:10]:
        print(f"lost: {reason}")


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=positive_int, help="the server's process, whose memory is watched")
    parser.add_argument("--clients", type=positive_int, default=32)
    parser.add_argument("--minutes", type=positive_float, default=3)
    asyncio.run(load(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
