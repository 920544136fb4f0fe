"""Two models talk: one reads reports and sends latents, the other answers from what it was sent.

Only bytes pass between the two processes. The one that answers holds no sender and never sees a text.
"""

from multiprocessing import get_context
from multiprocessing.connection import Connection

import latentwire

REPORTS = ["Mara wants a cup of tea.", "Ben lives in Rome. Mara lives in Oslo.", "Otto sings."]
QUESTIONS = ["What does Mara want?", "Where does Mara live?", "What does Otto do?"]


def read_and_send(out: Connection) -> None:
    """The reader: a text becomes a message."""
    bridge = latentwire.Bridge.load("builtin")
    for report in REPORTS:
        (latent,) = bridge.encode([report])
        out.send_bytes(latent.data)
    out.close()


def receive_and_answer(messages: Connection) -> None:
    """The answerer: a message and a question become an answer."""
    bridge = latentwire.Bridge.load("builtin")
    for question in QUESTIONS:
        message = messages.recv_bytes()
        answers = bridge.generate(message, f"Question: {question}\nAnswer:")
        print(f"{len(message)} bytes. {question} {answers.texts[0].strip()}")


if __name__ == "__main__":
    context = get_context("spawn")
    incoming, outgoing = context.Pipe(duplex=False)
    reader = context.Process(target=read_and_send, args=(outgoing,))
    reader.start()
    receive_and_answer(incoming)
    reader.join()
