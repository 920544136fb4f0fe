"""Texts are read on several threads at once, with one tokenizer."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer

from latentwire.bridge import reader
from latentwire.bridge.models import load_reader
from latentwire.bridge.reader import ids_of_texts, text_ids

FAMILY = "👨‍👩‍👧‍👦"


@pytest.mark.parametrize("name", ["builtin:llama", "builtin:neox"])
def test_threads_that_read_with_one_tokenizer_do_not_meet(name: str) -> None:
    """Though somebody else uses it the library's way, which sets it anew at every call: Already borrowed."""
    lm, texts = load_reader(name), [FAMILY * 300, "_" * 9000, "Mara wants tea. " * 500]
    wanted, over = ids_of_texts(lm, texts), threading.Event()

    def read(times: int) -> list[list[list[int]]]:
        return [ids_of_texts(lm, texts) for _ in range(times)]

    def set_anew() -> None:
        while not over.is_set():
            lm.tokenizer("<s> a", truncation=True, max_length=3)
            lm.tokenizer("<s> a")

    with ThreadPoolExecutor() as threads:
        other = threads.submit(set_anew)
        try:
            read_ = [threads.submit(read, 20) for _ in range(2)]
            assert all(ids == wanted for reading in read_ for ids in reading.result())
        finally:
            over.set()
        other.result()


class Watched:
    """A tokenizer that says when it reads."""

    def __init__(self, real: Tokenizer) -> None:
        self._real, self.began, self.ended = real, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        def watched(*given: Any, **named: Any) -> Any:
            self.began.set()
            try:
                return getattr(self._real, name)(*given, **named)
            finally:
                self.ended.set()

        return watched


def test_other_threads_run_while_a_long_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, turns = load_reader("builtin:llama"), 0
    plain = reader._plain(lm.tokenizer)
    assert plain is not None
    watched = Watched(plain)
    monkeypatch.setattr(reader, "_plain", lambda _: watched)
    reading = threading.Thread(target=text_ids, args=(lm, FAMILY * 40_000))
    reading.start()
    watched.began.wait()
    while not watched.ended.is_set():
        time.sleep(0.001)
        turns += 1
    reading.join()
    assert turns > 20
