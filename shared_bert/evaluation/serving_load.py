"""Servers of completions on this machine, and how they do under the load of several clients."""

import contextlib
import itertools
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .tables import markdown_table

START_SECONDS = 300
TEXT = "the fox hunts while the dog barks at an owl that sees a cat and a hen"


@contextlib.contextmanager
def served(command: list[str], log: Path) -> Iterator[str]:
    """Start a server by a command that takes --host and --port; give its address, and stop it in the end.

    Args:
        log: a file for what it prints.

    Raises:
        RuntimeError: it ends, or does not answer /health within five minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output
        )
    try:
        for _ in range(START_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(1)
                raise RuntimeError(f"the server ended with {status}:\n{log.read_text()[-3000:]}")
            if _is_healthy(url):
                break
        else:
            raise RuntimeError(f"the server does not answer:\n{log.read_text()[-3000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def load_test(
    url: str, model: str, clients: int = 8, requests: int = 300, prompt_words: int = 32, new_tokens: int = 16
) -> dict[str, Any]:
    """Ask an OpenAI-compatible server for completions, each client for one at a time, and return how it went.

    Args:
        url: of the server, without "/v1".
        model: its name on the server.
        requests: of all clients together. Prompts differ from their first word on, so that none is in a cache.

    Returns:
        The settings; how many requests were `lost` (an error, or no answer in two minutes); the median and the 95th
        percentile of the seconds to an answer; and the generated tokens per second of all clients together.

    Raises:
        ImportError: without the extra serving.
        ValueError: the first request is lost.
    """
    try:
        import openai
    except ImportError as error:
        raise ImportError("a load test needs openai: pip install 'shared_bert[serving]'") from error
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    words = " ".join(itertools.islice(itertools.cycle(TEXT.split()), prompt_words))

    def ask(number: int) -> tuple[float, int]:
        start = time.perf_counter()
        answer = client.completions.create(
            model=model, prompt=f"{number} {words}", max_tokens=new_tokens, temperature=0
        )
        return time.perf_counter() - start, answer.usage.completion_tokens

    def ask_or_lose(number: int) -> tuple[float, int] | None:
        with contextlib.suppress(openai.OpenAIError):
            return ask(number)

    try:
        ask(0)
    except openai.OpenAIError as error:
        raise ValueError(f"the server at {url} gives no completion of the model {model}: {error}") from error
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for answer in pool.map(ask_or_lose, range(1, requests + 1)) if answer is not None]
    seconds = time.perf_counter() - start
    # None, if all are lost
    median, slow = np.quantile([latency for latency, _ in answers], [0.5, 0.95]).tolist() if answers else (None, None)
    return {
        "clients": clients,
        "requests": requests,
        "prompt_words": prompt_words,
        "new_tokens": new_tokens,
        "lost": requests - len(answers),
        "seconds_median": median,
        "seconds_95th": slow,
        "tokens_per_second": sum(tokens for _, tokens in answers) / seconds,
    }


def load_table(rows: list[dict]) -> str:
    """Return results of `load_test`, each with the `server` and the `model`, as a Markdown table."""
    header = ["server", "model", "requests", "lost", "median", "95th percentile", "tokens a second"]
    lines = []
    for row in rows:
        cells = [row["server"], f"`{row['model']}`", str(row["requests"]), str(row["lost"])]
        times = (row["seconds_median"], row["seconds_95th"])
        cells += [*("–" if time is None else f"{time:.2f} s" for time in times), f"{row['tokens_per_second']:,.0f}"]
        lines.append(cells)
    return markdown_table(header, lines)
