"""wip"""
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from fastapi import FastAPI

from service.serving import Server
from tests.integration.service.conftest import READY_SECONDS, until

@contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """The application behind a real server and real sockets, on a thread; gives its port."""
    server = Server(app)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as bound:
        thread = Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            until(lambda: app.state.runtime.ready, READY_SECONDS)
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
