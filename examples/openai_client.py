"""Call a bridge from OpenAI's client: the bridge is the model, and the source comes beside the prompt.

Start a service first: ``latentwire serve``. Needs ``pip install openai``.
"""

import os

from openai import OpenAI

SOURCE = "Mara wants a cup of tea. Ben lives in Rome."
QUESTION = "Question: Where does Ben live?\nAnswer:"

url = os.environ.get("LATENTWIRE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("LATENTWIRE_API_KEY", "unused"))
model = client.models.list().data[0].id

completion = client.completions.create(model=model, prompt=QUESTION, temperature=0, extra_body={"source": SOURCE})
print(completion.choices[0].text.strip())

content = [{"type": "source", "text": SOURCE}, {"type": "text", "text": QUESTION}]
for chunk in client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": content}], temperature=0, stream=True
):
    print(chunk.choices[0].delta.content or "", end="")
print()
