"""Encode a text once, keep the latent, and ask about it many times.

The sender reads the text one time. Every question after that costs the receiver alone.
"""

import latentwire

TEXT = "Mara wants a cup of tea. Ben lives in Rome. Otto wants a silver ring."
QUESTIONS = ["What does Mara want?", "Where does Ben live?", "What does Otto want?"]

bridge = latentwire.Bridge.load("builtin")
(latent,) = bridge.encode([TEXT])
print(f"{latent.source_tokens} tokens became {latent.shape[0]} soft tokens in a message of {len(latent.data)} bytes")

prompts = [f"Question: {question}\nAnswer:" for question in QUESTIONS]
answers = bridge.generate([latent] * len(prompts), prompts)
for question, answer in zip(QUESTIONS, answers.texts, strict=True):
    print(f"{question} {answer.strip()}")
