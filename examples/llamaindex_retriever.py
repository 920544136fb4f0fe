"""Retrieve with LlamaIndex, answer from latents: a node carries the id of its latent, and no receiver reads a text.

Start a service first: ``latentwire serve``. Needs ``pip install llama-index-core llama-index-retrievers-bm25``.
"""

from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from latentwire import Client

DOCUMENTS = [
    "Mara wants a cup of tea. Mara lives in Oslo.",
    "Ben lives in Rome. Ben is a pilot.",
    "Otto wants a silver ring.",
]
QUESTIONS = ["Where does Mara live?", "Where does Ben live?", "What does Otto want?"]


class LatentQueryEngine(CustomQueryEngine):
    """Answers from the latent of each node that the retriever finds."""

    retriever: BaseRetriever
    client: Client

    def custom_query(self, query_str: str) -> Response:
        nodes = self.retriever.retrieve(query_str)
        latents = [{"latent_id": found.metadata["latent_id"]} for found in nodes]
        answers = self.client.generate(latents, f"Question: {query_str}\nAnswer:")
        return Response("\n".join(text.strip() for text in answers.texts), source_nodes=nodes)


with Client() as client:
    kept = client.keep(DOCUMENTS)
    nodes = [
        TextNode(text=text, metadata={"latent_id": latent.id}, excluded_embed_metadata_keys=["latent_id"])
        for text, latent in zip(DOCUMENTS, kept, strict=True)
    ]
    engine = LatentQueryEngine(retriever=BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=1), client=client)
    for question in QUESTIONS:
        print(question, engine.query(question))
