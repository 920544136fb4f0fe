"""Ask a kept document through LangChain: the sender reads it once, every question takes its latent by the id.

Start a service first: ``latentwire serve``. Needs ``pip install langchain-openai``.
"""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

import latentwire

DOCUMENT = "Mara wants a cup of tea. Ben lives in Rome. Otto wants a silver ring."
QUESTIONS = ["What does Mara want?", "Where does Ben live?"]

url = os.environ.get("LATENTWIRE_URL", "http://127.0.0.1:8000")
with latentwire.Client(url) as client:
    bridge = client.bridges()[0].name
    (document,) = client.keep(DOCUMENT, bridge=bridge)

model = ChatOpenAI(
    base_url=f"{url}/v1",
    api_key=SecretStr(os.environ.get("LATENTWIRE_API_KEY", "unused")),
    model=bridge,
    temperature=0,
    extra_body={"latent_id": document.id},
)
chain = PromptTemplate.from_template("Question: {question}\nAnswer:") | model | StrOutputParser()

for question, answer in zip(QUESTIONS, chain.batch([{"question": each} for each in QUESTIONS]), strict=True):
    print(question, answer.strip())
for piece in chain.stream({"question": "What does Otto want?"}):
    print(piece, end="", flush=True)
print()
